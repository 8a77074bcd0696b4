"""Time and memory on a GPU: measure.py's fresh process runs this where the device has a clock of its own.

    time     Every contestant is called three times first: kernels are compiled, libraries make their handles. Then come rounds. Each runs
             every contestant once and begins with another one. Before a step a buffer larger than the L2 cache is written, so that no
             inputs are found there. The device is idle when the first event is recorded: a backlog would hide the cost of launching. The
             clock is a pair of CUDA events; ratios are taken within a round.
    memory   The allocator's peak during one step, above its level with the inputs. A small problem ran before, so that workspaces of
             libraries, which stay, are already there.
    gemm     One N x N x N product of normally distributed values: zeros would run up to 13 % faster.
    kernels  The profiler's list of one step: every kernel, its calls and its time, and the sum of the calls: the launches of the step.
    host     As time, by the clock of the host, until the last launch is on its way: the device is idle at first, and nobody waits for it.

A contestant that fails becomes a row, and the others go on. Where there is no GPU the same code runs with the host's clock, which proves
the code and measures nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import dense, measure, peers
from bench.dense import Contestant
from bench.measure import MIB, computed, guarded, prepared
from bench.record import Cell, Row, row_of

WARM_UP = 3  # calls of each contestant that are not counted
WARM_UP_ROWS = 256  # of the small problem that runs before memory is measured
FEWEST = 3  # rounds, however slow they are
FLUSH = 256 * MIB  # five times the L2 cache of an H100


def milliseconds(device: str, call: Callable[[], object]) -> float:
    """One call, from an idle device to its last kernel."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def host_milliseconds(device: str, call: Callable[[], object]) -> float:
    """The host's part of one call, from an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def release(leaves: tuple[Tensor, ...]) -> None:
    """Free the memory that a contestant left behind, so that the next one has the whole device."""
    for leaf in leaves:
        leaf.grad = None
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def lost() -> bool:
    """Whether the device is lost to this process after a fault: every later call would fail too."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _start(cell: Cell, name: str, function: Contestant, leaves: tuple[Tensor, ...]) -> Row:
    for _ in range(WARM_UP):
        value = measure.step(function, leaves, cell.mode)
    return row_of(cell, name, "ok", **computed(value, leaves))


def interleaved(
    cell: Cell,
    contestant: Callable[[str, str, str], Contestant] = peers.contestant,
    within: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
    clock: Callable[[str, Callable[[], object]], float] = milliseconds,
) -> tuple[dict[str, Row], dict[str, list[float]]]:
    """The row of each contestant by its name, and its milliseconds round by round.

    contestant(loss, name, backend) makes each, within(name) is the context that it runs in, and clock(device, call) times a call."""
    leaves = measure.leaves_of(cell)
    running: dict[str, Contestant] = {}
    rows: dict[str, Row] = {}

    def start(name: str) -> Row:
        function = contestant(cell.loss, name, cell.backend)
        with within(name):
            row = _start(cell, name, function, leaves)
        running[name] = function
        return row

    for name in cell.names:
        rows[name] = guarded(cell, name, partial(start, name))
        release(leaves)

    samples: dict[str, list[float]] = {name: [] for name in running}
    flush = torch.empty(FLUSH if cell.device == "cuda" else 1, dtype=torch.int8, device=cell.device)
    order, begun, rounds = list(running), time.perf_counter(), 0
    gc.disable()
    while order and rounds < cell.repeats:
        if cell.seconds and rounds >= FEWEST and time.perf_counter() - begun > cell.seconds:
            break
        for name in order:
            with within(name):
                call = prepared(cell.mode, running[name], leaves)
                flush.zero_()
                samples[name].append(clock(cell.device, call))
            del call  # frees the tensors that the forward saved
        order.append(order.pop(0))
        rounds += 1
    gc.enable()
    return rows, samples


def measure_time(cell: Cell) -> list[Row]:
    rows, samples = interleaved(cell)
    for name, times in samples.items():
        rows[name] |= {"gpu_ms": {"median": median(times), "min": min(times)}, "iterations": len(times)}
        rows[name]["tflops"] = dense.products(cell.loss, cell.n, cell.d, cell.mode) / median(times) / 1e9
        if peers.OURS in samples:
            rows[name]["gpu_ratio"] = median(a / b for a, b in zip(times, samples[peers.OURS], strict=True))
    return list(rows.values())


def measure_host(cell: Cell) -> list[Row]:
    rows, samples = interleaved(cell, clock=host_milliseconds)
    for name, times in samples.items():
        rows[name] |= {"host_ms": median(times), "iterations": len(times)}
    return list(rows.values())


def _peak(device: str, call: Callable[[], object]) -> float:
    """The peak of memory during a call, MiB above the level before it."""
    if device == "cpu":
        before = measure.resident("VmRSS")
        call()
        return max(measure.resident("VmHWM") - before, 0.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _memory(cell: Cell, name: str) -> Row:
    function = peers.contestant(cell.loss, name, cell.backend)
    small = measure.leaves_of(cell, min(WARM_UP_ROWS, cell.n))
    measure.step(function, small, cell.mode)
    release(small)
    leaves = measure.leaves_of(cell)
    peak = _peak(cell.device, prepared(cell.mode, function, leaves))
    learning = [leaf for leaf in leaves if leaf.grad is not None]
    return row_of(
        cell,
        name,
        "ok",
        peak_mib=peak,
        input_mib=sum(leaf.nbytes for leaf in leaves) / MIB,
        gradient_mib=sum(leaf.nbytes for leaf in learning) / MIB,
        gradient_norm=measure.gradient_norm(leaves),
    )


def measure_memory(cell: Cell) -> list[Row]:
    (name,) = cell.names
    return [guarded(cell, name, partial(_memory, cell, name))]


def measure_gemm(cell: Cell) -> list[Row]:
    """The median TFLOP/s of the library's matrix product, the ceiling that rates are compared with."""
    a, b = (torch.randn(cell.n, cell.n, device=cell.device).to(getattr(torch, cell.dtype)) for _ in range(2))
    times = [milliseconds(cell.device, lambda: a @ b) for _ in range(WARM_UP + max(cell.repeats, FEWEST))][WARM_UP:]
    return [row_of(cell, cell.names[0], "ok", gpu_ms={"median": median(times)}, tflops=2.0 * cell.n**3 / median(times) / 1e9)]


def _kernels(cell: Cell, name: str) -> Row:
    function = peers.contestant(cell.loss, name, cell.backend)
    leaves = measure.leaves_of(cell)
    for _ in range(WARM_UP):
        measure.step(function, leaves, cell.mode)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cell.device == "cuda" else [])]) as seen:
        prepared(cell.mode, function, leaves)()
        if cell.device == "cuda":
            torch.cuda.synchronize()
    found: list[dict[str, Any]] = [
        {"kernel": event.key, "calls": event.count, "ms": event.self_device_time_total / 1e3}
        for event in seen.key_averages()
        if event.self_device_time_total > 0
    ]
    launches = sum(kernel["calls"] for kernel in found)
    return row_of(cell, name, "ok", launches=launches, kernels=sorted(found, key=lambda kernel: -kernel["ms"])[:20])


def measure_kernels(cell: Cell) -> list[Row]:
    (name,) = cell.names
    return [guarded(cell, name, partial(_kernels, cell, name))]


MEASURES: dict[str, Callable[[Cell], list[Row]]] = {
    "time": measure_time,
    "memory": measure_memory,
    "gemm": measure_gemm,
    "kernels": measure_kernels,
    "host": measure_host,
}
