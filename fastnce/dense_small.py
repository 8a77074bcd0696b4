"""Small problems on the CPU: torch's own dense cross-entropy, which is faster there than tiles.

A tiled forward and backward begin with 0.4 ms of bookkeeping. In that time a core multiplies 256 x 256 logits of dimension 128 three times.
Up to about that size a dozen dense operations with torch's own backward take less time.

Cross-entropy is -log_softmax at the positive. Its rounding, 6e-8 absolute, would show in a small loss and its gradient. So a loss below
SOLVED is computed again from the same logits, as log1p(sum exp(s - pos)), which is exact there and a little slower. The value of the loss
is read to decide; on a CPU that costs nothing.
"""

from __future__ import annotations

import math

import torch
import torch.autograd.forward_ad
import torch.nn.functional as F
from torch import Tensor

from fastnce import arguments
from fastnce.autograd import first_order_only
from fastnce.precision import EPS, LARGEST
from fastnce.problem import Problem

LARGEST_LOGITS = 2**18  # one tile
LARGEST_PRODUCT = 20 * 2**20  # multiplications; measured break-even between 16 and 36 times 2^20
SOLVED = 0.05


def mean_cross_entropy(problem: Problem, backend: str, reduction: str, weight: Tensor | None) -> Tensor | None:
    """Mean over the rows, and with two_sided over both directions, of log sum exp - positive logit.

    None where this shortcut does not serve: it takes a plain mean, and exactly one positive for every row, at `offset`."""
    if reduction != "mean" or weight is not None or not _serves(problem, backend):
        return None
    q, k, pairs, scale = problem.q, problem.keys, problem.pairs, problem.scale
    if not 0 < float(scale.detach()) < math.inf:
        return None
    x = _unit(q)
    y = x if problem.symmetric or x is None else _unit(k)
    if x is None or y is None:
        return None
    rows, offset = q.shape[0], pairs.offset or 0
    if scale.requires_grad:
        # A constant taken from all logits changes no loss. Less one of them, the derivative by scale is a sum of differences of cosines.
        # In a collapsed batch, where all cosines are equal, it is then 0. Of the cosines themselves it would be the rounding of a sum that
        # cancels, and an optimizer would follow it.
        cosines = x @ y.T
        s = (cosines - cosines[0, offset].detach()) * scale
        if pairs.exclude_self:
            s = s.fill_diagonal_(-torch.inf)
    else:
        start = x.new_zeros(rows, k.shape[0])
        if pairs.exclude_self:
            start.fill_diagonal_(-torch.inf)
        s = torch.addmm(start, x, y.T, alpha=float(scale))
    target = torch.arange(offset, rows + offset, device=q.device)
    if problem.symmetric:
        target = target.remainder_(rows)
    sides = [s, s.T] if problem.two_sided else [s]
    loss = _mean([F.cross_entropy(side, target) for side in sides])
    value = float(loss.detach())
    if value < SOLVED:
        loss = _mean([_apart(side, target) for side in sides])
    return loss if math.isfinite(value) else None


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


def _apart(s: Tensor, target: Tensor) -> Tensor:
    """Mean over the rows of log(1 + sum over the negatives of exp(s_ij - positive)).

    No maximum is needed: there are at most 512 rows, since there are as many columns. Where their mean loss is below SOLVED (in one of two
    directions, below twice that) no row is above 52 nats, and exp overflows at 88.
    """
    positive = s.gather(1, target[:, None])
    return (s.scatter(1, target[:, None], -torch.inf) - positive).exp().sum(1).log1p().mean()


def _serves(problem: Problem, backend: str) -> bool:
    q, k, pairs = problem.q, problem.keys, problem.pairs
    rows, columns = q.shape[0], k.shape[0]
    # Whether the code is traced is asked first: a shape that is looked at before would become a guard of the traced code.
    return (
        backend == "auto"
        and not arguments.backend_of_environment("")
        and all(arguments.has_values(t) and t.device.type == "cpu" for t in (q, k, problem.scale))
        and torch.autograd.forward_ad._current_level == -1
        and not torch.is_autocast_enabled("cpu")
        and q.dtype in (torch.float32, torch.float64)
        and problem.normalize
        and pairs.offset is not None
        and pairs.q_label is pairs.q_exclude is pairs.mask is problem.bias is None
        and columns > (2 if problem.symmetric else 1)  # every row has a negative
        and 0 < rows * columns <= LARGEST_LOGITS
        and rows * columns * q.shape[1] <= LARGEST_PRODUCT
        and (2 * pairs.offset == rows if problem.symmetric else 0 <= pairs.offset <= columns - rows)
        and (rows == columns or not problem.two_sided)
    )


def _unit(x: Tensor) -> Tensor | None:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    shortest, longest = torch.aminmax(norm.detach())
    if not (float(shortest) >= EPS and float(longest) <= LARGEST):
        return None
    unit = x / norm
    if unit.requires_grad:
        unit.register_hook(first_order_only)
    return unit
