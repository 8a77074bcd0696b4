"""Problems that the Triton kernels can run, by metadata alone."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from fastnce.backends._gpu import limits
from fastnce.backends.triton import toolchain
from fastnce.problem import Problem

OLDEST = (3, 6)
try:
    INSTALLED: str | None = version("triton")
except PackageNotFoundError:
    INSTALLED = None


def unsupported(problem: Problem) -> list[str]:
    """Why not, with what to do about it; empty: these kernels run it. Reads no values."""
    reasons, device = [], problem.q.device
    if INSTALLED is None:
        reasons.append("triton is not installed (python -m pip install triton)")
    elif tuple(int(part) for part in INSTALLED.split(".")[:2]) < OLDEST:
        reasons.append(f"triton {INSTALLED} is too old (python -m pip install 'triton>={OLDEST[0]}.{OLDEST[1]}')")
    reasons += limits.of_operands(problem)
    if device.type == "cuda":
        # A machine without a GPU need not have the tools of one.
        reasons += limits.of_gpu(device) or list(toolchain.missing())
    elif not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        reasons.append(f"device {device.type} (needs CUDA, or TRITON_INTERPRET=1 for Triton's interpreter on the CPU)")
    return reasons


def keeps_output(problem: Problem) -> bool:
    """Whether own_pos of forward is (M, D + 1): the mean of the keys, and of the logits, by the weights p. Then backward needs no tiles."""
    rows_only = not (problem.symmetric or problem.two_sided)
    alone = problem.pairs.offset is None and not problem.pairs.positives_by_content()
    return problem.frozen and rows_only and alone and limits.fits(problem)
