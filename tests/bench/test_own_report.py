"""A report of one's own results touches nothing but its --out, and measuring touches nothing of a checkout."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from made_up import environment, measured, record, recorded
from test_page import contents, copied

from bench import __main__ as command
from bench import page

pytest.importorskip("matplotlib")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with pages, results and figures that were drawn of others; the current folder is elsewhere."""
    root = copied(tmp_path / "checkout")
    monkeypatch.setattr(page, "ROOT", root)
    monkeypatch.setattr(page.record, "RESULTS", recorded(root / "bench" / "results"))
    (root / "docs" / "figures").mkdir()
    (root / "docs" / "figures" / "old.svg").write_text(f"sha256 {'0' * 64} (matplotlib 1, Pillow 2, x)")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert page.main(["--check"]) == 1  # README, docs and figures would be written
    return root


@pytest.mark.parametrize("options", [[], ["--out", "here", "--plot"]], ids=" ".join)
def test_a_report_of_ones_own_results_touches_nothing_but_its_out(
    checkout: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"d": 32} for row in measured("sup_con")]
    mine = record(checkout.parent / "mine", "my-cpu/2026-03-04-e.json", rows, environment(cpu="MINE")).parents[1]
    before, there = contents(checkout), contents(mine)
    capsys.readouterr()
    assert page.main(["--results", str(mine), *options]) == 0
    assert contents(checkout) == before and contents(mine) == there
    out = Path("here" if "--out" in options else "fastnce-report")
    figures_of = {"my-cpu-sup_con-d32.svg"} if "--plot" in options else set()
    assert {path.relative_to(".") for path in Path().rglob("*") if path.is_file()} == {out / name for name in {"report.md", *figures_of}}
    assert capsys.readouterr().out.split() == [str(out / "report.md"), *(str(out / name) for name in sorted(figures_of, reverse=True))]
    text = (out / "report.md").read_text()
    assert "MINE" in text and "| 1,024 | 32 |" in text
    assert set(re.findall(r"my-cpu-sup_con-d32\.\w+", text)) == figures_of


def test_a_page_of_the_recorded_results_changes_no_page(checkout: Path) -> None:
    before = contents(checkout)
    assert page.main(["--out", "here"]) == 0
    assert contents(checkout) == before
    assert {path.name for path in Path("here").iterdir()} == {"report.md"}
    assert "198 of 200 cells are inside the contract" in Path("here/report.md").read_text()


def test_a_plot_of_too_little_says_so(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(checkout.parent / "mine", "my-cpu/a.json", [row for row in measured("clip") if row["n"] == 1024], environment())
    assert page.main(["--results", "../mine", "--plot"]) == 0
    assert "no figure: it takes times and memory of fastnce and eager at two N or more" in capsys.readouterr().err
    assert [path.name for path in Path("fastnce-report").iterdir()] == ["report.md"]


@pytest.mark.parametrize(
    "options", ["--check --results ../mine", "--check --plot", "--check --out a", "--root . --out a", "--root . --plot"]
)
def test_options_that_contradict_each_other(checkout: Path, options: str) -> None:
    record(checkout.parent / "mine", "my-cpu/a.json", measured("clip"), environment())
    before = contents(checkout)
    with pytest.raises(SystemExit) as stopped:
        page.main(options.split())
    assert stopped.value.code == 2 and contents(checkout) == before and list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 100_000, '{"schema": 2}', '{"schema": 2, "rows": [], "env": {"time": 1}}', "\x80"],
    ids=range(8),
)
def test_a_damaged_result_is_named(content: str, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "bench/results/a-cpu/broken.json").write_bytes(content.encode("latin1"))
    before = contents(checkout)
    with pytest.raises(SystemExit) as stopped:
        page.main([])
    assert stopped.value.code == 2 and contents(checkout) == before
    assert re.search(r"--results: .*broken\.json is (damaged or )?no result", capsys.readouterr().err)


def test_a_folder_that_is_not_there_is_an_error(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        page.main(["--results", "nowhere"])
    assert stopped.value.code == 2 and "no such folder" in capsys.readouterr().err


def test_what_measures_writes_into_the_current_folder() -> None:
    """Measuring on a machine of one's own records nothing in the checkout unless that is asked for."""
    for name in ("time", "memory", "accuracy"):
        shown = io.StringIO()
        with pytest.raises(SystemExit), contextlib.redirect_stdout(shown):
            command.main([name, "--help"])
        assert "default: fastnce-bench" in " ".join(shown.getvalue().split())
