"""Backward: coefficients of every row and column in float64, launches over the tiles, then the backward of the normalisation."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu import tiles
from fastnce.backends._gpu.host import NONE, View, Work
from fastnce.backends._gpu.rows import Coefficients, coefficients, on_device, row_kernels, scalar_gradients
from fastnce.precision import float32_sums
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted


def backward(problem: Problem, kernels: ModuleType, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    with on_device(problem.q):
        output = stats[0].own_pos.dim() == 2 and not wanted.k
        work = Work.of_queries(problem, kernels) if output else Work.of(problem, kernels)
        run = _Run.of(work, grads, stats, wanted)
        found = _Found(None, None, [], 1.0)
        if output:
            found = _from_output(run, grads[0], stats[0])
        elif wanted.q or wanted.k or wanted.scale:
            found = _in_tiles(run) if work.fits else _in_blocks(run)
        dscale = dbias = None
        if wanted.scale or wanted.bias:
            dscale, dbias = scalar_gradients(run.weights.scalars, found.about, found.divide, problem.scale)
        return Gradients(found.dq, found.dk, dscale if wanted.scale else None, dbias if wanted.bias else None)


class _Run(NamedTuple):
    work: Work
    wanted: Wanted
    weights: Coefficients
    lift: Tensor  # float32, as the kernels read it; center too
    center: Tensor

    @staticmethod
    def of(work: Work, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> _Run:
        problem, factors = work.problem, [work.x.factor, work.y.factor]
        weights = coefficients(grads, stats, factors, problem.bias, work.aligned(), work.in_tile, problem.symmetric)
        lift, center = (weights.scalars[n].to(torch.float32) for n in range(2))
        return _Run(work, wanted, weights, lift, center)


class _Found(NamedTuple):
    dq: Tensor | None
    dk: Tensor | None
    about: list[Tensor]  # lift * divide * sum of w (t - center) over the pairs of the tiles, in parts
    divide: float


def _in_tiles(run: _Run) -> _Found:
    """Tiles hold whole rows: one pass over the logits for each gradient, which adds up in registers."""
    work, wanted = run.work, run.wanted
    problem = work.problem
    rows = View(work, work.x, work.y, False)
    both = problem.symmetric or problem.two_sided
    dq = dk = about = None
    row, column = run.weights.vectors[0], run.weights.vectors[-1]
    if wanted.q or wanted.scale:
        dx, about = _pass(run, rows, row, column, True, both, wanted.scale)
        if wanted.q:
            dq = _finish(run, rows, dx)
        del dx  # before the other side's is made
    if wanted.k and not problem.symmetric:
        columns = View(work, work.y, work.x, True)
        dx, _ = _pass(run, columns, column, row, problem.two_sided, True, False)
        dk = _finish(run, columns, dx)
    # Where k is q, each pair is met from both of its ends: `about` is twice the sum.
    return _Found(dq, dk, [] if about is None else [about], 2.0 if problem.symmetric else 1.0)


def _pass(run: _Run, view: View, row: Tensor, column: Tensor, rows: bool, columns: bool, moment: bool) -> tuple[Tensor, Tensor | None]:
    walk, new = view.walk("gradient"), view.x.raw.new_empty
    dx = new((walk.splits, view.x.padded, view.depth), dtype=torch.float32)
    about = new((walk.splits, view.x.rows), dtype=torch.float32) if moment else None
    view.work.kernels.backward_rows(view, walk, row, column, run.center, rows, columns, dx, about)
    return dx, about


def _in_blocks(run: _Run) -> _Found:
    """Long rows: the weights of one block of pairs at a time go into a workspace, then into plain matrix products, in a fixed order."""
    work, wanted = run.work, run.wanted
    problem = work.problem
    view = View(work, work.x, work.y, False)
    tile, block = view.tile("block"), tiles.BLOCK
    x, y, symmetric = work.x, work.y, problem.symmetric
    new, (_, parts, depth) = x.raw.new_zeros, x.tiles.shape
    row, column = run.weights.vectors[0], run.weights.vectors[-1]
    dx = new((x.padded, depth), dtype=torch.float32) if wanted.q else None
    dy = dx if symmetric else new((y.padded, depth), dtype=torch.float32) if wanted.k else None
    pitch = min(block, max(x.padded, y.padded))
    for_rows, for_columns = (None if out is None else x.tiles.new_empty((parts, pitch, pitch)) for out in (dx, dy))
    moment = run.weights.scalars[3]
    for row0 in range(0, x.padded, block):
        height = min(block, x.padded - row0)
        for column0 in range(row0 if symmetric else 0, y.padded, block):
            width = min(block, y.padded - column0)
            down, across, mirrored = height // tile.rows, width // tile.columns, symmetric and row0 != column0
            about = new((across, pitch), dtype=torch.float32) if wanted.scale else None
            columns = for_columns if mirrored or not symmetric else None
            work.kernels.weights_block(
                view, tile, row, column, run.center, symmetric or problem.two_sided, row0, column0, down, across, pitch,
                for_rows, columns, about,
            )  # fmt: skip
            i, j = slice(row0, row0 + height), slice(column0, column0 + width)
            if dx is not None and for_rows is not None:
                _accumulate(dx[i], for_rows[:, :height, :width], y.tiles[j])
            if dy is not None and columns is not None:
                _accumulate(dy[j], columns[:, :height, :width].transpose(1, 2), x.tiles[i])
            if about is not None:
                moment += about.sum(dtype=torch.float64) / (run.lift if mirrored or not symmetric else 2 * run.lift)
    del for_rows, for_columns  # before the results are made
    dq = None if dx is None else _finish(run, view, dx[None])
    dk = None if dy is None or symmetric else _finish(run, View(work, y, x, True), dy[None])
    return _Found(dq, dk, [], 1.0)


def _accumulate(out: Tensor, w: Tensor, rows: Tensor) -> None:
    """out += w rows, of shapes (parts, m, n) and (n, parts, depth).

    In two parts, the product of both low halves is left out: it is below float32's rounding. Tensor cores then sum tiles.SUM columns at a
    time: they round towards zero, and over thousands of columns would lose more than float32 may.
    """
    if len(w) == 2:
        out += _product(w[1], rows[:, 0])
        out += _product(w[0], rows[:, 1])
    columns = w.shape[2]
    step = columns if len(w) == 1 else tiles.SUM
    for n in range(0, columns, step):
        out += _product(w[0, :, n : n + step], rows[n : n + step, 0])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """float32 sums of products of float16 numbers."""
    if not a.is_cuda:
        return a.float() @ b.float()
    with float32_sums():
        return torch.mm(a, b, out_dtype=torch.float32)


def _from_output(run: _Run, grad: SideGrad, rows: Side) -> _Found:
    """No tiles: the forward pass has summed the keys by their weights."""
    view, mean, factor = View(run.work, run.work.x, run.work.y, False), rows.own_pos, grad.of_some(rows).dlse_neg
    dx = (mean[:, :-1] * (factor * run.lift).to(mean.dtype)[:, None])[None] if run.wanted.q else None
    run.weights.scalars[3] += (factor * (mean[:, -1].to(factor.dtype) - run.center)).sum()
    return _Found(None if dx is None else _finish(run, view, dx), None, [], 1.0)


def _finish(run: _Run, view: View, dx: Tensor) -> Tensor:
    """dL/dx of the raw rows from the sums over the tiles (splits, padded, depth)."""
    work, x, y = run.work, view.x, view.y
    problem, w = work.problem, run.weights.pair
    ends = [] if w is None else view.ends()
    if w is not None and ends == [slice(0, x.rows)]:
        pair = w
    else:
        pair = torch.zeros_like(x.r)
        for own in ends:
            pair[own] = w  # type: ignore[assignment]
    # The kernel writes the dtype that it reads. It reads rows of y on these diagonals alone: without one, a single row stands for all keys
    # and need not be converted.
    dtype, diagonals = problem.gradient_dtypes[1 if view.flip else 0], view.diagonals()[1:]
    rows, read = x.raw.to(dtype), diagonals != (NONE, NONE) or dtype == y.raw.dtype
    partners = y.raw.to(dtype) if read else rows.new_zeros(1, rows.shape[1]).expand(y.raw.shape)
    out = torch.empty(x.raw.shape, dtype=dtype, device=x.raw.device)
    row_kernels(work.kernels, x.raw).finish(dx, rows, partners, x.r, y.r, pair, problem.scale, run.lift, *diagonals, problem.normalize, out)
    return out
