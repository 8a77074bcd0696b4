"""Device code of the arithmetic with one number per row, O(N), in float64: from the sums of the tiles to a loss, and to the coefficients of
a gradient, whose weights are

    w_ij = factor_i 2^(t - base_i) for a negative, factor_pos_i 2^(t - base_pos_i) + share_i for a positive

A launch visits the rows, then, as programs of their own, the columns.
"""

import triton
import triton.language as tl

from fastnce.backends.triton.kernels_rows import (
    CENTER,
    DUE,
    FACTOR,
    LIFT,
    LOG2E,
    OVER,
    PAIR_MOMENT,
    PAIR_WEIGHT,
    PEAK,
    is_last,
    power_of_two,
    raise_to,
    read,
)
from fastnce.backends.triton.kernels_statistics import LN2, row_sums

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# Values of FORMULA: the losses of fastnce/formulas.py.
OUT = tl.constexpr(0)
IN = tl.constexpr(1)
DECOUPLED = tl.constexpr(2)
# Sums over all rows that a program leaves in `partial`: value * weight, weight, t of the positives, then w, and w t and w of the aligned
# pairs.
SUMS = tl.constexpr(8)


# Weights --------------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _store_rounded(base_place, factor_place, base, factor, inside, held):
    """The base, rounded to the float32 that tiles read, and the factor, which takes up the rounding of up to 1e-5 of a bit."""
    none = base == -float("inf")
    kept = tl.where(none, 0.0, base).to(tl.float32)
    exact = factor * tl.where(none, 1.0, tl.exp2(kept.to(tl.float64) - tl.where(none, 0.0, base)))
    tl.store(base_place, tl.where(inside, kept, 0.0), mask=held)
    tl.store(factor_place, tl.where(inside, exact, 0.0).to(tl.float32), mask=held)


@triton.jit
def _store_weights(
    vectors, pair, kept, i, padded, own_neg, own_pos, n_pos, negative, positive, mean, inside, peak, BR: tl.constexpr,
    IN_TILE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Coefficients of rows i, 0 in the padding: dL/d of the log-sum of the negatives, of the positives, and of the mean positive.

    vectors   (2 or 5, padded): base, factor; IN_TILE: base_pos, factor_pos, share
    pair      (padded,) or None: w of the row's aligned pair. With one positive, its log-sum and mean are one number: gradients add up
    kept      (padded,), KEPT only: the factor alone, for an output that is divided by the row's own sum
    """
    step = padded.to(tl.int64)
    held = i < padded
    share = mean / tl.maximum(n_pos, 1).to(tl.float64)
    size = tl.abs(negative)
    if KEPT:
        tl.store(kept + i, tl.where(inside, negative, 0.0).to(tl.float32), mask=held)
    else:
        _store_rounded(vectors + i, vectors + step + i, own_neg, negative, inside, held)
    if IN_TILE:
        _store_rounded(vectors + 2 * step + i, vectors + 3 * step + i, own_pos, positive, inside, held)
        tl.store(vectors + 4 * step + i, tl.where(inside, share, 0.0).to(tl.float32), mask=held)
        of_positive = tl.abs(positive) + tl.abs(share)
        size = tl.where(of_positive > size, of_positive, size)
    elif pair is not None:
        tl.store(pair + i, tl.where(inside, positive + mean, 0.0).to(tl.float32), mask=held)
    size = tl.where(inside & (size == size), tl.minimum(size, LARGEST_FLOAT), 0.0)
    raise_to(peak, tl.max(size, 0).to(tl.float32))


@triton.jit
def _sum_up(partial, program, programs, BP: tl.constexpr):
    """The sums over all programs in the order of their numbers, as (SUMS,) numbers."""
    total = tl.zeros([BP, SUMS], tl.float64)
    for n in range(0, programs, BP):
        at = n + tl.arange(0, BP)
        place = partial + at[:, None] * SUMS + tl.arange(0, SUMS)[None, :]
        total += tl.load(place, mask=(at < programs)[:, None] & (tl.arange(0, SUMS) >= 0)[None, :], other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _at(values, n: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SUMS) == n, values, 0.0), 0)


@triton.jit
def _store_partial(partial, program, value, weight, t, w, moment, pair_weight):
    n = tl.arange(0, SUMS)
    row = tl.where(n == 0, tl.sum(value, 0), 0.0) + tl.where(n == 1, tl.sum(weight, 0), 0.0) + tl.where(n == 2, tl.sum(t, 0), 0.0)
    row += tl.where(n == 3, tl.sum(w, 0), 0.0) + tl.where(n == 4, tl.sum(moment, 0), 0.0) + tl.where(n == 5, tl.sum(pair_weight, 0), 0.0)
    tl.store(partial + program * SUMS + n, row)


@triton.jit
def _largest_factor(factor, i, padded, state, normalize: tl.constexpr):
    """Factors of normalised rows are bounded, see prepare; of others the largest is looked for."""
    if not normalize:
        a = tl.load(factor + i, mask=i < padded, other=0.0)
        raise_to(state + FACTOR, tl.max(tl.where(a == a, tl.minimum(a, LARGEST_FLOAT), 0.0), 0))


@triton.jit
def _conclude(sums, slots, scalars, state, rows, SYMMETRIC: tl.constexpr, NORMALIZE: tl.constexpr):
    """Numbers of the whole problem for the launches that follow, by its last program."""
    peak = read(state + PEAK).to(tl.float64) + read(state + PEAK + 1).to(tl.float64)
    if SYMMETRIC:
        # A pair has the weights of both of its ends.
        peak = peak * 2.0
    if NORMALIZE:
        largest = peak * 0.00390625
    else:
        largest = peak * read(state + FACTOR).to(tl.float64)
    tl.store(slots + LIFT, power_of_two(largest, 15))
    tl.store(slots + CENTER, (_at(sums, 2) / tl.maximum(rows, 1).to(tl.float64)).to(tl.float32))
    tl.store(scalars + DUE, _at(sums, 3))
    tl.store(scalars + PAIR_MOMENT, _at(sums, 4))
    tl.store(scalars + PAIR_WEIGHT, _at(sums, 5))
    # Largest numbers start again at 0 where these launches are repeated.
    tl.store(state + PEAK + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit
def _formula(own_neg, own_pos, total, n_pos, FORMULA: tl.constexpr, SEVERAL: tl.constexpr):
    """(value, dL/d lse_neg, dL/d lse_pos, dL/d pos) of a row: fastnce/formulas.py and its derivatives, from the log-sums in base 2.

    Without SEVERAL no row has more than one positive.
    """
    none = n_pos == 0
    pos = total / tl.maximum(n_pos, 1).to(tl.float64)
    zero = tl.zeros_like(pos)
    if FORMULA == DECOUPLED:
        nothing = none | (own_neg == -float("inf"))
        value = tl.where(nothing, 0.0, (tl.where(nothing, 0.0, own_neg) - pos) * LN2)
        one = tl.where(nothing, 0.0, 1.0).to(tl.float64)
        return value, one, zero, -one
    several = n_pos > 1
    anchor = pos
    if SEVERAL:
        anchor = tl.where(several, own_pos, pos)
    d = (own_neg - tl.where(none, 0.0, anchor)) * LN2
    e = tl.exp(-tl.abs(d))
    # log(1 + e): of a small e the sum would lose the last bits.
    small = tl.where(e < 1e-5, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))
    value = tl.where(d > 0.0, d, 0.0) + small
    p = tl.where(d > 0.0, 1.0 / (1.0 + e), e / (1.0 + e))
    # Comparisons with nan are false: it comes through.
    value = tl.where(d == d, value, d)
    p = tl.where(d == d, p, d)
    of_lse, of_mean = zero, -p
    if FORMULA == IN:
        value += tl.log(tl.maximum(n_pos, 1).to(tl.float64))
        of_lse, of_mean = -p, zero
    elif SEVERAL:
        value += tl.where(several, (own_pos - pos) * LN2, 0.0)
        of_lse = tl.where(several, 1.0 - p, 0.0)
        of_mean = tl.where(several, -1.0, -p)
    return tl.where(none, 0.0, value), tl.where(none, 0.0, p), tl.where(none, 0.0, of_lse), tl.where(none, 0.0, of_mean)


@triton.jit
def _loss_of_rows(
    sums, count, both, both_count, t, weight, values, vectors, pair, kept, known, i, rows, padded, splits, pairs, first, second, constant,
    peak, partial, program, OF_ROWS: tl.constexpr, IN_TILE: tl.constexpr, FORMULA: tl.constexpr, KEPT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    inside = i < rows
    step = rows.to(tl.int64)
    if sums is None and both is None:
        own_neg = tl.load(known + i, mask=inside, other=0.0)
        own_pos = tl.load(known + step + i, mask=inside, other=0.0)
        total = tl.load(known + 2 * step + i, mask=inside, other=0.0)
        n_pos = tl.load(known + 3 * step + i, mask=inside, other=0.0).to(tl.int32)
    else:
        own_neg, own_pos, total, n_pos = row_sums(
            sums, count, both, both_count, t, i, rows, splits, pairs, first, second, inside, IN_TILE, BR
        )  # fmt: skip
        if known is not None:
            tl.store(known + i, own_neg, mask=inside)
            tl.store(known + step + i, own_pos, mask=inside)
            tl.store(known + 2 * step + i, total, mask=inside)
            tl.store(known + 3 * step + i, n_pos.to(tl.float64), mask=inside)
    value, of_neg, of_lse, of_mean = _formula(own_neg, own_pos, total, n_pos, FORMULA, IN_TILE)
    c = tl.zeros([BR], tl.float64) + 1.0
    if weight is not None:
        c = tl.load(weight + i, mask=inside, other=0.0).to(tl.float64)
    w = c
    c = c * constant
    if values is not None:
        tl.store(values + i, value * constant, mask=inside)
    # A row that takes no part has no gradient, whatever its weight is: 0 * inf would be nan.
    c_of_part = tl.where((of_neg == 0.0) & (of_lse == 0.0) & (of_mean == 0.0), 0.0, c)
    negative, positive, mean = of_neg * c_of_part, of_lse * c_of_part, of_mean * c_of_part
    _store_weights(vectors, pair, kept, i, padded, own_neg, own_pos, n_pos, negative, positive, mean, inside, peak, BR, IN_TILE, KEPT)
    mean_t = total / tl.maximum(n_pos, 1).to(tl.float64)
    none = tl.zeros([BR], tl.float64)
    aligned = none
    if not IN_TILE:
        aligned += tl.where(inside & (n_pos > 0), positive + mean, 0.0)
    _store_partial(
        partial, program, tl.where(inside, value * c, 0.0), tl.where(inside, w, 0.0) if OF_ROWS else none,
        tl.where(inside, mean_t, 0.0) if OF_ROWS else none, tl.where(inside, negative + positive + mean, 0.0), aligned * mean_t, aligned,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "padded", "column_padded", "splits", "column_splits", "pairs", "first", "second", "column_first", "constant",
        "column_constant", "over", "programs", "column_programs",
    ]
)  # fmt: skip
def close(
    sums, count, both, both_count, column_sums, column_count, column_both, column_both_count, t, weight, factor, column_factor,
    loss, values, column_values, vectors, column_vectors, pair, column_pair, kept, known, column_known, slots, scalars, partial,
    state, rows, columns, padded, column_padded, splits, column_splits, pairs, first, second, column_first, constant, column_constant, over,
    programs, column_programs,
    WEIGHTED_MEAN: tl.constexpr, IN_TILE: tl.constexpr, FORMULA: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr,
    SYMMETRIC: tl.constexpr, NORMALIZE: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A loss from the sums of the tiles, and the coefficients of its gradient.

        loss = over * (sum_i constant weight_i value_i + the same of the columns)        over: 1 / sum of the weights if WEIGHTED_MEAN

    values          (rows,) float64 or None: constant * value of the rows
    known           (4, rows) float64 or None: log2 of the sum of the negatives, of the positives, sum of t over the positives, and their
                    number. It is written, or where no sums are given read
    vectors, pair   see _store_weights;  column_*: the same of the columns, COLUMNS only
    scalars, slots  for the launches of backward
    """
    program = tl.program_id(0)
    if program < programs:
        i = program * BR + tl.arange(0, BR)
        _loss_of_rows(
            sums, count, both, both_count, t, weight, values, vectors, pair, kept, known, i, rows, padded, splits, pairs, first, second,
            constant, state + PEAK, partial, program, 1, IN_TILE, FORMULA, KEPT, BR,
        )  # fmt: skip
        _largest_factor(factor, i, padded, state, NORMALIZE)
    else:
        j = (program - programs) * BR + tl.arange(0, BR)
        if COLUMNS:
            _loss_of_rows(
                column_sums, column_count, column_both, column_both_count, t, weight, column_values, column_vectors, column_pair, kept,
                column_known, j, columns, column_padded, column_splits, pairs, column_first, column_first, column_constant,
                state + PEAK + 1, partial, program, 0, IN_TILE, FORMULA, False, BR,
            )  # fmt: skip
        else:
            none = tl.zeros([BR], tl.float64)
            _store_partial(partial, program, none, none, none, none, none, none)
        _largest_factor(column_factor, j, column_padded, state, NORMALIZE)
    if is_last(state, programs + column_programs):
        found = _sum_up(partial, program, programs + column_programs, BP)
        factor_of_all = tl.zeros([1], tl.float64) + over
        factor_of_all = tl.sum(factor_of_all, 0)
        if WEIGHTED_MEAN:
            weights = _at(found, 1)
            factor_of_all = 1.0 / tl.where(weights == 0.0, 1.0, weights)
        tl.store(scalars + OVER, factor_of_all)
        tl.store(loss, (_at(found, 0) * factor_of_all).to(loss.dtype.element_ty))
        _conclude(found, slots, scalars, state, rows, SYMMETRIC, NORMALIZE)


@triton.jit
def _gradients_of_rows(
    dlse_neg, dlse_pos, dpos, lse_neg, lse_pos, pos, n_pos, own_neg, own_pos, bias, vectors, pair, kept, i, rows, padded, peak, partial,
    program, OF_ROWS: tl.constexpr, IN_TILE: tl.constexpr, KEPT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    inside = i < rows
    no_negative = tl.load(lse_neg + i, mask=inside, other=-float("inf")) == -float("inf")
    no_positive = tl.load(lse_pos + i, mask=inside, other=-float("inf")) == -float("inf")
    none = tl.zeros([BR], tl.float64)
    # 0 where a row has no negative, or no positive, whatever came down. None: no gradient came down.
    negative, positive, mean = none, none, none
    if dlse_neg is not None:
        negative = tl.where(no_negative, 0.0, tl.load(dlse_neg + i, mask=inside, other=0.0).to(tl.float64))
    if dlse_pos is not None:
        positive = tl.where(no_positive, 0.0, tl.load(dlse_pos + i, mask=inside, other=0.0).to(tl.float64))
    if dpos is not None:
        mean = tl.where(no_positive, 0.0, tl.load(dpos + i, mask=inside, other=0.0).to(tl.float64))
    n = tl.load(n_pos + i, mask=inside, other=0)
    neg2 = tl.load(own_neg + i, mask=inside, other=0.0)
    pos2 = neg2
    if IN_TILE:
        pos2 = tl.load(own_pos + i, mask=inside, other=0.0)
    neg2 = tl.where(no_negative, -float("inf"), neg2)
    pos2 = tl.where(no_positive, -float("inf"), pos2)
    _store_weights(vectors, pair, kept, i, padded, neg2, pos2, n, negative, positive, mean, inside, peak, BR, IN_TILE, KEPT)
    aligned = none
    if IN_TILE or KEPT:
        # Around this t sums are taken: any that is near will do.
        offset = none
        if bias is not None:
            offset += tl.load(bias).to(tl.float64)
        t = (tl.load(pos + i, mask=inside, other=0.0).to(tl.float64) - offset) * LOG2E
    else:
        t = tl.load(own_pos + i, mask=inside, other=0.0)
        aligned = tl.where(inside & (n > 0), positive + mean, 0.0)
    _store_partial(
        partial, program, none, none, tl.where(inside, t, 0.0) if OF_ROWS else none, tl.where(inside, negative + positive + mean, 0.0),
        tl.where(aligned == 0.0, 0.0, aligned * t), aligned,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "padded", "column_padded", "programs", "column_programs"])
def coefficients(
    dlse_neg, dlse_pos, dpos, lse_neg, lse_pos, pos, n_pos, own_neg, own_pos,
    column_dlse_neg, column_dlse_pos, column_dpos, column_lse_neg, column_lse_pos, column_pos, column_n_pos, column_own_neg, column_own_pos,
    bias, factor, column_factor, vectors, column_vectors, pair, column_pair, kept, slots, scalars, partial, state,
    rows, columns, padded, column_padded, programs, column_programs,
    IN_TILE: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr, SYMMETRIC: tl.constexpr, NORMALIZE: tl.constexpr,
    BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The coefficients of a gradient from dL/d of the statistics, see SideGrad and Side: as `close` has them of a loss."""
    program = tl.program_id(0)
    if program < programs:
        i = program * BR + tl.arange(0, BR)
        _gradients_of_rows(
            dlse_neg, dlse_pos, dpos, lse_neg, lse_pos, pos, n_pos, own_neg, own_pos, bias, vectors, pair, kept, i, rows, padded,
            state + PEAK, partial, program, 1, IN_TILE, KEPT, BR,
        )  # fmt: skip
        _largest_factor(factor, i, padded, state, NORMALIZE)
    else:
        j = (program - programs) * BR + tl.arange(0, BR)
        if COLUMNS:
            _gradients_of_rows(
                column_dlse_neg, column_dlse_pos, column_dpos, column_lse_neg, column_lse_pos, column_pos, column_n_pos, column_own_neg,
                column_own_pos, bias, column_vectors, column_pair, kept, j, columns, column_padded, state + PEAK + 1, partial, program, 0,
                IN_TILE, False, BR,
            )  # fmt: skip
        else:
            none = tl.zeros([BR], tl.float64)
            _store_partial(partial, program, none, none, none, none, none, none)
        _largest_factor(column_factor, j, column_padded, state, NORMALIZE)
    if is_last(state, programs + column_programs):
        found = _sum_up(partial, program, programs + column_programs, BP)
        tl.store(scalars + OVER, 1.0)
        _conclude(found, slots, scalars, state, rows, SYMMETRIC, NORMALIZE)
