"""The backend "triton": Triton kernels for NVIDIA GPUs from compute capability 8.0 on and for AMD GPUs. Importing this needs no Triton."""

from __future__ import annotations

from fastnce.backends._gpu import gradients, statistics
from fastnce.backends.triton.limits import keeps_output, unsupported
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted

__all__ = ["NAME", "backward", "forward", "keeps_output", "unsupported"]

NAME = "triton"


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    from fastnce.backends.triton import launches

    return statistics.forward(problem, launches)


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    from fastnce.backends.triton import launches

    return gradients.backward(problem, launches, grads, stats, wanted)
