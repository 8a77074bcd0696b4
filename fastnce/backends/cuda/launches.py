"""Every launch over the tiles, with the arguments of the library's operators. passes.py has those over single rows."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu import tiles
from fastnce.backends._gpu.gradients import Block, Pass, Weights
from fastnce.backends._gpu.host import Sums, UnshiftedSums, View, Walk
from fastnce.backends._gpu.tiles import held_depth
from fastnce.precision import float32_sums

# The kernel's name in the library.
NAMES = {"rows": "forward_rows", "both": "forward_both", "retrieval": "retrieval", "gradient": "backward_rows", "block": "weights_block"}


class TileShape(NamedTuple):
    """The tile that a kernel takes: rows x columns of logits. family says of which kernels, and goes back to the library that named it."""

    rows: int
    columns: int
    family: int


@cache
def architecture(device: torch.device) -> int:
    """90 for compute capability 9.0. On the CPU, where the kernels are emulated, that of the oldest GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def tile(kernel: str, rules: str, device: torch.device, parts: int, depth: int) -> TileShape:
    return _tile(NAMES[kernel], rules, parts, held_depth(parts, depth), architecture(device))


@cache
def _tile(kernel: str, rules: str, parts: int, depth: int, architecture: int) -> TileShape:
    return TileShape(*torch.ops.fastnce_cuda.tile(kernel, rules, parts, depth, architecture))


def launch(name: str, view: View, walk: Walk, *arguments: Any) -> None:
    """The operator of this name over the tiles of a walk."""
    if walk.programs:
        getattr(torch.ops.fastnce_cuda, name)(*_problem(view, walk.tile), *arguments)


def forward_rows(views: list[View], walks: list[Walk], always: bool, sides: list[Sums]) -> None:
    for view, walk, side in zip(views, walks, sides, strict=True):
        launch("forward_rows", view, walk, always, walk.splits, walk.per_split, side.sums, side.n_pos)


def forward_both(view: View, walk: Walk, row_sums: UnshiftedSums, column_sums: UnshiftedSums) -> None:
    symmetric = view.work.problem.symmetric
    launch("forward_both", view, walk, symmetric, walk.splits, walk.per_split, *row_sums, *column_sums)


def retrieval(view: View, walk: Walk, bounds: Tensor, largest: Tensor, counts: Tensor) -> None:
    launch("retrieval", view, walk, bounds, walk.splits, walk.per_split, largest, counts)


def backward_rows(passes: list[Pass], weights: Weights) -> None:
    for one in passes:
        walk = one.walk
        how = (one.row, one.column, weights.center, one.rows, one.columns, walk.splits, walk.per_split)
        launch("backward_rows", one.view, walk, *how, one.dx, one.about)


def weights_block(
    view: View, tile: TileShape, weights: Weights, block: Block, for_rows: Tensor | None, for_columns: Tensor | None,
    about: Tensor | None, share: float,
) -> None:  # fmt: skip
    both = view.work.problem.symmetric or view.work.problem.two_sided
    moment = None if about is None else about.new_empty((block.across, block.pitch))
    launch(
        "weights_block", view, Walk(tile, block.down, block.across, 1), weights.vectors[0], weights.vectors[-1], weights.center, both,
        block.row0, block.column0, block.down, block.across, block.pitch, for_rows, for_columns, moment,
    )  # fmt: skip
    if about is not None and moment is not None:
        about[: block.across, block.row0 : block.row0 + block.height].add_(moment[:, : block.height], alpha=share)


def products(
    view: View, block: Block, for_rows: Tensor | None, for_columns: Tensor | None, dx: Tensor | None, dy: Tensor | None,
    first_of_rows: bool, first_of_columns: bool,
) -> None:  # fmt: skip
    i, j = slice(block.row0, block.row0 + block.height), slice(block.column0, block.column0 + block.width)
    if dx is not None and for_rows is not None:
        _accumulate(dx[i], for_rows[:, : block.height, : block.width], view.y.tiles[j], first_of_rows)
    if dy is not None and for_columns is not None:
        _accumulate(dy[j], for_columns[:, : block.height, : block.width].transpose(1, 2), view.x.tiles[i], first_of_columns)


def _accumulate(out: Tensor, w: Tensor, rows: Tensor, first: bool) -> None:
    """out += w rows, of shapes (parts, m, n) and (n, parts, depth); first: out = w rows.

    In two parts, the product of both low halves is left out: it is below float32's rounding. Tensor cores then sum tiles.SUM columns at a
    time: they round towards zero, and over thousands of columns would lose more than float32 may.
    """
    if first:
        out.zero_()
    if len(w) == 2:
        out += product(w[1], rows[:, 0])
        out += product(w[0], rows[:, 1])
    columns = w.shape[2]
    step = columns if len(w) == 1 else tiles.SUM
    for n in range(0, columns, step):
        out += product(w[0, :, n : n + step], rows[n : n + step, 0])


def product(a: Tensor, b: Tensor) -> Tensor:
    """float32 sums of products of float16 numbers."""
    if not a.is_cuda:
        return a.float() @ b.float()
    with float32_sums():
        return torch.mm(a, b, out_dtype=torch.float32)


def _problem(view: View, tile: TileShape) -> tuple[Any, ...]:
    """The first arguments of every operator: operands, rules, sizes."""
    x, y, work = view.x, view.y, view.work
    sizes = [*view.sizes(), int(work.in_tile), tile.family]
    return x.tiles, y.tiles, x.factor, y.factor, work.scale, work.bound, *view.content(), sizes
