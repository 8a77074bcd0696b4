"""Arithmetic with one number per row, as torch operations: the definition that the kernels of both GPU backends are compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastnce.precision import LN2, LOG2E, vector_dtype
from fastnce.problem import Side, SideGrad

# Forward --------------------------------------------------------------------------------------------------------------------------------


def close(
    sums: Tensor,
    count: Tensor | None,
    unshifted: Tensor | None,
    unshifted_count: Tensor | None,
    pairs: Tensor | None,
    ends: list[slice],
    bias: Tensor | None,
) -> Side:
    """Statistics of the rows from the sums of the tiles.

    sums, count                  (2 or 5, splits, rows), (splits, rows): see forward_rows in triton/kernels.py
    unshifted, unshifted_count   (1 or 3, rows), (rows,), or None where forward_both did not run: see there
    pairs, ends                  where positives are kept out of the tiles, which then have no counts: t of the aligned pairs (pairs,),
                                 and the rows that these belong to, once or twice
    """
    rows = sums.shape[2]
    own_neg = _log_sum(sums[0], sums[1], None if unshifted is None else unshifted[0])
    lse_neg = nats(own_neg, bias)
    if pairs is not None:
        pos, n_pos = _at_ends(rows, ends, pairs)
        own_pos = pos
    else:
        assert count is not None
        own_pos = _log_sum(sums[2], sums[3], None if unshifted is None else unshifted[1])
        pos, n_pos = sums[4].sum(0, dtype=lse_neg.dtype), count.sum(0)
        if unshifted is not None:
            assert unshifted_count is not None
            pos, n_pos = pos + unshifted[2], n_pos + unshifted_count
    none = n_pos == 0
    pos = nats(pos / n_pos.clamp(min=1), bias).masked_fill(none, 0.0)
    lse_pos = torch.where(n_pos == 1, pos, nats(own_pos, bias)).masked_fill(none, -torch.inf)
    return Side(lse_neg, lse_pos, pos, n_pos, own_neg, own_pos)


def _log_sum(tops: Tensor, totals: Tensor, unshifted: Tensor | None) -> Tensor:
    """log2 of a sum of 2^t per row."""
    precise = vector_dtype(tops)
    tops, totals = tops.to(precise), totals.to(precise)
    if unshifted is not None:
        tops = torch.cat([tops, torch.zeros_like(tops[:1]).masked_fill(~(unshifted > 0), -torch.inf)])
        totals = torch.cat([totals, unshifted[None].to(precise)])
    top = tops.amax(0)
    base = top.masked_fill(top == -torch.inf, 0.0)
    return (totals * torch.exp2(tops - base)).sum(0).log2() + base


def _at_ends(rows: int, ends: list[slice], pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(t of the row's aligned pair, 0 without one; 1 or 0): per row."""
    pos = pairs.new_zeros(rows, dtype=vector_dtype(pairs))
    n_pos = torch.zeros(rows, dtype=torch.int64, device=pairs.device)
    for own in ends:
        pos[own] = pairs.to(pos.dtype)
        n_pos[own] = 1
    return pos, n_pos


def nats(t: Tensor, bias: Tensor | None) -> Tensor:
    s = t * LN2
    return s if bias is None else s + bias


# Backward -------------------------------------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """Coefficients of the weights, as the tiles read them.

    vectors   per side (2 or 5, padded) float32, 0 in the padding: base, factor of the negatives, whose weight is factor * 2^(t - base);
              where positives are found in the tiles also base_pos, factor_pos, share of these: factor_pos * 2^(t - base_pos) + share.
              Factors and shares are multiplied by lift
    pair      (pairs,) float32: w of the aligned pairs that are kept out of the tiles; None without any
    scalars   float64: lift, a power of two that brings the largest weight near the top of float16;
              center, a float32 t around which sums of w t lose less; due = sum_ij w_ij; moment = sum w (t - center) of the aligned pairs
    """

    vectors: list[Tensor]
    pair: Tensor | None
    scalars: Tensor


def coefficients(
    grads: list[SideGrad],
    stats: list[Side],
    factors: list[Tensor],
    bias: Tensor | None,
    pairs: tuple[slice, slice],
    in_tile: bool,
    symmetric: bool,
) -> Coefficients:
    """factors: of the operands of rows and columns, padded. pairs: rows and columns of the aligned pairs, as Work.aligned() says."""
    i, j = pairs
    some = i.stop > i.start
    sides = [_Contribution.of(*side, in_tile) for side in zip(grads, stats, strict=True)]
    # The sum of all w follows without the tiles: the exponentials of a row, divided by their own sum, add up to one.
    due = torch.stack([side.total for side in sides]).sum()
    peak = torch.stack([side.peak for side in sides]).sum() * (2 if symmetric else 1)
    largest = torch.stack([factor.nan_to_num(0.0).amax() if len(factor) else factor.sum() for factor in factors]).amax()
    lift = torch.exp2((15 - (peak * largest).log2().ceil()).nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100))
    vectors = []
    for side, factor in zip(sides, factors, strict=False):
        count, rows = side.vectors.shape
        one, padded = torch.ones_like(lift), side.vectors.new_zeros((count, len(factor)), dtype=torch.float32)
        padded[:, :rows] = side.vectors * torch.stack([one, lift, one, lift, lift][:count])[:, None]
        vectors.append(padded)
    pos = stats[0].pos if bias is None else stats[0].pos - bias
    center = (pos.sum() / max(len(pos), 1) * LOG2E).to(torch.float32)
    pair, moment = None, torch.zeros_like(due)
    if some:
        # With one positive, lse_pos and pos are the same number, so their gradients add up. So do those of the two ends of a pair.
        w = sides[0].aligned[i]
        if symmetric or len(sides) == 2:
            w = w + sides[-1].aligned[j]
        pair, moment = w.to(torch.float32), ((stats[0].own_pos[i] - center) * w).sum()
    return Coefficients(vectors, pair, torch.stack([lift, center.to(lift.dtype), due, moment]))


class _Contribution(NamedTuple):
    """The weights of one side, before they have a lift."""

    vectors: Tensor  # (2 or 5, rows) float64, as in Coefficients, not multiplied by lift
    aligned: Tensor  # (rows,): weight of the one aligned pair of the row
    peak: Tensor  # no |w| of this side is larger
    total: Tensor  # sum of its w

    @staticmethod
    def of(grad: SideGrad, side: Side, in_tile: bool) -> _Contribution:
        # The log-sum and mean of a row without a negative, or without a positive, are constants, whatever gradient came down. It gets
        # base 0: -inf - -inf would be nan.
        no_negative, no_positive = side.lse_neg == -torch.inf, side.lse_pos == -torch.inf
        empty = (no_negative, no_positive, no_positive)
        negative, positive, mean = (g.masked_fill(none, 0.0) for g, none in zip(grad.of_all(side), empty, strict=True))
        total = (negative + positive + mean).sum()
        own_neg = side.own_neg.masked_fill(no_negative, 0.0)
        share = mean / side.n_pos.clamp(min=1)
        peak = torch.maximum(negative.abs(), positive.abs() + share.abs() if in_tile else torch.zeros_like(share))
        vectors = [*_rounded(own_neg, negative)]
        if in_tile:
            own_pos = side.own_pos.masked_fill(no_positive, 0.0)
            vectors += [*_rounded(own_pos, positive), share]
        peak = peak.nan_to_num(0.0).amax() if len(peak) else peak.new_zeros(())
        return _Contribution(torch.stack(vectors), positive + mean, peak, total)


def _rounded(base: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The base, rounded to the float32 that kernels read, and the factor, which takes up the rounding of up to 1e-5 of a bit."""
    kept = base.to(torch.float32).to(base.dtype)
    return kept, factor * torch.exp2(kept - base)


def scalar_gradients(scalars: Tensor, about: list[Tensor], divide: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(dscale, dbias). about: lift * divide * sum w (t - center) over the pairs of the tiles, in parts."""
    lift, center, due, moment = scalars
    for part in about:
        moment = moment + part.sum(dtype=torch.float64) / (divide * lift)
    return ((center * due + moment) / (LOG2E * scale)).to(scale.dtype), due.to(scale.dtype)
