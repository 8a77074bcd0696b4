"""Time and memory of contestants, inside the fresh process that sweep.py starts for each cell.

    time    one process per (loss, N, D). Every round runs every contestant once, and each round begins with another one, so that a slow
            moment of the machine falls on all of them. Ratios are taken within a round.
    memory  one process per contestant: the peak of resident memory during one step, above what the process held with its
            inputs. A smaller problem ran before, so code and thread pools are already there.
    gemm    one N x N x N product, the rate that those of the losses are compared with.

A contestant that fails becomes a row, and the others go on. gpu/measure.py has the same for a cell on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench import dense, peers
from bench.dense import Contestant
from bench.record import Cell, Row, row_of
from fastnce.backends._tiled.gemm import product

MIB = 2**20
GEMM_MS = 1000.0  # of products; after that no other one is started
# Rows of the small problem that runs first, so that code which is loaded at a first call is not counted. They are enough for the path that
# larger problems take: with 64 rows, 7 MiB of a matrix library's code were counted as fastnce's at N = 512.
WARM_UP = 1024
COMPILING = 4096  # MiB beyond the limit that a compiler may take


def leaves_of(cell: Cell, rows: int | None = None) -> tuple[Tensor, ...]:
    """The leaves of a cell, or of the same cell with another number of rows."""
    return dense.leaves(cell.loss, rows or cell.n, cell.d, getattr(torch, cell.dtype), device=cell.device, noise=cell.noise)


# ---------------------------------------------------------------- one step


def prepared(mode: str, function: Contestant, leaves: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """One step, ready to be timed; it returns the loss. Earlier gradients are dropped, and for bwd the forward has run."""
    for leaf in leaves:
        leaf.grad = None
    if mode == "bwd":
        return partial(_backward, function(*leaves))
    return partial(function, *leaves) if mode == "fwd" else lambda: _backward(function(*leaves))


def _backward(loss: Tensor) -> Tensor:
    torch.autograd.backward(loss)
    return loss.detach()


def step(function: Contestant, leaves: tuple[Tensor, ...], mode: str = "full") -> float:
    """The loss of one step, which leaves the gradients behind."""
    return prepared(mode, function, leaves)().item()


def gradient_norm(leaves: tuple[Tensor, ...]) -> float:
    return float(sum(leaf.grad.double().square().sum().item() for leaf in leaves if leaf.grad is not None)) ** 0.5


def computed(loss: float, leaves: tuple[Tensor, ...]) -> dict[str, float]:
    """The fields of a row that show the result, so that a contestant that computes something else is seen."""
    gradient = {"gradient_norm": gradient_norm(leaves)} if any(leaf.grad is not None for leaf in leaves) else {}
    return {"loss_value": loss, **gradient}


# ---------------------------------------------------------------- failures


def is_out_of_memory(error: BaseException) -> bool:
    refused = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return refused or any(words in str(error) for words in ("allocate memory", "bad_alloc"))


def status_of(error: Exception) -> tuple[str, str]:
    """Status and detail of a row whose contestant raised: the size of the refused allocation, or the last line of the message."""
    said = str(error).strip()
    if is_out_of_memory(error):
        asked = re.search(r"tried to allocate [\d.]+ \w+", said, re.IGNORECASE)
        return "oom", asked[0].lower() if asked else "an allocation was refused"
    kind = "missing" if isinstance(error, ImportError) else "crash"
    return kind, f"{type(error).__name__}: {(said.splitlines() or [''])[-1]}"[:300]


def guarded(cell: Cell, name: str, call: Callable[[], Row]) -> Row:
    """The row of a contestant, or that of its failure."""
    try:
        return call()
    except Exception as error:
        # Only the words leave this clause: until it ends, the traceback holds every tensor of the failed call.
        status, detail = status_of(error)
    return row_of(cell, name, status, detail=detail)


def limit_memory(mebibytes: int) -> None:
    """Let the address space grow by no more than that from now on, so a larger allocation is refused instead of swapping; 0: no limit."""
    if mebibytes:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        ceiling = pages * resource.getpagesize() + mebibytes * MIB
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, resource.getrlimit(resource.RLIMIT_AS)[1]))


def warmed_up(cell: Cell, name: str) -> Contestant:
    """The contestant after a step of a small problem; a compiled one, which is compiled for a shape, after a step of this problem."""
    function = peers.contestant(cell.loss, name, cell.backend)
    compiled = name in peers.COMPILED
    if compiled and cell.mem_limit:
        limit_memory(cell.mem_limit + COMPILING)
    step(function, leaves_of(cell, cell.n if compiled else min(cell.n, WARM_UP)), cell.mode)
    return function


# ---------------------------------------------------------------- time


def _start(cell: Cell, name: str, leaves: tuple[Tensor, ...], running: dict[str, Contestant]) -> Row:
    value = step(running[name], leaves, cell.mode)
    return row_of(cell, name, "ok", **computed(value, leaves))


def clocks(call: Callable[[], Tensor]) -> tuple[float, float]:
    """Milliseconds of process CPU time and of wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def measure_time(cell: Cell) -> list[Row]:
    """A contestant that fails, at the first call or in a later round, has a row that says so; the others go on."""
    rows: dict[str, Row] = {}
    running: dict[str, Contestant] = {}

    def attempt(name: str, call: Callable[[], Row]) -> bool:
        rows[name] = guarded(cell, name, call)
        if rows[name]["status"] != "ok":
            running.pop(name, None)
        return name in running

    def warm_up(name: str) -> Row:
        running[name] = warmed_up(cell, name)
        return row_of(cell, name, "ok")

    for name in cell.names:
        attempt(name, partial(warm_up, name))
    leaves = leaves_of(cell)
    limit_memory(cell.mem_limit)
    for name in list(running):
        attempt(name, partial(_start, cell, name, leaves, running))

    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in running}

    def sample(name: str) -> Row:
        samples[name].append(clocks(prepared(cell.mode, running[name], leaves)))
        return rows[name]

    gc.collect()
    gc.disable()
    order = list(running)
    for turn in range(cell.repeats):
        # In turn forwards and backwards, and from another one each time: no contestant always follows the same other one.
        for name in order[:: 1 if turn % 2 else -1]:
            if name in running:
                attempt(name, partial(sample, name))
        order = order[1:] + order[:1]
    gc.enable()
    for name in running:
        for clock, of_round in (("cpu", 0), ("wall", 1)):
            milliseconds = [pair[of_round] for pair in samples[name]]
            rows[name][f"{clock}_ms"] = {"median": median(milliseconds), "min": min(milliseconds)}
            if peers.OURS in running:
                ours = [pair[of_round] for pair in samples[peers.OURS]]
                rows[name][f"{clock}_ratio"] = median(a / b for a, b in zip(milliseconds, ours, strict=True))
    return list(rows.values())


def measure_gemm(cell: Cell) -> list[Row]:
    """TFLOP/s of matrix products, by the clock that the losses are read from: torch's, and fastnce's where that is another."""
    a, b, out = (torch.randn(cell.n, cell.n).to(getattr(torch, cell.dtype)) for _ in range(3))
    calls: dict[str, Callable[[], Tensor]] = {"torch": partial(torch.mm, a, b, out=out), "oneDNN": partial(product, a, b)}
    return [_rate(cell, name, calls[name]) for name in cell.names]


def _rate(cell: Cell, name: str, call: Callable[[], Tensor]) -> Row:
    call()
    pairs: list[tuple[float, float]] = []
    # The time is limited because float16, on a CPU without instructions for it, runs at a hundredth of float32's rate.
    while len(pairs) < cell.repeats and sum(cpu for cpu, _ in pairs) < GEMM_MS:
        pairs.append(clocks(call))
    cpu, wall = (median(pair[of_round] for pair in pairs) for of_round in (0, 1))
    rate = 2.0 * cell.n**3 / (cpu if cell.threads == 1 else wall) / 1e9
    return row_of(cell, name, "ok", cpu_ms={"median": cpu}, wall_ms={"median": wall}, tflops=rate)


# ---------------------------------------------------------------- memory


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def _memory(cell: Cell, name: str) -> Row:
    function = warmed_up(cell, name)
    leaves = leaves_of(cell)
    gc.collect()
    # Memory that was freed while the inputs were made would otherwise be reused by the loss, and not count.
    ctypes.CDLL(None).malloc_trim(0)
    limit_memory(cell.mem_limit)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    value = step(function, leaves, cell.mode)
    peak = resident("VmHWM") - before
    return row_of(cell, name, "ok", peak_mib=peak, **computed(value, leaves))


def measure_memory(cell: Cell) -> list[Row]:
    (name,) = cell.names
    return [guarded(cell, name, partial(_memory, cell, name))]


# ---------------------------------------------------------------- the process

MEASURES: dict[str, Callable[[Cell], list[Row]]] = {"time": measure_time, "memory": measure_memory, "gemm": measure_gemm}


def here(cell: Cell) -> list[Row]:
    """The rows of a cell, measured in this process."""
    measures = MEASURES
    if cell.clock == "device":
        from bench.gpu import measure

        measures = measure.MEASURES
    before = dense.TEMPERATURE, dense.LOGIT_SCALE
    if cell.temperature:
        # The contestants read it when they are made and when they run.
        dense.TEMPERATURE, dense.LOGIT_SCALE = cell.temperature, 1 / cell.temperature
    try:
        rows: list[Row] = measures[cell.measure](cell)
        return rows
    finally:
        dense.TEMPERATURE, dense.LOGIT_SCALE = before


def main() -> None:
    cell = Cell(**json.loads(sys.argv[1]))
    torch.set_num_threads(cell.threads)
    print(json.dumps(here(cell)))


if __name__ == "__main__":
    main()
