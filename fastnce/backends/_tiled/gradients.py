"""Backward beside the tiles: the coefficients of the weights, and the gradients that follow from the sums of the tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce.backends._tiled.gemm import inner
from fastnce.backends._tiled.moment import Moment
from fastnce.backends._tiled.operands import Work
from fastnce.precision import LOG2E
from fastnce.problem import Gradients, Side, SideGrad, Wanted


class Weights(NamedTuple):
    """Coefficients of one side, from which a tile makes its weights, multiplied by lift:

        w = negative * exp2(t - base_neg) for a negative,   positive * exp2(t - base_pos) + mean for a positive

    Unshifted, tiles hold exp2(t), and exp2(-base) is inside the coefficient.
    """

    negative: Tensor
    positive: Tensor
    mean: Tensor
    base_neg: Tensor
    base_pos: Tensor

    @staticmethod
    def of(work: Work, grads: list[SideGrad], stats: list[Side]) -> tuple[list[Weights], Tensor, Tensor]:
        """The coefficients of every side, lift, and Parts.due. Both sides are computed at once, in matrices with a line for each field."""
        # A log-sum or mean of a row without a negative, or without a positive, is a constant, whatever gradient came down.
        empty = _of_both([(side.lse_neg, side.lse_pos, side.lse_pos) for side in stats]) == -torch.inf
        given = _of_both([grad.of_all(side) for grad, side in zip(grads, stats, strict=True)]).masked_fill_(empty, 0.0)
        lift = _lift_of(given)
        # Such a row gets base 0 (sum 1): -inf - -inf and 0 / 0 would be nan.
        own = _of_both([(side.own_neg, side.own_pos) for side in stats]).masked_fill_(empty[:2], 1.0 if work.unshifted else 0.0)
        base, weights, in_tiles = own.to(work.x.dtype), given * lift, 2 if work.in_tile else 1
        if work.unshifted:
            weights[:in_tiles].div_(own[:in_tiles])
        else:
            # Rounding to float32 takes up to 1e-5 of a bit from the base, at a temperature of 0.005. It goes into the coefficient.
            weights[:in_tiles].mul_(_rest_of(base[:in_tiles], own[:in_tiles]))
        if work.in_tile:
            weights[2].div_(_of_both([(side.n_pos,) for side in stats])[0].clamp_(min=1))
        weights, due = weights.to(work.x.dtype), given[0] + given[1] + given[2]
        rows = [len(side.pos) for side in stats]
        found = [Weights(*each) for each in zip(*(line.split(rows) for line in (*weights, *base)), strict=True)]
        return found, lift, torch.stack([side.sum() for side in due.split(rows)]).sum()


class Parts(NamedTuple):
    """The sums over pairs from which backward makes its gradients.

    weights  of the rows, then of the columns where two_sided
    dx, dy   sum_j w_ij y_j and sum_i w_ij x_i, times lift; None where not asked for. Where k is q, both are one tensor
    moment   sum_ij w_ij t_ij; None where not asked for
    due      sum_ij w_ij. It is known without the tiles: the exponentials of a row, divided by their own sum, add up to one
    """

    work: Work
    wanted: Wanted
    weights: list[Weights]
    dx: Tensor | None
    dy: Tensor | None
    moment: Moment | None
    due: Tensor
    lift: Tensor

    @staticmethod
    def of(work: Work, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Parts:
        """The sums before the first tile: they hold the pairs that are kept out of the tiles."""
        problem = work.problem
        weights, lift, due = Weights.of(work, grads, stats)
        moment = Moment(problem, stats[0], work.in_tile, work.x.dtype, due, lift) if wanted.scale else None
        dx = torch.zeros_like(work.x) if wanted.q else None
        dy = dx if problem.symmetric else torch.zeros_like(work.y) if wanted.k else None
        parts = Parts(work, wanted, weights, dx, dy, moment, due, lift)
        if not work.in_tile:
            parts._add_aligned()
        return parts

    @property
    def in_tiles(self) -> bool:
        """Whether some gradient that is asked for needs the tiles; dbias does not."""
        return self.wanted.q or self.wanted.k or self.wanted.scale

    def _add_aligned(self) -> None:
        work, (i, j) = self.work, self.work.aligned()
        # With one positive, lse_pos and pos are the same number, so their gradients add up. So do those of the two ends of a pair.
        ends = [(self.weights[side].positive + self.weights[side].mean)[own] for side, own in work.ends(i, j)]
        w = ends[0] if len(ends) == 1 else ends[0] + ends[1]
        if self.moment is not None:
            self.moment.add((self.moment.aligned[i] - self.moment.at) * w)
        if self.dx is not None:
            self.dx[i].addcmul_(w[:, None], work.y[j])
        if self.dy is not None:
            self.dy[j].addcmul_(w[:, None], work.x[i])

    def result(self) -> Gradients:
        """dL/d(q, k, scale, bias). dx and dy are overwritten."""
        work, problem = self.work, self.work.problem
        dq_dtype, dk_dtype = problem.gradient_dtypes
        return Gradients(
            None if self.dx is None else self._project(self.dx, work.x, work.r_x, dq_dtype),
            None if self.dy is None or problem.symmetric else self._project(self.dy, work.y, work.r_y, dk_dtype),
            None if self.moment is None else (self.moment.total() / (LOG2E * problem.scale)).to(problem.scale.dtype),
            self.due.to(problem.scale.dtype) if self.wanted.bias else None,
        )

    def _project(self, dx: Tensor, x: Tensor, r: Tensor | None, dtype: torch.dtype) -> Tensor:
        """From lift * dL/dx (natural log) to dL/drows: ds/dq_hat = root / log2(e) * y, then the backward of q_hat = r q."""
        root = self.work.root
        factor = root / LOG2E / self.lift
        if r is None:
            dx.mul_(factor.to(dx.dtype))
        else:
            radial = (inner(x, dx) / -(root * root)).to(dx.dtype)
            dx.addcmul_(x, radial[:, None]).mul_((r * factor).to(dx.dtype)[:, None])
        return dx[:, : self.work.problem.q.shape[1]].to(dtype).contiguous()


def _of_both(sides: Sequence[Sequence[Tensor]]) -> Tensor:
    """(fields, rows of both sides) from the vectors of each side."""
    vectors = [vector for field in zip(*sides, strict=True) for vector in field]
    return torch.cat(vectors).view(len(sides[0]), sum(len(side[0]) for side in sides))


def _lift_of(given: Tensor) -> Tensor:
    """The power of two that brings the largest upstream gradient to between 1/2 and 1. Without it, the weights of a loss that is multiplied
    by 1e-34 would leave the normal numbers of float32."""
    peak = given.abs().amax() if given.numel() else given.new_zeros(())
    most = math.log2(torch.finfo(peak.dtype).max) - 24
    return torch.exp2(-peak.log2().ceil().nan_to_num(0.0, 0.0, 0.0).clamp(-most, most))


def _rest_of(base: Tensor, own: Tensor) -> Tensor:
    """2^(base - own), where base is own rounded; 1 where both are infinite."""
    return torch.exp2((base - own).masked_fill(own.isinf(), 0.0))
