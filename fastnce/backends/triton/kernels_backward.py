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
    weight,
)


@triton.jit
def _coefficients(C, index, padded, IN_TILE: tl.constexpr):
    """Vectors of one side: base and factor of the negatives, base and factor of the positives, share of dpos of each positive."""
    padded = padded.to(tl.int64)
    base = tl.load(C + index)
    factor = tl.load(C + padded + index)
    base_pos, factor_pos, share = base, factor, factor
    if IN_TILE:
        base_pos = tl.load(C + 2 * padded + index)
        factor_pos = tl.load(C + 3 * padded + index)
        share = tl.load(C + 4 * padded + index)
    return base, factor, base_pos, factor_pos, share


@triton.jit
def _weights(
    t, i, j, row, column, row_padded, column_padded, unshifted, positive,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN_TILE: tl.constexpr,
):  # fmt: skip
    """w of every pair of a tile, also of those that do not count. Where 2^t itself is in range, one exponential serves both sides."""
    if ROWS:
        base_i, factor_i, base_pos_i, factor_pos_i, share_i = _coefficients(row, i, row_padded, IN_TILE)
    if COLUMNS:
        base_j, factor_j, base_pos_j, factor_pos_j, share_j = _coefficients(column, j, column_padded, IN_TILE)
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
    X, Y, A, B, scale, bound, row, column, center, dx, moment,
    q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
    rows, columns, own, up, down, row_padded, column_padded, splits, per_split,
    IN_TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx (splits, padded rows, DP) = sum_j w_ij beta_j y~_j over the tiles of a split. Tiles hold whole rows.

    row, column    (5, padded), or (2, padded) without IN_TILE: coefficients of the rows (ROWS) and of the columns (COLUMNS)
    moment         (splits, rows) or None: sum_j w_ij (t_ij - center)
    """
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    a = tl.load(A + i)
    alpha = row_factor(a, scale, PARTS)
    unshifted = tl.load(bound) <= UNSHIFTED
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
        w = _weights(t, i, j, row, column, row_padded, column_padded, unshifted, positive, ROWS, COLUMNS, IN_TILE)
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
        tl.store(moment + split.to(tl.int64) * rows + i, about, mask=i < rows)


@triton.jit(do_not_specialize=RUNTIME)
def weights_block(
    X, Y, A, B, scale, bound, row, column, center, for_rows, for_columns, moment,
    q_label, k_label, q_exclude, k_exclude, mask, mask_rows, mask_columns, mask_row, mask_column,
    rows, columns, own, up, down, depth, row_padded, column_padded, row0, column0, down_tiles, across, pitch,
    IN_TILE: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Weights of down_tiles x across tiles from (row0, column0), for two plain matrix products. Rows have any length.

    for_rows, for_columns  (parts, pitch, pitch) or None: w_ij beta_j and w_ij a_i in half precision, 0 in the padding
    moment                 (across, pitch) or None: per row of the block, sum over a tile of w_ij (t_ij - center)
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
    w = _weights(t, i, j, row, column, row_padded, column_padded, unshifted, positive, True, COLUMNS, IN_TILE)
    w = tl.where(kept, w, 0.0)
    if moment is not None:
        tl.store(moment + (j0 - column0) // BN * pitch + (i - row0), tl.sum(w * (t - tl.load(center)), 1))
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
