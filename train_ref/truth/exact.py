"""The exact answer: a loss in float64, its rows and its derivatives, in blocks of rows, so that N may be 32,768.

losses.py is the definition, and in float64 the two agree where a loss is not small. Here the logits are taken less the mean of the row's
positives, t_ij = scale * (cos_ij - mean_P cos_ip). Then the loss of a row is

    log(1 + sum over negatives of exp t_ij)        one positive: nothing cancels, a loss of 1e-50 has all its digits, and so have 1 - p and
                                                   the gradients, which p - 1 would lose
    log(sum over keys of exp t_ij)                 several positives: at least the log of their number
    log(sum over negatives of exp t_ij)            DCL, whose sum leaves the positives out

float64 rounds its own logits. To judge float64, give the logits with more digits: see `logits`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train_ref.truth import Loss

BLOCK = 2**22  # logits at a time: 32 MiB


class Answer(NamedTuple):
    """In float64; gradients are those of the mean, by the raw rows of each of the loss's sides."""

    mean: float
    rows: Tensor
    gradients: list[Tensor]
    by_scale: float


class Sizes(NamedTuple):
    """The sums of magnitudes of the terms of each gradient (Frobenius) and of dL/dscale.

    They measure the error where the exact value is 0, as every gradient is for D = 1.
    """

    gradients: list[float]
    by_scale: float


# Of a side, a block of its rows and their positives: t, and to be added to it what float64 cannot hold, both (rows, keys) float64.
Logits = Callable[[int, slice, Tensor], tuple[Tensor, Tensor]]


def sides_of(loss: Loss, of_leaves: dict[str, Tensor]) -> list[Tensor]:
    """Leaves, or their gradients, with those of one side joined."""
    return [torch.cat([of_leaves[leaf] for leaf in side]) for side in loss.sides]


def less_positives(cosines: Tensor, positive: Tensor) -> Tensor:
    """Less the mean of the row's positives; as they are where it has none."""
    count = positive.sum(1, keepdim=True).clamp(min=1)
    return cosines - cosines.masked_fill(~positive, 0.0).sum(1, keepdim=True) / count


def values(t: Tensor, positive: Tensor, negative: Tensor, in_sum: bool) -> Tensor:
    """The loss of every row; 0, also in the gradient, of a row without positives and of one whose sum is empty."""
    count = positive.sum(1, keepdim=True)
    kept = negative | positive if in_sum else negative
    asked = (count[:, 0] > 0) & kept.any(1)
    t = t.masked_fill(~(kept & asked[:, None]), -torch.inf)
    if not in_sum:
        return t.masked_fill(~asked[:, None], 0.0).logsumexp(1).masked_fill(~asked, 0.0)
    # The only positive of a row has t = 0. As a number, without a derivative: that would be 1 - p and be taken from 1 again.
    t = t.masked_fill(positive & (count == 1), 0.0)
    most = t.detach().amax(1).clamp(min=0.0)
    shares = (t - most[:, None]).exp()
    one = (-most).exp()
    beyond_one = (shares.masked_fill(~positive, 0.0).sum(1) - one) + shares.masked_fill(~negative, 0.0).sum(1)
    return (most + torch.log1p(torch.expm1(-most) + beyond_one)).masked_fill(~asked, 0.0)


def exact(loss: Loss, arguments: dict[str, Tensor], scale: float, logits: Logits | None = None) -> tuple[Answer, Sizes]:
    """The answer on the stored values of the arguments, on their device.

    scale   multiplies the cosines
    logits  for more digits than float64's; the values of rows then have them too, the derivatives do not
    """
    wide = [side.double() for side in sides_of(loss, arguments)]
    inverse = [1 / torch.linalg.vector_norm(side, dim=1, keepdim=True) for side in wide]
    units = [side * r for side, r in zip(wide, inverse, strict=True)]
    gradients, magnitudes = ([torch.zeros_like(unit) for unit in units] for _ in range(2))
    n = len(units[0])
    rows = units[0].new_zeros(n)
    by_scale = size_by_scale = 0.0
    for side in range(2 if loss.both_ways else 1):
        q, k = units[side], units[-1 - side]
        index = torch.arange(len(k), device=k.device)
        for block in (slice(start, start + max(1, BLOCK // len(k))) for start in range(0, n, max(1, BLOCK // len(k)))):
            cosines = q[block] @ k.T
            positive, negative = loss.pairs(arguments, torch.arange(n, device=k.device)[block, None], index)
            t, beyond = (scale * less_positives(cosines, positive), None) if logits is None else logits(side, block, positive)
            value = values(t.requires_grad_(), positive, negative, loss.positive_in_sum)
            (by_t,) = torch.autograd.grad(value.sum(), t)
            share = (0.5 if loss.both_ways else 1.0) / n
            rows[block] += n * share * (value.detach() if beyond is None else value.detach() + (by_t * beyond).sum(1))
            by_scale += share * (by_t * t.detach()).sum().item() / scale
            weights = share * less_sum(by_t, positive)
            size_by_scale += (weights * cosines).abs().sum().item()
            for into, w, x, y in ((gradients, weights, q, k), (magnitudes, weights.abs(), q.abs(), k.abs())):
                into[side][block] += w @ y
                into[-1 - side] += w.T @ x[block]
    raw = [scale * r * g for r, g in zip(inverse, gradients, strict=True)]
    # The radial part, which normalisation removes.
    tangent = [g - (g * unit).sum(1, keepdim=True) * unit for g, unit in zip(raw, units, strict=True)]
    sizes = [(scale * r * g).norm().item() for r, g in zip(inverse, magnitudes, strict=True)]
    return Answer(rows.mean().item(), rows, tangent, by_scale), Sizes(sizes, size_by_scale)


def less_sum(by_t: Tensor, positive: Tensor) -> Tensor:
    """dL/d(scale cos_ij) from dL/dt_ij: each positive takes its part of what all others add."""
    count = positive.sum(1, keepdim=True).clamp(min=1)
    return by_t - positive * (by_t.sum(1, keepdim=True) / count)
