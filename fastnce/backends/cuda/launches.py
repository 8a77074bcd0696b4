"""Every launch over the tiles, with the arguments of the library's operators. Its passes over single rows are called by _gpu/rows.py."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu.host import UnshiftedSums, View, Walk
from fastnce.backends._gpu.tiles import held_depth
from fastnce.problem import Problem

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


def keeps_output(problem: Problem) -> bool:
    """Never: the library has no such kernel."""
    return False


def forward_rows(view: View, walk: Walk, always: bool, sums: Tensor, count: Tensor | None) -> None:
    if walk.programs:
        torch.ops.fastnce_cuda.forward_rows(*_problem(view, walk.tile), always, walk.splits, walk.per_split, sums, count)


def forward_both(view: View, walk: Walk, row_sums: UnshiftedSums, column_sums: UnshiftedSums) -> None:
    symmetric = view.work.problem.symmetric
    if walk.programs:
        torch.ops.fastnce_cuda.forward_both(*_problem(view, walk.tile), symmetric, walk.splits, walk.per_split, *row_sums, *column_sums)


def retrieval(view: View, walk: Walk, bounds: Tensor, largest: Tensor, counts: Tensor) -> None:
    if walk.programs:
        torch.ops.fastnce_cuda.retrieval(*_problem(view, walk.tile), bounds, walk.splits, walk.per_split, largest, counts)


def backward_rows(
    view: View, walk: Walk, row: Tensor, column: Tensor, center: Tensor, rows: bool, columns: bool, dx: Tensor, moment: Tensor | None
) -> None:
    if walk.programs:
        torch.ops.fastnce_cuda.backward_rows(
            *_problem(view, walk.tile), row, column, center, rows, columns, walk.splits, walk.per_split, dx, moment
        )


def weights_block(
    view: View, tile: TileShape, row: Tensor, column: Tensor, center: Tensor, columns: bool,
    row0: int, column0: int, down: int, across: int, pitch: int,
    for_rows: Tensor | None, for_columns: Tensor | None, moment: Tensor | None,
) -> None:  # fmt: skip
    torch.ops.fastnce_cuda.weights_block(
        *_problem(view, tile), row, column, center, columns, row0, column0, down, across, pitch, for_rows, for_columns, moment
    )


def _problem(view: View, tile: TileShape) -> tuple[Any, ...]:
    """The first arguments of every operator: operands, rules, sizes."""
    x, y, work = view.x, view.y, view.work
    sizes = [*view.sizes(), int(work.in_tile), tile.family]
    return x.tiles, y.tiles, x.factor, y.factor, work.problem.scale, work.bound, *view.content(), sizes
