"""From the statistics of a row to the value of its loss, and from the values to the result: O(N) operations of torch."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from fastnce.precision import compute_dtype, softplus

Reduction = Literal["none", "mean", "sum"]


class Statistics(Protocol):
    """What a formula reads of the rows: ContrastiveStats, as users have them, or Side, as backends have them."""

    @property
    def lse_neg(self) -> Tensor: ...
    @property
    def lse_pos(self) -> Tensor: ...
    @property
    def pos(self) -> Tensor: ...
    @property
    def n_pos(self) -> Tensor: ...


def l_out(found: Statistics, one_positive: bool = False) -> Tensor:
    """InfoNCE, NT-Xent, CLIP and SupCon's L_out (Khosla et al. 2020, eq. 2); 0 for a row without positives.

        log(sum over negatives and positives) - mean positive logit = softplus(lse_neg - lse_pos) + (lse_pos - pos)

    In the second form a small loss is never the difference of two large numbers. At a loss of 2.5e-5 the relative error of its gradient is
    2.5e-6, and that of eager float32 1.6e-2. With one positive, lse_pos is pos.
    """
    if one_positive:
        return softplus(found.lse_neg - found.pos)
    several = found.n_pos > 1
    anchor = torch.where(several, found.lse_pos, found.pos)
    # Where a row has one positive, anchor - pos would be 0 too, but its gradient is +1 - 1, and p added to it in between is rounded away.
    values = softplus(found.lse_neg - anchor) + torch.where(several, found.lse_pos - found.pos, 0.0)
    return values.masked_fill(found.n_pos == 0, 0.0)


def l_in(found: Statistics) -> Tensor:
    """SupCon's L_in (Khosla et al. 2020, eq. 3): log(sum over negatives and positives) - log(mean over positives); 0 without positives."""
    none = found.n_pos == 0
    values = softplus(found.lse_neg - found.lse_pos.masked_fill(none, 0.0)) + found.n_pos.clamp(min=1).to(found.pos.dtype).log()
    return values.masked_fill(none, 0.0)


def decoupled(found: Statistics) -> Tensor:
    """DCL (Yeh et al. 2021, eq. 6): log(sum over negatives) - mean positive logit; 0 for a row without positives or without negatives."""
    nothing = (found.n_pos == 0) | (found.lse_neg == -torch.inf)
    return (found.lse_neg.masked_fill(nothing, 0.0) - found.pos).masked_fill(nothing, 0.0)


def reduced(values: Tensor, weight: Tensor | None, reduction: Reduction, like: Tensor) -> Tensor:
    """The values themselves, their sum or their mean, in the dtype of results for features `like`.

    The weighted mean is sum(weight * value) / sum(weight), and 0 where the weights sum to 0.
    """
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
