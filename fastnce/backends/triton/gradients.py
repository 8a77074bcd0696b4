"""Backward: coefficients of every row and column in float64, launches over the tiles, then the backward of the normalisation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce import tiles
from fastnce.backends.triton import kernels_backward, kernels_rows
from fastnce.backends.triton.host import View, Work, launch, on_device
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted

LOG2E = math.log2(math.e)
# Consecutive programs of the block kernel share this many rows of tiles.
GROUP = 8


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    with on_device(problem.q):
        output = stats[0].own_pos.dim() == 2 and not wanted.k
        work = Work.of_queries(problem) if output else Work.of(problem)
        sides = [_Coefficients.of(work, *side) for side in zip(grads, stats, strict=True)]
        # sum_ij w_ij: the exponentials of a set, over their own sum, add up to one.
        due = torch.stack([side.total for side in sides]).sum()
        run = _Run.of(work, sides, stats[0], wanted)
        if output:
            found = _from_output(run, stats[0])
        elif wanted.q or wanted.k or wanted.scale:
            found = _whole(run) if work.whole else _blocked(run)
        else:
            found = _Found(None, None, run.center.new_zeros(()))
        dscale = (run.center * due + found.moment.to(due.dtype)) / (LOG2E * problem.scale)
        return Gradients(
            found.dq, found.dk, dscale.to(problem.scale.dtype) if wanted.scale else None,
            due.to(problem.scale.dtype) if wanted.bias else None,
        )  # fmt: skip


class _Coefficients(NamedTuple):
    """What a side contributes to its pairs: factor * 2^(t - base) for negatives, factor_pos * 2^(t - base_pos) + share for positives."""

    vectors: Tensor  # (5, rows) float64: base, factor, base_pos, factor_pos, share; only the first two where positives are kept apart
    negative: Tensor  # (rows,): sum of w over the row's negatives
    aligned: Tensor  # (rows,): weight of the one aligned pair of the row
    peak: Tensor  # no |w| of this side is larger
    total: Tensor  # sum of its w

    @staticmethod
    def of(work: Work, grad: SideGrad, side: Side) -> _Coefficients:
        # Of an empty set, base 0 keeps -inf - -inf out.
        no_negative, no_positive = side.empty()
        negative, positive, mean = grad.of_some(side)
        total = (negative + positive + mean).sum()
        own_neg = side.own_neg.masked_fill(no_negative, 0.0)
        share = mean / side.n_pos.clamp(min=1)
        peak = torch.maximum(negative.abs(), positive.abs() + share.abs() if work.in_tile else torch.zeros_like(share))
        if work.in_tile:
            own_pos = side.own_pos.masked_fill(no_positive, 0.0)
            vectors = [*_rounded(own_neg, negative), *_rounded(own_pos, positive), share]
        else:
            vectors = [*_rounded(own_neg, negative)]
        peak = peak.nan_to_num(0.0).amax() if len(peak) else peak.new_zeros(())
        return _Coefficients(torch.stack(vectors), negative, positive + mean, peak, total)


def _rounded(base: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The base as the kernel's float32 holds it; what it lost, up to 1e-5 of a bit, goes into the factor."""
    kept = base.to(torch.float32).to(base.dtype)
    return kept, factor * torch.exp2(kept - base)


class _Run(NamedTuple):
    work: Work
    sides: list[_Coefficients]
    padded: list[Tensor]  # (2 or 5, padded) float32 per side; factors and shares times lift
    wanted: Wanted
    lift: Tensor  # power of two that brings the largest weight near the top of float16
    center: Tensor  # a common t: sums of w t lose less around it
    moment: Tensor  # sum of w (t - center) over the aligned pairs

    @staticmethod
    def of(work: Work, sides: list[_Coefficients], rows: Side, wanted: Wanted) -> _Run:
        problem = work.problem
        peak = torch.stack([side.peak for side in sides]).sum() * (2 if problem.symmetric else 1)
        largest = torch.stack([o.factor.nan_to_num(0.0).amax() if o.padded else o.factor.sum() for o in (work.x, work.y)]).amax()
        lift = torch.exp2((15 - (peak * largest).log2().ceil()).nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100))
        operands = (work.x, work.y)
        padded = []
        for side, operand in zip(sides, operands, strict=False):
            fields, one = len(side.vectors), torch.ones_like(lift)
            vectors = side.vectors.new_zeros((fields, operand.padded), dtype=torch.float32)
            scaled = side.vectors * torch.stack([one, lift, one, lift, lift][:fields])[:, None]
            vectors[:, : operand.rows] = scaled
            padded.append(vectors)
        pos = rows.pos if problem.bias is None else rows.pos - problem.bias
        center = (pos.sum() / max(len(pos), 1) * LOG2E).to(torch.float32)
        i, _ = work.aligned()
        moment = ((rows.own_pos[i] - center) * _pair_weights(work, sides)).sum() if i.stop > i.start else center.new_zeros(())
        return _Run(work, sides, padded, wanted, lift.to(torch.float32), center, moment)


def _pair_weights(work: Work, sides: list[_Coefficients]) -> Tensor:
    """w of the aligned pairs: with one positive lse_pos and pos are the same number, and the two ends of a pair add up."""
    i, j = work.aligned()
    w = sides[0].aligned[i]
    if work.problem.symmetric:
        return w + sides[0].aligned[j]
    return w + sides[1].aligned[j] if work.problem.two_sided else w


class _Found(NamedTuple):
    dq: Tensor | None
    dk: Tensor | None
    moment: Tensor  # sum of w (t - center) over all pairs


def _whole(run: _Run) -> _Found:
    """Rows that fit into a tile: one pass over the logits per gradient, sums in registers."""
    work, wanted = run.work, run.wanted
    problem = work.problem
    rows = View(work, work.x, work.y, False)
    both = problem.symmetric or problem.two_sided
    dq = dk = None
    moment = run.moment
    row, column = run.padded[0], run.padded[-1]
    if wanted.q or wanted.scale:
        dx, about = _pass(run, rows, row, column, True, both, wanted.scale)
        if wanted.q:
            dq = _finish(run, rows, dx)
        del dx  # before the other side's is made
        if about is not None:
            # Where k is q each pair is met from both of its ends.
            moment = moment + about.sum(dtype=torch.float64) / (2 * run.lift if problem.symmetric else run.lift)
    if wanted.k and not problem.symmetric:
        columns = View(work, work.y, work.x, True)
        dx, _ = _pass(run, columns, column, row, problem.two_sided, True, False)
        dk = _finish(run, columns, dx)
    return _Found(dq, dk, moment)


def _pass(run: _Run, view: View, row: Tensor, column: Tensor, rows: bool, columns: bool, moment: bool) -> tuple[Tensor, Tensor | None]:
    tile = view.tile("gradient")
    blocks, splits, per_split = view.splits(tile, -(-view.y.rows // tile.columns))
    dx = view.x.raw.new_empty((splits, view.x.padded, view.x.tiles.shape[2]), dtype=torch.float32)
    about = view.x.raw.new_empty((splits, view.x.rows), dtype=torch.float32) if moment else None
    launch(
        kernels_backward.backward_rows, blocks * splits, *view.operands(), run.work.bound, row, column, run.center, dx, about,
        *view.rules(), view.x.padded, view.y.padded, splits, per_split,
        **view.form(), ROWS=rows, COLUMNS=columns, BM=tile.rows, BN=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx, about


def _blocked(run: _Run) -> _Found:
    """Long rows: weights of one block of pairs at a time in a fixed workspace, then plain matrix products, in a fixed order."""
    work, wanted = run.work, run.wanted
    problem = work.problem
    view = View(work, work.x, work.y, False)
    tile, block = view.tile("block"), tiles.TRITON_BLOCK
    x, y, symmetric = work.x, work.y, problem.symmetric
    new, (_, parts, depth) = x.raw.new_zeros, x.tiles.shape
    dx = new((x.padded, depth), dtype=torch.float32) if wanted.q else None
    dy = dx if symmetric else new((y.padded, depth), dtype=torch.float32) if wanted.k else None
    pitch = min(block, max(x.padded, y.padded))
    for_rows, for_columns = (None if out is None else x.tiles.new_empty((parts, pitch, pitch)) for out in (dx, dy))
    moment = run.moment
    for row0 in range(0, x.padded, block):
        height = min(block, x.padded - row0)
        for column0 in range(row0 if symmetric else 0, y.padded, block):
            width = min(block, y.padded - column0)
            down, across, mirrored = height // tile.rows, width // tile.columns, symmetric and row0 != column0
            about = new((across, pitch), dtype=torch.float32) if wanted.scale else None
            columns = for_columns if mirrored or not symmetric else None
            launch(
                kernels_backward.weights_block, down * across, *view.operands(), work.bound, run.padded[0], run.padded[-1], run.center,
                for_rows, columns, about, *view.rules(), depth, x.padded, y.padded, row0, column0, down, across, pitch,
                IN_TILE=work.in_tile, PARTS=parts, COLUMNS=symmetric or problem.two_sided, GROUP=GROUP,
                BM=tile.rows, BN=tile.columns, BD=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            i, j = slice(row0, row0 + height), slice(column0, column0 + width)
            if dx is not None and for_rows is not None:
                _accumulate(dx[i], for_rows[:, :height, :width], y.tiles[j])
            if dy is not None and columns is not None:
                _accumulate(dy[j], columns[:, :height, :width].transpose(1, 2), x.tiles[i])
            if about is not None:
                moment = moment + about.sum(dtype=torch.float64) / (run.lift if mirrored or not symmetric else 2 * run.lift)
    del for_rows, for_columns  # before the results are made
    dq = None if dx is None else _finish(run, view, dx[None])
    dk = None if dy is None or symmetric else _finish(run, View(work, y, x, True), dy[None])
    return _Found(dq, dk, moment)


def _accumulate(out: Tensor, w: Tensor, rows: Tensor) -> None:
    """out += w rows; (parts, m, n) by (n, parts, depth). The product of the two low halves is below float32's rounding."""
    for a, b in [(0, 0)] if len(w) == 1 else [(1, 0), (0, 1), (0, 0)]:
        if out.is_cuda:
            out += torch.mm(w[a], rows[:, b], out_dtype=torch.float32)
        else:
            out.addmm_(w[a].float(), rows[:, b].float())


def _from_output(run: _Run, rows: Side) -> _Found:
    """The forward pass already summed the keys by their weights."""
    view, mean, factor = View(run.work, run.work.x, run.work.y, False), rows.own_pos, run.sides[0].negative
    dx = (mean[:, :-1] * (factor * run.lift).to(mean.dtype)[:, None])[None] if run.wanted.q else None
    moment = (factor * (mean[:, -1].to(factor.dtype) - run.center)).sum()
    return _Found(None if dx is None else _finish(run, view, dx), None, moment)


def _finish(run: _Run, view: View, dx: Tensor) -> Tensor:
    """dL/dx of the raw rows from the sums over the tiles (splits, padded, depth)."""
    work, x, y = run.work, view.x, view.y
    problem = work.problem
    i, _ = work.aligned()
    pair = torch.zeros_like(x.r)
    if i.stop > i.start:
        w = _pair_weights(work, run.sides).to(pair.dtype)
        for own in view.ends():
            pair[own] = w
    out = torch.empty(x.raw.shape, dtype=x.raw.dtype, device=x.raw.device)
    height, width = tiles.TRITON_ROWS
    launch(
        kernels_rows.finish, -(-x.rows // height), dx, x.raw, y.raw, x.r, y.r, pair, problem.scale, run.lift, out,
        x.rows, y.rows, *view.diagonals()[1:], x.raw.stride(0), y.raw.stride(0), dx.stride(1), dx.stride(0), len(dx),
        x.raw.shape[1], NORMALIZE=problem.normalize, BR=height, BD=width,
    )  # fmt: skip
    return out
