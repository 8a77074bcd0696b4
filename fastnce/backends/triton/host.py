"""What every launch needs: operands in the form of the tiles, the rules of the pairs as arguments, how many programs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce import tiles
from fastnce.backends.triton import kernels_rows, limits
from fastnce.problem import Problem


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any) -> None:
    """Run a kernel on a grid of one axis. Fusion is asked for, because Triton's default changes between versions."""
    if programs > 0:
        kernel[(programs,)](*arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constants)


@cache
def architecture(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_90"


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# A diagonal that no pair of indices below 2^30 lies on, also where the arithmetic with it wraps around.
NONE = 2**31 - 1


class Operand(NamedTuple):
    """Rows in the two forms that kernels read.

    raw      (rows, D), any row stride
    tiles    (padded, parts, depth) float16: a power of two times the row; float32 in two parts, or in one where TF32 would do
    factor   (padded,): normalised row = factor * tile row, see kernels_rows.prepare
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
    def of(x: Tensor, normalize: bool) -> Operand:
        raw = x if x.stride(1) == 1 else x.contiguous()
        rows, columns = raw.shape
        parts = limits.parts(x.dtype)
        depth, padded = tiles.triton_depth(columns), up(rows, tiles.TRITON_PADDED)
        operand = raw.new_empty((padded, parts, depth), dtype=torch.float16)
        factor, r = (raw.new_empty(count, dtype=torch.float32) for count in (padded, rows))
        height, width = tiles.TRITON_ROWS
        # The longest step that divides the padded row: its power of two.
        sizes = {"NORMALIZE": normalize, "PARTS": parts, "DP": depth, "BR": height, "BD": min(width, depth & -depth)}
        launch(kernels_rows.prepare, padded // height, raw, operand, factor, r, rows, raw.stride(0), columns, **sizes)
        return Operand(raw, operand, factor, r)


class Work(NamedTuple):
    """Operands of one call; where k is q, y is x."""

    problem: Problem
    x: Operand
    y: Operand
    labels: tuple[Tensor | None, Tensor | None]
    excludes: tuple[Tensor | None, Tensor | None]
    bound: Tensor  # no |logit| without bias is larger: only the device reads it
    in_tile: bool  # positives are found tile by tile; otherwise they are one aligned pair per row, kept out of the tiles

    @staticmethod
    def of(problem: Problem) -> Work:
        x = Operand.of(problem.q, problem.normalize)
        y = x if problem.k is None else Operand.of(problem.k, problem.normalize)
        bound = problem.scale
        if not problem.normalize:
            longest = [torch.linalg.vector_norm(o.raw, dim=1, dtype=torch.float32).amax() if o.rows else bound for o in (x, y)]
            bound = problem.scale * longest[0] * longest[1]
        pairs = problem.pairs
        labels, excludes = ranked(pairs.q_label, pairs.k_label, x, y), ranked(pairs.q_exclude, pairs.k_exclude, x, y)
        return Work(problem, x, y, labels, excludes, bound, not problem.pairs.one_positive_at_most(x.rows, problem.symmetric))

    @staticmethod
    def of_queries(problem: Problem) -> Work:
        """Without the keys, for what has no tiles to visit."""
        x = Operand.of(problem.q, problem.normalize)
        return Work(problem, x, x, (None, None), (None, None), problem.scale, False)

    @property
    def whole(self) -> bool:
        return limits.whole(self.problem)

    def views(self) -> list[View]:
        """The rows, and where two_sided the columns: the same problem with the sides exchanged."""
        rows = View(self, self.x, self.y, False)
        return [rows, View(self, self.y, self.x, True)] if self.problem.two_sided else [rows]

    def aligned(self) -> tuple[slice, slice]:
        """Rows and columns of the aligned pairs that are counted apart; none where positives are found in the tiles."""
        return (slice(0, 0), slice(0, 0)) if self.in_tile else self.problem.pairs.aligned(self.x.rows, self.y.rows)


class View(NamedTuple):
    """A problem seen from its rows, or (flip) from its columns."""

    work: Work
    x: Operand
    y: Operand
    flip: bool

    def ends(self) -> list[slice]:
        """Where the aligned pairs are in this view's rows; where k is q, each pair has two ends there."""
        i, j = self.work.aligned()
        return [j] if self.flip else [i, j] if self.work.problem.symmetric else [i]

    def tile(self, kernel: str) -> tiles.Tile:
        _, parts, depth = self.x.tiles.shape
        pairs = self.work.problem.pairs
        rules = "mask" if pairs.mask is not None else "ids" if self.work.in_tile or pairs.q_exclude is not None else "index"
        return tiles.triton(kernel, rules, architecture(self.x.raw.device), parts, depth)

    def rules(self) -> tuple[Any, ...]:
        """Ids, mask and its shape and strides, rows, columns, diagonals: in this order in every kernel."""
        work, pairs = self.work, self.work.problem.pairs
        label, exclude, mask = list(work.labels), list(work.excludes), pairs.mask
        shape = (1, 1, 0, 0) if mask is None else (*mask.shape, *mask.stride())
        if self.flip:
            label, exclude, shape = label[::-1], exclude[::-1], (shape[1], shape[0], shape[3], shape[2])
        return *label, *exclude, mask, *shape, self.x.rows, self.y.rows, *self.diagonals()

    def diagonals(self) -> tuple[int, int, int]:
        """j - i of self, of the aligned pairs, and of these mirrored; NONE where there is none."""
        own, aligned = self.work.problem.pairs.diagonals(self.work.problem.symmetric)
        if self.flip:
            aligned = [-diagonal for diagonal in aligned]
        return own[0] if own else NONE, *aligned[::-1], *[NONE] * (2 - len(aligned))  # type: ignore[return-value]

    def form(self) -> dict[str, Any]:
        """The form of the operands, and whether positives are found in the tiles."""
        _, parts, depth = self.x.tiles.shape
        return {"IN_TILE": self.work.in_tile, "PARTS": parts, "DP": depth if self.work.whole else 0}

    def operands(self) -> tuple[Tensor, ...]:
        return self.x.tiles, self.y.tiles, self.x.factor, self.y.factor, self.work.problem.scale

    def splits(self, tile: tiles.Tile, steps: int) -> tuple[int, int, int]:
        """(row blocks, splits of each, tiles per split): a pure function of the shape, so that sums have one order."""
        blocks = -(-self.x.rows // tile.rows)
        wanted = -(-tiles.TRITON_PROGRAMS * multiprocessors(self.x.raw.device) // max(blocks, 1))
        per_split = -(-steps // max(1, min(wanted, steps)))
        return blocks, max(1, -(-steps // max(per_split, 1))), per_split


def ranked(q: Tensor | None, k: Tensor | None, x: Operand, y: Operand) -> tuple[Tensor | None, Tensor | None]:
    """Ids of any size as int32 that are equal where they were: half the registers in the tile. Padded; what matches nothing is negative."""
    if q is None:
        return None, None
    ids = q if k is None else torch.cat([q, k])
    ordered, order = ids.sort()
    rank = torch.empty_like(ids, dtype=torch.int32)
    # 0 for the smallest id, and one more at every change: no value is read, and no size depends on one.
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
