"""The harness itself: failures become rows, results give nothing away, and accuracy.py finds what is wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import accuracy, exact, measure, peers, record, report, run

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")


# ---------------------------------------------------------------- cells


@LINUX
def test_a_refused_allocation_is_a_row() -> None:
    """The (4096, 4096) float32 logits are 64 MiB: they do not fit into 48, and fastnce does."""
    cell = measure.Cell("memory", "nt_xent", 4096, 16, ("eager",), mem_limit=48)
    (dense,) = measure.run(cell, timeout=120)
    assert dense["status"] == "oom"
    (ours,) = measure.run(measure.Cell("memory", "nt_xent", 4096, 16, (peers.OURS,), mem_limit=48), timeout=120)
    assert ours["status"] == "ok"
    assert 0 < ours["peak_mib"] < 48


def test_a_wanted_peer_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> peers.Contestant:
        raise ModuleNotFoundError("No module named 'lightly'")

    monkeypatch.setitem(peers.FACTORIES["nt_xent"], "lightly", missing)
    assert "lightly" not in peers.contestants("nt_xent")
    with pytest.raises(SystemExit, match="No module named 'lightly'; install it, or leave it out of --peers"):
        run.main(["--losses=nt_xent", "--peers=lightly", "--dry-run"])


def test_a_crash_and_a_timeout_are_rows() -> None:
    (row,) = measure.run(measure.Cell("time", "nt_xent", 8, 4, ("nobody",)), timeout=120)
    assert (row["status"], row["detail"]) == ("crash", "KeyError: 'nobody'")
    rows = measure.run(measure.Cell("time", "nt_xent", 8, 4, ("eager", peers.OURS)), timeout=0.01)
    assert [(row["contestant"], row["status"]) for row in rows] == [("eager", "timeout"), (peers.OURS, "timeout")]


def test_times_of_one_process_come_with_their_ratios() -> None:
    rows = measure.measure_time(measure.Cell("time", "clip", 32, 8, (peers.OURS, "eager", "careful"), repeats=3))
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[0]["cpu_ratio"] == rows[0]["wall_ratio"] == 1
    for row in rows:
        assert 0 < row["wall_ms"]["min"] <= row["wall_ms"]["median"]
        assert row["loss_value"] == pytest.approx(rows[0]["loss_value"], rel=5e-6)
        assert row["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=2e-5)


# ---------------------------------------------------------------- results


def test_a_result_names_neither_host_nor_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--losses=nt_xent", "--n=32", "--d=4", "--repeats=1", "--mode=time", "--peers=eager"]
    run.main([*arguments, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/*.json")
    text = path.read_text() + path.with_suffix(".md").read_text()
    assert path.with_suffix(".md").read_text() == report.render(json.loads(path.read_text()))
    assert capsys.readouterr().out.strip() == path.with_suffix(".md").read_text().strip()
    for secret in (str(tmp_path), str(record.ROOT), str(Path.home())):
        assert secret not in text
    assert socket.gethostname() not in text.split()
    assert json.loads(path.read_text())["env"]["command"].startswith("python bench/run.py --losses=nt_xent --n=32")


def test_a_later_result_never_replaces_an_earlier_one(tmp_path: Path) -> None:
    result = {"env": {"time": "2026-01-02T03:04:05Z", "sources": "0123456789abcdef"}}
    first, second = (record.save(result, "", tmp_path) for _ in range(2))
    assert (first.name, second.name) == ("2026-01-02-01234567.json", "2026-01-02-01234567-2.json")


def test_the_digest_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "fastnce").mkdir()
    source = tmp_path / "fastnce" / "a.py"
    found = []
    for text in ("1", "2"):
        source.write_text(text)
        found.append(record.digest())
    (tmp_path / "fastnce" / "a.pyc").write_text("compiled")
    found.append(record.digest())
    source.rename(tmp_path / "fastnce" / "b.py")
    found.append(record.digest())
    assert found[1] == found[2]
    assert len(set(found)) == 3


def test_the_report_shows_what_did_not_run() -> None:
    env = {"cpu": "C", "vector": "V", "threads": 1, "time": "T", "fastnce": "0", "sources": "d" * 64, "torch": "2"}
    env |= {"python": "3", "peers": {}, "load": [0.0], "allocator": {}, "command": "c"}
    problem = {"mode": "memory", "loss": "clip", "n": 1024, "d": 8, "dtype": "float32"}
    rows = [
        {**problem, "contestant": "fastnce", "status": "ok", "peak_mib": 4.0},
        {**problem, "contestant": "eager", "status": "oom"},
        {**problem, "contestant": "careful", "status": "ok", "peak_mib": 10.0},
        {**problem, "contestant": "lightly", "status": "timeout"},
    ]
    assert "| 1,024 | 8 | 4 | OOM | 10 (2.5×) | timeout |" in report.render({"env": env, "rows": rows})


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("regime", exact.REGIMES)
@pytest.mark.parametrize("loss", accuracy.LOSSES)
def test_the_exact_answer_is_that_of_dense_float64(loss: str, regime: str) -> None:
    """Where the dense form is well conditioned, autograd through it confirms the analytic reference."""
    cell = accuracy.Cell(loss, torch.float64, regime, 24, 0.5)
    sides, parameter = accuracy.inputs(cell, 34)
    true, sizes = exact.exact(exact.Cosines.of(loss, sides), 2.0)
    dense = accuracy.answer(accuracy.dense(loss), sides, parameter, loss == "nt_xent", 1.0)
    for name, error in accuracy.errors(dense, true, sizes).items():
        assert error.max() < 1e-12 * (sizes.scale / abs(true.scale) if name == "scale" else 1), name


def test_the_exact_answer_holds_at_tiny_losses() -> None:
    """Two negatives at cosine 0, the positive at 1: log(1 + 2 exp(-scale)), where dense float64 has 0."""
    z = torch.eye(2, dtype=torch.float64).repeat(2, 1)
    true, _ = exact.exact(exact.Cosines.of("nt_xent", [z]), np.longdouble(100))
    assert true.loss == pytest.approx(2 * np.exp(-100), rel=1e-13)
    assert true.scale == pytest.approx(-2 * np.exp(-100), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [None, "loss", "gradient"])
def test_accuracy_finds_a_planted_error(wrong: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of fastnce the dense loss in float64: as it is, with a loss 1e-4 too large, with 2 % less gradient."""
    loss_of = accuracy.dense("clip")

    def planted(sides: list[Tensor], parameter: Tensor, reduction: str) -> Tensor:
        wide = [side.double() for side in sides]
        if wrong == "gradient":
            wide[0] = 0.98 * wide[0] + 0.02 * wide[0].detach()
        value = loss_of(wide, parameter.double(), reduction)
        return value + 1e-4 if wrong == "loss" else value

    monkeypatch.setattr(accuracy, "fused", lambda loss, backend: planted)
    cell = accuracy.Cell("clip", dtype, "random", 24, 0.1)
    sides, parameter = accuracy.inputs(cell, 66)
    verdicts = accuracy.judge(cell, sides, parameter, exact.Cosines.of("clip", sides), "cpu")
    outside = {name for name, verdict in verdicts.items() if not verdict.used <= 1}
    assert outside == ({wrong} if wrong != "loss" else {"loss", "row"}) - {None}
