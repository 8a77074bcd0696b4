"""A run over many cells: those that are not tried, those that are left at its end, and the rates and ratios of its rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench import __main__ as command
from bench import dense, sweep
from bench.peers import OURS
from bench.record import Cell, Row, row_of


def answers(status: Callable[[str, int], str]) -> sweep.Runner:
    """In place of processes: every contestant ends as the function of its name and N says."""

    def runner(cell: Cell, timeout: float) -> list[Row]:
        return [row_of(cell, name, status(name, cell.n), detail="took more than 1 s") for name in cell.names]

    return runner


def cells(*n: int, **more: Any) -> list[Cell]:
    return [Cell("time", "clip", size, 8, (OURS, "eager"), **more) for size in n]


@pytest.mark.parametrize(("status", "then"), [("oom", "oom-skipped"), ("timeout", "timeout"), ("crash", "crash")])
def test_what_failed_at_a_smaller_n(status: str, then: str) -> None:
    ran = []

    def outcome(name: str, n: int) -> str:
        ran.append((name, n))
        return status if name == "eager" and n >= 32 else "ok"

    planned = [*cells(16, 32, 64), *cells(64, mode="fwd")]
    found = sweep.run(planned, 1.0, None, answers(outcome)).rows
    assert [row["status"] for row in found if row["contestant"] == "eager"] == ["ok", status, then, status]
    assert [row["status"] for row in found if row["contestant"] == OURS] == ["ok"] * 4
    # A crash may have another reason than size. Another mode is another problem.
    assert ran.count(("eager", 64)) == (2 if status == "crash" else 1)
    assert all("N=32" in row["detail"] for row in found if row["detail"].startswith("not run"))


def test_what_would_take_longer_than_a_process_may_is_not_tried() -> None:
    """A step of 1 s at N = 16 takes 4 s at 32 and 16 s at 64; six of them a cell."""
    ran = []

    def runner(cell: Cell, timeout: float) -> list[Row]:
        ran.append((cell.measure, cell.n, cell.names))
        seconds = {OURS: 1e-3, "eager": (cell.n / 16) ** 2}
        time = {name: {"wall_ms": {"median": 1e3 * seconds[name]}} if cell.measure == "time" else {} for name in cell.names}
        return [row_of(cell, name, "ok", **time[name]) for name in cell.names]

    planned = [*cells(16, 32, 64), *(replace(cell, measure="memory") for cell in cells(32, 64))]
    found = sweep.run(planned, 30.0, None, runner).rows
    assert ran[2] == ("time", 64, (OURS,))
    assert ran[4] == ("memory", 64, (OURS, "eager"))  # a single step
    (left,) = [row for row in found if row["status"] != "ok"]
    assert (left["status"], left["n"], left["contestant"]) == ("timeout", 64, "eager")
    assert left["detail"] == "not run: N=32 took 4 s a step, so this needs 96 of 30 s"


def test_an_interrupt_leaves_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def runner(cell: Cell, timeout: float) -> list[Row]:
        if cell.n == 32:
            raise KeyboardInterrupt
        return answers(lambda name, n: "ok")(cell, timeout)

    found = sweep.run(cells(16, 32, 64), 1.0, None, runner)
    assert (len(found.rows), found.left) == (2, 2)
    assert "interrupted: 2 of 3 cells left out" in capsys.readouterr().err


def test_the_time_left_counts_contestants_that_still_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])

    def runner(cell: Cell, timeout: float) -> list[Row]:
        now[0] += 10.0
        return answers(lambda name, n: "ok" if name == OURS else "oom")(cell, timeout)

    monkeypatch.setattr(sweep, "START", 0.0)
    sweep.run(cells(16, 16), 1.0, None, runner)
    assert "[2/2] " in (last := capsys.readouterr().err.splitlines()[-1])
    assert last.endswith("10 s elapsed, eta at most 5 s")


def test_progress_and_the_end_of_the_budget(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of 10 s each: after three the 25 s are over."""
    now = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])

    def runner(cell: Cell, timeout: float) -> list[Row]:
        now[0] += 10.0
        return answers(lambda name, n: "ok")(cell, timeout)

    found = sweep.run(cells(8, 8, 8, 8, 8), 1.0, 25.0, runner)
    assert (len(found.rows), found.left) == (6, 2)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"time.*eager, ", "", line) for line in lines] == [
        "[1/5] 0 s elapsed, eta ?",
        "[2/5] 10 s elapsed, eta at most 40 s",
        "[3/5] 20 s elapsed, eta at most 30 s",
        "time budget of 25 s ended: 2 of 5 cells left out",
    ]
    assert sweep.run(cells(8, 8), 1.0, None, runner).left == 0


def test_rates_are_nominal_and_shares_are_of_the_better_product() -> None:
    problem = {"mode": "full", "loss": "clip", "n": 1000, "d": 10, "dtype": "float32", "device": "cpu", "threads": 1}
    timed = problem | {"measure": "time", "status": "ok", "cpu_ms": {"median": 6.0}}  # 6e7 FLOP: 10 GFLOP/s
    product = problem | {"measure": "gemm", "mode": "fwd", "loss": "gemm", "status": "ok"}
    slow, fast = [product | {"tflops": 0.02}], [product | {"tflops": 0.04}]
    assert sweep.better(slow, fast) == sweep.better(fast, slow) == fast
    rows = sweep.with_shares([timed, timed | {"mode": "fwd"}, timed | {"status": "crash"}, timed | {"dtype": "float64"}], fast)
    assert [row.get("gemm_share") for row in rows] == [pytest.approx(25.0), pytest.approx(25.0 / 3), None, None]
    assert dense.products("moco", 64, 8) == 4 * 4 * 64 * 8


def test_a_ratio_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    def row(contestant: str, status: str = "ok", **more: Any) -> Row:
        return row_of(cells(16)[0], contestant, status, **more)

    fast, slow = row("eager", cpu_ratio=4.0), row("eager", cpu_ratio=2.0)
    assert command._slower([row(OURS), fast], 3.0) == 0
    assert command._slower([row(OURS), fast, slow], 3.0) == 1
    assert command._slower([row(OURS), row("eager", "oom", detail="")], 3.0) == 1
    assert command._slower([row(OURS)], 3.0) == 1
    assert "eager takes 2.00 times, not 3" in capsys.readouterr().err
