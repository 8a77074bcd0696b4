"""Device code over single rows, O(N D): operands for the tiles, aligned pairs, and the backward of the normalisation."""

import triton
import triton.language as tl

# precision.EPS and precision.LARGEST, once more: device code cannot import torch. A test compares them.
EPS = tl.constexpr(1e-12)
LARGEST = tl.constexpr(1e18)
LOG2E = tl.constexpr(1.4426950408889634)
# The largest element of an operand's row is in [2^8, 2^9): dot products of 8,192 columns stay below 2^31. Half a step of float16's smallest
# numbers, 2^-25, is 2^-33 of it.
EXPONENT = tl.constexpr(8)


@triton.jit
def valid(scale):
    """The scale behind the pointer, nan where it is no positive number: then everything computed with it is nan."""
    value = tl.load(scale)
    return tl.where((value > 0.0) & (value < float("inf")), value, float("nan"))


@triton.jit
def _power_of_two(largest):
    """2^k that lifts `largest` into [2^EXPONENT, 2^(EXPONENT + 1)), and 2^-k. k is at most 120, so that 2^k is finite."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    k = tl.minimum(EXPONENT + 127 - exponent, 120)
    return ((k + 127) << 23).to(tl.float32, bitcast=True), ((127 - k) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _row(X, row, stride, column, inside, D, BD: tl.constexpr):
    """BD columns from `column` of raw rows, as float32, with 0 outside."""
    d = column + tl.arange(0, BD)
    place = row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(X + place, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "stride", "D"])
def prepare(
    X, operand, factor, inverse_norm, rows, stride, D,
    NORMALIZE: tl.constexpr, PARTS: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Operands from raw rows, in the form that tiles read, for all padded rows.

    operand        (padded, PARTS, DP): x~ = 2^k x in float16, which half-precision input fits exactly; of float32 a high and a low half
    factor         (padded,): x^ = factor x~
    inverse_norm   (rows,): 1 / |x|; 1 without NORMALIZE, 0 for a zero row, nan for one that is not finite or longer than LARGEST
    """
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < rows
    largest = tl.zeros([BR], tl.float32)
    finite = inside | ~inside
    for column in range(0, DP, BD):
        x = tl.abs(_row(X, i, stride, column, inside, D, BD))
        largest = tl.maximum(largest, tl.max(x, 1))
        finite = finite & (tl.sum((x < float("inf")).to(tl.int32), 1) == BD)
    up, down = _power_of_two(tl.where(finite, largest, 1.0))
    square = tl.zeros([BR], tl.float32)
    to = operand + i.to(tl.int64)[:, None] * (PARTS * DP)
    for column in range(0, DP, BD):
        x = _row(X, i, stride, column, inside, D, BD)
        x = tl.where(finite[:, None], x * up[:, None], 0.0)
        square += tl.sum(x * x, 1)
        d = (column + tl.arange(0, BD))[None, :]
        high = x.to(tl.float16)
        tl.store(to + d, high)
        if PARTS == 2:
            tl.store(to + DP + d, (x - high.to(tl.float32)).to(tl.float16))
    if NORMALIZE:
        norm = tl.sqrt_rn(square)
        short = norm * down < EPS
        # The factor of a zero row is 2^-100: small enough that its similarities are 0, and not 0 itself, because -inf * 0 is nan.
        a = tl.where(short, 7.888609052210118e-31, tl.div_rn(1.0, tl.where(short, 1.0, norm)))
        r = tl.where(short, 0.0, a * up)
        finite = finite & (norm * down <= LARGEST)
    else:
        a = down
        r = tl.full([BR], 1.0, tl.float32)
    tl.store(factor + i, tl.where(finite, a, float("nan")))
    tl.store(inverse_norm + i, tl.where(finite, r, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["pairs", "first_row", "first_column", "row_stride", "column_stride", "D"])
def aligned(
    X, Y, r_x, r_y, scale, t, pairs, first_row, first_column, row_stride, column_stride, D,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """t (pairs,) = log2(e) scale <x^_i, y^_j> of the pairs (first_row + p, first_column + p), from the raw rows."""
    p = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = p < pairs
    dot = tl.zeros([BR], tl.float32)
    for column in range(0, D, BD):
        x = _row(X, first_row + p, row_stride, column, inside, D, BD)
        dot += tl.sum(x * _row(Y, first_column + p, column_stride, column, inside, D, BD), 1)
    r = tl.load(r_x + first_row + p, mask=inside)
    # The dot product is multiplied by one norm, then by the other: the product of both norms may leave float32.
    tl.store(t + p, dot * r * tl.load(r_y + first_column + p, mask=inside) * (valid(scale) * LOG2E), mask=inside)


@triton.jit(do_not_specialize=["rows", "columns", "up", "down", "x_stride", "y_stride", "dx_stride", "split_stride", "splits", "D"])
def finish(
    dx, X, Y, r_x, r_y, pair_weight, scale, lift, out,
    rows, columns, up, down, x_stride, y_stride, dx_stride, split_stride, splits, D,
    NORMALIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dL/dx (rows, D) from the sums of the tiles: add the splits in order, add the aligned pair, then the backward of x^ = r x.

    dx            (splits, rows.., D..): lift * sum_j w_ij y^_j over the tiles of a split
    pair_weight   (rows,): w of the aligned pair (i, i + up) or (i, i + down); of each row at most one exists
    out           (rows, D) = r (g - x^ <x^, g>),  g = dL/dx^ = scale (sum_j w_ij y^_j)
    """
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < rows
    factor = valid(scale) / tl.load(lift)
    # With host.NONE, which stands for no diagonal, the sum is no index of a row.
    partner = i + up
    partner = tl.where((partner >= 0) & (partner < columns), partner, i + down)
    paired = inside & (partner >= 0) & (partner < columns)
    pair = tl.load(pair_weight + i, mask=paired, other=0.0) * valid(scale) * tl.load(r_y + partner, mask=paired, other=0.0)
    r = tl.load(r_x + i, mask=inside, other=0.0)
    radial = tl.zeros([BR], tl.float32)
    if NORMALIZE:
        for column in range(0, D, BD):
            g = _gradient(dx, Y, pair, partner, paired, factor, i, inside, y_stride, dx_stride, split_stride, splits, column, D, BD)
            radial += tl.sum(_row(X, i, x_stride, column, inside, D, BD) * r[:, None] * g, 1)
    for column in range(0, D, BD):
        g = _gradient(dx, Y, pair, partner, paired, factor, i, inside, y_stride, dx_stride, split_stride, splits, column, D, BD)
        if NORMALIZE:
            g = r[:, None] * (g - _row(X, i, x_stride, column, inside, D, BD) * r[:, None] * radial[:, None])
        d = column + tl.arange(0, BD)
        place = out + i.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(place, g.to(out.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _gradient(
    dx, Y, pair, partner, paired, factor, i, inside, y_stride, dx_stride, split_stride, splits, column, D,
    BD: tl.constexpr,
):  # fmt: skip
    g = _row(dx, i, dx_stride, column, inside, D, BD)
    for _ in range(1, splits):
        dx += split_stride
        g += _row(dx, i, dx_stride, column, inside, D, BD)
    return g * factor + pair[:, None] * _row(Y, partner, y_stride, column, paired, D, BD)
