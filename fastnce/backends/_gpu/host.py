"""The arguments of every launch over tiles: operands in the form that tiles read, the rules of the pairs, how many programs."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu import limits, tiles
from fastnce.backends._gpu.rows import row_kernels
from fastnce.problem import Problem


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# Stands for a diagonal that does not exist: no pair of indices below 2^30 lies on it, also where int32 arithmetic with it wraps around.
NONE = 2**31 - 1


class Operand(NamedTuple):
    """Rows in the two forms that kernels read.

    raw      (rows, D), any row stride
    tiles    (padded, parts, depth) float16: a power of two times the row; float32 in two parts, or in one where TF32 would do
    factor   (padded,): normalised row = factor * tile row, see prepare in triton/kernels_rows.py
    r        (rows,): inverse norm, 1 where normalize is off
    """

    raw: Tensor
    tiles: Tensor
    factor: Tensor
    r: Tensor

    @property
    def rows(self) -> int:
        return self.raw.shape[0]

    @property
    def padded(self) -> int:
        return self.tiles.shape[0]

    @staticmethod
    def of(kernels: ModuleType, x: Tensor, normalize: bool) -> Operand:
        raw = x if x.stride(1) == 1 else x.contiguous()
        count, columns = raw.shape
        parts = limits.parts(x.dtype)
        depth, padded = tiles.padded_depth(columns), up(count, tiles.PADDED)
        operand = raw.new_empty((padded, parts, depth), dtype=torch.float16)
        factor, r = (raw.new_empty(length, dtype=torch.float32) for length in (padded, count))
        row_kernels(kernels, raw).prepare(raw, operand, factor, r, normalize)
        return Operand(raw, operand, factor, r)


class Work(NamedTuple):
    """Operands of one call; where k is q, y is x."""

    problem: Problem
    kernels: ModuleType  # launch functions of the backend
    x: Operand
    y: Operand
    labels: tuple[Tensor | None, Tensor | None]
    excludes: tuple[Tensor | None, Tensor | None]
    bound: Tensor  # no |logit| without bias is larger: only the device reads it
    in_tile: bool  # positives are found tile by tile; otherwise they are one aligned pair per row, kept out of the tiles

    @staticmethod
    def of(problem: Problem, kernels: ModuleType) -> Work:
        x = Operand.of(kernels, problem.q, problem.normalize)
        y = x if problem.k is None else Operand.of(kernels, problem.k, problem.normalize)
        bound = problem.scale
        if not problem.normalize:
            longest = [torch.linalg.vector_norm(o.raw, dim=1, dtype=torch.float32).amax() if o.rows else bound for o in (x, y)]
            bound = problem.scale * longest[0] * longest[1]
        pairs = problem.pairs
        labels, excludes = ranked(pairs.q_label, pairs.k_label, x, y), ranked(pairs.q_exclude, pairs.k_exclude, x, y)
        in_tile = not pairs.one_positive_at_most(x.rows, problem.symmetric)
        return Work(problem, kernels, x, y, labels, excludes, bound, in_tile)

    @staticmethod
    def of_queries(problem: Problem, kernels: ModuleType) -> Work:
        """Without the keys, for a backward that visits no tiles."""
        x = Operand.of(kernels, problem.q, problem.normalize)
        return Work(problem, kernels, x, x, (None, None), (None, None), problem.scale, False)

    @property
    def fits(self) -> bool:
        return limits.fits(self.problem)

    def views(self) -> list[View]:
        """The rows; where two_sided then the columns, which are the rows of the problem with its sides exchanged."""
        rows = View(self, self.x, self.y, False)
        return [rows, View(self, self.y, self.x, True)] if self.problem.two_sided else [rows]

    def aligned(self) -> tuple[slice, slice]:
        """Rows and columns of the aligned pairs that are counted apart; none where positives are found in the tiles."""
        return (slice(0, 0), slice(0, 0)) if self.in_tile else self.problem.pairs.aligned(self.x.rows, self.y.rows)


class UnshiftedSums(NamedTuple):
    """Sums of the tiles per row, without a running maximum: see forward_both in triton/kernels.py."""

    sums: Tensor  # (1 or 3, rows): of 2^t over the negatives; over the positives, and their sum of t
    n_pos: Tensor | None  # (rows,)


class Walk(NamedTuple):
    """The tiles of one launch. They follow from the shape alone, so that sums have one order."""

    tile: Any  # the backend's TileShape, with rows and columns
    blocks: int  # of rows
    splits: int  # parts of the columns of each block
    per_split: int  # tiles of a split

    @property
    def programs(self) -> int:
        return self.blocks * self.splits


class View(NamedTuple):
    """A problem seen from its rows, or (flip) from its columns."""

    work: Work
    x: Operand
    y: Operand
    flip: bool

    def ends(self) -> list[slice]:
        """The rows of this view that have an aligned pair; where k is q, a pair has two such rows."""
        i, j = self.work.aligned()
        return [j] if self.flip else [i, j] if self.work.problem.symmetric else [i]

    @property
    def parts(self) -> int:
        return self.x.tiles.shape[1]

    @property
    def depth(self) -> int:
        return self.x.tiles.shape[2]

    def tile(self, kernel: str) -> Any:
        pairs = self.work.problem.pairs
        rules = "mask" if pairs.mask is not None else "ids" if self.work.in_tile or pairs.q_exclude is not None else "index"
        return self.work.kernels.tile(kernel, rules, self.x.raw.device, self.parts, self.depth)

    def walk(self, kernel: str, half: bool = False) -> Walk:
        """The walk over all tiles. half: the matrix is symmetric, and each tile also stands for its mirror image."""
        tile = self.tile(kernel)
        steps = -(-self.y.rows // tile.columns)
        if half:
            steps = steps // 2 + 1
        blocks = -(-self.x.rows // tile.rows)
        wanted = -(-tiles.PROGRAMS * multiprocessors(self.x.raw.device) // max(blocks, 1))
        per_split = -(-steps // max(1, min(wanted, steps)))
        return Walk(tile, blocks, max(1, -(-steps // max(per_split, 1))), per_split)

    def content(self) -> tuple[Tensor | None, ...]:
        """Labels of rows and columns, exclude ids of rows and columns, mask: arguments of every kernel, before sizes()."""
        label, exclude, step = self.work.labels, self.work.excludes, -1 if self.flip else 1
        return *label[::step], *exclude[::step], self.work.problem.pairs.mask

    def sizes(self) -> tuple[int, ...]:
        """Shape and strides of the mask, rows, columns, diagonals: arguments of every kernel, after content()."""
        mask, step = self.work.problem.pairs.mask, -1 if self.flip else 1
        shape, stride = ((1, 1), (0, 0)) if mask is None else (tuple(mask.shape), mask.stride())
        return *shape[::step], *stride[::step], self.x.rows, self.y.rows, *self.diagonals()

    def diagonals(self) -> tuple[int, int, int]:
        """j - i of the pairs with themselves, of the aligned pairs, and of these mirrored; NONE where there are none."""
        own, aligned = self.work.problem.pairs.diagonals(self.work.problem.symmetric)
        if self.flip:
            aligned = [-diagonal for diagonal in aligned]
        return own[0] if own else NONE, *aligned[::-1], *[NONE] * (2 - len(aligned))  # type: ignore[return-value]


def ranked(q: Tensor | None, k: Tensor | None, x: Operand, y: Operand) -> tuple[Tensor | None, Tensor | None]:
    """Ids as int32 that are equal where the int64 ids are: half the registers in a tile. Padded; an id that matches nothing is negative."""
    if q is None:
        return None, None
    ids = q if k is None else torch.cat([q, k])
    ordered, order = ids.sort()
    rank = torch.empty_like(ids, dtype=torch.int32)
    # The rank of an id: 0 for the smallest, one more at every change. The host reads no value, and no size depends on one.
    step = torch.cat([ids.new_zeros(1, dtype=torch.int32), (ordered[1:] != ordered[:-1]).to(torch.int32)])[: len(ids)]
    rank[order] = step.cumsum(0, dtype=torch.int32)
    sides = []
    for own, other, operand, nothing in ((ids[: len(q)], rank[: len(q)], x, -2), (ids[-y.rows :], rank[-y.rows :], y, -1)):
        padded = torch.full((operand.padded,), nothing, dtype=torch.int32, device=ids.device)
        padded[: operand.rows] = other.masked_fill(own < 0, nothing)
        sides.append(padded)
    return sides[0], sides[1]


def up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
