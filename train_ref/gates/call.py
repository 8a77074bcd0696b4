"""One call of a loss, forward and backward, by any implementation: the operator gate compares these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train_ref.gates.cases import Case

# The upstream gradient: random for the loss of every row, or one multiple of the mean.
Drive = Literal["rows", "mean"]
UPSTREAM = -1.7  # of the mean: neither 1 nor positive

# Of the features and the scale: the losses of rows, which may be none where only the mean is driven, and the mean.
Both = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Answer:
    """In float64 on the CPU. Gradients are multiplied by the length of their row: free of the lengths of the rows."""

    mean: float
    rows: Tensor
    gradients: Sequence[Tensor]
    by_scale: float


def upstream(drive: Drive, n_rows: int) -> Tensor:
    """dL/d(loss of a row), (n_rows,) float64: as large as those of a mean."""
    if drive == "mean":
        return torch.full((n_rows,), UPSTREAM / n_rows, dtype=torch.float64)
    return torch.randn(n_rows, generator=torch.Generator().manual_seed(n_rows), dtype=torch.float64) / n_rows


def call(loss: Both, case: Case, stored: Sequence[Tensor], drive: Drive, loss_scale: float, device: torch.device) -> Answer:
    """Run a loss on features as they are stored. Gradients are taken of loss_scale times the loss, and divided by it."""
    leaves = [side.to(device).detach().requires_grad_() for side in stored]
    wide = torch.float64 if stored[0].dtype == torch.float64 else torch.float32
    # Rounded to float32 for all, so that every dtype has the same scale.
    scale = torch.tensor(1 / case.temperature, dtype=torch.float32).to(device, wide).requires_grad_()
    rows, mean = loss(leaves, scale)
    value = (rows * (upstream("rows", len(rows)) * loss_scale).to(rows)).sum() if drive == "rows" else mean * (UPSTREAM * loss_scale)
    *gradients, by_scale = torch.autograd.grad(value, [*leaves, scale], materialize_grads=True)
    pairs = zip(gradients, stored, strict=True)
    return Answer(
        mean.item(),
        rows.detach().double().cpu(),
        [gradient.double().cpu() * lengths(side) / loss_scale for gradient, side in pairs],
        by_scale.double().item() / loss_scale,
    )


def lengths(side: Tensor) -> Tensor:
    """(N, 1) float64."""
    return side.double().norm(dim=1, keepdim=True)
