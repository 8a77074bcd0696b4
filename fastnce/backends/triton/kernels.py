"""Device code over tiles of logits: row and column statistics. The lines of docs/math.md, in base 2 and without the bias:

    x~_i       row i of q times a power of two, in float16 (float32 in a high and a low half), padded with zeros. bfloat16 fits exactly
    t_ij       = alpha_i beta_j <x~_i, y~_j>,   alpha_i = log2(e) scale a_i,  beta_j = a_j,  a = 1 / |x~|
    log-sums   log2 sum_{N_i} 2^t_ij,  log2 sum_{P_i} 2^t_ij;   pos_i = sum_{P_i} t_ij
    w_ij       = [N_i] c_i 2^(t_ij - L_i) + [P_i] (c'_i 2^(t_ij - L'_i) + mean_i)      + the same of column j
    dx_i       = sum_j w_ij beta_j y~_j            kernels_rows.py turns it into dL/dq

A launch has one axis of programs, each of which visits the tiles of one block of rows, or a split of them.

Where no |logit| is above 40 the unshifted kernel adds 2^t itself; elsewhere the kernel with a running maximum does. `bound`, a number that
only the device reads, decides: both kernels are launched, and the loop of one is empty.

Operands are padded to a multiple of the tile, so they load without masks. Pairs are masked in the tiles that need it, behind a branch that
is the same for all threads of a program.
"""

import triton
import triton.language as tl

from fastnce.backends.triton.kernels_rows import LOG2E, valid

# Numbers that change from call to call: a kernel is compiled once for all their values. depth, row0, column0 and pitch are not among them.
# They are multiples of 16 wherever they are used. The compiler must know it: otherwise it copies element by element, without a pipeline.
RUNTIME = [
    "rows", "columns", "own", "up", "down", "mask_rows", "mask_columns", "mask_row", "mask_column", "row_padded", "column_padded",
    "down_tiles", "across", "splits", "per_split", "other_splits", "other_per_split", "first", "always", "symmetric", "share",
]  # fmt: skip
# The largest |logit|, in nats, of the unshifted kernels: 2^t, a sum of 2^31 such terms, and an upstream gradient over it are then normal
# float32 numbers.
UNSHIFTED = tl.constexpr(40.0)


@triton.jit
def operand(X, first, column, depth, PARTS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """BR rows from `first` and BD columns from `column` of a padded operand: (high, low). With one part low is not used."""
    row = X + (first + tl.arange(0, BR)).to(tl.int64)[:, None] * (PARTS * depth)
    high = tl.load(row + (column + tl.arange(0, BD))[None, :])
    low = high
    if PARTS == 2:
        low = tl.load(row + (depth + column + tl.arange(0, BD))[None, :])
    return high, low


@triton.jit
def product(a, a_low, b, b_low, acc, PARTS: tl.constexpr):
    """acc + a b. In two parts the small terms come first; the product of both low halves is below float32's rounding and left out."""
    if PARTS == 2:
        acc = tl.dot(a_low, b, acc, input_precision="ieee")
        acc = tl.dot(a, b_low, acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def accumulate(a, a_low, b, b_low, acc, PARTS: tl.constexpr):
    """acc + a b, for a sum over many tiles.

    Tensor cores round every sum towards zero: over n columns they take some 2^-29 n of it, at a thousand more than float32 may lose. So in
    two parts they sum one tile, and the tile is added here.
    """
    if PARTS == 2:
        # The last of the three products starts from the other two. If one started from 0, the compiler would merge this addition into it.
        return acc + product(a, a_low, b, b_low, tl.zeros(acc.shape, tl.float32), PARTS)
    return product(a, a_low, b, b_low, acc, PARTS)


@triton.jit
def halves(w, PARTS: tl.constexpr):
    """float32 numbers as (high, low) float16. It is the only rounding to float16, after every sum that cancels."""
    high = w.to(tl.float16)
    low = high
    if PARTS == 2:
        low = (w - high.to(tl.float32)).to(tl.float16)
    return high, low


@triton.jit
def finite(factor):
    """factor, 1 where it is nan. The weights of a row that is nan are nan where it counts, and 0 where it is excluded: 0 * nan is nan."""
    return tl.where(factor == factor, factor, 1.0)


@triton.jit
def logits(x, x_low, X, Y, i0, j0, depth, PARTS: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """<x~_i, y~_j> of a tile. Where a tile holds whole rows (DP columns), they are given as x; longer ones (DP = 0) are read in pieces."""
    acc = tl.zeros([BM, BN], tl.float32)
    if DP:
        y, y_low = operand(Y, j0, 0, DP, PARTS, BN, DP)
        acc = product(x, x_low, tl.trans(y), tl.trans(y_low), acc, PARTS)
    else:
        for column in range(0, depth, BD):
            a, a_low = operand(X, i0, column, depth, PARTS, BM, BD)
            y, y_low = operand(Y, j0, column, depth, PARTS, BN, BD)
            acc = accumulate(a, a_low, tl.trans(y), tl.trans(y_low), acc, PARTS)
    return acc


# t = <x~_i, y~_j> pair_factor row_factor_i. In two parts pair_factor is a_i b_j, so that a pair has the same t from both of its ends.
# Weights are divided by sums over rows and by sums over columns: with factors in another order, t from one end would be off by u scale, at
# a temperature of 0.005 ten times the error of the gradient. In one part that is far below the rounding of the input, so pair_factor is b_j
# alone and saves a multiplication for every pair.


@triton.jit
def pair_factor(a, beta, PARTS: tl.constexpr):
    factor = beta[None, :]
    if PARTS == 2:
        factor = a[:, None] * factor
    return factor


@triton.jit
def row_factor(a, scale, PARTS: tl.constexpr):
    largest = valid(scale) * LOG2E
    if PARTS == 2:
        return tl.zeros_like(a) + largest
    return a * largest


@triton.jit
def swap(turned, a, b):
    return tl.where(turned, b, a), tl.where(turned, a, b)


@triton.jit
def own_rows(X, i0, A, PARTS: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """The program's own rows, loaded once for all tiles. Where rows are longer than a tile holds, the result is not used."""
    if DP:
        x, x_low = operand(X, i0, 0, DP, PARTS, BM, DP)
    else:
        x, x_low = A, A
    return x, x_low


# The rules of pairs.py, for a tile ------------------------------------------------------------------------------------------------------
#
# own, up and down are diagonals j - i: self, aligned, aligned mirrored; host.NONE where there is none.


@triton.jit
def _meets(i0, j0, diagonal, BM: tl.constexpr, BN: tl.constexpr):
    """Whether the line j - i == diagonal crosses the tile."""
    local = j0 - i0 - diagonal
    return (local < BM) & (local > -BN)


@triton.jit
def needs_mask(i0, j0, rows, columns, own, up, down, BM: tl.constexpr, BN: tl.constexpr):
    crossed = _meets(i0, j0, own, BM, BN) | _meets(i0, j0, up, BM, BN) | _meets(i0, j0, down, BM, BN)
    return crossed | (i0 + BM > rows) | (j0 + BN > columns)


@triton.jit
def outside(i, j, rows, columns, own, up, down):
    """Pairs that are negative by index alone: inside of the matrix, not self, not aligned."""
    step = j[None, :] - i[:, None]
    return (i < rows)[:, None] & (j < columns)[None, :] & (step != own) & (step != up) & (step != down)


@triton.jit
def classes(
    i, j, q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
    rows, columns, own, up, down, IN_TILE: tl.constexpr,
):  # fmt: skip
    """(positive, negative) of every pair of a tile. Only if IN_TILE are aligned pairs positives here: otherwise they are neither.

    Ids are padded. An id that matches nothing is negative, and a different one on either side.
    """
    step = j[None, :] - i[:, None]
    inside = (i < rows)[:, None] & (j < columns)[None, :] & (step != own)
    aligned = (step == up) | (step == down)
    kept = inside
    if q_exclude is not None:
        kept = kept & (tl.load(q_exclude + i)[:, None] != tl.load(k_exclude + j)[None, :])
    if not IN_TILE:
        kept = kept & (step != up) & (step != down)
        return kept, kept
    same = aligned
    if q_label is not None:
        same = tl.load(q_label + i)[:, None] == tl.load(k_label + j)[None, :]
    if mask is not None:
        place = (i % mask_rows).to(tl.int64)[:, None] * mask_row + (j % mask_columns).to(tl.int64)[None, :] * mask_column
        chosen = tl.load(mask + place) != 0
        same = chosen if q_label is None else same | chosen
    positive = (kept & same) | (inside & aligned)
    return positive, kept & ~same & ~aligned


# The formula ----------------------------------------------------------------------------------------------------------------------------


@triton.jit
def term(t, base=None):
    """What a logit adds to the sum of its row and of its column: 2^t, that is exp(s). With a base it is divided by 2^base."""
    if base is not None:
        t = t - base
    return tl.exp2(t)


@triton.jit
def weight(t, base=None):
    """The derivative of the term by s. The factor of a row or column makes that one's part of the weight dL/ds of it."""
    return term(t, base)


# Statistics -----------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _running(u, alpha, top, total):
    """Add a tile to the sum total 2^top of every row. t = u alpha, alpha > 0; a pair that is left out has u = -inf."""
    new = tl.maximum(top, tl.max(u, 1) * alpha)
    # A row without any pair so far gets base 0, and 2^-inf = 0: -inf - -inf would be nan.
    base = tl.where(new == -float("inf"), 0.0, new)
    e = term(u * alpha[:, None], base[:, None])
    shrink = tl.exp2(top - base)
    return new, total * shrink + tl.sum(e, 1), e, shrink


@triton.jit(do_not_specialize=RUNTIME)
def forward_rows(
    X, Y, A, B, scale, bound, sums, count, column_sums, column_count, out, moment, lift,
    q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
    rows, columns, own, up, down, depth, row_padded, splits, per_split, other_splits, other_per_split, first, always,
    COLUMNS: tl.constexpr, IN_TILE: tl.constexpr, PARTS: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Row statistics with a running maximum, for logits of any size. Unless `always`, only where forward_both must not run.

    sums   (2 or 5, splits, rows): top and total of the negatives; IN_TILE: of the positives, and their sum of t
    count  (splits, rows) int32: number of positives, IN_TILE only
    out    (splits, padded rows, DP) or None: lift sum_j 2^(t - top) beta_j y~_j, and moment (splits, rows): sum_j 2^(t - top) t

    COLUMNS: from program `first` on, the programs do the same for the columns, into column_sums and column_count.
    """
    program = tl.program_id(0)
    if COLUMNS:
        turned = program >= first
        program = tl.where(turned, program - first, program)
        splits, per_split = swap(turned, splits, other_splits)[0], swap(turned, per_split, other_per_split)[0]
        X, Y = swap(turned, X, Y)
        A, B = swap(turned, A, B)
        sums = tl.where(turned, column_sums, sums)
        if count is not None:
            count = tl.where(turned, column_count, count)
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
    a = tl.load(A + i)
    alpha = row_factor(a, scale, PARTS)
    lo = split * per_split
    hi = tl.minimum(lo + per_split, tl.cdiv(columns, BN))
    hi = tl.where((tl.load(bound) <= UNSHIFTED) & (always == 0), lo, hi)
    x, x_low = own_rows(X, i0, A, PARTS, DP, BM)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if IN_TILE:
        top_pos = tl.full([BM], -float("inf"), tl.float32)
        total_pos = tl.zeros([BM], tl.float32)
        pos = tl.zeros([BM], tl.float32)
        n_pos = tl.zeros([BM], tl.int32)
    if out is not None:
        acc = tl.zeros([BM, DP], tl.float32)
        mean = tl.zeros([BM], tl.float32)
        lifted = tl.load(lift)
    for tile in range(lo, hi):
        j0 = tile * BN
        j = j0 + tl.arange(0, BN)
        beta = tl.load(B + j)
        u = logits(x, x_low, X, Y, i0, j0, depth, PARTS, DP, BM, BN, BD) * pair_factor(a, beta, PARTS)
        if IN_TILE or q_exclude is not None:
            positive, negative = classes(
                i, j, q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
                rows, columns, own, up, down, IN_TILE,
            )  # fmt: skip
            if IN_TILE:
                of_positive = tl.where(positive, u, -float("inf"))
                top_pos, total_pos, _, _ = _running(of_positive, alpha, top_pos, total_pos)
                pos += tl.sum(tl.where(positive, u, 0.0), 1) * alpha
                n_pos += tl.sum(positive.to(tl.int32), 1)
            u = tl.where(negative, u, -float("inf"))
        elif needs_mask(i0, j0, rows, columns, own, up, down, BM, BN):
            u = tl.where(outside(i, j, rows, columns, own, up, down), u, -float("inf"))
        top, total, e, shrink = _running(u, alpha, top, total)
        if out is not None:
            y, y_low = operand(Y, j0, 0, DP, PARTS, BN, DP)
            g, g_low = halves(e * (finite(beta) * lifted)[None, :], PARTS)
            acc = accumulate(g, g_low, y, y_low, acc * shrink[:, None], PARTS)
            # Where e is 0, u may be -inf, and 0 * -inf is nan.
            mean = mean * shrink + tl.sum(tl.where(e > 0.0, e * u, 0.0), 1) * alpha
    inside = i < rows
    field = splits.to(tl.int64) * rows
    place = sums + split.to(tl.int64) * rows + i
    tl.store(place, top, mask=inside)
    tl.store(place + field, total, mask=inside)
    if IN_TILE:
        tl.store(place + 2 * field, top_pos, mask=inside)
        tl.store(place + 3 * field, total_pos, mask=inside)
        tl.store(place + 4 * field, pos, mask=inside)
        tl.store(count + split.to(tl.int64) * rows + i, n_pos, mask=inside)
    if out is not None:
        row = (split.to(tl.int64) * row_padded + i)[:, None] * DP
        tl.store(out + row + tl.arange(0, DP)[None, :], acc)
        tl.store(moment + split.to(tl.int64) * rows + i, mean, mask=inside)


@triton.jit
def _add(place, value, inside):
    tl.atomic_add(place, value, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=RUNTIME)
def forward_both(
    X, Y, A, B, scale, bound, row_sum, row_count, column_sum, column_count,
    q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
    rows, columns, own, up, down, depth, splits, per_split, symmetric,
    IN_TILE: tl.constexpr, PARTS: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of rows and of columns from the same tiles, added in memory. It runs where every |logit| <= 40: no maximum is needed.

    row_sum     (1 or 3, rows): sum of 2^t over the negatives; IN_TILE: over the positives, and their sum of t
    row_count   (rows,) int32: number of positives, IN_TILE only;  column_*: the same per column
    symmetric   the keys are the queries, and column_* are row_*: a tile also stands for its mirror image, so half of T x T are visited.
                Block I visits the tiles (I, I + step mod T): all have the same number, and add to one column at different times
    """
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    tiles = tl.cdiv(columns, BN)
    # With an even number of tiles the one half way round would be met from both ends: the second half of the blocks leaves it out.
    half = tl.where((tiles % 2 == 0) & (block >= tiles // 2), tiles // 2, tiles // 2 + 1)
    steps = tl.where(symmetric != 0, half, tiles)
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    a = tl.load(A + i)
    alpha = row_factor(a, scale, PARTS)
    lo = split * per_split
    hi = tl.minimum(lo + per_split, steps)
    unshifted = tl.load(bound) <= UNSHIFTED
    hi = tl.where(unshifted, hi, lo)
    x, x_low = own_rows(X, i0, A, PARTS, DP, BM)
    total = tl.zeros([BM], tl.float32)
    if IN_TILE:
        total_pos = tl.zeros([BM], tl.float32)
        pos = tl.zeros([BM], tl.float32)
        n_pos = tl.zeros([BM], tl.int32)
    start = block % tiles
    for step in range(lo, hi):
        tile = start + step
        tile = tl.where(tile >= tiles, tile - tiles, tile)
        j0 = tile * BN
        j = j0 + tl.arange(0, BN)
        t = logits(x, x_low, X, Y, i0, j0, depth, PARTS, DP, BM, BN, BD) * pair_factor(a, tl.load(B + j), PARTS) * alpha[:, None]
        e = term(t)
        # Where the keys are the queries, a tile on the diagonal holds its own mirror image: it adds to rows alone.
        counted = j < tl.where((symmetric != 0) & (step == 0), 0, columns)
        if IN_TILE or q_exclude is not None:
            positive, negative = classes(
                i, j, q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
                rows, columns, own, up, down, IN_TILE,
            )  # fmt: skip
            if IN_TILE:
                e_pos = tl.where(positive, e, 0.0)
                t_pos = tl.where(positive, t, 0.0)
                ones = positive.to(tl.int32)
                total_pos += tl.sum(e_pos, 1)
                pos += tl.sum(t_pos, 1)
                n_pos += tl.sum(ones, 1)
                _add(column_sum + columns + j, tl.sum(e_pos, 0), counted)
                _add(column_sum + 2 * columns + j, tl.sum(t_pos, 0), counted)
                _add(column_count + j, tl.sum(ones, 0), counted)
            e = tl.where(negative, e, 0.0)
        elif needs_mask(i0, j0, rows, columns, own, up, down, BM, BN):
            e = tl.where(outside(i, j, rows, columns, own, up, down), e, 0.0)
        total += tl.sum(e, 1)
        _add(column_sum + j, tl.sum(e, 0), counted)
    inside = i < tl.where(unshifted, rows, 0)
    _add(row_sum + i, total, inside)
    if IN_TILE:
        _add(row_sum + rows + i, total_pos, inside)
        _add(row_sum + 2 * rows + i, pos, inside)
        _add(row_count + i, n_pos, inside)
