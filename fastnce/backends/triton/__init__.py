"""The backend "triton": Triton kernels for NVIDIA GPUs from compute capability 8.0 on and for AMD GPUs. Importing this needs no Triton."""

from __future__ import annotations

from torch import Tensor

from fastnce.backends.triton.limits import keeps_output, unsupported
from fastnce.problem import Gradients, LossProblem, LossWanted, Problem, Side, SideGrad, Wanted

__all__ = ["NAME", "ROUNDED", "backward", "fake_loss", "forward", "gradients", "keeps_output", "loss", "unsupported"]

NAME = "triton"
ROUNDED = True  # see Problem.rounded


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    from fastnce.backends.triton import statistics

    return statistics.forward(problem)


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    from fastnce.backends.triton import statistics

    return statistics.backward(problem, grads, stats, wanted)


def loss(ask: LossProblem) -> tuple[Tensor, Tensor]:
    """A loss, one number or one of each row, and what its gradient needs of it."""
    from fastnce.backends.triton import losses

    return losses.loss(ask)


def fake_loss(ask: LossProblem) -> tuple[Tensor, Tensor]:
    """The same for tensors without values: nothing is launched."""
    from fastnce.backends.triton import losses

    return losses.fake_loss(ask)


def gradients(ask: LossProblem, kept: Tensor, upstream: Tensor, wanted: LossWanted) -> list[Tensor | None]:
    """The gradients of `loss` in the order of LossWanted; None where not asked for."""
    from fastnce.backends.triton import losses

    return losses.gradients(ask, kept, upstream, wanted)
