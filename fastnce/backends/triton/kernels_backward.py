"""Device code of the gradient: compute the logits of a tile again, turn them into weights, multiply the weights with the rows."""

import triton
import triton.language as tl

from fastnce.backends.triton.kernels import (
    RUNTIME,
    UNSHIFTED,
    accumulate,
    classes,
    finite,
    halves,
    logits,
    needs_mask,
    operand,
    outside,
    pair_factor,
    product,
    row_factor,
    swap,
    weight,
)


@triton.jit
def _coefficients(C, index, padded, lift, IN_TILE: tl.constexpr):
    """Vectors of one side: base and factor of the negatives, base and factor of the positives, share of dpos of each positive."""
    padded = padded.to(tl.int64)
    base = tl.load(C + index)
    factor = tl.load(C + padded + index) * lift
    base_pos, factor_pos, share = base, factor, factor
    if IN_TILE:
        base_pos = tl.load(C + 2 * padded + index)
        factor_pos = tl.load(C + 3 * padded + index) * lift
        share = tl.load(C + 4 * padded + index) * lift
    return base, factor, base_pos, factor_pos, share


@triton.jit
def _weights(
    t, i, j, row, column, row_padded, column_padded, lift, unshifted, positive,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN_TILE: tl.constexpr,
):  # fmt: skip
    """w of every pair of a tile, also of those that do not count. Where 2^t itself is in range, one exponential serves both sides."""
    if ROWS:
        base_i, factor_i, base_pos_i, factor_pos_i, share_i = _coefficients(row, i, row_padded, lift, IN_TILE)
    if COLUMNS:
        base_j, factor_j, base_pos_j, factor_pos_j, share_j = _coefficients(column, j, column_padded, lift, IN_TILE)
    if ROWS and COLUMNS:
        if unshifted:
            own = _unshifted(factor_i, base_i)[:, None] + _unshifted(factor_j, base_j)[None, :]
            if IN_TILE:
                own_pos = _unshifted(factor_pos_i, base_pos_i)[:, None] + _unshifted(factor_pos_j, base_pos_j)[None, :]
                own = tl.where(positive, own_pos, own)
            w = weight(t) * own
        else:
            w = _one_side(t, positive, base_i[:, None], factor_i[:, None], base_pos_i[:, None], factor_pos_i[:, None], IN_TILE)
            w += _one_side(t, positive, base_j[None, :], factor_j[None, :], base_pos_j[None, :], factor_pos_j[None, :], IN_TILE)
    elif ROWS:
        w = _one_side(t, positive, base_i[:, None], factor_i[:, None], base_pos_i[:, None], factor_pos_i[:, None], IN_TILE)
    else:
        w = _one_side(t, positive, base_j[None, :], factor_j[None, :], base_pos_j[None, :], factor_pos_j[None, :], IN_TILE)
    if IN_TILE:
        if ROWS:
            w += tl.where(positive, share_i[:, None], 0.0)
        if COLUMNS:
            w += tl.where(positive, share_j[None, :], 0.0)
    return w


@triton.jit
def _unshifted(factor, base):
    """A factor with 2^-base inside."""
    return factor * tl.exp2(-base)


@triton.jit
def _one_side(t, positive, base, factor, base_pos, factor_pos, IN_TILE: tl.constexpr):
    if IN_TILE:
        return weight(t, tl.where(positive, base_pos, base)) * tl.where(positive, factor_pos, factor)
    return weight(t, base) * factor


@triton.jit(do_not_specialize=RUNTIME)
def backward_rows(
    X, Y, A, B, scale, bound, row, column, center, lift, dx, column_dx, moment,
    q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
    rows, columns, own, up, down, row_padded, column_padded, splits, per_split, other_splits, other_per_split, first,
    IN_TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx (splits, padded rows, DP) = sum_j w_ij beta_j y~_j over the tiles of a split. Tiles hold whole rows.

    row, column    (5, padded), or (2, padded) without IN_TILE: coefficients of the rows (ROWS) and of the columns (COLUMNS)
    moment         (splits, rows) or None: sum_j w_ij (t_ij - center)
    column_dx      or None: from program `first` on, the programs make the gradient of the columns there, without a moment

    All of it is multiplied by lift.
    """
    program = tl.program_id(0)
    of_rows = rows
    if column_dx is not None:
        turned = program >= first
        program = tl.where(turned, program - first, program)
        splits, per_split = tl.where(turned, other_splits, splits), tl.where(turned, other_per_split, per_split)
        X, Y = swap(turned, X, Y)
        A, B = swap(turned, A, B)
        row, column = swap(turned, row, column)
        dx = tl.where(turned, column_dx, dx)
        if q_label is not None:
            q_label, k_label = swap(turned, q_label, k_label)
        if q_exclude is not None:
            q_exclude, k_exclude = swap(turned, q_exclude, k_exclude)
        mask_rows, mask_columns = swap(turned, mask_rows, mask_columns)
        mask_row, mask_column = swap(turned, mask_row, mask_column)
        rows, columns = swap(turned, rows, columns)
        row_padded, column_padded = swap(turned, row_padded, column_padded)
        up = tl.where(turned, -up, up)
        of_rows = tl.where(turned, 0, rows)
    block = program // splits
    split = program % splits
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    a = tl.load(A + i)
    alpha = row_factor(a, scale, PARTS)
    unshifted = tl.load(bound) <= UNSHIFTED
    lifted = tl.load(lift)
    tiles = tl.cdiv(columns, BN)
    lo = split * per_split
    hi = tl.minimum(lo + per_split, tiles)
    x, x_low = operand(X, i0, 0, DP, PARTS, BM, DP)
    acc = tl.zeros([BM, DP], tl.float32)
    if moment is not None:
        middle = tl.load(center)
        about = tl.zeros([BM], tl.float32)
    for tile in range(lo, hi):
        j0 = tile * BN
        j = j0 + tl.arange(0, BN)
        beta = tl.load(B + j)
        y, y_low = operand(Y, j0, 0, DP, PARTS, BN, DP)
        s = product(x, x_low, tl.trans(y), tl.trans(y_low), tl.zeros([BM, BN], tl.float32), PARTS)
        t = s * pair_factor(a, beta, PARTS) * alpha[:, None]
        positive = t == t
        if IN_TILE or q_exclude is not None:
            positive, negative = classes(
                i, j, q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
                rows, columns, own, up, down, IN_TILE,
            )  # fmt: skip
        w = _weights(t, i, j, row, column, row_padded, column_padded, lifted, unshifted, positive, ROWS, COLUMNS, IN_TILE)
        if IN_TILE:
            w = tl.where(positive | negative, w, 0.0)
        elif q_exclude is not None:
            w = tl.where(negative, w, 0.0)
        elif needs_mask(i0, j0, rows, columns, own, up, down, BM, BN):
            w = tl.where(outside(i, j, rows, columns, own, up, down), w, 0.0)
        if moment is not None:
            about += tl.sum(w * (t - middle), 1)
        g, g_low = halves(w * finite(beta)[None, :], PARTS)
        acc = accumulate(g, g_low, y, y_low, acc, PARTS)
    to = (split.to(tl.int64) * row_padded + i)[:, None] * DP
    tl.store(dx + to + tl.arange(0, DP)[None, :], acc)
    if moment is not None:
        tl.store(moment + split.to(tl.int64) * rows + i, about, mask=i < of_rows)


@triton.jit(do_not_specialize=RUNTIME)
def weights_block(
    X, Y, A, B, scale, bound, row, column, center, lift, for_rows, for_columns, moment,
    q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
    rows, columns, own, up, down, depth, row_padded, column_padded, row0, column0, down_tiles, across, pitch, share,
    IN_TILE: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Weights of down_tiles x across tiles from (row0, column0), for two plain matrix products. Rows have any length.

    for_rows, for_columns  (parts, pitch, pitch) or None: w_ij beta_j and w_ij a_i in half precision, 0 in the padding
    moment                 (across or more, padded rows) or None: `share` times a tile's sum of w_ij (t_ij - center) is added, per row

    All of it is multiplied by lift.
    """
    # Programs take GROUP tiles of a column before the next column: those that run together then share rows and columns in the L2 cache.
    program = tl.program_id(0)
    group = program // (GROUP * across)
    height = tl.minimum(down_tiles - group * GROUP, GROUP)
    i0 = row0 + (group * GROUP + program % (GROUP * across) % height) * BM
    j0 = column0 + program % (GROUP * across) // height * BN
    i = i0 + tl.arange(0, BM)
    j = j0 + tl.arange(0, BN)
    a = tl.load(A + i)
    beta = tl.load(B + j)
    lifted = tl.load(lift)
    s = logits(A, A, X, Y, i0, j0, depth, PARTS, 0, BM, BN, BD)
    t = s * pair_factor(a, beta, PARTS) * row_factor(a, scale, PARTS)[:, None]
    positive = t == t
    if IN_TILE or q_exclude is not None:
        positive, negative = classes(
            i, j, q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
            rows, columns, own, up, down, IN_TILE,
        )  # fmt: skip
        kept = negative
        if IN_TILE:
            kept = positive | negative
    else:
        kept = outside(i, j, rows, columns, own, up, down)
    unshifted = tl.load(bound) <= UNSHIFTED
    w = _weights(t, i, j, row, column, row_padded, column_padded, lifted, unshifted, positive, True, COLUMNS, IN_TILE)
    w = tl.where(kept, w, 0.0)
    if moment is not None:
        place = moment + ((j0 - column0) // BN).to(tl.int64) * row_padded + i
        tl.store(place, tl.load(place) + share * tl.sum(w * (t - tl.load(center)), 1))
    to = (i - row0).to(tl.int64)[:, None] * pitch + (j - column0)[None, :]
    if for_rows is not None:
        _store(for_rows, to, pitch, w * finite(beta)[None, :], PARTS)
    if for_columns is not None:
        _store(for_columns, to, pitch, w * finite(a)[:, None], PARTS)


@triton.jit
def _store(G, to, pitch, w, PARTS: tl.constexpr):
    high, low = halves(w, PARTS)
    tl.store(G + to, high)
    if PARTS == 2:
        tl.store(G + pitch.to(tl.int64) * pitch + to, low)


@triton.jit(do_not_specialize=["first_of_rows", "first_of_columns", "row_programs", "wide"])
def products(
    for_rows, for_columns, X, Y, dx, dy, depth, pitch, row0, column0, height, width, row_programs, wide, first_of_rows, first_of_columns,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Plain matrix products of a block's weights with its rows: dx_i += sum_j (w_ij beta_j) y~_j and dy_j += sum_i (w_ij a_i) x~_i.

    The first row_programs programs have tiles of dx, BM rows and BN of its columns, the others tiles of dy. The very first product of a row
    is stored, without reading what was there.
    """
    program = tl.program_id(0)
    part = pitch.to(tl.int64) * pitch
    # Two conditions each: Triton leaves out what the first one, a constant, rules out.
    if for_rows is not None:  # noqa: SIM102
        if program < row_programs:
            _product(
                for_rows, pitch, 1, part, Y, column0, width, dx, row0, depth, program, wide, first_of_rows, PARTS, BM, BN, BK,
            )  # fmt: skip
    if for_columns is not None:  # noqa: SIM102
        if program >= row_programs:
            _product(
                for_columns, 1, pitch, part, X, row0, height, dy, column0, depth, program - row_programs, wide, first_of_columns,
                PARTS, BM, BN, BK,
            )  # fmt: skip


@triton.jit
def _product(
    G, down, across, part, rows, row, count, out, to, depth, program, wide, first,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of sum_k g_mk rows_k, g_mk at m * down + k * across, in PARTS; in two, sums of BK terms are added in float32."""
    m = program // wide * BM + tl.arange(0, BM)
    n = program % wide * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, count, BK):
        place = G + m.to(tl.int64)[:, None] * down + (start + k).to(tl.int64)[None, :] * across
        g = tl.load(place)
        g_low = g
        at = rows + (row + start + k).to(tl.int64)[:, None] * (PARTS * depth) + n[None, :]
        y = tl.load(at, mask=(n < depth)[None, :], other=0.0)
        y_low = y
        if PARTS == 2:
            g_low = tl.load(place + part)
            y_low = tl.load(at + depth, mask=(n < depth)[None, :], other=0.0)
        acc = accumulate(g, g_low, y, y_low, acc, PARTS)
    place = out + (to + m).to(tl.int64)[:, None] * depth + n[None, :]
    inside = (n < depth)[None, :] & (m >= 0)[:, None]
    if first == 0:
        acc += tl.load(place, mask=inside, other=0.0)
    tl.store(place, acc, mask=inside)
