"""Every launch of a Triton kernel, with the arguments that its signature wants."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastnce.backends._gpu.host import UnshiftedSums, View, Walk
from fastnce.backends.triton import kernels, kernels_backward, kernels_rows, tiles
from fastnce.backends.triton.limits import keeps_output

__all__ = [
    "aligned", "backward_rows", "finish", "forward_both", "forward_output", "forward_rows", "keeps_output", "prepare", "retrieval", "tile",
    "weights_block",
]  # fmt: skip

# Consecutive programs of the block kernel share this many rows of tiles.
GROUP = 8


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any) -> None:
    """Run a kernel on a grid of one axis. Fusion is asked for, because Triton's default changes between versions."""
    if programs > 0:
        kernel[(programs,)](*arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constants)


@cache
def architecture(device: torch.device) -> str:
    """sm_90, or gfx942 in a ROCm build of torch. The interpreter takes the tiles of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tile(kernel: str, rules: str, device: torch.device, parts: int, depth: int) -> tiles.TileShape:
    return tiles.tile(kernel, rules, architecture(device), parts, depth)


# Passes over single rows: the arguments of the CUDA library's operators of the same name -------------------------------------------------


def prepare(x: Tensor, operand: Tensor, factor: Tensor, inverse_norm: Tensor, normalize: bool) -> None:
    (rows, columns), (padded, parts, depth) = x.shape, operand.shape
    height, width = tiles.ROWS
    # The longest step that divides the padded row: its power of two.
    sizes = {"NORMALIZE": normalize, "PARTS": parts, "DP": depth, "BR": height, "BD": min(width, depth & -depth)}
    launch(kernels_rows.prepare, padded // height, x, operand, factor, inverse_norm, rows, x.stride(0), columns, **sizes)


def aligned(x: Tensor, y: Tensor, r_x: Tensor, r_y: Tensor, scale: Tensor, first_row: int, first_column: int, t: Tensor) -> None:
    height, width = tiles.ROWS
    launch(
        kernels_rows.aligned, -(-len(t) // height), x, y, r_x, r_y, scale, t,
        len(t), first_row, first_column, x.stride(0), y.stride(0), x.shape[1], BR=height, BD=width,
    )  # fmt: skip


def finish(
    dx: Tensor, x: Tensor, y: Tensor, r_x: Tensor, r_y: Tensor, pair: Tensor, scale: Tensor, lift: Tensor,
    up: int, down: int, normalize: bool, out: Tensor,
) -> None:  # fmt: skip
    height, width = tiles.ROWS
    launch(
        kernels_rows.finish, -(-len(x) // height), dx, x, y, r_x, r_y, pair, scale, lift, out,
        len(x), len(y), up, down, x.stride(0), y.stride(0), dx.stride(1), dx.stride(0), len(dx),
        x.shape[1], NORMALIZE=normalize, BR=height, BD=width,
    )  # fmt: skip


# Passes over the tiles ------------------------------------------------------------------------------------------------------------------


def forward_rows(view: View, walk: Walk, always: bool, sums: Tensor, count: Tensor | None) -> None:
    _forward_rows(view, walk, always, sums, count, None, None, None)


def forward_output(view: View, walk: Walk, sums: Tensor, out: Tensor, moment: Tensor, lift: Tensor) -> None:
    _forward_rows(view, walk, True, sums, None, out, moment, lift)


def _forward_rows(view: View, walk: Walk, always: bool, sums: Tensor, count: Tensor | None, *kept: Tensor | None) -> None:
    launch(
        kernels.forward_rows, walk.programs, *_operands(view), view.work.bound, sums, count, *kept,
        *view.content(), *view.sizes(), view.depth, view.x.padded, walk.splits, walk.per_split, int(always),
        **_form(view), **_tile(walk.tile),
    )  # fmt: skip


def forward_both(view: View, walk: Walk, row_sums: UnshiftedSums, column_sums: UnshiftedSums) -> None:
    launch(
        kernels.forward_both, walk.programs, *_operands(view), view.work.bound, *row_sums, *column_sums,
        *view.content(), *view.sizes(), view.depth, walk.splits, walk.per_split, int(view.work.problem.symmetric),
        **_form(view), **_tile(walk.tile),
    )  # fmt: skip


def retrieval(view: View, walk: Walk, bounds: Tensor, largest: Tensor, counts: Tensor) -> None:
    launch(
        kernels.retrieval, walk.programs, *_operands(view), bounds, largest, counts,
        *view.content(), *view.sizes(), view.depth, walk.splits, walk.per_split, **_form(view), **_tile(walk.tile),
    )  # fmt: skip


def backward_rows(
    view: View, walk: Walk, row: Tensor, column: Tensor, center: Tensor, rows: bool, columns: bool, dx: Tensor, moment: Tensor | None
) -> None:
    tile = walk.tile
    launch(
        kernels_backward.backward_rows, walk.programs, *_operands(view), view.work.bound, row, column, center, dx, moment,
        *view.content(), *view.sizes(), view.x.padded, view.y.padded, walk.splits, walk.per_split,
        **_form(view), ROWS=rows, COLUMNS=columns, BM=tile.rows, BN=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def weights_block(
    view: View, tile: tiles.TileShape, row: Tensor, column: Tensor, center: Tensor, columns: bool,
    row0: int, column0: int, down: int, across: int, pitch: int,
    for_rows: Tensor | None, for_columns: Tensor | None, moment: Tensor | None,
) -> None:  # fmt: skip
    launch(
        kernels_backward.weights_block, down * across, *_operands(view), view.work.bound, row, column, center,
        for_rows, for_columns, moment, *view.content(), *view.sizes(), view.depth, view.x.padded, view.y.padded,
        row0, column0, down, across, pitch, IN_TILE=view.work.in_tile, PARTS=view.parts, COLUMNS=columns, GROUP=GROUP, **_tile(tile),
    )  # fmt: skip


def _operands(view: View) -> tuple[Tensor, ...]:
    return view.x.tiles, view.y.tiles, view.x.factor, view.y.factor, view.work.problem.scale


def _form(view: View) -> dict[str, Any]:
    """The form of the operands, and whether positives are found in the tiles."""
    return {"IN_TILE": view.work.in_tile, "PARTS": view.parts, "DP": view.depth if view.work.fits else 0}


def _tile(tile: tiles.TileShape) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.columns, "BD": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages}
