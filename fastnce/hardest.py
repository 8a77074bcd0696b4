"""The hardest negatives of every row, several of them, by tiles of torch operations. Every backend uses this module.

For each tile: multiply the rows, set every pair that is no negative to -inf, put the tile beside the negatives that were kept so far, and
keep the largest. Of equal negatives the one in the lowest column stays: tiles are visited in the order of their columns, and the kept
negatives stand before the tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import tiles
from fastnce.backends._tiled.gemm import product
from fastnce.pairs import TileRange
from fastnce.precision import compute_dtype, inverse_norms, no_autocast
from fastnce.problem import Problem


def forward(problem: Problem, count: int) -> list[Tensor]:
    """Indices (M, count) and similarities (M, count) of the hardest negatives of every row, the hardest first; then, where two_sided, those
    of every column. A row with fewer negatives ends in -1 and -inf."""
    with no_autocast(problem.q):
        x, y = _rows(problem.q, problem.normalize), _rows(problem.keys, problem.normalize)
        rows, columns = _Kept(x, count), _Kept(y, count) if problem.two_sided else None
        size = tiles.tile_of(x)
        for i in range(0, len(x), size):
            for j in range(0, len(y), size):
                tile = TileRange(i, min(len(x), i + size), j, min(len(y), j + size))
                negatives = _negatives(problem, x, y, tile)
                rows.see(i, negatives, j)
                if columns is not None:
                    columns.see(j, negatives.T, i)
    return [rows.index, rows.similarity] + ([] if columns is None else [columns.index, columns.similarity])


def fake(problem: Problem, count: int) -> list[Tensor]:
    """Tensors like those of forward."""
    sides = (problem.q, problem.keys)[: 2 if problem.two_sided else 1]
    return [x.new_empty((len(x), count), dtype=dtype) for x in sides for dtype in (torch.int64, compute_dtype(x.dtype))]


def _rows(x: Tensor, normalize: bool) -> Tensor:
    """The rows in the inner precision, normalised with one rounding per row."""
    dtype = compute_dtype(x.dtype)
    return x.to(dtype) * inverse_norms(x, exact=True).to(dtype)[:, None] if normalize else x.to(dtype)


def _negatives(problem: Problem, x: Tensor, y: Tensor, tile: TileRange) -> Tensor:
    """The similarities of a tile; -inf for pairs that are no negatives, and for nan."""
    # The order of the sums in a product depends on its shape. All tiles get one shape, so that equal rows have equal similarities.
    size = tiles.tile_of(x)
    parts = [F.pad(rows, (0, 0, 0, size - len(rows))) for rows in (x[tile.i0 : tile.i1], y[tile.j0 : tile.j1])]
    s = product(*parts)[: tile.i1 - tile.i0, : tile.j1 - tile.j0]
    positive, excluded = problem.pairs.classify(tile, problem.symmetric, s.device)
    return s.masked_fill(positive | excluded | s.isnan(), -torch.inf)


class _Kept:
    """The negatives that are kept, (rows, count)."""

    def __init__(self, like: Tensor, count: int) -> None:
        self.count = count
        self.similarity = like.new_full((len(like), count), -torch.inf)
        self.index = torch.full((len(like), count), -1, dtype=torch.int64, device=like.device)

    def see(self, start: int, negatives: Tensor, first: int) -> None:
        """Take in a tile whose rows begin at `start`, and whose columns at `first`."""
        own = slice(start, start + len(negatives))
        index = torch.arange(first, first + negatives.shape[1], device=negatives.device).expand(negatives.shape)
        similarity, index = torch.cat([self.similarity[own], negatives], 1), torch.cat([self.index[own], index], 1)
        best = _first_largest(similarity, self.count)
        # The kept entries come first, and there are `count` of them: where only -inf is left, their index -1 is taken, never a column.
        self.similarity[own], self.index[own] = similarity.gather(1, best), index.gather(1, best)


def _first_largest(s: Tensor, count: int) -> Tensor:
    """Columns (rows, count) of the largest numbers of each row, in descending order; of equal numbers the lower column comes first.

    torch.topk takes any of equal numbers. So it only says which is the smallest number to keep: all larger ones are kept, and of those
    equal to it the first.
    """
    least = s.topk(count, 1).values[:, -1:]
    above, equal = s > least, s == least
    kept = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    column = torch.arange(s.shape[1], device=s.device).expand(s.shape)
    columns = column.where(kept, s.shape[1]).topk(count, 1, largest=False).values
    order = s.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)
