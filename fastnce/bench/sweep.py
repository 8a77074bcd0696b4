"""The cells of a run one after the other: what need not be tried is skipped, progress is shown, a time budget ends it early."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from fastnce.bench import forms, process, table
from fastnce.bench.cell import Cell, row_of
from fastnce.bench.table import Row

GEMM = {"cpu": 1024, "cuda": 8192}  # rows of the matrix product: large enough for its full rate, and under a second
GEMM_REPEATS = 10
# Of a cell's cost: starting a process takes about as long as this many FLOP on one core. Only the ratio matters, for the ETA.
START = 5e10

Runner = Callable[[Cell, float], list[Row]]


class Sweep(NamedTuple):
    """What came of a run: its rows, and how many cells the time budget left out."""

    rows: list[Row]
    left: int


def run(cells: list[Cell], timeout: float, budget: float | None, runner: Runner = process.isolated) -> Sweep:
    """The rows of all cells, in order; no cell starts after `budget` seconds. Progress goes to stderr."""
    begun, done = time.monotonic(), 0.0
    rows: list[Row] = []
    failed: dict[tuple[str, ...], Row] = {}
    total = sum(map(cost, cells))
    for index, cell in enumerate(cells):
        elapsed = time.monotonic() - begun
        if budget is not None and elapsed > budget:
            _say(f"time budget of {budget:g} s ended: {len(cells) - index} of {len(cells)} cells left out")
            return Sweep(rows, len(cells) - index)
        eta = f"{elapsed * (total - done) / done:.0f} s" if done else "?"
        _say(f"[{index + 1}/{len(cells)}] {cell.title()}, {elapsed:.0f} s elapsed, eta {eta}")
        rows += without_the_failed(cell, failed, lambda cell: runner(cell, timeout))
        done += cost(cell)
    return Sweep(rows, 0)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def cost(cell: Cell) -> float:
    """About how long a cell takes, in FLOP."""
    calls = len(cell.names) * (1 + cell.repeats if cell.measure == "time" else 1)
    return START + calls * forms.products(cell.loss, cell.n, cell.d)


def without_the_failed(cell: Cell, failed: dict[tuple[str, ...], Row], runner: Callable[[Cell], list[Row]]) -> list[Row]:
    """The rows of a cell, of which only those contestants run that had memory and time enough at every smaller N.

    `failed` is what is known of them, (contestant, problem without its N) -> row, and learns from this cell.
    """

    def key(name: str) -> tuple[str, ...]:
        return (name, cell.measure, cell.mode, cell.loss, str(cell.d), cell.dtype)

    names = tuple(name for name in cell.names if key(name) not in failed)
    found = {row["contestant"]: row for row in (runner(replace(cell, names=names)) if names else [])}
    for name, row in found.items():
        if row["status"] in ("oom", "timeout"):
            failed[key(name)] = row
    return [found[name] if name in found else _skipped(cell, name, failed[key(name)]) for name in cell.names]


def _skipped(cell: Cell, name: str, before: Row) -> Row:
    if before["status"] == "oom":
        return row_of(cell, name, "oom-skipped", detail=f"not run: out of memory at N={before['n']}")
    return row_of(cell, name, "timeout", detail=f"not run: N={before['n']} {before['detail']}")


# ---------------------------------------------------------------- the rate of a matrix product


def gemm(like: Cell, dtypes: list[str], timeout: float) -> list[Row]:
    """A row for every dtype: the product of square matrices on the same device and threads."""
    n = GEMM[like.device]
    cell = replace(like, measure="gemm", mode="fwd", loss="gemm", n=n, d=n, names=("torch",), repeats=GEMM_REPEATS, mem_limit=0)
    return [row for dtype in dtypes for row in process.run(replace(cell, dtype=dtype), timeout)]


def better(first: list[Row], second: list[Row]) -> list[Row]:
    """Of two measurements of the same products the faster: a slow moment of the machine lowers a rate, nothing raises it."""
    return [max(pair, key=lambda row: row.get("tflops", 0.0)) for pair in zip(first, second, strict=True)]


def with_shares(rows: list[Row], products: list[Row]) -> list[Row]:
    """Every ok row of measure time with its nominal rate in percent of its dtype's matrix product."""
    rates = table.gemm_rates(products)

    def share(row: Row) -> dict[str, float]:
        if row["measure"] != "time" or row["status"] != "ok" or row["dtype"] not in rates:
            return {}
        gigaflops = forms.products(row["loss"], row["n"], row["d"], row["mode"]) / table.milliseconds(row) / 1e6
        return {"gemm_share": 100 * gigaflops / rates[row["dtype"]]}

    return [row | share(row) for row in rows]
