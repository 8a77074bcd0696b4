"""From the statistics of a row to the value of its loss, and from the rows to the result. All of it O(N) torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastnce.precision import compute_dtype, softplus
from fastnce.statistics import ContrastiveStats

Reduction = Literal["none", "mean", "sum"]


def l_out(found: ContrastiveStats, one_positive: bool = False) -> Tensor:
    """log(sum over negatives and positives) - mean positive logit = softplus(lse_neg - a) + (a - pos), 0 for a row without positives;
    a = lse_pos, which is pos itself where there is one positive.

    In this form a small loss is never the difference of two large numbers: at a loss of 2.5e-5 the gradient is 2.5e-6 off where that of
    eager float32 is 1.6e-2 off. InfoNCE, NT-Xent, CLIP and SupCon's L_out (Khosla et al. 2020, eq. 2) are all this line.
    """
    if one_positive:  # every row is known to have exactly one
        return softplus(found.lse_neg - found.pos)
    several = found.n_pos > 1
    anchor = torch.where(several, found.lse_pos, found.pos)
    # Not anchor - pos: with one positive that is 0 in value, but its gradient, +1 - 1 beside -p, would round p away.
    values = softplus(found.lse_neg - anchor) + torch.where(several, found.lse_pos - found.pos, 0.0)
    return values.masked_fill(found.n_pos == 0, 0.0)


def l_in(found: ContrastiveStats) -> Tensor:
    """log(sum over negatives and positives) - log(mean over positives): SupCon's L_in (Khosla et al. 2020, eq. 3), 0 without positives."""
    none = found.n_pos == 0
    values = softplus(found.lse_neg - found.lse_pos.masked_fill(none, 0.0)) + found.n_pos.clamp(min=1).to(found.pos.dtype).log()
    return values.masked_fill(none, 0.0)


def decoupled(found: ContrastiveStats) -> Tensor:
    """log(sum over negatives) - mean positive logit (Yeh et al. 2021, eq. 6), 0 for a row without positives or without negatives."""
    nothing = (found.n_pos == 0) | (found.lse_neg == -torch.inf)
    return (found.lse_neg.masked_fill(nothing, 0.0) - found.pos).masked_fill(nothing, 0.0)


def reduced(values: Tensor, weight: Tensor | None, reduction: Reduction, like: Tensor) -> Tensor:
    """none, sum, or mean (with weights: sum of weight * value over sum of weight, 0 where that is 0), in the dtype of results for
    features `like`."""
    if weight is not None:
        values = values * weight
    if reduction == "sum":
        values = values.sum()
    elif reduction == "mean" and weight is None:
        values = values.mean()
    elif reduction == "mean" and weight is not None:
        total = weight.sum()
        values = values.sum() / total.masked_fill(total == 0, 1.0)
    return values.to(compute_dtype(like.dtype))
