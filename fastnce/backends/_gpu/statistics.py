"""Forward: launches over the tiles, then O(N) arithmetic in float64."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce.backends._gpu.host import Sums, UnshiftedSums, Work, on_device, up
from fastnce.problem import Problem, Side


def forward(problem: Problem, kernels: ModuleType) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    with on_device(problem.q):
        work: Work = kernels.prepare(problem, unshifted=adds_in_memory(problem))
        if kernels.keeps_output(problem):
            sides = kernels.statistics(work, [(kept := keep_output(work))[0]], kept)
        else:
            sides = kernels.statistics(work, over_tiles(work), None)
        return kernels.with_metrics(work, sides) if problem.metrics else sides


def adds_in_memory(problem: Problem) -> bool:
    """Whether forward_both runs. It adds to memory in any order: not where torch is asked for the same bits every time."""
    return (problem.symmetric or problem.two_sided) and not torch.are_deterministic_algorithms_enabled()


def unshifted_sums(sides: list[int], in_tile: bool, like: Tensor) -> tuple[Tensor, tuple[UnshiftedSums, ...]]:
    """Memory for forward_both of sides with so many rows, and the same memory as one vector, which has to be filled with zeros."""
    fields = 3 if in_tile else 1
    # Every vector starts at a multiple of 16 bytes: a kernel is compiled once for pointers that do, and once more for others.
    sizes = [(up(fields * rows, 4), up(rows, 4) if in_tile else 0) for rows in sides]
    memory = like.new_empty(sum(map(sum, sizes)), dtype=torch.float32)
    found, start = [], 0
    for rows, (of_sums, of_count) in zip(sides, sizes, strict=True):
        count = memory[start + of_sums :][:rows].view(torch.int32) if in_tile else None
        found.append(UnshiftedSums(memory[start:][: fields * rows].view(fields, rows), count))
        start += of_sums + of_count
    return memory, tuple(found)


def over_tiles(work: Work, rows: bool = True) -> list[Sums]:
    """Sums of every side. rows: whether forward_rows runs, which then serves where forward_both does not."""
    views, unshifted = work.views(), work.unshifted
    if unshifted:
        work.kernels.forward_both(views[0], views[0].walk("both", half=work.problem.symmetric), unshifted[0], unshifted[-1])
    sides = [Sums(1, None, None, unshifted[n] if unshifted else None) for n in range(len(views))]
    if rows:
        walks, new = [view.walk("rows") for view in views], work.x.tiles.new_empty
        for n, (view, walk) in enumerate(zip(views, walks, strict=True)):
            sums = new((5 if work.in_tile else 2, walk.splits, view.x.rows), dtype=torch.float32)
            count = new((walk.splits, view.x.rows), dtype=torch.int32) if work.in_tile else None
            sides[n] = sides[n]._replace(splits=walk.splits, sums=sums, n_pos=count)
        work.kernels.forward_rows(views, walks, not unshifted, sides)
    return sides


def keep_output(work: Work) -> tuple[Sums, Tensor, Tensor]:
    """Sums of the rows, and of the keys and of t by their weights in every split: (splits, padded, depth) and (splits, rows)."""
    view = work.views()[0]
    walk, new, rows = view.walk("output"), work.x.tiles.new_empty, view.x.rows
    sums = new((2, walk.splits, rows), dtype=torch.float32)
    out, moment = new((walk.splits, view.x.padded, view.depth), dtype=torch.float32), new((walk.splits, rows), dtype=torch.float32)
    work.kernels.forward_output(view, walk, sums, out, moment)
    return Sums(walk.splits, sums, None, None), out, moment
