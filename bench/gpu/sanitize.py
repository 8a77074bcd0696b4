"""Part `sanitize`: memcheck, initcheck, racecheck and synccheck of compute-sanitizer over ragged shapes, for every kind of kernels.

The tools watch `python -m bench.gpu.sanitize --inside ...`, which runs the shapes forward and backward. It runs first without a tool, so
that Triton's kernels are compiled. Both kinds of the CUDA library share a process, since its start takes longer than its shapes. The four
tools run at the same time. They are looked for on PATH, below the CUDA toolkit, and in an installed wheel (nvidia-cuda-sanitizer-api).

Without caching every tensor is an allocation of its own, so that a read beyond a tensor is a read beyond an allocation. racecheck sees
shared memory only, and reports copies by the bulk engine as hazards that are none: its rows are to be read, not only counted.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastnce
from bench import dense
from bench.gpu import part
from bench.gpu.kernels import Kernels, chosen
from bench.record import ROOT
from train_ref.truth import Rows

TOOLS: dict[str, list[str]] = {
    "memcheck": ["--leak-check", "no"],
    "initcheck": [],
    "racecheck": ["--racecheck-report", "analysis"],
    "synccheck": [],
}
COLUMNS = ("tool", "kernels", "shapes", "reports", "clean", "seconds", "status", "first")


class Shape(NamedTuple):
    """A loss of bench/dense.py by its name there, or "mask", with n rows in all: both views of a symmetric loss, or the queue."""

    loss: str
    n: int
    d: int
    dtype: torch.dtype = torch.bfloat16
    scale: float = 10.0


# No number of rows is a multiple of a tile, and of the widths only 64 and 512 are one of a step. Scale 90 needs a running maximum.
CHOSEN = (
    Shape("nt_xent", 130, 24),
    Shape("nt_xent", 258, 64, torch.float32),
    Shape("nt_xent", 194, 100, torch.float16, 90.0),
    Shape("nt_xent", 262, 300),
    Shape("clip", 131, 33),
    Shape("clip", 257, 129, torch.float16),
    Shape("clip", 201, 512, torch.bfloat16, 90.0),
    Shape("clip", 65, 257, torch.float32),
    Shape("sup_con", 193, 40),
    Shape("sup_con", 161, 260, torch.float16),
    Shape("moco", 1041, 72),
    Shape("moco", 1041, 384, torch.float32, 90.0),
    # Labels at the widths that wgmma serves, where it takes other tiles.
    Shape("sup_con", 197, 100),
    Shape("sup_con", 133, 200, torch.bfloat16, 90.0),
    Shape("mask", 150, 72),
    Shape("mask", 139, 270, torch.float16, 90.0),
)
# A loss that none of them has gets one all the same.
SHAPES = (*CHOSEN, *(Shape(loss, 134, 40) for loss in dense.LOSSES if loss not in {shape.loss for shape in CHOSEN}))


def solve(shape: Shape, device: str, backend: str) -> None:
    """Forward and backward of one shape."""
    g = torch.Generator().manual_seed(shape.n)
    loss = dense.TABLE.get(shape.loss)
    queued, views = loss is not None and "queue" in loss.leaves, len(loss.leaves) if loss is not None and loss.symmetric else 1
    rows = max(shape.n // 16, 1) if queued else shape.n // views
    q, k, queue = (torch.randn(n, shape.d, generator=g).to(device, shape.dtype) for n in (rows, rows, shape.n))
    q.requires_grad_()
    k.requires_grad_(not queued)
    scale = torch.tensor(shape.scale, device=device, requires_grad=True)
    if loss is None:
        value = masked(q, k, scale, backend)
    else:
        tensors = loss.example(Rows(q, k, queue, torch.arange(rows, device=device) % 16))
        value = getattr(fastnce, loss.name)(**tensors, **{loss.number: scale}, backend=backend)
    value.backward()
    assert q.grad is not None
    if device == "cuda":
        torch.cuda.synchronize()


def masked(q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor, backend: str) -> torch.Tensor:
    """A call with all that no loss asks for: a mask and exclude ids on both sides at once, and ranks."""
    index = torch.arange(len(q), device=q.device)
    found = fastnce.contrastive_stats(
        q, k, scale=scale, two_sided=True, metrics=True, positive_mask=(index[:, None] + index) % 7 == 0,
        q_exclude_ids=index % 30, k_exclude_ids=index.flip(0) % 30, backend=backend,
    )  # fmt: skip
    assert found.columns is not None
    return (found.lse_neg + found.columns.lse_neg + found.pos).mean()


def inside(where: str, names: Sequence[str]) -> None:
    for name in names:
        kernels = Kernels.of(name, where)
        with chosen(kernels):
            for shape in SHAPES:
                solve(shape, kernels.device, kernels.backend)
                print("solved", name, shape, flush=True)


def solved_in(log: str) -> int:
    return len(re.findall(r"^solved ", log, re.MULTILINE))


def sanitizer() -> str | None:
    """The path of compute-sanitizer; None where it is not installed."""
    found = shutil.which("compute-sanitizer")
    folders = [Path("/usr/local/cuda/bin")]
    for folder in sys.path:
        # Wheels of different CUDA versions put it at different depths.
        folders += [path.parent for path in sorted((Path(folder) / "nvidia").glob("**/compute-sanitizer")) if path.is_file()]
    return found or next((str(path) for path in (folder / "compute-sanitizer" for folder in folders) if path.is_file()), None)


def reports_of(log: str) -> int | None:
    """How many errors a tool counted. None where it printed no summary: it was cut off, or could not start."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error", log)
    counts += [
        str(int(errors) + int(warnings)) for errors, warnings in re.findall(r"RACECHECK SUMMARY: .*?(\d+) error.*?(\d+) warning", log)
    ]
    return sum(map(int, counts)) if counts else None


def under(tool: str, program: str, report: part.Report, kernels: list[Kernels], seconds: float) -> dict[str, Any]:
    command = [program, "--tool", tool, *TOOLS[tool], "--print-limit", "20", *this_program(report, kernels)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    begun = time.monotonic()
    status, log = execute(command, environment, seconds)
    row = {"tool": tool, "kernels": named(kernels), "seconds": time.monotonic() - begun, "status": status}
    with report.log.open("a") as file:
        file.write(f"=== {tool}, {row['kernels']}: {status}\n{log[-200_000:]}\n")
    count, shapes = reports_of(log), solved_in(log)
    first = next((line.strip("= ")[:120] for line in log.splitlines() if line.startswith("========= ") and "SANITIZER" not in line), "")
    clean = None if count is None else count == 0 and shapes == len(SHAPES) * len(kernels)
    return row | {"shapes": shapes, "reports": count, "clean": clean, "first": first if count else ""}


def this_program(report: part.Report, kernels: list[Kernels]) -> list[str]:
    return [sys.executable, "-m", "bench.gpu.sanitize", "--inside", report.where, *(one.name for one in kernels)]


def named(kernels: list[Kernels]) -> str:
    return ", ".join(one.name for one in kernels)


def execute(command: list[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """Run a command for at most so many seconds: its outcome in words, and its output."""
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment = environment | {"PYTHONPATH": path}
    # Of its own session, because a sanitizer starts the program as a child, which would outlive it and hold the pipe.
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        log, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        return f"cut off after {seconds:.0f} s", log
    return "ok" if process.returncode == 0 else f"exit status {process.returncode}", log


def rows(report: part.Report, kernels: list[Kernels], seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of kernels that share a process: first without a tool, then with each."""
    begun = time.monotonic()
    status, log = execute(this_program(report, kernels), dict(os.environ), max(seconds / 3, 1.0))
    yield {"tool": "none", "kernels": named(kernels), "shapes": solved_in(log), "seconds": time.monotonic() - begun, "status": status}
    if status != "ok":
        report.fail(f"the shapes alone, {named(kernels)}: {status}: {(log.strip().splitlines() or [''])[-1]}")
        return
    program = sanitizer()
    if program is None or report.dry:
        why = "compute-sanitizer not found" if program is None else "dry run: there is nothing to look at on a CPU"
        yield from ({"tool": tool, "kernels": named(kernels), "clean": None, "status": why} for tool in TOOLS)
        return
    left = max(seconds - (time.monotonic() - begun), 1.0)
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        yield from pool.map(lambda tool: under(tool, program, report, kernels, left), TOOLS)


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        torch.set_num_threads(1)
        inside(sys.argv[2], sys.argv[3:])
        return 0
    report = part.Report("sanitize")
    groups = [list(group) for _, group in groupby(report.kernels(), lambda kernels: kernels.backend)]
    for index, kernels in enumerate(groups):
        with report.step(f"sanitize {named(kernels)}"):
            for row in rows(report, kernels, max(report.left() / (len(groups) - index), 1.0)):
                report.add(row)
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
