"""Part `sanitize`: memcheck, initcheck, racecheck and synccheck of compute-sanitizer over twelve ragged shapes.

`python -m bench.sanitize --inside ...` runs the shapes, forward and backward, and is what the tools run under: first without any, so that
the kernels are compiled. The tools are looked for on PATH, below the CUDA toolkit, and in an installed wheel (nvidia-cuda-sanitizer-api).
Without caching every tensor is an allocation of its own, so that a read beyond it is one beyond what is allocated. racecheck knows shared
memory only, and reports copies by the bulk engine as hazards that are none: its rows are to be read, not only counted.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import gpu
from fastnce.bench import places

TOOLS: dict[str, list[str]] = {
    "memcheck": ["--leak-check", "no"],
    "initcheck": [],
    "racecheck": ["--racecheck-report", "analysis"],
    "synccheck": [],
}
COLUMNS = ("tool", "shapes", "reports", "clean", "seconds", "status", "first")


class Shape(NamedTuple):
    loss: str
    n: int
    d: int
    dtype: torch.dtype = torch.bfloat16
    scale: float = 10.0


# No number of rows is a multiple of a tile, no width but 64 and 512 of a step; scale 90 needs a running maximum.
SHAPES = (
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
)


def solve(shape: Shape, device: str, backend: str) -> None:
    """Forward and backward of one shape."""
    import fastnce

    g = torch.Generator().manual_seed(shape.n)
    rows = max(shape.n // 16, 1) if shape.loss == "moco" else shape.n
    q, k, queue = (torch.randn(n, shape.d, generator=g).to(device, shape.dtype) for n in (rows, rows, shape.n))
    q.requires_grad_()
    k.requires_grad_(shape.loss != "moco")
    scale = torch.tensor(shape.scale, device=device, requires_grad=True)
    labels = torch.arange(shape.n, device=device) % 16
    losses: dict[str, Callable[[], Any]] = {
        "nt_xent": lambda: fastnce.nt_xent(q, scale=scale, backend=backend),
        "clip": lambda: fastnce.clip_loss(q, k, scale, backend=backend),
        "sup_con": lambda: fastnce.sup_con(q, labels, scale=scale, backend=backend),
        "moco": lambda: fastnce.moco_loss(q, k, queue, scale=scale, backend=backend),
    }
    losses[shape.loss]().backward()
    assert q.grad is not None
    if device == "cuda":
        torch.cuda.synchronize()


def inside(device: str, backend: str) -> None:
    for shape in SHAPES:
        solve(shape, device, backend)
        print("solved", shape, flush=True)


def sanitizer() -> str | None:
    """The program, where there is one."""
    found = shutil.which("compute-sanitizer")
    places = [Path("/usr/local/cuda/bin")]
    for folder in sys.path:
        # Wheels of different CUDA versions put it at different depths.
        places += [path.parent for path in sorted((Path(folder) / "nvidia").glob("**/compute-sanitizer")) if path.is_file()]
    return found or next((str(place / "compute-sanitizer") for place in places if (place / "compute-sanitizer").is_file()), None)


def reports_of(log: str) -> int | None:
    """Errors that a tool counted; None where it printed no summary, because it was cut off or could not start."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error", log)
    counts += [
        str(int(errors) + int(warnings)) for errors, warnings in re.findall(r"RACECHECK SUMMARY: .*?(\d+) error.*?(\d+) warning", log)
    ]
    return sum(map(int, counts)) if counts else None


def under(tool: str, program: str, report: gpu.Report, seconds: float) -> dict[str, Any]:
    command = [program, "--tool", tool, *TOOLS[tool], "--print-limit", "20", *this_program(report)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    begun = report.left()
    status, log = execute(command, environment, seconds)
    with (report.out / "sanitize.log").open("a") as file:
        file.write(f"=== {tool}: {status}\n{log[-200_000:]}\n")
    count = reports_of(log)
    shapes = len(re.findall(r"^solved ", log, re.MULTILINE))
    first = next((line.strip("= ")[:120] for line in log.splitlines() if line.startswith("========= ") and "SANITIZER" not in line), "")
    clean = None if count is None else count == 0 and shapes == len(SHAPES)
    row = {"tool": tool, "shapes": shapes, "reports": count, "clean": clean, "seconds": begun - report.left(), "status": status}
    return row | {"first": first if count else ""}


def this_program(report: gpu.Report) -> list[str]:
    return [sys.executable, "-m", "bench.sanitize", "--inside", report.device, report.backend]


def execute(command: list[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """What became of it, and all it printed."""
    path = os.pathsep.join(filter(None, [str(places.ROOT), environment.get("PYTHONPATH")]))
    environment = environment | {"PYTHONPATH": path}
    # Of its own session, because a sanitizer starts the program as a child, which would outlive it and hold the pipe.
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=places.ROOT, env=environment, start_new_session=True, **pipes)
    try:
        log, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        return f"cut off after {seconds:.0f} s", log
    return "ok" if process.returncode == 0 else f"exit status {process.returncode}", log


def rows(report: gpu.Report) -> Iterator[dict[str, Any]]:
    begun = report.left()
    status, log = execute(this_program(report), dict(os.environ), max(report.left() / 3, 1.0))
    shapes = len(re.findall(r"^solved ", log, re.MULTILINE))
    yield {"tool": "none", "shapes": shapes, "seconds": begun - report.left(), "status": status}
    if status != "ok":
        report.fail(f"the shapes alone: {status}: {(log.strip().splitlines() or [''])[-1]}")
        return
    program = sanitizer()
    for index, tool in enumerate(TOOLS):
        if program is None:
            yield {"tool": tool, "clean": None, "status": "compute-sanitizer not found"}
        elif report.dry:
            yield {"tool": tool, "clean": None, "status": "dry run: there is nothing to look at on a CPU"}
        else:
            yield under(tool, program, report, max(report.left() / (len(TOOLS) - index), 1.0))


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        torch.set_num_threads(1)
        inside(*sys.argv[2:4])
        return 0
    report = gpu.Report("sanitize")
    report.out.mkdir(parents=True, exist_ok=True)
    (report.out / "sanitize.log").unlink(missing_ok=True)
    with report.step("sanitize"):
        for row in rows(report):
            report.add(row)
    return report.finish(COLUMNS)


if __name__ == "__main__":
    gpu.run(main)
