"""Device code of ranks, ties, hardest negatives and best positives: passes over the tiles, then one over the rows.

The best positive must be known before the negatives above it are counted. So there are two passes over the tiles, and one where a threshold
is given.
"""

import triton
import triton.language as tl

from fastnce.backends.triton.kernels import RUNTIME, classes, logits, own_rows, swap
from fastnce.backends.triton.kernels_rows import LOG2E, valid
from fastnce.backends.triton.kernels_statistics import LN2

# problem.TIE of float32 products, once more: device code cannot import torch. A test compares them.
TIE = tl.constexpr(3 * 2.0**-24)


@triton.jit
def _best(positives, pos, i, rows, splits, inside, BR: tl.constexpr):
    """Largest t of the positives. The tiles pass over a positive that is nan: the mean of the positives tells."""
    best = tl.full([BR], -float("inf"), tl.float32)
    for n in range(splits):
        best = tl.maximum(best, tl.load(positives + n * rows.to(tl.int64) + i, mask=inside, other=-float("inf")))
    mean = tl.load(pos + i, mask=inside, other=0.0)
    return tl.where(mean == mean, best, float("nan"))


@triton.jit
def _bounds(positives, pos, threshold, scale, bias, i, rows, splits, inside, NORMALIZE: tl.constexpr, BR: tl.constexpr):
    """(low, high) of the t that tie with the threshold, or with the best positive: the lines of Problem.tied."""
    offset = tl.zeros([BR], tl.float64)
    if bias is not None:
        offset += tl.load(bias).to(tl.float64)
    if threshold is not None:
        t = (tl.load(threshold + i, mask=inside, other=0.0).to(tl.float64) - offset) * LOG2E
    else:
        # A bias that is no number makes every logit nan.
        t = _best(positives, pos, i, rows, splits, inside, BR).to(tl.float64) + 0.0 * offset
    if NORMALIZE:
        band = tl.zeros([BR], tl.float64) + TIE * LOG2E * valid(scale)
    else:
        band = TIE * tl.abs(t)
    low, high = t - band, t + band
    return tl.where(low > -float("inf"), low, float("inf")).to(tl.float32), tl.where(high == high, high, -float("inf")).to(tl.float32)


@triton.jit(do_not_specialize=RUNTIME)
def retrieval(
    X, Y, A, B, scale, bias, threshold, pos, positives, negatives, counts, column_pos, column_positives, column_negatives, column_counts,
    q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
    rows, columns, own, up, down, depth, splits, per_split, other_splits, other_per_split, first,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr, IN_TILE: tl.constexpr, PARTS: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The best positive of every row, or with COUNT its ranks and hardest negative. A t that is nan is never the largest.

    positives   (splits, rows): largest t of the positives. It is written without COUNT, or where there is a threshold, and read otherwise
    negatives   (splits, rows), COUNT: largest t of the negatives
    counts      (3, splits, rows) int32, COUNT: negatives that are not t <= high; those with low <= t <= high; column of the largest
    threshold   (rows,) logits or None: the bounds low and high are around it, or around the best positive
    pos         (rows,): mean logit of the positives

    COLUMNS: from program `first` on, the programs do the same for the columns, into column_*.
    """
    program = tl.program_id(0)
    if COLUMNS:
        turned = program >= first
        program = tl.where(turned, program - first, program)
        splits, per_split = swap(turned, splits, other_splits)[0], swap(turned, per_split, other_per_split)[0]
        X, Y = swap(turned, X, Y)
        A, B = swap(turned, A, B)
        positives = tl.where(turned, column_positives, positives)
        if COUNT:
            pos = tl.where(turned, column_pos, pos)
            negatives = tl.where(turned, column_negatives, negatives)
            counts = tl.where(turned, column_counts, counts)
        if q_label is not None:
            q_label, k_label = swap(turned, q_label, k_label)
        if q_exclude is not None:
            q_exclude, k_exclude = swap(turned, q_exclude, k_exclude)
        mask_rows, mask_columns = swap(turned, mask_rows, mask_columns)
        mask_row, mask_column = swap(turned, mask_row, mask_column)
        rows, columns = swap(turned, rows, columns)
        # Seen from the columns, a diagonal j - i is i - j. host.NONE stays a diagonal that no pair lies on.
        up = tl.where(turned, -up, up)
    block = program // splits
    split = program % splits
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    inside = i < rows
    alpha = tl.load(A + i) * (valid(scale) * LOG2E)
    lo = split * per_split
    hi = tl.minimum(lo + per_split, tl.cdiv(columns, BN))
    x, x_low = own_rows(X, i0, A, PARTS, DP, BM)
    best_pos = tl.full([BM], -float("inf"), tl.float32)
    if COUNT:
        low, high = _bounds(positives, pos, threshold, scale, bias, i, rows, splits, inside, NORMALIZE, BM)
        best = tl.full([BM], -float("inf"), tl.float32)
        above = tl.zeros([BM], tl.int32)
        ties = tl.zeros([BM], tl.int32)
        where = tl.full([BM], -1, tl.int32)
    for tile in range(lo, hi):
        j0 = tile * BN
        j = j0 + tl.arange(0, BN)
        t = logits(x, x_low, X, Y, i0, j0, depth, PARTS, DP, BM, BN, BD) * tl.load(B + j)[None, :] * alpha[:, None]
        positive, negative = classes(
            i, j, q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
            rows, columns, own, up, down, IN_TILE,
        )  # fmt: skip
        if threshold is not None or not COUNT:
            best_pos = tl.maximum(best_pos, tl.max(tl.where(positive, t, -float("inf")), 1))
        if COUNT:
            t = tl.where(negative, t, -float("inf"))
            below = t <= high[:, None]
            above += tl.sum(tl.where(below, 0, 1), 1)
            ties += tl.sum((below & (t >= low[:, None])).to(tl.int32), 1)
            t = tl.where(t == t, t, -float("inf"))
            highest, at = tl.max(t, 1, return_indices=True)
            where = tl.where(highest > best, j0 + at, where)
            best = tl.maximum(best, highest)
    place = split.to(tl.int64) * rows + i
    field = splits.to(tl.int64) * rows
    if threshold is not None or not COUNT:
        tl.store(positives + place, best_pos, mask=inside)
    if COUNT:
        tl.store(negatives + place, best, mask=inside)
        tl.store(counts + place, above, mask=inside)
        tl.store(counts + field + place, ties, mask=inside)
        tl.store(counts + 2 * field + place, where, mask=inside)


@triton.jit(do_not_specialize=["rows", "columns", "splits", "column_splits", "programs"])
def metrics(
    pos, positives, negatives, counts, column_pos, column_positives, column_negatives, column_counts, bias,
    rank, ties, hardest, hardest_logit, pos_max,
    column_rank, column_ties, column_hardest, column_hardest_logit, column_pos_max,
    rows, columns, splits, column_splits, programs, COLUMNS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The metrics of Side from what the tiles left, of the rows in the first `programs` programs, then of the columns."""
    program = tl.program_id(0)
    if program < programs:
        i = program * BR + tl.arange(0, BR)
        _side(pos, positives, negatives, counts, bias, rank, ties, hardest, hardest_logit, pos_max, i, rows, splits, BR)
    elif COLUMNS:
        i = (program - programs) * BR + tl.arange(0, BR)
        _side(
            column_pos, column_positives, column_negatives, column_counts, bias, column_rank, column_ties, column_hardest,
            column_hardest_logit, column_pos_max, i, columns, column_splits, BR,
        )  # fmt: skip


@triton.jit
def _side(
    pos, positives, negatives, counts, bias, rank, ties, hardest, hardest_logit, pos_max, i, rows, splits, BR: tl.constexpr,
):  # fmt: skip
    inside = i < rows
    step = rows.to(tl.int64)
    best = tl.full([BR], -float("inf"), tl.float32)
    where = tl.full([BR], -1, tl.int32)
    above = tl.zeros([BR], tl.int32)
    tied = tl.zeros([BR], tl.int32)
    for n in range(splits):
        above += tl.load(counts + n * step + i, mask=inside, other=0)
        tied += tl.load(counts + (splits + n) * step + i, mask=inside, other=0)
        # Of equal splits the first has the lowest column.
        t = tl.load(negatives + n * step + i, mask=inside, other=-float("inf"))
        where = tl.where(t > best, tl.load(counts + (2 * splits + n) * step + i, mask=inside, other=-1), where)
        best = tl.maximum(best, t)
    offset = tl.zeros([BR], tl.float64)
    if bias is not None:
        offset += tl.load(bias).to(tl.float64)
    best_pos = _best(positives, pos, i, rows, splits, inside, BR)
    tl.store(rank + i, above.to(tl.int64), mask=inside)
    tl.store(ties + i, tied.to(tl.int64), mask=inside)
    tl.store(hardest + i, where.to(tl.int64), mask=inside)
    tl.store(hardest_logit + i, (best.to(tl.float64) * LN2 + offset).to(hardest_logit.dtype.element_ty), mask=inside)
    tl.store(pos_max + i, (best_pos.to(tl.float64) * LN2 + offset).to(pos_max.dtype.element_ty), mask=inside)
