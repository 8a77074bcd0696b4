"""The backend of torch operations: one tile of the logits at a time, on any device, in O(tile * rows) memory.

Read this file first: the kernels of the other backends take the same steps.

    forward, for each tile     multiply rows with columns: the logits t
                               find out which pairs are positive or excluded
                               add the terms of the negatives, exp2(t), to the running sum of their row, and of their column
    backward, for each tile    compute t again
                               turn it into weights w = dL/ds, as reference.py does
                               multiply the weights with the rows: dx_i += w_ij y_j, dy_j += w_ij x_i

Three things are true everywhere below. Logits are in base 2, and their bias is added for term and weight alone, see _tiled. Where k is q,
only tiles on or above the diagonal are visited: a tile above it also stands for its mirror image, one on it contains its own. Sums are
always along the last dim: the columns of a tile are the rows of its transposed view.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import tiles
from fastnce.backends._tiled.gemm import add_product, product
from fastnce.backends._tiled.gradients import Parts, Weights
from fastnce.backends._tiled.operands import Work
from fastnce.backends._tiled.sums import LogSum, Sums
from fastnce.pairs import Pairs, TileRange, fill_diagonal
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted

NAME = "torch"


def term(t: Tensor, base: Tensor | None = None) -> Tensor:
    """What a logit adds to the sum of its row: exp2(t), that is exp(s), in the place of t. With a base it is divided by exp2(base)."""
    return t.exp2_() if base is None else (t - base).exp2_()


def weight(t: Tensor, base: Tensor | None = None) -> Tensor:
    """The derivative of the term by s, also in the place of t. The coefficient of a row makes its part of the weight dL/ds of it."""
    return term(t, base)


def unsupported(problem: Problem) -> list[str]:
    """Runs everything: these are torch's own operations."""
    return []


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    work = Work.of(problem)
    pairs, sums = problem.pairs.comparable(), Sums.of(work)
    terms = _Terms(sums[0].logs)
    # Tensors, because a Python number in torch.where is a launch at every tile.
    zero, nothing = work.x.new_zeros(()), work.x.new_full((), -torch.inf)
    if problem.metrics:
        _find_best_positives(work, sums)
    for tile, t in _tiles(work):
        kinds = _Kinds.of(work, pairs, tile)
        views = _views(problem, tile)
        if kinds.positive is None:
            _see_aligned(work, sums, tile, t)
        else:
            _add_positives(sums, views, kinds.positive, t.where(kinds.positive, zero))
        t = kinds.split(t, nothing)
        if problem.metrics:
            for view in views:
                _compare(sums[view.side], view, view.of(t[0]))
        if work.bias is not None:
            t.add_(work.bias)
        if work.unshifted:
            t = term(t)
        for view in views:
            terms.add(sums[view.side].own.start, view, t)
    terms.merge()
    return [side.result() for side in sums]


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    work = Work.of(problem)
    pairs, parts = problem.pairs.comparable(), Parts.of(work, grads, stats, wanted)
    dx, dy, moment = parts.dx, parts.dy, parts.moment
    sides = [_Coefficients.of(work, weights) for weights in parts.weights]
    for tile, t in _tiles(work) if parts.in_tiles else ():
        centered = None if moment is None else t - moment.center
        if work.bias is not None:
            t.add_(work.bias)
        if work.unshifted:
            t = weight(t)
        kinds, w = _Kinds.of(work, pairs, tile), None
        for view in _views(problem, tile):
            w = _add_weights(w, t, sides[view.side], view, kinds.positive)
        assert w is not None
        kinds.fill(w, 0.0)
        if moment is not None and centered is not None:
            moment.add(centered.mul_(w).sum(1))
        on_diagonal = problem.symmetric and tile.i0 == tile.j0
        if on_diagonal:
            w = w + w.T
        i, j = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        if dx is not None:
            add_product(dx[i], w, work.y[j])
        if dy is not None and not on_diagonal:
            add_product(dy[j], w.T, work.x[i])
    return parts.result()


def _tiles(work: Work, positives: bool = False) -> Iterator[tuple[TileRange, Tensor]]:
    """Every tile and its logits. positives: only tiles in which some pair may be positive."""
    rows, columns, symmetric, size = len(work.x), len(work.y), work.problem.symmetric, tiles.tile_of(work.x)
    for i in range(0, rows, size):
        for j in range(i if symmetric else 0, columns, size):
            tile = TileRange(i, min(rows, i + size), j, min(columns, j + size))
            if not positives or work.problem.pairs.may_be_positive(tile, symmetric):
                yield tile, _logits(work.problem, work.x[tile.i0 : tile.i1], work.y[tile.j0 : tile.j1])


def _logits(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    if not problem.metrics:
        return product(x, y)
    # Ranks compare logits of different tiles. The order of the sums in a product depends on its shape. All tiles get one shape, so that
    # equal rows have equal logits.
    size = tiles.tile_of(x)
    full = [F.pad(rows, (0, 0, 0, size - len(rows))) for rows in (x, y)]
    return product(*full)[: len(x), : len(y)]


class _Kinds(NamedTuple):
    """Which pairs of a tile are what.

    positive   a boolean matrix; None where positives are kept out of the tiles
    excluded   a boolean matrix; None where no ids exclude
    diagonals  lines j - i whose pairs no tile counts: a row with itself, and the aligned pairs that are kept out of the tiles
    """

    tile: TileRange
    positive: Tensor | None
    excluded: Tensor | None
    diagonals: list[int]

    @staticmethod
    def of(work: Work, pairs: Pairs, tile: TileRange) -> _Kinds:
        """pairs: those of the problem, comparable()."""
        positive, excluded = pairs.matches(tile)
        by_self, by_alignment = pairs.diagonals(work.problem.symmetric)
        if not work.in_tile:
            return _Kinds(tile, None, excluded, by_self + by_alignment)
        if positive is None:
            positive = torch.zeros(tile.i1 - tile.i0, tile.j1 - tile.j0, dtype=torch.bool, device=work.x.device)
        if excluded is not None:
            positive.masked_fill_(excluded, False)
        for diagonal in by_alignment:
            fill_diagonal(positive, tile, diagonal, True)
            if excluded is not None:
                fill_diagonal(excluded, tile, diagonal, False)
        for diagonal in by_self:
            fill_diagonal(positive, tile, diagonal, False)
        return _Kinds(tile, positive, excluded, by_self)

    def fill(self, matrix: Tensor, value: float) -> None:
        """Write value where no tile counts the pair. Never a product with a mask: 0 * nan would carry the nan of an excluded pair into its
        row."""
        if self.excluded is not None:
            matrix.masked_fill_(self.excluded, value)
        for diagonal in self.diagonals:
            fill_diagonal(matrix, self.tile, diagonal, value)

    def split(self, t: Tensor, nothing: Tensor) -> Tensor:
        """(classes, rows, columns): t of the negatives and, with positives in the tile, of these; elsewhere -inf. t is overwritten."""
        if self.positive is None:
            logits = t[None]
        else:
            logits = t.new_empty(2, *t.shape)
            torch.where(self.positive, nothing, t, out=logits[0])
            torch.where(self.positive, t, nothing, out=logits[1])
        self.fill(logits[0], -torch.inf)
        return logits


class _View(NamedTuple):
    """A tile seen from one side: its rows, or (flip) its columns. own, other: the ranges they cover in that side's statistics."""

    side: int
    flip: bool
    own: slice
    other: slice

    def of(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.flip else matrix

    def along(self, vector: Tensor) -> Tensor:
        """A vector of the side, or several, where it meets the tile."""
        return vector[..., None, self.own] if self.flip else vector[..., self.own, None]


def _views(problem: Problem, tile: TileRange) -> list[_View]:
    i, j = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
    views = [_View(0, False, i, j)]
    if problem.two_sided:
        views.append(_View(1, True, j, i))
    elif problem.symmetric and i != j:
        views.append(_View(0, True, j, i))
    return views


def _find_best_positives(work: Work, sums: list[Sums]) -> None:
    """A pass over the tiles with positives, before negatives are counted: the same product gives equal rows the same bits."""
    problem = work.problem
    for tile, t in _tiles(work, positives=True):
        positive, _ = problem.pairs.classify(tile, problem.symmetric, t.device)
        best = t.masked_fill(~positive, -torch.inf)
        for view in _views(problem, tile):
            pos_max = sums[view.side].pos_max
            pos_max[view.own] = torch.maximum(pos_max[view.own], view.of(best).amax(1))
    for side in sums:
        side.compare()


def _see_aligned(work: Work, sums: list[Sums], tile: TileRange, t: Tensor) -> None:
    """Keep the logits of the aligned pairs that lie in this tile; where k is q, of those with j above i."""
    i, j = work.aligned()
    offset = j.start - i.start
    start, stop = max(i.start, tile.i0, tile.j0 - offset), min(i.stop, tile.i1, tile.j1 - offset)
    if start < stop:
        aligned = t[start - tile.i0 : stop - tile.i0, start + offset - tile.j0 : stop + offset - tile.j0].diagonal()
        for side, own in work.ends(slice(start, stop), slice(start + offset, stop + offset)):
            sums[side].tile_pos[own] = aligned


def _add_positives(sums: list[Sums], views: list[_View], positive: Tensor, t: Tensor) -> None:
    """t: the logits of the positives, elsewhere 0."""
    for view in views:
        side = sums[view.side]
        side.pos[view.own] += view.of(t).sum(1)
        side.n_pos[view.own] += view.of(positive).sum(1)


def _compare(sums: Sums, view: _View, negative: Tensor) -> None:
    """Count the negatives above the bounds, and keep the hardest. negative: their logits, elsewhere -inf."""
    own = view.own
    low, high = sums.low[own, None], sums.high[own, None]
    sums.rank[own] += (~(negative <= high)).sum(1)
    sums.ties[own] += ((low <= negative) & (negative <= high)).sum(1)
    best, where = negative.masked_fill(negative.isnan(), -torch.inf).max(1)
    # `>`: of equally hard negatives the one in the lowest column stays, because tiles come in the order of their columns.
    better = best > sums.hardest_logit[own]
    sums.hardest_logit[own] = torch.where(better, best, sums.hardest_logit[own])
    sums.hardest[own] = torch.where(better, where + view.other.start, sums.hardest[own])


class _Terms:
    """The terms of the tiles, on their way into the sums of their rows.

    Unshifted, the sum of a tile is added at once. Elsewhere every tile has a largest t of its own in each row, to which its sum belongs.
    Several such sums wait, and then are brought to one maximum together.

    top, total  (tiles, classes, rows) of each tile that waits: its largest t, and its sum of term(t, top). A top of -inf: no tile, or one
                without a pair of the class, whose total means nothing
    seen        the number of tiles so far, by the first row of their block of rows
    """

    def __init__(self, logs: LogSum) -> None:
        self.logs, self.seen = logs, dict[int, int]()
        if logs.top is not None:
            shape = (tiles.waiting_of(logs.top), *logs.top.shape)
            self.top, self.total = logs.top.new_full(shape, -torch.inf), logs.top.new_empty(shape)

    def add(self, start: int, view: _View, logits: Tensor) -> None:
        """Take in a tile, whose side begins at row `start`. Unshifted, logits hold terms."""
        own, logits = slice(start + view.own.start, start + view.own.stop), view.of(logits)
        if self.logs.top is None:
            self.logs.total[:, own] += logits.sum(-1)
            return
        seen, places = self.seen.get(own.start, 0), len(self.top)
        self.seen[own.start] = seen + 1
        if seen > 0 and seen % places == 0:
            self.merge(own)
        top, total = self.top[seen % places, :, own], self.total[seen % places, :, own]
        torch.amax(logits, -1, out=top)
        if seen >= places:  # a maximum so far is known: with one place it is the running maximum of the other backends
            torch.maximum(top, self.logs.top[:, own], out=top)
        torch.sum(term(logits, top[..., None]), -1, out=total)

    def merge(self, own: slice = slice(None)) -> None:
        """Add the sums that wait, and rescale the sum so far, to the new maximum."""
        if self.logs.top is None:
            return
        top, total, old, sum_ = self.top[..., own], self.total[..., own], self.logs.top[:, own], self.logs.total[:, own]
        new = torch.maximum(old, top.amax(0))
        # Where the maximum is infinite (no pair so far, or an infinite logit) inf - inf would be nan.
        base = new.nan_to_num(torch.nan, 0.0, 0.0)
        waiting = (total * torch.exp2(top - base)).masked_fill_(top == -torch.inf, 0.0)
        sum_.mul_(torch.exp2(old - base)).add_(waiting.sum(0, dtype=sum_.dtype)).masked_fill_(new == torch.inf, torch.inf)
        old.copy_(new)
        top.fill_(-torch.inf)


class _Coefficients(NamedTuple):
    """The coefficients of a side by the kind of the pair: for negatives, for positives. Weights has the formula.

    base    (rows,) each; None where it is unshifted
    linear  (rows,) factor of the exponential; with positives in the tiles (2, rows): factor and mean, which is 0 for negatives
    """

    base: tuple[Tensor, Tensor] | None
    linear: tuple[Tensor, Tensor]

    @staticmethod
    def of(work: Work, weights: Weights) -> _Coefficients:
        base = None if work.unshifted else (weights.base_neg, weights.base_pos)
        if not work.in_tile:
            return _Coefficients(base, (weights.negative, weights.positive))
        of_negative = torch.stack([weights.negative, torch.zeros_like(weights.mean)])
        return _Coefficients(base, (of_negative, torch.stack([weights.positive, weights.mean])))


def _add_weights(w: Tensor | None, t: Tensor, side: _Coefficients, view: _View, positive: Tensor | None) -> Tensor:
    """w, 0 if None, plus the weights of a side; those of pairs that no tile counts mean nothing. Unshifted, t holds values of weight."""

    def by_kind(negatives: Tensor, positives: Tensor) -> Tensor:
        negatives = view.along(negatives)
        return negatives if positive is None else torch.where(positive, view.along(positives), negatives)

    e = t if side.base is None else weight(t, by_kind(*side.base))
    linear = by_kind(*side.linear)
    factor = linear if positive is None else linear[0]
    w = e * factor if w is None else w.addcmul_(e, factor)
    return w if positive is None else w.add_(linear[1])
