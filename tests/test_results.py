"""Recorded runs: their tables in the documentation, and what they say of themselves."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from train_ref import results

IMAGES = {
    "data": {"described": "cifar10: 20 training images", "files": {"c.npz": "1f"}},
    "config": {
        "preset": "cifar10-gpu",
        "learning_rate": 0.12,
        "temperatures": {"simclr": 0.5, "moco": 0.1},
        "backend": None,
        "seeds": [0, 1],
    },
    "versions": {"torch": "2.13.0"},
    "seconds": 12.3,
    "cpu_seconds": 10.6,
    "summary": [
        {"row": "raw pixels", "knn_20": {"mean": 0.5, "sd": None}},
        {"row": "SimCLR, fused", "knn_20": {"mean": 0.61234, "sd": 0.0071}, "linear": {"mean": 0.7, "sd": 0.0}},
    ],
}
CLIP = {
    "data": {"described": "digits: 20 training images"},
    "config": {"preset": "digits", "loss": "fused", "seeds": [0]},
    "versions": {"torch": "2.13.0"},
    "seconds": 1,
    "cpu_seconds": 1,
    "summary": [{"row": "CLIP, fused", "left_to_right_r1": {"mean": 0.25, "sd": None}, "new": {"mean": 0.2, "sd": None}}],
}
EXPECTED = """before
<!-- results:begin (generated) -->

### digits-clip

digits: 20 training images. In %, mean ± standard deviation; seeds 0.

| | l→r R@1 | new |
|---|--:|--:|
| CLIP, fused | 25.0 | 20.0 |

preset digits; loss fused; torch 2.13.0; 1 CPU s, 1 s for all of it.

### images

cifar10: 20 training images. In %, mean ± standard deviation; seeds 0, 1.

| | kNN-20 | linear probe |
|---|--:|--:|
| raw pixels | 50.0 |  |
| SimCLR, fused | 61.2 ± 0.7 | 70.0 ± 0.0 |

preset cifar10-gpu; learning rate 0.12; temperatures simclr 0.5, moco 0.1; c.npz sha256 1f; torch 2.13.0; 11 CPU s, 12 s for all of it.

<!-- results:end -->
after
"""


def test_recorded_runs_become_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, result in (("images", IMAGES), ("digits-clip", CLIP), ("no-run", {"schema": 1})):
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n", encoding="utf-8")
    assert results.main(["--check"], page, tmp_path) == 1
    assert "page.md is not what" in capsys.readouterr().err
    assert "old" in page.read_text(encoding="utf-8")
    assert results.main([], page, tmp_path) == 0
    assert page.read_text(encoding="utf-8") == EXPECTED
    assert results.main(["--check"], page, tmp_path) == 0
    with pytest.raises(ValueError, match="once each and in this order"):
        results.render(f"{results.END} {results.BEGIN}", tmp_path)


def test_the_page_says_what_the_recorded_runs_say() -> None:
    assert results.main(["--check"]) == 0


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_recorded_runs_name_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<!\w)[/~]\w|[A-Z]:\\", text), "an absolute path"
    assert os.uname().nodename not in text


def test_something_is_recorded() -> None:
    assert len(sorted(results.RESULTS.glob("*.json"))) >= 2


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_summaries_are_those_of_their_runs(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert len(result["config"]["seeds"]) == 3
    trained = result["summary"][2:]
    assert len(trained) == len(result["config"]["methods"])
    for row, method in zip(trained, result["config"]["methods"], strict=True):
        runs = [run for run in result["runs"] if run["method"] == method]
        assert [run["seed"] for run in runs] == result["config"]["seeds"]
        for metric in runs[0]["accuracies"]:
            values = [run["accuracies"][metric] for run in runs]
            assert row[metric] == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})
    # All methods of a seed saw the same batches in the same order.
    for seed in result["config"]["seeds"]:
        assert len({run["order_sha256"] for run in result["runs"] if run["seed"] == seed}) == 1
