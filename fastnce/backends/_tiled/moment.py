"""The derivative by scale: a sum over all pairs, in a form that keeps its digits where the weights cancel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnce.precision import LOG2E
from fastnce.problem import Problem, Side


class Moment:
    """sum_ij w_ij t_ij, of which dscale is a multiple, as

        sum w (t - center) + center * sum w      with the exact sum of w, Parts.due

    Where all rows point nearly the same way, all t are nearly the same large number, and the w cancel. Without the center, the rounding of
    w times that number would be the result. <x_i, dx_i> is the same sum, and is not used for the same reason.

    center        float32: the tiles subtract it from their t
    aligned       t of the aligned pairs that are kept out of the tiles
    at            the center of these. Their t are rounded less than the tiles' own: it is `center` less the difference, as far as that is
                  the same in all aligned pairs. So where all rows are equal, every term is 0
    """

    def __init__(self, problem: Problem, rows: Side, in_tile: bool, dtype: torch.dtype, due: Tensor, lift: Tensor) -> None:
        def base_2(nats: Tensor) -> Tensor:
            return (nats if problem.bias is None else nats - problem.bias) * LOG2E

        some = rows.n_pos > 0
        count = some.sum().clamp(min=1)
        # Rounding gives back the float32 numbers from which pos was made.
        self.aligned = base_2(rows.pos).to(dtype).to(due.dtype)
        mean = self.aligned.where(some, 0.0).sum() / count
        # Where no row has a positive, the center is the mean of log(sum / number of keys), which is t if all t are equal.
        log_mean = base_2(rows.lse_neg - math.log(max(problem.keys.shape[0], 1)))
        log_mean = log_mean.masked_fill(log_mean.isinf(), 0.0).sum() / max(len(some), 1)
        alike = torch.zeros_like(due)
        if not in_tile:
            more = (rows.own_pos - self.aligned).where(some, 0.0)
            alike = more.sum() / count
            spread = ((more - alike).where(some, 0.0).square().sum() / count).sqrt()
            alike = alike.where(alike.abs() > spread, 0.0)
        self.center = (torch.where(some.any(), mean, log_mean) + alike).to(problem.scale.dtype)
        self.at = self.center - alike
        self.lift = lift
        self.lifted = self.at * due * lift

    def add(self, terms: Tensor) -> None:
        """Terms that are multiplied by lift, as the weights are."""
        self.lifted = self.lifted + terms.sum(dtype=self.lifted.dtype)

    def total(self) -> Tensor:
        return self.lifted / self.lift
