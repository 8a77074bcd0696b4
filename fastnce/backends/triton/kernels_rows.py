"""Device code over single rows, O(N D): operands for the tiles, aligned pairs, ids, and the backward of the normalisation.

The rows of a problem are numbered through: the padded queries first, then the padded keys. Queries may be the rows of a first tensor, view
after view, and then those of a second one; keys are rows of one tensor.
"""

import triton
import triton.language as tl

# precision.EPS and precision.LARGEST, once more: device code cannot import torch. A test compares them.
EPS = tl.constexpr(1e-12)
LARGEST = tl.constexpr(1e18)
LOG2E = tl.constexpr(1.4426950408889634)
# The largest element of an operand's row is in [2^8, 2^9): dot products of 8,192 columns stay below 2^31. Half a step of float16's smallest
# numbers, 2^-25, is 2^-33 of it.
EXPONENT = tl.constexpr(8)
# Places in `slots`, float32 numbers that one launch leaves for the next ones. Each starts at a multiple of 16 bytes, as any tensor does.
SCALE = tl.constexpr(0)
BOUND = tl.constexpr(4)  # no |logit| without bias is larger
LIFT = tl.constexpr(8)  # the power of two that the weights of the gradient are multiplied by
CENTER = tl.constexpr(12)  # a t around which sums of w t lose less
OUTPUT_LIFT = tl.constexpr(16)  # the power of two that the weights of the kept output are multiplied by
# Places in `state`, int32: how many programs of a launch are done, and the bits of largest numbers that are not negative.
DONE = tl.constexpr(0)
LONGEST = tl.constexpr(1)  # row of the queries, of the keys
PEAK = tl.constexpr(3)  # |w| of the rows, of the columns
FACTOR = tl.constexpr(5)  # of the operands
# Places in `scalars`, float64: the factor of all gradients; sum of all w; of w t and of w of the aligned pairs.
OVER = tl.constexpr(0)
DUE = tl.constexpr(1)
PAIR_MOMENT = tl.constexpr(2)
PAIR_WEIGHT = tl.constexpr(3)


@triton.jit
def valid(scale):
    """The scale behind the pointer, nan where it is no positive number: then everything computed with it is nan."""
    return positive(tl.load(scale).to(tl.float32))


@triton.jit
def positive(value):
    return tl.where((value > 0.0) & (value < float("inf")), value, float("nan"))


@triton.jit
def is_last(state, programs):
    """Whether all other programs of the launch are done, and what they stored can be read. The count goes back to 0 for the next launch."""
    # Every thread of the program has stored before one of them counts.
    tl.debug_barrier()
    last = tl.atomic_add(state + DONE, 1, sem="acq_rel") == programs - 1
    if last:
        tl.atomic_xchg(state + DONE, 0, sem="acq_rel")
    return last


@triton.jit
def raise_to(place, value):
    """The larger of a float32 number in memory and a value, neither negative; a value that is nan counts as 0."""
    tl.atomic_max(place, tl.where(value == value, value, 0.0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def read(place):
    """The number that raise_to left there in an earlier launch, or by a program that is done."""
    return tl.load(place, cache_modifier=".cg").to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(largest, TO: tl.constexpr):
    """2^k, float32, that lifts the float64 number `largest` into (2^(TO - 1), 2^TO], |k| <= 100; 1 where it is 0 or no finite number."""
    bits = largest.to(tl.int64, bitcast=True)
    above = ((bits >> 52) & 2047) - 1023 + tl.where((bits & 0xFFFFFFFFFFFFF) != 0, 1, 0)
    k = tl.minimum(tl.maximum(TO - above, -100), 100)
    k = tl.where((largest > 0.0) & (largest < float("inf")), k, 0).to(tl.int32)
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(largest):
    """2^k that lifts `largest` into [2^EXPONENT, 2^(EXPONENT + 1)), and 2^-k. k is at most 120, so that 2^k is finite."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    k = tl.minimum(EXPONENT + 127 - exponent, 120)
    return ((k + 127) << 23).to(tl.float32, bitcast=True), ((127 - k) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _at(X, elements):
    """Addresses of elements of X, as numbers: Triton 3.6 chooses between numbers on every GPU, and between pointers not on AMD's."""
    return X.to(tl.int64) + elements * (X.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def _query(X, Z, i, first, per_view, x_view, x_row, z_row):
    """Addresses of the queries i: the first ones are rows of X, per_view of each view, the others rows of Z."""
    place = _at(X, (i // per_view).to(tl.int64) * x_view + (i % per_view).to(tl.int64) * x_row)
    if Z is not None:
        place = tl.where(i < first, place, _at(Z, (i - first).to(tl.int64) * z_row))
    return place


@triton.jit
def _row(X, place, column, inside, D, BD: tl.constexpr):
    """BD columns from `column` of rows that lie at these addresses and have the elements of X, as float32, with 0 outside."""
    d = column + tl.arange(0, BD)
    return tl.load(place.to(X.dtype)[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _range(X, place, inside, D, BR: tl.constexpr, BD: tl.constexpr):
    """(2^k, 2^-k, whether a row is finite): the power of two that its elements are multiplied by."""
    largest = tl.zeros([BR], tl.float32)
    finite = inside | ~inside
    for column in range(0, D, BD):
        x = tl.abs(_row(X, place, column, inside, D, BD))
        largest = tl.maximum(largest, tl.max(x, 1))
        finite = finite & (tl.sum((x < float("inf")).to(tl.int32), 1) == BD)
    up, down = _power_of_two(tl.where(finite, largest, 1.0))
    return up, down, finite


@triton.jit
def _lengths(square, up, down, finite, NORMALIZE: tl.constexpr):
    """(factor of the operand, inverse norm, norm) from the sum of the squares of 2^k x."""
    norm = tl.sqrt_rn(square)
    if NORMALIZE:
        short = norm * down < EPS
        # The factor of a zero row is 2^-100: small enough that its similarities are 0, and not 0 itself, because -inf * 0 is nan.
        a = tl.where(short, 7.888609052210118e-31, tl.div_rn(1.0, tl.where(short, 1.0, norm)))
        r = tl.where(short, 0.0, a * up)
        finite = finite & (norm * down <= LARGEST)
    else:
        a = down
        r = tl.full(norm.shape, 1.0, tl.float32)
    return tl.where(finite, a, float("nan")), tl.where(finite, r, float("nan")), norm * down


@triton.jit
def _rank(ids, count, wanted, some, BR: tl.constexpr, BC: tl.constexpr):
    """The first place in ids of each wanted number; count where there is none, or where it is not asked for."""
    place = tl.full([BR], 0, tl.int32) + count
    left = tl.max(some.to(tl.int32), 0)
    start = 0
    while (start < count) & (left > 0):
        j = start + tl.arange(0, BC)
        other = tl.load(ids + j, mask=j < count, other=-1)
        same = (other[None, :] == wanted[:, None]) & some[:, None]
        place = tl.minimum(place, tl.min(tl.where(same, j[None, :], count), 1))
        left = tl.max((some & (place == count)).to(tl.int32), 0)
        start += BC
    return place


@triton.jit
def _store_ranks(
    q_id, k_id, rank, rank_of_column, i, own, padded, of_keys, inside, counts, k_counts, by_place, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Ids as int32 that are equal where the int64 ids of a query and a key are: the first query of that id, or nothing.

    Half the registers of int64 in a tile. An id that matches nothing is -2 for a query and -1 for a key. Where the keys are the queries,
    rank_of_column has the keys'. by_place: query i has the id i % counts.
    """
    if by_place != 0:
        place = (own % tl.maximum(counts, 1)).to(tl.int32)
        some = inside
    else:
        wanted = tl.load(q_id + own % tl.maximum(counts, 1), mask=inside & (i < padded), other=-1)
        if k_id is not None:
            wanted = tl.where(of_keys, tl.load(k_id + own % tl.maximum(k_counts, 1), mask=inside & of_keys, other=-1), wanted)
        some = inside & (wanted >= 0)
        place = _rank(q_id, counts, wanted, some, BR, BC)
        some = some & (place < counts)
    tl.store(rank + i, tl.where(some, place, tl.where(of_keys, -1, -2)))
    if rank_of_column is not None:
        tl.store(rank_of_column + i, tl.where(some, place, -1))


@triton.jit(
    do_not_specialize=[
        "value", "inverse", "rows", "first", "per_view", "columns", "padded", "x_view", "x_row", "z_row", "y_row", "p_row", "D",
        "first_row", "first_column", "pairs", "labels", "k_labels", "by_place", "excludes", "k_excludes", "zeros",
        "zeros_each",
    ]
)  # fmt: skip
def prepare(
    X, Z, Y, P, scale, bias, value, inverse, operand, factor, inverse_norm, partner_norm, t, zeroed, state, slots,
    q_label, k_label, label, column_label, q_exclude, k_exclude, exclude, column_exclude,
    rows, first, per_view, columns, padded, x_view, x_row, z_row, y_row, p_row, D,
    first_row, first_column, pairs, labels, k_labels, by_place, excludes, k_excludes, zeros, zeros_each, depth,
    NORMALIZE: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All that the launches over the tiles read, from the raw rows: of `rows` queries (X, then Z) and `columns` keys (Y, or none).

    operand        (padded + padded keys, PARTS, depth): x~ = 2^k x in float16, which half-precision input fits exactly; of float32 a high
                   and a low half
    factor         (padded + ..,): x^ = factor x~
    inverse_norm   (padded + ..,): 1 / |x|; 1 without NORMALIZE, 0 for a zero row, nan for one that is not finite or longer than LARGEST
    t              (pairs,) or None: log2(e) scale <x^_i, y^_j> of the pairs (first_row + p, first_column + p), from the raw rows. y is row
                   first_column + p of P where there is one, whose inverse norms are then stored in partner_norm; else a key, or a query
    label, exclude (padded + ..,) int32 or None: see _store_ranks
    zeroed         (zeros,): memory that is to hold zeros
    slots          numbers for the launches that follow: the scale (behind `scale`, or `value`; 1 over it where `inverse`), and bounds.
                   Without NORMALIZE the longest rows are looked for, and `state` holds zeros before
    """
    program = tl.program_id(0)
    i = program * BR + tl.arange(0, BR)
    of_keys = i >= padded
    own = tl.where(of_keys, i - padded, i)
    inside = own < tl.where(of_keys, columns, rows)
    place = _query(X, Z, own, first, per_view, x_view, x_row, z_row)
    if Y is not None:
        place = tl.where(of_keys, _at(Y, own.to(tl.int64) * y_row), place)
    up, down, finite = _range(X, place, inside, D, BR, BD)
    square = tl.zeros([BR], tl.float32)
    to = operand + i.to(tl.int64)[:, None] * (PARTS * depth)
    for column in range(0, depth, BD):
        x = _row(X, place, column, inside, D, BD)
        x = tl.where(finite[:, None], x * up[:, None], 0.0)
        square += tl.sum(x * x, 1)
        d = (column + tl.arange(0, BD))[None, :]
        high = x.to(tl.float16)
        tl.store(to + d, high)
        if PARTS == 2:
            tl.store(to + depth + d, (x - high.to(tl.float32)).to(tl.float16))
    a, r, norm = _lengths(square, up, down, finite, NORMALIZE)
    tl.store(factor + i, a)
    tl.store(inverse_norm + i, r)
    given = value
    if scale is not None:
        given = tl.load(scale).to(tl.float32)
    given = positive(tl.where(inverse != 0, tl.div_rn(1.0, given), given))
    bound = given
    if bias is not None:
        # A bias that is no number makes every logit nan. The bound stays: which kernels run follows from the scale.
        given += 0.0 * tl.load(bias).to(tl.float32)
    if t is not None:
        pair = i - first_row
        paired = inside & (pair >= 0) & (pair < pairs)
        j = pair + first_column
        if P is not None:
            partner = _at(P, j.to(tl.int64) * p_row)
        elif Y is not None:
            partner = _at(Y, j.to(tl.int64) * y_row)
        else:
            partner = _query(X, Z, j, first, per_view, x_view, x_row, z_row)
        p_up, p_down, p_finite = _range(X, partner, paired, D, BR, BD)
        p_square = tl.zeros([BR], tl.float32)
        dot = tl.zeros([BR], tl.float32)
        for column in range(0, D, BD):
            y = _row(X, partner, column, paired, D, BD)
            dot += tl.sum(_row(X, place, column, paired, D, BD) * y, 1)
            y = tl.where(p_finite[:, None], y * p_up[:, None], 0.0)
            p_square += tl.sum(y * y, 1)
        p_a, p_r, p_norm = _lengths(p_square, p_up, p_down, p_finite, NORMALIZE)
        # The dot product is multiplied by one norm, then by the other: the product of both norms may leave float32.
        tl.store(t + pair, dot * r * p_r * (given * LOG2E), mask=paired)
        if partner_norm is not None:
            tl.store(partner_norm + pair, p_r, mask=paired)
    if label is not None:
        _store_ranks(q_label, k_label, label, column_label, i, own, padded, of_keys, inside, labels, k_labels, by_place, BR, BC)
    if exclude is not None:
        _store_ranks(q_exclude, k_exclude, exclude, column_exclude, i, own, padded, of_keys, inside, excludes, k_excludes, 0, BR, BC)
    if zeroed is not None:
        stop = tl.minimum(zeros, (program + 1) * zeros_each)
        for start in range(program * zeros_each, stop, BC):
            n = start + tl.arange(0, BC)
            tl.store(zeroed + n, tl.zeros([BC], tl.float32), mask=n < stop)
    if program == 0:
        tl.store(slots + SCALE, given)
        if NORMALIZE:
            tl.store(slots + BOUND, bound)
            # The factor of a row is at most 2^-EXPONENT, see above.
            tl.store(slots + OUTPUT_LIFT, 4194304.0)
            tl.store(state + tl.arange(0, 8), tl.zeros([8], tl.int32))
    if not NORMALIZE:
        # A row without a norm has the length of its elements.
        raise_to(state + LONGEST + tl.where(program * BR >= padded, 1, 0), tl.max(tl.where(inside, norm, 0.0), 0))
        raise_to(state + FACTOR, tl.max(tl.where(of_keys & (a == a), a, 0.0), 0))
        if is_last(state, tl.num_programs(0)):
            longest = read(state + LONGEST)
            other = longest
            if Y is not None:
                other = read(state + LONGEST + 1)
            tl.store(slots + BOUND, bound * longest * other)
            tl.store(slots + OUTPUT_LIFT, power_of_two(read(state + FACTOR).to(tl.float64), 14))


@triton.jit
def _gradient(numbers, source, splits, split_stride, factor, X, partner, pair, column, inside, paired, D, BD: tl.constexpr):
    """dL/dx^ of some rows: the splits in order, then the aligned pair. Rows whose pairs are all aligned have no splits.

    numbers: any pointer to float32, the type of the sums at `source`.
    """
    g = tl.zeros([source.shape[0], BD], tl.float32)
    for _ in range(splits):
        g += _row(numbers, source, column, inside, D, BD)
        source += split_stride * 4  # bytes of float32
    return g * factor[:, None] + pair[:, None] * _row(X, partner, column, paired, D, BD)


@triton.jit(
    do_not_specialize=[
        "rows", "first", "per_view", "columns", "padded", "pairs", "first_row", "first_column", "x_view", "x_row", "z_row", "y_row",
        "p_row", "o_view", "o_row", "D", "x_stride", "x_splits", "x_split", "y_stride", "y_splits", "y_split", "parts", "part", "step",
        "divide", "inverse", "x_programs", "y_programs",
    ]
)  # fmt: skip
def finish(
    dx, dy, X, Z, Y, P, inverse_norm, partner_norm, row_pair, column_pair, row_factor, slots, scalars, upstream, about, partial, state,
    out_x, out_z, out_y, out_p, dscale, dbias,
    rows, first, per_view, columns, padded, pairs, first_row, first_column, x_view, x_row, z_row, y_row, p_row, o_view, o_row, D,
    x_stride, x_splits, x_split, y_stride, y_splits, y_split, parts, part, step, divide, inverse, x_programs, y_programs,
    NORMALIZE: tl.constexpr, SYMMETRIC: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs from the sums of the tiles: add the splits in order, add the aligned pair, then the backward of x^ = r x.

        out = r (g - x^ <x^, g>) c     g = dL/dx^ = scale (sum_j w_ij y^_j / lift)     c = upstream * scalars[OVER]

    The first x_programs programs have the queries, then y_programs the keys, the others the rows of P.

    dx, dy          (splits, rows.., D..): lift * sum_j w_ij y^_j over the tiles of a split. With row_factor (rows,), that is c of `close`,
                    dx is sum_j p_ij y^_j instead, without a lift
    row_pair, column_pair   (padded,) or None: what the two ends give to the w of an aligned pair, see prepare for its rows
    about           (parts, rows..) or None: lift * divide * sum_j w_ij (t_ij - center); with row_factor sum_j p_ij t_ij
    partial         (programs,) float64: sums of `about` on their way to dscale, which the last program adds up in order
    out_*           gradients of X, Z, Y, P, or None;  dscale, dbias: of scale (or of 1 / scale where `inverse`) and bias, or None
    """
    program = tl.program_id(0)
    # Vectors of equal numbers: masks are made of them.
    each = tl.zeros([BR], tl.int32) + program
    of_queries, of_partners = each < x_programs, each >= x_programs + y_programs
    of_keys = (each >= x_programs) & (each < x_programs + y_programs)
    own = (each - tl.where(of_queries, 0, tl.where(of_keys, x_programs, x_programs + y_programs))) * BR + tl.arange(0, BR)
    inside = own < tl.where(of_queries, rows, tl.where(of_keys, columns, pairs))
    place = _query(X, Z, own, first, per_view, x_view, x_row, z_row)
    r_place = own
    # The aligned pair of a row: its number, and whether the row is its first end.
    pair = tl.where(of_queries, own - first_row, own - tl.where(of_keys, first_column, 0))
    paired = inside & (pair >= 0) & (pair < pairs)
    first_end = paired & of_queries
    if SYMMETRIC:
        other = own - first_column
        second = inside & (other >= 0) & (other < pairs)
        pair = tl.where(second, other, pair)
        paired = paired | second
        first_end = first_end & ((other < 0) | (other >= pairs))
    # Only first ends have partners that are keys or rows of P; all others have queries.
    j = tl.where(first_end, first_column + pair, first_row + pair)
    partner = _query(X, Z, j, first, per_view, x_view, x_row, z_row)
    r_partner = j
    if Y is not None:
        place = tl.where(of_keys, _at(Y, own.to(tl.int64) * y_row), place)
        r_place = tl.where(of_keys, padded + own, r_place)
        if P is None:
            partner = tl.where(first_end, _at(Y, j.to(tl.int64) * y_row), partner)
            r_partner = tl.where(first_end, padded + j, r_partner)
    if P is not None:
        place = tl.where(of_partners, _at(P, own.to(tl.int64) * p_row), place)
        partner = tl.where(first_end, _at(P, j.to(tl.int64) * p_row), partner)
        # Keys beside a P have no aligned pairs.
        paired = paired & (of_queries | of_partners)
    scale = tl.load(slots + SCALE)
    outer = 1.0
    if upstream is not None:
        outer = tl.load(upstream).to(tl.float32) * tl.load(scalars + OVER).to(tl.float32)
    w = tl.zeros([BR], tl.float32)
    if row_pair is not None:
        w += tl.load(row_pair + tl.where(of_queries, own, first_row + pair), mask=paired, other=0.0)
        if SYMMETRIC:
            w += tl.load(row_pair + j, mask=paired, other=0.0)
        elif column_pair is not None:
            w += tl.load(column_pair + tl.where(of_keys, own, first_column + pair), mask=paired, other=0.0)
    if P is None:
        r = tl.load(inverse_norm + r_place, mask=inside, other=0.0)
        r_other = tl.load(inverse_norm + r_partner, mask=paired, other=0.0)
    else:
        r = tl.load(inverse_norm + r_place, mask=inside & (of_queries | of_keys), other=0.0)
        r += tl.load(partner_norm + own, mask=inside & of_partners, other=0.0)
        r_other = tl.load(inverse_norm + r_partner, mask=paired & of_partners, other=0.0)
        r_other += tl.load(partner_norm + j, mask=first_end, other=0.0)
    w = w * scale * r_other
    factor = tl.zeros([BR], tl.float32) + scale
    # Where no sums are given for some rows, there are no splits, and the address is not used.
    source = place
    splits, split = x_splits, x_split
    if dx is not None:
        source = _at(dx, own.to(tl.int64) * x_stride)
    if row_factor is not None:
        factor = factor * tl.load(row_factor + own, mask=inside, other=0.0)
    else:
        factor = factor / tl.load(slots + LIFT)
    if dy is not None:
        source = tl.where(of_keys, _at(dy, own.to(tl.int64) * y_stride), source)
        splits = tl.where(program < x_programs, x_splits, y_splits)
        split = tl.where(program < x_programs, x_split, y_split)
    splits = tl.where(program < x_programs + y_programs, splits, 0)
    radial = tl.zeros([BR], tl.float32)
    if NORMALIZE:
        for column in range(0, D, BD):
            g = _gradient(slots, source, splits, split, factor, X, partner, w, column, inside, paired, D, BD)
            radial += tl.sum(_row(X, place, column, inside, D, BD) * r[:, None] * g, 1)
    for column in range(0, D, BD):
        g = _gradient(slots, source, splits, split, factor, X, partner, w, column, inside, paired, D, BD)
        if NORMALIZE:
            g = r[:, None] * (g - _row(X, place, column, inside, D, BD) * r[:, None] * radial[:, None])
        g = g * outer
        d = (column + tl.arange(0, BD))[None, :]
        here = inside[:, None] & (d < D)
        if out_z is not None:
            after = (own - first).to(tl.int64)[:, None] * D + d
            tl.store(out_z + after, g.to(out_z.dtype.element_ty), mask=here & (of_queries & (own >= first))[:, None])
        if out_x is not None:
            kept = here & (of_queries & (own < first))[:, None]
            to = (own // per_view).to(tl.int64) * o_view + (own % per_view).to(tl.int64) * o_row
            tl.store(out_x + to[:, None] + d, g.to(out_x.dtype.element_ty), mask=kept)
        if out_y is not None:
            tl.store(out_y + own.to(tl.int64)[:, None] * D + d, g.to(out_y.dtype.element_ty), mask=here & of_keys[:, None])
        if out_p is not None:
            tl.store(out_p + own.to(tl.int64)[:, None] * D + d, g.to(out_p.dtype.element_ty), mask=here & of_partners[:, None])
    if partial is not None:
        center = tl.load(slots + CENTER)
        total = tl.zeros([BR], tl.float64)
        if about is not None:
            for n in range(parts):
                total += tl.load(about + n * part.to(tl.int64) + own.to(tl.int64) * step, mask=inside & of_queries, other=0.0).to(
                    tl.float64
                )
            if row_factor is not None:
                c = tl.load(row_factor + own, mask=inside & of_queries, other=0.0).to(tl.float64)
                total = tl.where(c == 0.0, 0.0, c * (total - center))
            else:
                total = total / (tl.load(slots + LIFT).to(tl.float64) * divide)
        tl.store(partial + program, tl.sum(total, 0))
        programs = tl.num_programs(0)
        if is_last(state, programs):
            of_all = tl.zeros([BP], tl.float64)
            for n in range(0, programs, BP):
                at = n + tl.arange(0, BP)
                of_all += tl.load(partial + at, mask=at < programs, other=0.0, cache_modifier=".cg")
            due = tl.load(scalars + DUE)
            moment = tl.sum(of_all, 0) + tl.load(scalars + PAIR_MOMENT) - center * tl.load(scalars + PAIR_WEIGHT)
            exact = scale.to(tl.float64)
            found = (center * due + moment) / (LOG2E * exact)
            if dscale is not None:
                # The derivative by a temperature T = 1 / scale is -scale^2 times that by the scale.
                found = tl.where(inverse != 0, -found * exact * exact, found) * outer
                tl.store(dscale, found.to(dscale.dtype.element_ty))
            if dbias is not None:
                tl.store(dbias, (due * outer).to(dbias.dtype.element_ty))
