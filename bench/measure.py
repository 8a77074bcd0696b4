"""Time and memory of contestants, each cell in a fresh process.

    time    one process per (loss, N, D). Every round runs every contestant once, starting with another one each round,
            so that a slow moment of the machine falls on all of them; ratios are taken within a round.
    memory  one process per contestant: the peak of resident memory during one forward and backward, above what the
            process held with its inputs. A smaller problem ran before, so code and thread pools are already there.

A cell ends as ok, oom (an allocation was refused), missing (a package is not installed), crash (with the signal or the last
line of its error) or timeout. What a cell on a GPU does instead is in gpu_measure.py.
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
    device: str = "cpu"
    clock: str = "host"  # "device": as gpu_measure.py measures; it falls back to the host's clock where the device has none
    backend: str = "auto"  # of fastnce
    noise: float = 0.5  # of the second view
    temperature: float = 0.0  # 0: that of peers.py
    seconds: float = 0.0  # stop the rounds of a device clock after that, if three are done; 0: never

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
        return [row_of(cell, name, "timeout", detail=f"{timeout:g} s") for name in cell.names]
    if done.returncode == 0:
        rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
        return rows
    if done.returncode < 0:
        detail = signal.Signals(-done.returncode).name
    else:
        detail = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return [row_of(cell, name, "crash", detail=detail) for name in cell.names]


def row_of(cell: Cell, name: str, status: str, **measured: Any) -> Row:
    problem = {"mode": cell.mode, "loss": cell.loss, "n": cell.n, "d": cell.d, "dtype": cell.dtype}
    return {**problem, "threads": cell.threads, "device": cell.device, "contestant": name, "status": status, **measured}


def leaves_of(cell: Cell, rows: int | None = None) -> tuple[Tensor, ...]:
    """The leaves of a cell, or of its like with another number of rows."""
    return peers.leaves(cell.loss, rows or cell.n, cell.d, getattr(torch, cell.dtype), device=cell.device, noise=cell.noise)


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
    leaves = leaves_of(cell)
    running: dict[str, peers.Contestant] = {}
    rows: dict[str, Row] = {}
    limit_memory(cell.mem_limit)
    for name in cell.names:
        function = peers.contestant(cell.loss, name, cell.backend)
        try:
            value = step(function, leaves)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            rows[name] = row_of(cell, name, "oom")
            continue
        running[name] = function
        rows[name] = row_of(cell, name, "ok", loss_value=value, gradient_norm=gradient_norm(leaves))

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


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def measure_memory(cell: Cell) -> list[Row]:
    (name,) = cell.names
    function = peers.contestant(cell.loss, name, cell.backend)
    step(function, leaves_of(cell, WARM_UP))
    leaves = leaves_of(cell)
    gc.collect()
    # What building the inputs freed would otherwise be reused by the loss and not count.
    ctypes.CDLL(None).malloc_trim(0)
    limit_memory(cell.mem_limit)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    try:
        value = step(function, leaves)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return [row_of(cell, name, "oom")]
    peak = resident("VmHWM") - before
    return [row_of(cell, name, "ok", peak_mib=peak, loss_value=value, gradient_norm=gradient_norm(leaves))]


MEASURES: dict[str, Callable[[Cell], list[Row]]] = {"time": measure_time, "memory": measure_memory}


def here(cell: Cell) -> list[Row]:
    """A cell in this process: what the fresh one does."""
    if cell.clock == "host":
        measures = MEASURES
    else:
        from bench import gpu_measure

        measures = gpu_measure.MEASURES
    before = peers.TEMPERATURE, peers.LOGIT_SCALE
    if cell.temperature:
        # The contestants read it when they are made and when they run.
        peers.TEMPERATURE, peers.LOGIT_SCALE = cell.temperature, 1 / cell.temperature
    try:
        return measures[cell.mode](cell)
    finally:
        peers.TEMPERATURE, peers.LOGIT_SCALE = before


def main() -> None:
    cell = Cell(**json.loads(sys.argv[1]))
    torch.set_num_threads(cell.threads)
    print(json.dumps(here(cell)))


if __name__ == "__main__":
    main()
