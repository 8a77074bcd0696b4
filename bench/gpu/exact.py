"""What a loss should be, in float64 and in blocks of rows on the device of its inputs: no N x N matrix, so N may be 32,768.

The same answer as exact.py, which holds whole matrices on the CPU, and two losses more. A task is one direction or two:

    nt_xent   z against z without itself, the positive half the rows away      info_nce   q against k, the positive at the same index
    clip      info_nce in both directions, each counting one half              sup_con    z against z without itself, equal labels
    moco      q against [k; queue]: of the k only its own, the queue is all negatives; k and queue get no gradient
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.exact import Answer, Sizes

BLOCK = 2048  # rows: a block at N = 32,768 is 512 MiB in float64

Masks = Callable[[slice], tuple[Tensor, Tensor]]  # rows -> (positive, negative), bool (rows, N)


class Direction(NamedTuple):
    """Rows of side `q` against rows of side `k`."""

    q: int
    k: int
    masks: Masks
    several: bool  # a row may have several positives
    share: float


def directions(loss: str, leaves: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Direction]]:
    """The sides that a loss compares, and what it compares."""
    if loss in ("nt_xent", "sup_con"):
        z = leaves[0]
        index = torch.arange(len(z), device=z.device)
        partner = index.roll(len(z) // 2)

        def of_views(rows: slice) -> tuple[Tensor, Tensor]:
            itself = index[rows, None] == index
            if loss == "sup_con":
                positive = (leaves[1][rows, None] == leaves[1]) & ~itself
            else:
                positive = partner[rows, None] == index
            return positive, ~(positive | itself)

        return [z], [Direction(0, 0, of_views, loss == "sup_con", 1.0)]
    q, k = leaves[0], leaves[1]
    own = torch.arange(len(q), device=q.device)
    if loss == "moco":
        k = torch.cat([k, leaves[2]])
    index = torch.arange(len(k), device=q.device)

    def of_pairs(rows: slice) -> tuple[Tensor, Tensor]:
        positive = own[rows, None] == index
        negative = ~positive
        if loss == "moco":
            negative[:, : len(q)] = False
        return positive, negative

    both = loss == "clip"
    share = 0.5 if both else 1.0
    return [q, k], [Direction(0, 1, of_pairs, False, share), Direction(1, 0, of_pairs, False, share)][: 2 if both else 1]


def _weights(cosines: Tensor, scale: float, positive: Tensor, negative: Tensor, several: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block of rows: their losses, dL_i/ds_ij, and sum_j of dL_i/ds_ij cos_ij.

    With one positive everything comes from the negatives' cosines minus its own: log(1 + sum exp(s - pos)) and its derivatives lose
    nothing where the loss is 1e-13, and 1 - p, formed from p, would lose all.
    """
    if not several:
        difference = cosines - cosines.masked_fill(~positive, 0.0).sum(1, keepdim=True)
        gap = (scale * difference).masked_fill(~negative, -torch.inf)
        value = torch.nn.functional.softplus(gap.logsumexp(1), threshold=700.0)
        weights = (gap - value[:, None]).exp()
        by_scale = (weights * difference).sum(1)
        return value, weights - weights.sum(1, keepdim=True) * positive, by_scale
    s = scale * cosines
    count = positive.sum(1, keepdim=True).double()  # a quotient of integers would be float32
    total = s.masked_fill(~(positive | negative), -torch.inf).logsumexp(1, keepdim=True)
    mean = s.masked_fill(~positive, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    weights = (s - total).exp() * (positive | negative) - positive / count.clamp(min=1)
    weights = weights.masked_fill(count == 0, 0.0)
    value = (total - mean).masked_fill(count == 0, 0.0)[:, 0]
    return value, weights, (weights * cosines).sum(1)


def exact(loss: str, leaves: tuple[Tensor, ...], scale: float) -> tuple[Answer, Sizes]:
    """The mean loss, every row's, the gradients of the features that learn, and dL/dscale, on the stored values of the leaves."""
    sides, found = directions(loss, leaves)
    wide = [side.double() for side in sides]
    inverse = [1 / torch.linalg.vector_norm(side, dim=1, keepdim=True) for side in wide]
    units = [side * r for side, r in zip(wide, inverse, strict=True)]
    gradients, magnitudes = ([torch.zeros_like(unit) for unit in units] for _ in range(2))
    n = len(units[0])
    values = torch.zeros(n, dtype=torch.float64, device=units[0].device)
    by_scale = size_by_scale = 0.0
    for one in found:
        q, k = units[one.q], units[one.k]
        for start in range(0, n, BLOCK):
            rows = slice(start, min(start + BLOCK, n))
            cosines = q[rows] @ k.T
            value, weights, of_scale = _weights(cosines, scale, *one.masks(rows), one.several)
            weights *= one.share / n
            values[rows] += one.share * value
            by_scale += one.share / n * of_scale.sum().item()
            size_by_scale += (weights * cosines).abs().sum().item()
            for into, w, x, y in ((gradients, weights, q, k), (magnitudes, weights.abs(), q.abs(), k.abs())):
                into[one.q][rows] += w @ y
                into[one.k] += w.T @ x[rows]
    learning = 1 if len(sides) == 1 or loss == "moco" else 2
    raw = [scale * r * g for r, g in zip(inverse, gradients, strict=True)][:learning]
    # The radial part, which normalisation removes.
    tangent = [g - (g * unit).sum(1, keepdim=True) * unit for g, unit in zip(raw, units, strict=False)]
    sizes = [float((scale * r * g).norm()) for r, g in zip(inverse, magnitudes, strict=True)][:learning]
    answer = Answer(values.mean().item(), values.cpu().numpy(), [g.cpu().numpy() for g in tangent], by_scale)
    return answer, Sizes(sizes, size_by_scale)
