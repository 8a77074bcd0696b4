"""Device code of the arithmetic with one number per row, O(N), in float64: from the sums of the tiles to the statistics of the rows.

lse = ln 2 * log2(sum_splits total 2^top) + bias       pos = ln 2 * (sum of t) / n_pos + bias
"""

import triton
import triton.language as tl

from fastnce.backends.triton.kernels_rows import OUTPUT_LIFT

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log_sum(sums, field, i, rows, splits, more, inside, BR: tl.constexpr):
    """log2 of the sum of total 2^top over the splits, and of an unshifted sum. Fields are tops, then totals."""
    step = rows.to(tl.int64)
    tops = sums + field * splits * step + i
    top_of_more = tl.where(more > 0.0, 0.0, -float("inf"))
    top = top_of_more
    for n in range(splits):
        top = tl.maximum(top, tl.load(tops + n * step, mask=inside, other=-float("inf")))
    # Without a term base 0: -inf - -inf would be nan.
    base = tl.where(top == -float("inf"), 0.0, top).to(tl.float64)
    total = more.to(tl.float64) * tl.exp2(top_of_more.to(tl.float64) - base)
    for n in range(splits):
        t = tl.load(tops + n * step, mask=inside, other=-float("inf")).to(tl.float64)
        total += tl.load(tops + (splits + n) * step, mask=inside, other=0.0).to(tl.float64) * tl.exp2(t - base)
    return tl.where(total == 0.0, -float("inf"), tl.log2(tl.where(total == 0.0, 1.0, total)) + base)


@triton.jit
def _unshifted(both, field, i, rows, inside, BR: tl.constexpr):
    more = tl.zeros([BR], tl.float32)
    if both is not None:
        more = tl.load(both + field * rows.to(tl.int64) + i, mask=inside, other=0.0)
    return more


@triton.jit
def row_sums(
    sums, count, both, both_count, t, i, rows, splits, pairs, first, second, inside, IN_TILE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """(log2 sum of the negatives, of the positives, sum of t over the positives, their number) of the rows i of one side.

    sums, count        (2 or 5, splits, rows), (splits, rows), or None: see forward_rows
    both, both_count   (1 or 3, rows), (rows,), or None: see forward_both
    t                  (pairs,) or None: t of the aligned pairs that are kept out of the tiles; rows `first` + p and `second` + p are ends
    """
    if sums is not None:
        own_neg = _log_sum(sums, 0, i, rows, splits, _unshifted(both, 0, i, rows, inside, BR), inside, BR)
    else:
        more = _unshifted(both, 0, i, rows, inside, BR).to(tl.float64)
        own_neg = tl.where(more == 0.0, -float("inf"), tl.log2(tl.where(more == 0.0, 1.0, more)))
    pos = tl.zeros([BR], tl.float64)
    n_pos = tl.zeros([BR], tl.int32)
    if IN_TILE:
        if sums is not None:
            own_pos = _log_sum(sums, 2, i, rows, splits, _unshifted(both, 1, i, rows, inside, BR), inside, BR)
            step = rows.to(tl.int64)
            for n in range(splits):
                pos += tl.load(sums + (4 * splits + n) * step + i, mask=inside, other=0.0).to(tl.float64)
                n_pos += tl.load(count + n * step + i, mask=inside, other=0)
        else:
            more = _unshifted(both, 1, i, rows, inside, BR).to(tl.float64)
            own_pos = tl.where(more == 0.0, -float("inf"), tl.log2(tl.where(more == 0.0, 1.0, more)))
        if both is not None:
            pos += _unshifted(both, 2, i, rows, inside, BR).to(tl.float64)
            n_pos += tl.load(both_count + i, mask=inside, other=0)
    else:
        if t is not None:
            pair = i - first
            end = inside & (pair >= 0) & (pair < pairs)
            other = i - second
            second_end = inside & (other >= 0) & (other < pairs)
            pair = tl.where(second_end, other, pair)
            end = end | second_end
            pos = tl.load(t + pair, mask=end, other=0.0).to(tl.float64)
            n_pos = end.to(tl.int32)
        own_pos = pos
    return own_neg, own_pos, pos, n_pos


@triton.jit(do_not_specialize=["rows", "columns", "splits", "column_splits", "pairs", "first", "second", "column_first", "programs"])
def statistics(
    sums, count, both, both_count, column_sums, column_count, column_both, column_both_count, t, bias,
    lse_neg, lse_pos, pos, n_pos, own_neg, own_pos,
    column_lse_neg, column_lse_pos, column_pos, column_n_pos, column_own_neg, column_own_pos,
    rows, columns, splits, column_splits, pairs, first, second, column_first, programs,
    IN_TILE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The fields of Side from the sums of the tiles, of the rows in the first `programs` programs, then of the columns."""
    program = tl.program_id(0)
    # Two conditions: Triton leaves out what the first one, a constant, rules out.
    if column_lse_neg is not None:  # noqa: SIM102
        if program >= programs:
            i = (program - programs) * BR + tl.arange(0, BR)
            _side(
                column_sums, column_count, column_both, column_both_count, t, bias,
                column_lse_neg, column_lse_pos, column_pos, column_n_pos, column_own_neg, column_own_pos,
                i, columns, column_splits, pairs, column_first, column_first, IN_TILE, BR,
            )  # fmt: skip
    i = program * BR + tl.arange(0, BR)
    _side(
        sums, count, both, both_count, t, bias, lse_neg, lse_pos, pos, n_pos, own_neg, own_pos,
        i, rows, splits, pairs, first, second, IN_TILE, BR,
    )  # fmt: skip


@triton.jit
def _side(
    sums, count, both, both_count, t, bias, lse_neg, lse_pos, pos, n_pos, own_neg, own_pos, i, rows, splits, pairs, first, second,
    IN_TILE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    inside = i < rows
    neg2, pos2, total, n = row_sums(sums, count, both, both_count, t, i, rows, splits, pairs, first, second, inside, IN_TILE, BR)
    offset = tl.zeros([BR], tl.float64)
    if bias is not None:
        offset += tl.load(bias).to(tl.float64)
    mean = tl.where(n == 0, 0.0, total / tl.maximum(n, 1).to(tl.float64) * LN2 + offset)
    of_vectors = lse_neg.dtype.element_ty
    tl.store(lse_neg + i, (neg2 * LN2 + offset).to(of_vectors), mask=inside)
    tl.store(lse_pos + i, tl.where(n == 0, -float("inf"), tl.where(n == 1, mean, pos2 * LN2 + offset)).to(of_vectors), mask=inside)
    tl.store(pos + i, mean.to(of_vectors), mask=inside)
    tl.store(n_pos + i, n.to(tl.int64), mask=inside)
    tl.store(own_neg + i, neg2, mask=inside)
    tl.store(own_pos + i, pos2, mask=inside)


@triton.jit(do_not_specialize=["rows", "padded", "splits", "D"])
def mean_key(
    out, tops, moment, own_neg, slots, mean, rows, padded, splits, D, DP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """mean (rows, D + 1): sum_j p_ij k^_j and sum_j p_ij t_ij with p = 2^(t - own_neg), from the splits of forward_rows."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < rows
    log = tl.load(own_neg + i, mask=inside, other=0.0)
    log = tl.where(log == -float("inf"), 0.0, log)
    step = rows.to(tl.int64)
    total = tl.zeros([BR, DP], tl.float32)
    total_t = tl.zeros([BR], tl.float64)
    lift = tl.load(slots + OUTPUT_LIFT)
    d = tl.arange(0, DP)[None, :]
    for n in range(splits):
        # The sums of a split are over 2^(t - top): its share is their part of the row.
        top = tl.load(tops + n * step + i, mask=inside, other=-float("inf")).to(tl.float64)
        share = tl.exp2(top - log)
        place = out + (n * padded.to(tl.int64) + i)[:, None] * DP + d
        total += tl.load(place, mask=inside[:, None] & (d < D), other=0.0) * (share / lift).to(tl.float32)[:, None]
        total_t += tl.load(moment + n * step + i, mask=inside, other=0.0).to(tl.float64) * share
    row = mean + i.to(tl.int64) * (D + 1)
    tl.store(row[:, None] + d, total, mask=inside[:, None] & (d < D))
    tl.store(row + D, total_t.to(tl.float32), mask=inside)
