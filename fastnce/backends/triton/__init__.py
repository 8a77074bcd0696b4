"""The backend "triton": Triton kernels for NVIDIA GPUs from compute capability 8.0 on and for AMD GPUs. Importing this needs no Triton."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from fastnce.backends._gpu import gradients as statistics_gradients
from fastnce.backends._gpu import statistics
from fastnce.backends.triton.limits import keeps_output, unsupported
from fastnce.problem import Gradients, LossProblem, LossWanted, Problem, Side, SideGrad, Wanted

__all__ = ["NAME", "ROUNDED", "backward", "forward", "gradients", "keeps_output", "loss", "unsupported", "without_launches"]

NAME = "triton"
ROUNDED = True  # see Problem.rounded


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    from fastnce.backends.triton import passes

    return statistics.forward(problem, passes)


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    from fastnce.backends.triton import passes

    return statistics_gradients.backward(problem, passes, grads, stats, wanted)


def loss(ask: LossProblem) -> tuple[Tensor, Sequence[Tensor]]:
    """A loss, one number or one of each row, and what its gradient needs of it."""
    from fastnce.backends.triton import losses

    return losses.loss(ask)


def gradients(ask: LossProblem, kept: Sequence[Tensor], upstream: Tensor, wanted: LossWanted) -> list[Tensor | None]:
    """The gradients of `loss` in the order of LossWanted; None where not asked for."""
    from fastnce.backends.triton import losses

    return losses.gradients(ask, losses.Kept(*kept), upstream, wanted)


@contextmanager
def without_launches() -> Iterator[None]:
    """Inside, this thread allocates results and launches nothing."""
    from fastnce.backends.triton import launches

    before, launches.this_thread.launches = launches.this_thread.launches, False
    try:
        yield
    finally:
        launches.this_thread.launches = before
