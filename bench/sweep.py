"""Run cells one after the other: skip those that cannot succeed, show progress, end early at a time budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from bench import dense, table
from bench.record import ROOT, Cell, Row, milliseconds, row_of

GEMM = {"cpu": 1024, "cuda": 8192}  # rows of the matrix product: large enough for its full rate, and under a second
GEMM_REPEATS = 10
# The part of a cell's cost for starting a process: a few seconds, in which one core does so many FLOP. Only the ETA depends on it.
START = 5e11


# ---------------------------------------------------------------- a cell


def in_a_process(cell: Cell, timeout: float) -> list[Row]:
    """One row per contestant of a cell. Where the process dies, or takes longer than the timeout (seconds), all of them say so.

    The kernel ends a process by SIGKILL where memory that it had granted is not there. With a single contestant that counts as oom, and
    larger N are not tried.
    """
    command = [sys.executable, "-m", "bench.measure", json.dumps(asdict(cell))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    given: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": path}, "timeout": timeout * len(cell.names)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, **given)
    except subprocess.TimeoutExpired:
        return [row_of(cell, name, "timeout", detail=f"took more than {timeout:g} s") for name in cell.names]
    if done.returncode == 0:
        try:
            rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
            return rows
        except (IndexError, ValueError):
            return [row_of(cell, name, "crash", detail="its last line is no result") for name in cell.names]
    if done.returncode == -signal.SIGKILL and len(cell.names) == 1:
        return [row_of(cell, cell.names[0], "oom", detail="SIGKILL, as the kernel does where memory is short")]
    if done.returncode < 0:
        detail = signal.Signals(-done.returncode).name
    else:
        detail = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return [row_of(cell, name, "crash", detail=detail) for name in cell.names]


def isolated(cell: Cell, timeout: float) -> list[Row]:
    """As in_a_process, but where a shared process dies, each contestant runs again in one of its own, so that only the culprit is lost.

    Those rows say "alone": true. They have no ratio, because no other contestant was measured in turn with them.
    """
    rows = in_a_process(cell, timeout)
    if len(cell.names) == 1 or any(row["status"] not in ("crash", "timeout") for row in rows):
        return rows
    alone = [row for name in cell.names for row in in_a_process(replace(cell, names=(name,)), timeout)]
    return [{key: value for key, value in row.items() if not key.endswith("_ratio")} | {"alone": True} for row in alone]


# ---------------------------------------------------------------- many cells

Runner = Callable[[Cell, float], list[Row]]


class Sweep(NamedTuple):
    """The rows of a run, and how many cells the time budget left out."""

    rows: list[Row]
    left: int


def run(cells: list[Cell], timeout: float, budget: float | None, runner: Runner = isolated) -> Sweep:
    """The rows of all cells, in order; no cell starts after `budget` seconds, or after an interrupt. Progress goes to stderr."""
    begun, done = time.monotonic(), 0.0
    rows: list[Row] = []
    past = Past(timeout)
    for index, cell in enumerate(cells):
        elapsed = time.monotonic() - begun
        if budget is not None and elapsed > budget:
            _say(f"time budget of {budget:g} s ended: {len(cells) - index} of {len(cells)} cells left out")
            return Sweep(rows, len(cells) - index)
        ahead = sum(cost(past.without_the_hopeless(later)) for later in cells[index:])
        eta = f"at most {elapsed * ahead / done:.0f} s" if done else "?"
        _say(f"[{index + 1}/{len(cells)}] {cell.title()}, {elapsed:.0f} s elapsed, eta {eta}")
        trying = past.without_the_hopeless(cell)
        try:
            found = {row["contestant"]: row for row in (runner(trying, timeout) if trying.names else [])}
        except KeyboardInterrupt:
            _say(f"interrupted: {len(cells) - index} of {len(cells)} cells left out")
            return Sweep(rows, len(cells) - index)
        rows += [found[name] if name in found else past.reason(cell, name) for name in cell.names]
        past.learn(found.values())
        done += cost(trying)
    return Sweep(rows, 0)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def calls(cell: Cell) -> int:
    """How many steps of each contestant a cell runs."""
    return 1 + cell.repeats if cell.measure == "time" else 1


def cost(cell: Cell) -> float:
    """About how long a cell takes, in FLOP; 0 where no contestant is left to run."""
    return START + len(cell.names) * calls(cell) * dense.products(cell.loss, cell.n, cell.d) if cell.names else 0.0


class Past:
    """The outcomes at smaller N, from which follows that a contestant would need more memory, or more time, than there is at this N."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.failed: dict[tuple[Any, ...], Row] = {}
        self.timed: dict[tuple[Any, ...], Row] = {}

    def learn(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if row["status"] in ("oom", "timeout"):
                self.failed[self._problem(row, row["contestant"]), row["measure"]] = row
            elif row["status"] == "ok" and "wall_ms" in row:
                self.timed[self._problem(row, row["contestant"])] = row

    def without_the_hopeless(self, cell: Cell) -> Cell:
        return replace(cell, names=tuple(name for name in cell.names if self._objection(cell, name) is None))

    def reason(self, cell: Cell, name: str) -> Row:
        """The row of a contestant that was not tried."""
        found = self._objection(cell, name)
        assert found is not None
        return row_of(cell, name, found[0], detail=f"not run: {found[1]}")

    def _objection(self, cell: Cell, name: str) -> tuple[str, str] | None:
        key = self._problem(asdict(cell), name)
        failed, timed = self.failed.get((key, cell.measure)), self.timed.get(key)
        if failed is not None:
            if failed["status"] == "oom":
                return "oom-skipped", f"out of memory at N={failed['n']}"
            return "timeout", f"N={failed['n']} {failed['detail']}"
        if timed is not None:
            seconds = timed["wall_ms"]["median"] / 1e3
            # All of these losses multiply every row with every other, so the time grows with N^2.
            needed = calls(cell) * seconds * (cell.n / timed["n"]) ** 2
            if needed > self.timeout:
                return "timeout", f"N={timed['n']} took {seconds:.3g} s a step, so this needs {needed:.0f} of {self.timeout:g} s"
        return None

    @staticmethod
    def _problem(of: dict[str, Any], name: str) -> tuple[Any, ...]:
        return (name, *(of[field] for field in ("mode", "loss", "d", "dtype")))


# ---------------------------------------------------------------- the rate of a matrix product


def gemm(like: Cell, dtypes: list[str], timeout: float) -> list[Row]:
    """Rows for every dtype: the product of square matrices on the same device and threads."""
    n = GEMM[like.device]
    cell = replace(like, measure="gemm", mode="fwd", loss="gemm", n=n, d=n, repeats=GEMM_REPEATS, mem_limit=0)
    # fastnce takes oneDNN's product in float32 on the CPU: on some processors that is twice torch's.
    names = {dtype: ("torch", "oneDNN") if dtype == "float32" and like.device == "cpu" else ("torch",) for dtype in dtypes}
    return [row for dtype in dtypes for row in in_a_process(replace(cell, dtype=dtype, names=names[dtype]), timeout)]


def better(first: list[Row], second: list[Row]) -> list[Row]:
    """The faster of two measurements of each product: a slow moment of the machine lowers a rate, and nothing raises it."""
    return [max(pair, key=lambda row: row.get("tflops", 0.0)) for pair in zip(first, second, strict=True)]


def with_shares(rows: list[Row], products: list[Row]) -> list[Row]:
    """The rows; each ok row of measure time with its nominal rate in percent of its dtype's matrix product."""
    rates = table.gemm_rates(products)

    def share(row: Row) -> dict[str, float]:
        if row["measure"] != "time" or row["status"] != "ok" or row["dtype"] not in rates:
            return {}
        gigaflops = dense.products(row["loss"], row["n"], row["d"], row["mode"]) / milliseconds(row) / 1e6
        return {"gemm_share": 100 * gigaflops / rates[row["dtype"]]}

    return [row | share(row) for row in rows]
