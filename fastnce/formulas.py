"""From the statistics of a row to the value of its loss, and from the rows to the result. All of it O(N) torch."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastnce import hints
from fastnce.norms import compute_dtype
from fastnce.stats import ContrastiveStats, log1p_loss, softplus

Reduction = Literal["none", "mean", "sum"]


class RetrievalStats(NamedTuple):
    """How well every anchor finds its positive, from the logits of the loss; no gradient.

    rank         negatives above the best positive, int64. All of them where the anchor is nan or has no positive
    ties         negatives that cannot be told from it in this precision, int64: cosines within 3 * 2^-24 (float64 features:
                 2^-49). Where all embeddings are equal, every rank is 0 and every negative a tie. The in-batch MRR is
                 mean(1 / (1 + rank + ties / 2)): the place in the middle of those that the rounding allows, 1 + rank to 1 + rank + ties
    top1         nothing is above and nothing ties, bool; False where the anchor has no positive or is nan
    hardest      index of the hardest negative among the row's keys, in the order in-batch keys, then negative_keys; -1 without any.
                 A paired negative counts from its own row, a ragged one by its position in `values`. One that is nan is never it
    hardest_similarity   its similarity (cosine where normalize), -inf without any
    columns      the same for the other direction of a symmetric loss
    """

    rank: Tensor
    ties: Tensor
    top1: Tensor
    hardest: Tensor
    hardest_similarity: Tensor
    columns: RetrievalStats | None = None


Loss: TypeAlias = Tensor | tuple[Tensor, RetrievalStats]


def l_out(found: ContrastiveStats, one_positive: bool = False) -> Tensor:
    """log(sum over negatives and positives) - mean positive logit = softplus(lse_neg - a) + (a - pos), 0 for a row without positives;
    a = lse_pos, which is pos itself where there is one positive.

    In this form a small loss is never the difference of two large numbers: at a loss of 2.5e-5 the gradient is 2.5e-6 off where that of
    eager float32 is 1.6e-2 off. InfoNCE, NT-Xent, CLIP and SupCon's L_out (Khosla et al. 2020, eq. 2) are all this line.
    """
    if one_positive:  # every row is known to have exactly one
        return log1p_loss(found.lse_neg, found.pos)
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


def answer(where: str, loss: Tensor, found: ContrastiveStats, scale: Tensor, bias: Tensor | None, return_stats: bool) -> Loss:
    """The loss, or the pair of loss and RetrievalStats."""
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    return (loss, _retrieval(found, scale, bias)) if return_stats else loss


def _retrieval(found: ContrastiveStats, scale: Tensor, bias: Tensor | None) -> RetrievalStats:
    assert found.rank is not None and found.ties is not None and found.hardest is not None
    assert found.hardest_logit is not None and found.pos_max is not None
    logit = found.hardest_logit.detach() if bias is None else found.hardest_logit.detach() - bias.detach()
    columns = None if found.columns is None else _retrieval(found.columns, scale, bias)
    top1 = (found.rank + found.ties == 0) & (found.pos_max > -torch.inf)
    return RetrievalStats(found.rank, found.ties, top1, found.hardest, (logit / scale.detach()).to(scale.dtype), columns)
