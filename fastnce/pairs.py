"""Which pairs are positive, negative or excluded: one rule over a few integer vectors, which are compared tile by tile.

For query i (row of q) and key j (row of k), the first line that applies decides:

    self      exclude_self and j == i                                        -> excluded
    aligned   j == offset + i  (k is q: |i - j| == offset)                   -> positive
    exclude   q_exclude[i] == k_exclude[j], both >= 0                        -> excluded
    label     q_label[i] == k_label[j], both >= 0, or mask[i, j]             -> positive
    otherwise                                                                -> negative

An aligned pair is kept whatever its exclude ids say. A query and its own document have the same document id; only the other copies of
that document must not count as negatives. A negative label or id matches nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TileRange(NamedTuple):
    """Half-open ranges of rows [i0, i1) and columns [j0, j1) of the (M, N) logits."""

    i0: int
    i1: int
    j0: int
    j1: int


class Pairs(NamedTuple):
    """The rules above. q_* are vectors (M,), k_* vectors (N,); where k is q, k_* stay None and q_* serve both sides.

    mask is a boolean matrix (Bq, Bk), for callers who hold one already. Row i of q meets mask row i % Bq, so that V stacked views share one
    (B, B) matrix. It is read tile by tile, never expanded.
    """

    exclude_self: bool = False
    offset: int | None = None
    q_label: Tensor | None = None
    k_label: Tensor | None = None
    q_exclude: Tensor | None = None
    k_exclude: Tensor | None = None
    mask: Tensor | None = None

    def positives_by_content(self) -> bool:
        """Whether positives depend on labels or a mask: then they are found by looking at every tile."""
        return self.q_label is not None or self.mask is not None

    def one_positive_at_most(self, rows: int, symmetric: bool) -> bool:
        """Whether positives are the aligned pairs alone, and no row has two: then they need O(M D) dot products and no tile.

        Where k is q, row i has the partners i - offset and i + offset. Some row has both unless 2 * offset >= rows.
        """
        return not self.positives_by_content() and not (symmetric and self.offset is not None and 2 * self.offset < rows)

    def may_be_positive(self, tile: TileRange, symmetric: bool) -> bool:
        """Whether some pair of the tile can be a positive."""
        return self.positives_by_content() or any(crosses(tile, diagonal) for diagonal in self.diagonals(symmetric)[1])

    def diagonals(self, symmetric: bool) -> tuple[list[int], list[int]]:
        """Diagonals j - i of the matrix whose pairs are (excluded, positive) by their index alone."""
        excluded = [0] if self.exclude_self else []
        if self.offset is None:
            return excluded, []
        aligned = {self.offset, -self.offset} if symmetric else {self.offset}
        return excluded, sorted(aligned - set(excluded))

    def aligned(self, rows: int, columns: int) -> tuple[slice, slice]:
        """Rows i and columns j of the aligned pairs that are not excluded, pair by pair; where k is q, j is above i."""
        if self.offset is None or (self.exclude_self and self.offset == 0):
            return slice(0, 0), slice(0, 0)
        start, stop = max(0, -self.offset), min(rows, columns - self.offset)
        if start >= stop:
            return slice(0, 0), slice(0, 0)
        return slice(start, stop), slice(start + self.offset, stop + self.offset)

    def comparable(self) -> Pairs:
        """The same with vectors for both sides, whose ids are equal only where they match. A negative id matches nothing, not even itself:
        it becomes -2 in q and -1 in k."""
        q_label, k_label = _comparable(self.q_label, self.k_label)
        q_exclude, k_exclude = _comparable(self.q_exclude, self.k_exclude)
        return self._replace(q_label=q_label, k_label=k_label, q_exclude=q_exclude, k_exclude=k_exclude)

    def matches(self, tile: TileRange) -> tuple[Tensor | None, Tensor | None]:
        """Of comparable() pairs: two boolean matrices of a tile, (i1 - i0, j1 - j0): the label rule holds, the exclude rule holds. None
        where there is no such rule."""
        same, excluded = _equal(self.q_label, self.k_label, tile), _equal(self.q_exclude, self.k_exclude, tile)
        if self.mask is not None:
            i = torch.arange(tile.i0, tile.i1, device=self.mask.device) % self.mask.shape[0]
            j = torch.arange(tile.j0, tile.j1, device=self.mask.device) % self.mask.shape[1]
            masked = self.mask[i[:, None], j]
            same = masked if same is None else same.logical_or_(masked)
        return same, excluded

    def classify(self, tile: TileRange, symmetric: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two boolean matrices (positive, excluded) of a tile, (i1 - i0, j1 - j0); a pair that is neither is negative."""
        shape = (tile.i1 - tile.i0, tile.j1 - tile.j0)
        positive, excluded = (
            torch.zeros(shape, dtype=torch.bool, device=device) if matrix is None else matrix for matrix in self.comparable().matches(tile)
        )
        positive &= ~excluded
        by_self, by_alignment = self.diagonals(symmetric)
        for diagonal in by_alignment:
            fill_diagonal(positive, tile, diagonal, True)
            fill_diagonal(excluded, tile, diagonal, False)
        for diagonal in by_self:
            fill_diagonal(positive, tile, diagonal, False)
            fill_diagonal(excluded, tile, diagonal, True)
        return positive, excluded

    def dense(self, rows: int, columns: int, symmetric: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """classify() of the (M, N) matrix. For the reference backend only."""
        return self.classify(TileRange(0, rows, 0, columns), symmetric, device)


def fill_diagonal(matrix: Tensor, tile: TileRange, diagonal: int, value: float) -> None:
    """Write value where j - i == diagonal, in the coordinates of the matrix, if that line crosses the tile."""
    if crosses(tile, diagonal):
        matrix.diagonal(diagonal - (tile.j0 - tile.i0)).fill_(value)


def crosses(tile: TileRange, diagonal: int) -> bool:
    """Whether the line j - i == diagonal has a pair in the tile."""
    return tile.i0 + diagonal < tile.j1 and tile.j0 < tile.i1 + diagonal


def _comparable(q_id: Tensor | None, k_id: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if q_id is None:
        return None, None
    k_id = q_id if k_id is None else k_id
    return q_id.masked_fill(q_id < 0, -2), k_id.masked_fill(k_id < 0, -1)


def _equal(q_id: Tensor | None, k_id: Tensor | None, tile: TileRange) -> Tensor | None:
    return None if q_id is None or k_id is None else q_id[tile.i0 : tile.i1, None] == k_id[tile.j0 : tile.j1]
