"""Every launch of a Triton kernel over the tiles, with the arguments that its signature wants. passes.py has those over single rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu.gradients import Block, Pass, Weights
from fastnce.backends._gpu.host import Sums, UnshiftedSums, View, Walk, Work
from fastnce.backends.triton import kernels, kernels_backward, kernels_retrieval, kernels_rows, tiles

# Consecutive programs of the block kernel share this many rows of tiles.
GROUP = 8


class Launch(NamedTuple):
    """A kernel, how many programs of it on a grid of one axis, its arguments in order, and what the compiler is told by keyword."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def start(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.options)

    def ordered(self) -> list[Any]:
        """The arguments and the constants, in the order of their names in the kernel."""
        return [*self.arguments, *(self.options[name] for name in self.kernel.arg_names[len(self.arguments) :])]


class _Thread(threading.local):
    """Who is handed the launches of this thread instead of the device."""

    taker: Callable[[Launch], None] | None = None


_this_thread = _Thread()


@contextmanager
def handed_to(taker: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, this thread launches nothing: `taker` is handed what would be launched."""
    before, _this_thread.taker = _this_thread.taker, taker
    try:
        yield
    finally:
        _this_thread.taker = before


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any) -> None:
    """Run a kernel on a grid of one axis. Fusion is asked for, because Triton's default changes between versions."""
    if programs > 0:
        options = dict(constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
        (_this_thread.taker or Launch.start)(Launch(kernel, programs, arguments, options))


def is_compiled(one: Launch) -> bool:
    """Whether the kernel is compiled: others are interpreted, or operations of torch."""
    from triton.runtime.jit import JITFunction

    return isinstance(one.kernel, JITFunction)


def compiled(launches: Sequence[Launch]) -> Sequence[Callable[..., None] | None]:
    """The compiled kernels, which are called with all arguments in the order of their names; None for those that are interpreted.

    Compilers run beside each other: most of their time they hold no lock of Python's.
    """
    from triton.runtime import _async_compile as side_by_side

    kernels: list[Any] = [None] * len(launches)
    failed: Exception | None = None
    with ThreadPoolExecutor() as threads:
        mode = side_by_side.AsyncCompileMode(threads, ignore_errors=True)
        with mode if side_by_side.active_mode.get() is None else nullcontext():
            for n, one in enumerate(launches):
                if is_compiled(one):
                    kernels[n] = one.kernel.warmup(*one.arguments, grid=(one.programs,), **one.options)
            # An error is caught in here: left to the mode, Triton 3.9 loses it, and with Triton 3.6 the mode would stay on behind it.
            for n, kernel in enumerate(kernels):
                if isinstance(kernel, side_by_side.FutureKernel):
                    try:
                        kernels[n] = kernel.result()
                    except Exception as error:
                        failed = failed or error
    if failed is not None:
        raise failed
    return [None if kernel is None else kernel[(one.programs, 1, 1)] for one, kernel in zip(launches, kernels, strict=True)]


def stream() -> Any:
    """The current stream of the current device, as compiled kernels take it."""
    from triton.runtime import driver

    return driver.active.get_current_stream(driver.active.get_current_device())


def slot(work: Work, number: Any) -> Tensor:
    """One of the numbers of `slots`, see kernels_rows.py, as a 0-dim tensor."""
    assert work.slots is not None
    return work.slots[number.value]


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


def forward_rows(views: list[View], walks: list[Walk], always: bool, sides: list[Sums]) -> None:
    """Both sides in one launch: the programs of the rows, then those of the columns. A launch each where ids or a mask take registers."""
    if len(views) == 2 and views[0].rules != "index":
        for one in zip(views, walks, sides, strict=True):
            forward_rows([one[0]], [one[1]], always, [one[2]])
        return
    view, walk, last = views[0], walks[0], walks[-1]
    launch(
        kernels.forward_rows, sum(walk.programs for walk in walks), *_operands(view), view.work.bound,
        sides[0].sums, sides[0].n_pos, *_columns(sides), None, None, None,
        *view.content(), *view.sizes(), view.depth, view.x.padded, walk.splits, walk.per_split, last.splits, last.per_split, walk.programs,
        int(always), COLUMNS=len(views) == 2, **_form(view), **_tile(walk.tile),
    )  # fmt: skip


def _columns(sides: list[Sums]) -> tuple[Tensor | None, Tensor | None]:
    return (sides[1].sums, sides[1].n_pos) if len(sides) == 2 else (None, None)


def forward_output(view: View, walk: Walk, sums: Tensor, out: Tensor, moment: Tensor) -> None:
    launch(
        kernels.forward_rows, walk.programs, *_operands(view), view.work.bound, sums, None, None, None, out, moment,
        slot(view.work, kernels_rows.OUTPUT_LIFT),
        *view.content(), *view.sizes(), view.depth, view.x.padded, walk.splits, walk.per_split, 1, 1, walk.programs, 1,
        COLUMNS=False, **_form(view), **_tile(walk.tile),
    )  # fmt: skip


def forward_both(view: View, walk: Walk, row_sums: UnshiftedSums, column_sums: UnshiftedSums) -> None:
    launch(
        kernels.forward_both, walk.programs, *_operands(view), view.work.bound, *row_sums, *column_sums,
        *view.content(), *view.sizes(), view.depth, walk.splits, walk.per_split, int(view.work.problem.symmetric),
        **_form(view), **_tile(walk.tile),
    )  # fmt: skip


class Ranks(NamedTuple):
    """What the passes for the metrics read and leave of one side, see kernels_retrieval.py."""

    pos: Tensor  # (rows,)
    positives: Tensor  # (splits, rows)
    negatives: Tensor  # (splits, rows)
    counts: Tensor  # (3, splits, rows)


def retrieval(views: list[View], walks: list[Walk], ranks: list[Ranks], count: bool) -> None:
    """Both sides in one launch. count: not the best positives alone."""
    view, walk, last, problem = views[0], walks[0], walks[-1], views[0].work.problem
    columns = ranks[1] if len(ranks) == 2 else [None] * 4
    threshold = None if problem.threshold is None else problem.threshold.contiguous()
    launch(
        kernels_retrieval.retrieval, sum(walk.programs for walk in walks), *_operands(view), problem.bias, threshold,
        *ranks[0], *columns, *view.content(), *view.sizes(), view.depth, walk.splits, walk.per_split, last.splits, last.per_split,
        walk.programs, COUNT=count, COLUMNS=len(views) == 2, NORMALIZE=problem.normalize, **_form(view), **_tile(walk.tile),
    )  # fmt: skip


def backward_rows(passes: list[Pass], weights: Weights) -> None:
    """A launch for each pass; one for both where their weights are alike, which are those of two-sided logits without ids or a mask."""
    alike = len(passes) == 2 and passes[0][4:6] == passes[1][4:6] and passes[0].view.rules == "index"
    for n, one in enumerate(passes[:1] if alike else passes):
        view, walk, tile, other = one.view, one.walk, one.walk.tile, passes[-1] if alike else one
        launch(
            kernels_backward.backward_rows, walk.programs + (other.walk.programs if alike else 0), *_operands(view), view.work.bound,
            one.row, one.column, weights.center, weights.lift, one.dx, other.dx if alike else None, one.about if n == 0 else None,
            *view.content(), *view.sizes(), view.x.padded, view.y.padded, walk.splits, walk.per_split,
            other.walk.splits, other.walk.per_split, walk.programs,
            **_form(view), ROWS=one.rows, COLUMNS=one.columns, BM=tile.rows, BN=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def weights_block(
    view: View, tile: tiles.TileShape, weights: Weights, block: Block, for_rows: Tensor | None, for_columns: Tensor | None,
    about: Tensor | None, share: float,
) -> None:  # fmt: skip
    both = view.work.problem.symmetric or view.work.problem.two_sided
    launch(
        kernels_backward.weights_block, block.down * block.across, *_operands(view), view.work.bound,
        weights.vectors[0], weights.vectors[-1], weights.center, weights.lift, for_rows, for_columns, about,
        *view.content(), *view.sizes(), view.depth, view.x.padded, view.y.padded,
        block.row0, block.column0, block.down, block.across, block.pitch, share,
        IN_TILE=view.work.in_tile, PARTS=view.parts, COLUMNS=both, GROUP=GROUP, **_tile(tile),
    )  # fmt: skip


def products(
    view: View, block: Block, for_rows: Tensor | None, for_columns: Tensor | None, dx: Tensor | None, dy: Tensor | None,
    first_of_rows: bool, first_of_columns: bool,
) -> None:  # fmt: skip
    """Both gradients in one launch: the programs of the rows of the block, then those of its columns."""
    tile = tiles.PRODUCTS[view.parts]
    wide = -(-view.depth // tile.columns)
    down = block.height // tile.rows * wide if for_rows is not None else 0
    across = block.width // tile.rows * wide if for_columns is not None else 0
    launch(
        kernels_backward.products, down + across, for_rows, for_columns, view.x.tiles, view.y.tiles, dx, dy, view.depth, block.pitch,
        block.row0, block.column0, block.height, block.width, down, wide, int(first_of_rows), int(first_of_columns),
        PARTS=view.parts, BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _operands(view: View) -> tuple[Tensor, ...]:
    return view.x.tiles, view.y.tiles, view.x.factor, view.y.factor, view.work.scale


def _form(view: View) -> dict[str, Any]:
    """The form of the operands, and whether positives are found in the tiles."""
    return {"IN_TILE": view.work.in_tile, "PARTS": view.parts, "DP": view.depth if view.work.fits else 0}


def _tile(tile: tiles.TileShape) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.columns, "BD": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages}
