"""Bars, and the page of what no run on a GPU has shown."""

from __future__ import annotations

from pathlib import Path

from bench import peers, record
from bench.gpu import bars, check, steps
from bench.gpu import part as gpu_part
from bench.record import Recorded, Row


def test_a_step_is_compared_with_its_bar() -> None:
    ours, eager = ({"contestant": name, "status": "ok", "launches": n} for name, n in ((peers.OURS, 6), ("eager", 20)))
    assert steps.compared([ours, eager], "launches", 6, by_ratio=False) == {
        "ours": 6,
        "theirs": 20,
        "ratio": 0.3,
        "met": True,
        "status": "ok",
    }
    assert steps.compared([eager, ours], "launches", 6, by_ratio=False)["met"] is False
    assert [steps.compared(pair, "launches", 1.5, by_ratio=True)["met"] for pair in ([ours, eager], [eager, ours])] == [True, False]
    crash = {"contestant": "eager", "status": "crash", "detail": "ValueError: x"}
    assert steps.compared([ours, crash], "launches", 6, by_ratio=False) == {"met": None, "status": "eager: crash ValueError: x"}


def test_what_a_check_printed() -> None:
    log = "GPU\nverdict   seconds  variant\nright        0.10  triton: a\nWRONG        0.20  triton: b\n                   off by 2\n"
    wrong = {"what": "triton: b", "passed": False, "status": "off by 2"}
    assert check.rows_of("exit status 1", log + "2 variants checked, 1 wrong\n") == [
        wrong,
        {"what": "all variants", "passed": False, "variants": 2, "wrong": 1, "status": "exit status 1"},
    ]
    assert check.rows_of("cut off after 9 s", log)[1:] == [
        {"what": "all variants", "passed": False, "status": "cut off after 9 s:                    off by 2"}
    ]
    assert check.rows_of("ok", "3 variants checked, 0 wrong\n")[0]["passed"]


def part_run(part: str, rows: list[Row], errors: tuple[str, ...] = ()) -> Recorded:
    env = {"gpu": {"name": "GPU 9000"}, "time": "2027-01-01T00:00:00Z"}
    return Recorded("gpu-9000", f"{part}.json", {"part": part, "env": env, "rows": rows, "errors": list(errors)})


def test_every_bar_of_a_row_has_its_words() -> None:
    numbers = {contest.bar for contest in bars.RATIOS} | {6, 7, 8, 9, 12, 13}
    assert numbers - {0} == {number for number, *_ in bars.WORDS}


def test_every_part_shows_something() -> None:
    assert {part for _, parts, _ in bars.CLAIMS for part in parts} == set(gpu_part.PARTS)


def test_bars_and_what_is_unshown_on_a_page() -> None:
    """Without a run nothing is shown; one that passed shows what its part alone shows; one that failed shows nothing."""
    assert bars.table([]).count("not measured") == len(bars.WORDS)
    assert bars.unshown([]).startswith("No run on a GPU is recorded.") and all(claim in bars.unshown([]) for claim, *_ in bars.CLAIMS)
    rows = [{"bar": 1, "met": True}, {"bar": 1, "met": None}, {"bar": 3, "met": False}, {"bar": 3, "met": True}, {"bar": 4, "met": None}]
    runs = [part_run("bench", rows), part_run("tests", [], ("a failure",)), part_run("race", [])]
    lines = bars.table(runs).splitlines()[2:]
    verdicts = [line.split(" | ")[-1].removesuffix(" |") for line in lines[:4]]
    assert verdicts[0] == "yes: 1 of 1, 1 open; GPU 9000, 2027-01-01"
    assert verdicts[1:] == ["**no**: 1 of 2; GPU 9000, 2027-01-01", "open", "no row"]
    text = bars.unshown(runs)
    assert "`race` on GPU 9000, 2027-01-01" in text and "any speed" not in text and "240 shapes" not in text
    assert "device memory" in text and "`check`" in text and bars.ELSEWHERE in text
    passed = bars.unshown([part_run(part, []) for part in gpu_part.PARTS])
    assert "Every part has passed" in passed and "| what |" not in passed


def test_parts_are_read_apart_from_other_results(tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    for name, more in (("dry", {"dry_run": True}), ("old", {}), ("new", {})):
        result = {"schema": 2, "part": "steps", "dry_run": False, "env": {"time": name, "gpu": {}}, "rows": [], "errors": []} | more
        (tmp_path / "gpu" / f"{name}.json").write_text(record.text(result))
    found = record.load(tmp_path)
    assert [run.name for run in found.parts] == ["old.json", "new.json"] and not found.measured
