"""The backend "cuda": the CUDA C++ kernels of csrc/cuda, where that library is built. Importing this file loads nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from fastnce.backends._gpu import gradients, limits, statistics
from fastnce.backends.cuda import passes
from fastnce.compiled import find
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted

NAME = "cuda"


@cache
def runs_on(device: int) -> bool:
    """Whether the library, which is loaded, has code for this GPU that its driver takes; -1: whether it is the tests' build for the CPU."""
    found: bool = torch.version.hip is None and torch.ops.fastnce_cuda.runs_on(device)
    return found


def library_path() -> Path | None:
    """The library of these very sources, None where it has not been built."""
    return find.library_path(NAME)


def _loaded() -> tuple[str, str]:
    """(Why the library is not loaded, type of the device that it is for)."""
    objection = find.objection(NAME)
    return objection or "", "cpu" if objection is None and runs_on(-1) else "cuda"


def _no_code(device: int) -> list[str]:
    """The objection where the library is loaded and does not run on this GPU."""
    if runs_on(device):
        return []
    major, minor = torch.cuda.get_device_capability(device)
    path = library_path()
    held = ", ".join(find.archs(path)) if path else ""
    return [
        f"the library, which holds code for {held or 'other GPUs'}, does not run on this one, sm_{major}{minor} "
        "(python -m fastnce build-cuda, with an nvcc no newer than the driver)"
    ]


# Dynamo traces unsupported() and takes their answers as constants. torch.compiler.assume_constant_result does the same, but importing it
# takes a second.
_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]
_no_code._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(problem: Problem) -> list[str]:
    """Why not, with what to do about it; empty: these kernels run it. Reads no values."""
    (objection, served), device = _loaded(), problem.q.device
    reasons = [f"library {objection}"] if objection else []
    reasons += limits.of_operands(problem)
    if device.type != served:
        needed = "CUDA" if served == "cuda" else "the CPU: the library is the tests' build of its kernels for it"
        reasons.append(f"device {device.type} (needs {needed})")
    elif device.type == "cuda" and torch.version.hip is not None:
        reasons.append("an AMD GPU: the library is machine code of NVIDIA's (backend='triton' compiles for AMD's)")
    elif device.type == "cuda":
        reasons += limits.of_gpu(device) or ([] if objection else _no_code(device.index))
    return reasons


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    return statistics.forward(problem, passes)


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    return gradients.backward(problem, passes, grads, stats, wanted)
