"""The arguments of every launch over tiles: operands in the form that tiles read, the rules of the pairs, how many programs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu import limits, tiles
from fastnce.pairs import Pairs
from fastnce.problem import Problem

# Stands for a diagonal that does not exist: no pair of indices below 2^30 lies on it, also where int32 arithmetic with it wraps around.
NONE = 2**31 - 1


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Raw(NamedTuple):
    """Rows as the caller has them: those of `first`, (rows, D) or, view after view, (examples, views, D), then those of `second`."""

    first: Tensor
    second: Tensor | None = None

    @staticmethod
    def of(first: Tensor, second: Tensor | None = None) -> Raw:
        """With columns that lie side by side."""
        both = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (first, second))
        return Raw(*both)  # type: ignore[arg-type]

    @property
    def in_first(self) -> int:
        return self.first.shape[0] * (self.first.shape[1] if self.first.dim() == 3 else 1)

    @property
    def rows(self) -> int:
        return self.in_first + (0 if self.second is None else self.second.shape[0])

    @property
    def columns(self) -> int:
        return self.first.shape[-1]


class Operand(NamedTuple):
    """Rows in the two forms that kernels read.

    raw      as the caller has them
    tiles    (padded, parts, depth) float16: a power of two times the row; float32 in two parts, or in one where TF32 would do
    factor   (padded,): normalised row = factor * tile row, see prepare in triton/kernels_rows.py
    r        (rows,): inverse norm, 1 where normalize is off
    """

    raw: Raw
    tiles: Tensor
    factor: Tensor
    r: Tensor

    @property
    def rows(self) -> int:
        return self.raw.rows

    @property
    def padded(self) -> int:
        return self.factor.shape[0]

    @staticmethod
    def empty(raw: list[Raw]) -> tuple[list[Operand], tuple[Tensor, Tensor, Tensor]]:
        """Memory for the operands of several sides, and the same memory whole: (tiles, factor, r)."""
        x, depth, padded = raw[0].first, tiles.padded_depth(raw[0].columns), sum(up(side.rows, tiles.PADDED) for side in raw)
        operand = x.new_empty((padded, limits.parts(x.dtype), depth), dtype=torch.float16)
        whole = operand, x.new_empty(padded, dtype=torch.float32), x.new_empty(padded, dtype=torch.float32)
        return Operand.over(raw, *whole), whole

    @staticmethod
    def over(raw: list[Raw], operand: Tensor, factor: Tensor, r: Tensor) -> list[Operand]:
        """The sides of one memory: they follow each other, padded."""
        found, start = [], 0
        for side in raw:
            stop = start + up(side.rows, tiles.PADDED)
            found.append(Operand(side, operand[start:stop], factor[start:stop], r[start : start + side.rows]))
            start = stop
        return found


class UnshiftedSums(NamedTuple):
    """Sums of the tiles per row, without a running maximum: see forward_both in triton/kernels.py."""

    sums: Tensor  # (1 or 3, rows): of 2^t over the negatives; over the positives, and their sum of t
    n_pos: Tensor | None  # (rows,)


class Sums(NamedTuple):
    """What the tiles leave of the rows of one side: by forward_rows, by forward_both, or by both of them."""

    splits: int
    sums: Tensor | None  # (2 or 5, splits, rows): see forward_rows in triton/kernels.py
    n_pos: Tensor | None  # (splits, rows)
    unshifted: UnshiftedSums | None


class Work(NamedTuple):
    """Operands of one call, prepared; where k is q, y is x.

    scale, bound   0-dim float32: the scale, and a number that no |logit| without bias is above. Only the device reads them
    in_tile        positives are found tile by tile; otherwise they are one aligned pair per row, kept out of the tiles
    labels         of rows and columns, int32, padded; excludes: the same
    t              (pairs,): t of the aligned pairs that are kept out of the tiles
    partners       (pairs, D): the second rows of the aligned pairs, where they are not among the keys; partner_r: their inverse norms
    unshifted      zeros for forward_both, of the rows and, where two_sided, of the columns; empty where it does not run
    norms          r of x, padded, then r of y
    slots, state   numbers that one launch of Triton's leaves for the next ones, see triton/kernels_rows.py
    """

    problem: Problem
    kernels: ModuleType
    x: Operand
    y: Operand
    labels: tuple[Tensor | None, Tensor | None]
    excludes: tuple[Tensor | None, Tensor | None]
    scale: Tensor
    bound: Tensor
    in_tile: bool
    t: Tensor | None = None
    partners: Tensor | None = None
    partner_r: Tensor | None = None
    unshifted: tuple[UnshiftedSums, ...] = ()
    norms: Tensor | None = None
    slots: Tensor | None = None
    state: Tensor | None = None

    @property
    def fits(self) -> bool:
        return limits.fits(self.problem)

    @property
    def keyed(self) -> bool:
        """Whether the keys are rows of their own."""
        return self.y is not self.x

    def views(self) -> list[View]:
        """The rows; where two_sided then the columns, which are the rows of the problem with its sides exchanged."""
        rows = View(self, self.x, self.y, False)
        return [rows, View(self, self.y, self.x, True)] if self.problem.two_sided else [rows]

    def aligned(self) -> tuple[slice, slice]:
        """Rows and columns of the aligned pairs that are counted apart; none where positives are found in the tiles."""
        return aligned(self.problem.pairs, self.x.rows, self.y.rows, self.in_tile, self.partners is not None)


def aligned(pairs: Pairs, rows: int, columns: int, in_tile: bool, with_partners: bool) -> tuple[slice, slice]:
    if with_partners:
        return slice(0, rows), slice(0, rows)
    return (slice(0, 0), slice(0, 0)) if in_tile else pairs.aligned(rows, columns)


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

    @property
    def rules(self) -> str:
        """How pairs are told apart: by "index", by "ids", or by a "mask"."""
        ids = self.work.in_tile or self.work.excludes[0] is not None
        return "mask" if self.work.problem.pairs.mask is not None else "ids" if ids else "index"

    def tile(self, kernel: str) -> Any:
        return self.work.kernels.tile(kernel, self.rules, self.x.tiles.device, self.parts, self.depth)

    def walk(self, kernel: str, half: bool = False) -> Walk:
        """The walk over all tiles. half: the matrix is symmetric, and each tile also stands for its mirror image."""
        tile = self.tile(kernel)
        steps = -(-self.y.rows // tile.columns)
        if half:
            steps = steps // 2 + 1
        blocks = -(-self.x.rows // tile.rows)
        wanted = -(-tiles.PROGRAMS * multiprocessors(self.x.tiles.device) // max(blocks, 1))
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
