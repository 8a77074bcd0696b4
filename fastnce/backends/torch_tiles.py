"""Tiled torch operations, O(tile * rows) memory: the backend of machines without a GPU, and the kernels in plain words.

Logits are kept in base 2 and without the bias: t_ij = <x_i, y_j> with x = root * q_hat, y = root * k_hat, root^2 = scale * log2(e).
One scaled copy of each input then serves the logits and both gradient products, and exp2 is four times as fast as exp.

    forward    per tile: t -> masked by class of pair -> exp2 -> sums of its rows and of its columns
    backward   per tile: t again -> w as in reference.py -> dx_i += w y_j,  dy_j += w' x_i

Where k is q only tiles on or above the diagonal are visited: one above it also stands for its mirror image, one on it contains its own.
Everything is reduced along dim 1; the columns of a tile are the rows of its transposed view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.backends import _native
from fastnce.backends._gemm import inner, product
from fastnce.backends._moment import LOG2E, Moment, lift_of, rest_of
from fastnce.norms import compute_dtype, inverse_norms, valid_scale, vector_dtype
from fastnce.pairs import Pairs, Tile, fill_diagonal
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted
from fastnce.tiles import CPU_TILE

NAME = "cpu"
LN2 = math.log(2.0)

# While |s| <= 40 nats, exp(s), its sum over 2^31 terms and exp(-lse) are normal float32 numbers with 20 nats to spare for rows whose
# upstream gradient is smaller than the largest: no maximum is needed, and one exp2 serves row and column. Every temperature >= 0.025 is
# inside.
UNSHIFTED = {torch.float32: 40.0, torch.float64: 300.0}


def unsupported(problem: Problem) -> list[str]:
    """Runs everything: these are torch's own operations."""
    return []


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    work = _prepare(problem)
    sums = [_Sums(problem, work, len(rows)) for rows in (work.x, work.y)[: 2 if problem.two_sided else 1]]
    if not work.in_tile:
        i, j = problem.pairs.aligned(problem.q.shape[0], problem.keys.shape[0])
        aligned = inner(work.x[i], work.y[j])
        for side, own in _ends(problem, i, j):
            sums[side].set_positive(own, aligned)
    if problem.metrics:
        _find_best_positives(problem, work, sums)
    if work.native:
        _native.forward(*_native_problem(problem, work), [vector for side in sums for vector in side.vectors()])
        return [side.result() for side in sums]
    for tile, t in _tiles(problem, work):
        if not work.in_tile:
            _see_aligned(problem, sums, tile, t)
        classes = _classify(problem, work, tile, t)
        views = _views(problem, tile)
        for view in views:
            sums[view.side].add_logits(view, classes)
        if work.unshifted:
            classes.exp2_()
        for view in views:
            sums[view.side].add_exponentials(view, classes)
    return [side.result() for side in sums]


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    work = _prepare(problem)
    grads = [grad.of_some(side) for grad, side in zip(grads, stats, strict=True)]
    lift = lift_of(grads)
    weights = [_Weights.of(work, *side, lift) for side in zip(grads, stats, strict=True)]
    # sum_ij w_ij: the exponentials of a set, over their own sum, add up to one.
    due = torch.stack([(grad.dlse_neg + grad.dlse_pos + grad.dpos).sum() for grad in grads]).sum()
    moment = Moment(problem, stats[0], work.in_tile, work.x.dtype, due, lift) if wanted.scale else None
    dx = torch.zeros_like(work.x) if wanted.q else None
    dy = dx if problem.symmetric else torch.zeros_like(work.y) if wanted.k else None
    if not work.in_tile:
        _add_aligned(problem, work, weights, dx, dy, moment)
    walked = work.native or not (wanted.q or wanted.k or wanted.scale)
    if work.native:
        _native_backward(problem, work, weights, dx, dy, moment)
    for tile, t in () if walked else _tiles(problem, work):
        centered = None if moment is None else t - moment.center
        classes = _classify(problem, work, tile, t)
        if work.unshifted:
            classes.exp2_()
        w = torch.zeros_like(t)
        for view in _views(problem, tile):
            weights[view.side].add_to(view.of(w), view, classes)
        if moment is not None and centered is not None:
            moment.add(centered.mul_(w).sum(1))
        on_diagonal = problem.symmetric and tile.i0 == tile.j0
        if on_diagonal:
            w = w + w.T
        i, j = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        if dx is not None:
            dx[i] += product(w, work.y[j].T)
        if dy is not None and not on_diagonal:
            # The copy costs 0.1 ms per tile; without it oneDNN transposes inside the product, at up to twice the time.
            dy[j] += product(w.T.contiguous(), work.x[i].T)
    depth, (dq_dtype, dk_dtype) = problem.q.shape[1], problem.gradient_dtypes
    return Gradients(
        None if dx is None else _project(dx, work.x, work.r_x, work.root, lift, depth, dq_dtype),
        None if dy is None or problem.symmetric else _project(dy, work.y, work.r_y, work.root, lift, depth, dk_dtype),
        None if moment is None else (moment.total / (LOG2E * problem.scale)).to(problem.scale.dtype),
        due.to(problem.scale.dtype) if wanted.bias else None,
    )


class _Work(NamedTuple):
    """Operands of one call. x, y: scaled, normalised rows; r_x, r_y: inverse norms, None where normalize is off."""

    x: Tensor
    y: Tensor
    r_x: Tensor | None
    r_y: Tensor | None
    root: Tensor
    unshifted: bool
    in_tile: bool  # positives are found tile by tile; otherwise they are one aligned pair per row, kept out of the tiles
    native: bool  # the compiled kernels walk the tiles: x and y are as wide as they need, zeros behind the last column


def _prepare(problem: Problem) -> _Work:
    q, k, scale = problem.q, problem.keys, problem.scale
    root = (valid_scale(scale).to(vector_dtype(q)) * LOG2E).sqrt()
    native = _native.serves(q.device, compute_dtype(q.dtype))
    x, r_x = _scaled(problem, q, root, native)
    y, r_y = (x, r_x) if problem.symmetric else _scaled(problem, k, root, native)
    unshifted = False
    if q.device.type == "cpu":
        # Reading a value costs nothing here. On any other device it would stall the host: the running maximum is used instead.
        bound = float(scale.detach())
        if not problem.normalize and min(q.shape[0], k.shape[0]) > 0:
            bound = float(torch.linalg.vector_norm(x, dim=1).max() * torch.linalg.vector_norm(y, dim=1).max()) / LOG2E
        unshifted = bound <= UNSHIFTED[x.dtype]
    in_tile = not problem.pairs.one_positive_at_most(q.shape[0], problem.symmetric)
    return _Work(x, y, r_x, r_y, root, unshifted, in_tile, native)


def _scaled(problem: Problem, rows: Tensor, root: Tensor, native: bool) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(rows.dtype)
    r = inverse_norms(rows, problem.metrics) if problem.normalize else None
    # One rounding per row: that of root alone would shift all logits the same way, and the mean loss with them.
    factor = root.to(dtype) if r is None else (r.to(root.dtype) * root).to(dtype)[:, None]
    if not native:
        return (rows.to(dtype) * factor).contiguous(), r
    padded = rows.new_zeros(len(rows), _native.pitched(rows.shape[1]), dtype=dtype)
    padded[:, : rows.shape[1]] = rows
    return padded.mul_(factor), r


class _View(NamedTuple):
    """A tile seen from one side: its rows, or (flip) its columns. own, other: the ranges they cover in that side's statistics."""

    side: int
    flip: bool
    own: slice
    other: slice

    def of(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.flip else matrix


def _views(problem: Problem, tile: Tile) -> list[_View]:
    i, j = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
    views = [_View(0, False, i, j)]
    if problem.two_sided:
        views.append(_View(1, True, j, i))
    elif problem.symmetric and i != j:
        views.append(_View(0, True, j, i))
    return views


def _tiles(problem: Problem, work: _Work, positives: bool = False) -> Iterator[tuple[Tile, Tensor]]:
    """positives: only tiles in which some pair may be one."""
    rows, columns = len(work.x), len(work.y)
    for i in range(0, rows, CPU_TILE):
        for j in range(i if problem.symmetric else 0, columns, CPU_TILE):
            tile = Tile(i, min(rows, i + CPU_TILE), j, min(columns, j + CPU_TILE))
            if not positives or problem.pairs.may_be_positive(tile, problem.symmetric):
                yield tile, _logits(problem, work.x[tile.i0 : tile.i1], work.y[tile.j0 : tile.j1])


def _logits(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    if not problem.metrics:
        return product(x, y)
    # Ranks compare logits of different tiles. The order in which a product is summed depends on its shape: give it one shape, so that
    # equal rows have equal logits.
    whole = [F.pad(rows, (0, 0, 0, CPU_TILE - len(rows))) for rows in (x, y)]
    return product(*whole)[: len(x), : len(y)]


def _see_aligned(problem: Problem, sums: list[_Sums], tile: Tile, t: Tensor) -> None:
    """The logits of the aligned pairs that lie in this tile; where k is q, of those with j above i."""
    i, j = problem.pairs.aligned(problem.q.shape[0], problem.keys.shape[0])
    offset = j.start - i.start
    start, stop = max(i.start, tile.i0, tile.j0 - offset), min(i.stop, tile.i1, tile.j1 - offset)
    if start < stop:
        aligned = t[start - tile.i0 : stop - tile.i0, start + offset - tile.j0 : stop + offset - tile.j0].diagonal()
        for side, own in _ends(problem, slice(start, stop), slice(start + offset, stop + offset)):
            sums[side].tile_pos[own] = aligned


class _Classes(NamedTuple):
    """Logits of one tile with all but the negatives at -inf, the same for the positives, and which pairs those are."""

    negative: Tensor
    positive: Tensor | None = None
    is_positive: Tensor | None = None

    def exp2_(self) -> None:
        self.negative.exp2_()
        if self.positive is not None:
            self.positive.exp2_()


def _classify(problem: Problem, work: _Work, tile: Tile, t: Tensor) -> _Classes:
    pairs = problem.pairs
    if not work.in_tile and pairs.q_exclude is None:
        for diagonal in sum(pairs.diagonals(problem.symmetric), []):
            fill_diagonal(t, tile, diagonal, -torch.inf)
        return _Classes(t)
    positive, excluded = pairs.classify(tile, problem.symmetric, t.device)
    # masked_fill and never a product with a mask: a nan at an excluded pair must not reach the row.
    negative = t.masked_fill(positive | excluded, -torch.inf)
    return _Classes(negative, t.masked_fill_(~positive, -torch.inf), positive) if work.in_tile else _Classes(negative)


def _ends(problem: Problem, i: slice, j: slice) -> list[tuple[int, slice]]:
    """(side, rows of its statistics) that the pairs (i, j) belong to: the row always, the column where it is counted too."""
    return [(0, i), (1, j)] if problem.two_sided else [(0, i), (0, j)] if problem.symmetric else [(0, i)]


def _find_best_positives(problem: Problem, work: _Work, sums: list[_Sums]) -> None:
    """Before the negatives above them are counted, and from the tiles: the same product gives the same bits for equal rows."""
    if work.native:
        _native.best_positives(*_native_problem(problem, work), [side.pos_max for side in sums])
    for tile, t in () if work.native else _tiles(problem, work, positives=True):
        positive, _ = problem.pairs.classify(tile, problem.symmetric, t.device)
        for view in _views(problem, tile):
            sums[view.side].see_positives(view, t.masked_fill(~positive, -torch.inf))
    for side in sums:
        side.compare()


class _LogSum:
    """log2 of a running sum of exp2 per row. Unshifted it is given exponentials, otherwise logits, and keeps a running maximum."""

    def __init__(self, work: _Work, rows: int) -> None:
        self.total = work.x.new_zeros(rows, dtype=vector_dtype(work.x))
        self.top = None if work.unshifted else work.x.new_full((rows,), -torch.inf)

    def add(self, own: slice, tile: Tensor) -> None:
        if self.top is None:
            self.total[own] += tile.sum(1)
            return
        old = self.top[own]
        top = torch.maximum(old, tile.amax(1))
        # No pair so far, or an infinite logit: inf - inf would be nan. From any finite base exp2(-inf) is 0 and exp2(inf) is inf.
        base = top.masked_fill(top.isinf(), 0.0)
        self.total[own] = self.total[own] * torch.exp2(old - base) + torch.exp2(tile - base[:, None]).sum(1)
        self.top[own] = top

    def log2(self) -> Tensor:
        return self.total.log2() if self.top is None else self.total.log2() + self.top

    def own(self) -> Tensor:
        """What backward divides by: the sum itself, or its logarithm where that is out of range."""
        return self.total if self.top is None else self.log2()


class _Sums:
    """What forward collects for one side."""

    def __init__(self, problem: Problem, work: _Work, rows: int) -> None:
        self.problem = problem
        self.negative = _LogSum(work, rows)
        self.positive = _LogSum(work, rows) if work.in_tile else None
        self.pos = work.x.new_zeros(rows, dtype=vector_dtype(work.x))
        # The same as the tiles have it: an aligned pair has a sum of products of its own in `pos`, which is rounded less.
        self.tile_pos = self.pos if work.in_tile else torch.zeros_like(self.pos)
        self.n_pos = torch.zeros(rows, dtype=torch.int64, device=work.x.device)
        if problem.metrics:
            self.pos_max = work.x.new_full((rows,), -torch.inf)
            self.low, self.high = self.pos_max, self.pos_max
            self.rank, self.ties = torch.zeros_like(self.n_pos), torch.zeros_like(self.n_pos)
            self.hardest = torch.full_like(self.n_pos, -1)
            self.hardest_logit = torch.full_like(self.pos_max, -torch.inf)

    def set_positive(self, own: slice, t: Tensor) -> None:
        self.pos[own] = t
        self.n_pos[own] = 1

    def see_positives(self, view: _View, positives: Tensor) -> None:
        self.pos_max[view.own] = torch.maximum(self.pos_max[view.own], view.of(positives).amax(1))

    def compare(self) -> None:
        """From the best positives to the bounds that negatives are compared with."""
        self.low, self.high = (bound.to(self.pos_max.dtype) for bound in self.problem.tied(self.pos_max, LOG2E))

    def add_logits(self, view: _View, classes: _Classes) -> None:
        if classes.is_positive is not None and classes.positive is not None:
            is_positive = view.of(classes.is_positive)
            self.pos[view.own] += view.of(classes.positive).where(is_positive, 0.0).sum(1)
            self.n_pos[view.own] += is_positive.sum(1)
        if self.problem.metrics:
            negative, low, high = view.of(classes.negative), self.low[view.own, None], self.high[view.own, None]
            self.rank[view.own] += (~(negative <= high)).sum(1)
            self.ties[view.own] += ((low <= negative) & (negative <= high)).sum(1)
            best, where = negative.masked_fill(negative.isnan(), -torch.inf).max(1)
            # Tiles come in the order of their columns: the first of equally hard ones stays.
            better = best > self.hardest_logit[view.own]
            self.hardest_logit[view.own] = torch.where(better, best, self.hardest_logit[view.own])
            self.hardest[view.own] = torch.where(better, where + view.other.start, self.hardest[view.own])

    def add_exponentials(self, view: _View, classes: _Classes) -> None:
        self.negative.add(view.own, view.of(classes.negative))
        if self.positive is not None and classes.positive is not None:
            self.positive.add(view.own, view.of(classes.positive))

    def vectors(self) -> list[Tensor]:
        """Everything above in the order of csrc/cpu/bind.cpp; an empty tensor for what is not collected."""
        nothing = self.pos.new_empty(0)
        collected = [self.negative.total, self.negative.top]
        collected += [None, None] if self.positive is None else [self.positive.total, self.positive.top]
        collected += [self.tile_pos, self.n_pos]
        if self.problem.metrics:
            collected += [self.low, self.high, self.rank, self.ties, self.hardest_logit, self.hardest]
        else:
            collected += [None] * 6
        return [nothing if vector is None else vector for vector in collected]

    def result(self) -> Side:
        lse_neg, own_neg, none = self._nats(self.negative.log2()), self.negative.own(), self.n_pos == 0
        if self.positive is None:
            pos = self._nats(self.pos).masked_fill_(none, 0.0)
            side = Side(lse_neg, pos.masked_fill(none, -torch.inf), pos, self.n_pos, own_neg, self.tile_pos)
        else:
            pos = self._nats(self.pos / self.n_pos.clamp(min=1)).masked_fill_(none, 0.0)
            lse_pos = torch.where(self.n_pos == 1, pos, self._nats(self.positive.log2()))
            side = Side(lse_neg, lse_pos, pos, self.n_pos, own_neg, self.positive.own())
        if not self.problem.metrics:
            return side
        logits = {"hardest_logit": self._nats(self.hardest_logit), "pos_max": self._nats(self.pos_max)}
        return side._replace(rank=self.rank, ties=self.ties, hardest=self.hardest, **logits)

    def _nats(self, t: Tensor) -> Tensor:
        s = t.to(self.pos.dtype) * LN2
        return s if self.problem.bias is None else s + self.problem.bias


class _Weights(NamedTuple):
    """Coefficients of one side: negative * exp2(t - base_neg) for its negatives, positive * exp2(t - base_pos) + mean for its
    positives, all of them times lift.

    Unshifted, the tile holds exp2(t) and exp2(-base) is already inside the coefficient.
    """

    negative: Tensor
    positive: Tensor
    mean: Tensor
    base_neg: Tensor
    base_pos: Tensor
    unshifted: bool
    guarded: bool  # a coefficient is nan, or may be where reading one would wait: 0 * nan must not reach the pairs that do not count

    @staticmethod
    def of(work: _Work, grad: SideGrad, side: Side, lift: Tensor) -> _Weights:
        # Of an empty set, base 0 (sum 1) keeps -inf - -inf and 0 / 0 out.
        no_negative, no_positive = side.empty()
        negative, positive, mean = (v * lift for v in grad)
        if work.in_tile:
            mean = mean / side.n_pos.clamp(min=1)
        empty = 1.0 if work.unshifted else 0.0
        own_neg, own_pos = side.own_neg.masked_fill(no_negative, empty), side.own_pos.masked_fill(no_positive, empty)
        dtype = work.x.dtype
        base_neg, base_pos = own_neg.to(dtype), own_pos.to(dtype)
        if work.unshifted:
            negative, positive = negative / own_neg, positive / own_pos if work.in_tile else positive
        else:
            # What the base lost, up to 1e-5 of a bit at a temperature of 0.005, goes into the coefficient.
            negative = negative * rest_of(base_neg, own_neg)
            positive = positive * rest_of(base_pos, own_pos) if work.in_tile else positive
        guarded = work.x.device.type != "cpu" or bool((negative + positive + base_neg + base_pos).isnan().any())
        return _Weights(negative.to(dtype), positive.to(dtype), mean.to(dtype), base_neg, base_pos, work.unshifted, guarded)

    def add_to(self, w: Tensor, view: _View, classes: _Classes) -> None:
        def add(tile: Tensor, coefficient: Tensor, base: Tensor) -> None:
            tile = view.of(tile)
            e = tile if self.unshifted else torch.exp2(tile - base[view.own, None])
            if self.guarded:
                w.add_((e * coefficient[view.own, None]).masked_fill_(tile == (0.0 if self.unshifted else -torch.inf), 0.0))
            else:
                w.addcmul_(e, coefficient[view.own, None])

        add(classes.negative, self.negative, self.base_neg)
        if classes.positive is not None and classes.is_positive is not None:
            add(classes.positive, self.positive, self.base_pos)
            w.add_(self.mean[view.own, None].where(view.of(classes.is_positive), 0.0))


def _add_aligned(
    problem: Problem, work: _Work, weights: list[_Weights], dx: Tensor | None, dy: Tensor | None, moment: Moment | None
) -> None:
    i, j = problem.pairs.aligned(problem.q.shape[0], problem.keys.shape[0])
    # With one positive lse_pos and pos are the same number: their gradients add up, and so do those of the two ends of a pair.
    ends = [(weights[side].positive + weights[side].mean)[own] for side, own in _ends(problem, i, j)]
    w = ends[0] if len(ends) == 1 else ends[0] + ends[1]
    if moment is not None:
        moment.add((moment.aligned[i] - moment.at) * w)
    if dx is not None:
        dx[i].addcmul_(w[:, None], work.y[j])
    if dy is not None:
        dy[j].addcmul_(w[:, None], work.x[i])


def _project(dx: Tensor, x: Tensor, r: Tensor | None, root: Tensor, lift: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """From lift * dL/dx (natural log) to dL/drows: ds/dq_hat = root / log2(e) * y, then the backward of q_hat = r q. dx is overwritten."""
    factor = root / LOG2E / lift
    if r is None:
        dx.mul_(factor.to(dx.dtype))
    else:
        radial = (inner(x, dx) / -(root * root)).to(dx.dtype)
        dx.addcmul_(x, radial[:, None]).mul_((r * factor).to(dx.dtype)[:, None])
    return dx[:, :depth].to(dtype).contiguous()


def _native_problem(problem: Problem, work: _Work) -> tuple[Tensor, Tensor | None, int, tuple[bool, ...], Pairs]:
    """The first arguments of all operators of the library."""
    flags = (problem.two_sided, work.unshifted, work.in_tile, problem.pairs.exclude_self)
    return work.x, None if problem.symmetric else work.y, problem.q.shape[1], flags, problem.pairs


def _native_backward(
    problem: Problem, work: _Work, weights: list[_Weights], dx: Tensor | None, dy: Tensor | None, moment: Moment | None
) -> None:
    vectors = [v for side in weights for v in (side.negative, side.base_neg, side.positive, side.base_pos, side.mean)]
    sums = None if moment is None else work.x.new_zeros(len(work.x), dtype=torch.float64)
    center = 0.0 if moment is None else float(moment.center)
    _native.backward(*_native_problem(problem, work), vectors, center, dx, None if problem.symmetric else dy, sums)
    if moment is not None and sums is not None:
        moment.add(sums)
