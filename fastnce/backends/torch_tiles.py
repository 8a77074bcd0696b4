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
always along dim 1: the columns of a tile are the rows of its transposed view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import tiles
from fastnce.backends._tiled.gemm import add_product, product
from fastnce.backends._tiled.gradients import Parts, Weights
from fastnce.backends._tiled.operands import Work
from fastnce.backends._tiled.sums import LogSum, Sums
from fastnce.pairs import TileRange, fill_diagonal
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted

NAME = "torch"


def term(t: Tensor, base: Tensor | None = None) -> Tensor:
    """What a logit adds to the sum of its row: exp2(t), that is exp(s), in the place of t. With a base it is divided by exp2(base)."""
    return t.exp2_() if base is None else torch.exp2(t - base)


def weight(t: Tensor, base: Tensor | None = None) -> Tensor:
    """The derivative of the term by s, also in the place of t. The coefficient of a row makes its part of the weight dL/ds of it."""
    return term(t, base)


def unsupported(problem: Problem) -> list[str]:
    """Runs everything: these are torch's own operations."""
    return []


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    work = Work.of(problem)
    sums = Sums.of(work)
    if problem.metrics:
        _find_best_positives(work, sums)
    for tile, t in _tiles(work):
        if not work.in_tile:
            _see_aligned(work, sums, tile, t)
        classes = _classify(work, tile, t)
        views = _views(problem, tile)
        for view in views:
            _add_logits(sums[view.side], view, classes)
        classes.add_(work.bias)
        if work.unshifted:
            classes = classes.of(term)
        for view in views:
            _add_terms(sums[view.side], view, classes)
    return [side.result() for side in sums]


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    work = Work.of(problem)
    parts = Parts.of(work, grads, stats, wanted)
    dx, dy, moment = parts.dx, parts.dy, parts.moment
    guarded = [_guarded(weights) for weights in parts.weights]
    for tile, t in _tiles(work) if parts.in_tiles else ():
        centered = None if moment is None else t - moment.center
        classes = _classify(work, tile, t)
        classes.add_(work.bias)
        if work.unshifted:
            classes = classes.of(weight)
        w = torch.zeros_like(t)
        for view in _views(problem, tile):
            _add_weights(view.of(w), work, parts.weights[view.side], guarded[view.side], view, classes)
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


class _Classes(NamedTuple):
    """Logits of one tile by class: -inf for every pair that is no negative; -inf for every pair that is no positive; which pairs are."""

    negative: Tensor
    positive: Tensor | None = None
    is_positive: Tensor | None = None

    def add_(self, bias: Tensor | None) -> None:
        """Put the bias into the logits."""
        if bias is not None:
            self.negative.add_(bias)
            if self.positive is not None:
                self.positive.add_(bias)

    def of(self, function: Callable[[Tensor], Tensor]) -> _Classes:
        """The same with term or weight instead of the logits: both sides of a pair share them where there is no base. -inf becomes 0."""
        return _Classes(function(self.negative), None if self.positive is None else function(self.positive), self.is_positive)


def _classify(work: Work, tile: TileRange, t: Tensor) -> _Classes:
    pairs, symmetric = work.problem.pairs, work.problem.symmetric
    if not work.in_tile and pairs.q_exclude is None:
        for diagonal in sum(pairs.diagonals(symmetric), []):
            fill_diagonal(t, tile, diagonal, -torch.inf)
        return _Classes(t)
    positive, excluded = pairs.classify(tile, symmetric, t.device)
    # masked_fill, never a product with a mask: 0 * nan would carry the nan of an excluded pair into its row.
    negative = t.masked_fill(positive | excluded, -torch.inf)
    return _Classes(negative, t.masked_fill_(~positive, -torch.inf), positive) if work.in_tile else _Classes(negative)


class _View(NamedTuple):
    """A tile seen from one side: its rows, or (flip) its columns. own, other: the ranges they cover in that side's statistics."""

    side: int
    flip: bool
    own: slice
    other: slice

    def of(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.flip else matrix


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


def _add_logits(sums: Sums, view: _View, classes: _Classes) -> None:
    own = view.own
    if classes.is_positive is not None and classes.positive is not None:
        is_positive = view.of(classes.is_positive)
        sums.pos[own] += view.of(classes.positive).where(is_positive, 0.0).sum(1)
        sums.n_pos[own] += is_positive.sum(1)
    if sums.problem.metrics:
        negative, low, high = view.of(classes.negative), sums.low[own, None], sums.high[own, None]
        sums.rank[own] += (~(negative <= high)).sum(1)
        sums.ties[own] += ((low <= negative) & (negative <= high)).sum(1)
        best, where = negative.masked_fill(negative.isnan(), -torch.inf).max(1)
        # `>`: of equally hard negatives the one in the lowest column stays, because tiles come in the order of their columns.
        better = best > sums.hardest_logit[own]
        sums.hardest_logit[own] = torch.where(better, best, sums.hardest_logit[own])
        sums.hardest[own] = torch.where(better, where + view.other.start, sums.hardest[own])


def _add_terms(sums: Sums, view: _View, classes: _Classes) -> None:
    """Unshifted, classes hold terms. Elsewhere they hold t, and the sum so far is rescaled to the new maximum."""

    def add(sum_: LogSum, tile: Tensor) -> None:
        tile = view.of(tile)
        if sum_.top is None:
            sum_.total[view.own] += tile.sum(1)
            return
        old = sum_.top[view.own]
        top = torch.maximum(old, tile.amax(1))
        # Where the maximum is infinite (no pair so far, or an infinite logit) inf - inf would be nan. With base 0, exp2(-inf) is 0 and
        # exp2(inf) is inf.
        base = top.nan_to_num(torch.nan, 0.0, 0.0)
        sum_.total[view.own].mul_(torch.exp2(old - base)).add_(term(tile, base[:, None]).sum(1))
        sum_.top[view.own] = top

    add(sums.negative, classes.negative)
    if sums.positive is not None and classes.positive is not None:
        add(sums.positive, classes.positive)


def _guarded(weights: Weights) -> bool:
    """Whether a coefficient may be nan: 0 * nan is nan, so pairs that do not count must then be filled with 0. Off the CPU one always
    may be: reading it would make the host wait."""
    some = weights.negative + weights.positive + weights.base_neg + weights.base_pos
    return some.device.type != "cpu" or bool(some.isnan().any())


def _add_weights(w: Tensor, work: Work, weights: Weights, guarded: bool, view: _View, classes: _Classes) -> None:
    def add(tile: Tensor, coefficient: Tensor, base: Tensor) -> None:
        tile = view.of(tile)
        e = tile if work.unshifted else weight(tile, base[view.own, None])
        if guarded:
            w.add_((e * coefficient[view.own, None]).masked_fill_(tile == (0.0 if work.unshifted else -torch.inf), 0.0))
        else:
            w.addcmul_(e, coefficient[view.own, None])

    add(classes.negative, weights.negative, weights.base_neg)
    if classes.positive is not None and classes.is_positive is not None:
        add(classes.positive, weights.positive, weights.base_pos)
        w.add_(weights.mean[view.own, None].where(view.of(classes.is_positive), 0.0))
