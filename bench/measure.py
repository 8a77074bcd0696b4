"""Time and memory of contestants, each cell in a fresh process.

    time    one process per (loss, N, D). Every round runs every contestant once, starting with another one each round,
            so that a slow moment of the machine falls on all of them; ratios are taken within a round.
    memory  one process per contestant: the peak of resident memory during one forward and backward, above what the
            process held with its inputs. A smaller problem ran before, so code and thread pools are already there.

A cell ends as ok, oom (an allocation was refused), crash (with the signal or the last line of its error) or timeout.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import peers

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
WARM_UP = 64  # rows of the small problem that runs before memory is measured

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What one process measures."""

    mode: str  # "time" or "memory"
    loss: str
    n: int
    d: int
    names: tuple[str, ...]
    dtype: str = "float32"
    threads: int = 1
    repeats: int = 5
    mem_limit: int = 0  # MiB of address space above the process with its inputs; 0: no limit

    def title(self) -> str:
        return f"{self.mode:6} {self.loss:8} N={self.n:<6} D={self.d:<4} {', '.join(self.names)}"


def cells(mode: str, cell: Cell) -> list[Cell]:
    """The processes that measure this (loss, N, D): one for the times of all, one each for their memory."""
    timing = [replace(cell, mode="time")] if mode in ("time", "both") else []
    memory = [replace(cell, mode="memory", names=(name,)) for name in cell.names] if mode in ("memory", "both") else []
    return timing + memory


def run(cell: Cell, timeout: float) -> list[Row]:
    """A cell in a fresh process; one row per contestant, whatever happens to the process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bench.measure", json.dumps(asdict(cell))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    except subprocess.TimeoutExpired:
        return [_row(cell, name, "timeout", detail=f"{timeout:g} s") for name in cell.names]
    if done.returncode == 0:
        rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
        return rows
    if done.returncode < 0:
        detail = signal.Signals(-done.returncode).name
    else:
        detail = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return [_row(cell, name, "crash", detail=detail) for name in cell.names]


def _row(cell: Cell, name: str, status: str, **measured: Any) -> Row:
    problem = {"mode": cell.mode, "loss": cell.loss, "n": cell.n, "d": cell.d, "dtype": cell.dtype}
    return {**problem, "threads": cell.threads, "contestant": name, "status": status, **measured}


# ---------------------------------------------------------------- inside the fresh process


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in ("allocate memory", "bad_alloc"))


def step(function: peers.Contestant, leaves: tuple[Tensor, ...]) -> float:
    """One forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    loss = function(*leaves)
    loss.backward()
    return loss.item()


def gradient_norm(leaves: tuple[Tensor, ...]) -> float:
    return float(sum(leaf.grad.double().square().sum().item() for leaf in leaves if leaf.grad is not None)) ** 0.5


def limit_memory(mebibytes: int) -> None:
    """Let the address space grow by no more than that, so a larger allocation is refused instead of swapping."""
    if mebibytes:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        ceiling = pages * resource.getpagesize() + mebibytes * MIB
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))


def measure_time(cell: Cell) -> list[Row]:
    leaves = peers.leaves(cell.loss, cell.n, cell.d, getattr(torch, cell.dtype))
    running: dict[str, peers.Contestant] = {}
    rows: dict[str, Row] = {}
    limit_memory(cell.mem_limit)
    for name in cell.names:
        function = peers.contestant(cell.loss, name)
        try:
            value = step(function, leaves)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            rows[name] = _row(cell, name, "oom")
            continue
        running[name] = function
        rows[name] = _row(cell, name, "ok", loss_value=value, gradient_norm=gradient_norm(leaves))

    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    gc.collect()
    gc.disable()
    order = list(running)
    for _ in range(cell.repeats):
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            step(running[name], leaves)
            samples[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        order.append(order.pop(0))
    for name, pairs in samples.items():
        for clock, of_round in (("cpu", 0), ("wall", 1)):
            milliseconds = [1e3 * pair[of_round] for pair in pairs]
            rows[name][f"{clock}_ms"] = {"median": median(milliseconds), "min": min(milliseconds)}
            if peers.OURS in samples:
                ours = [1e3 * pair[of_round] for pair in samples[peers.OURS]]
                rows[name][f"{clock}_ratio"] = median(a / b for a, b in zip(milliseconds, ours, strict=True))
    return list(rows.values())


def _resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def measure_memory(cell: Cell) -> list[Row]:
    (name,) = cell.names
    function = peers.contestant(cell.loss, name)
    dtype = getattr(torch, cell.dtype)
    step(function, peers.leaves(cell.loss, WARM_UP, cell.d, dtype))
    leaves = peers.leaves(cell.loss, cell.n, cell.d, dtype)
    gc.collect()
    # What building the inputs freed would otherwise be reused by the loss and not count.
    ctypes.CDLL(None).malloc_trim(0)
    limit_memory(cell.mem_limit)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _resident("VmRSS")
    try:
        value = step(function, leaves)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return [_row(cell, name, "oom")]
    peak = _resident("VmHWM") - before
    return [_row(cell, name, "ok", peak_mib=peak, loss_value=value, gradient_norm=gradient_norm(leaves))]


MEASURES: dict[str, Callable[[Cell], list[Row]]] = {"time": measure_time, "memory": measure_memory}


def main() -> None:
    cell = Cell(**json.loads(sys.argv[1]))
    torch.set_num_threads(cell.threads)
    print(json.dumps(MEASURES[cell.mode](cell)))


if __name__ == "__main__":
    main()
