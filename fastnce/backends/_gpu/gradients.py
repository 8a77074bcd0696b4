"""Backward: coefficients of every row and column in float64, launches over the tiles, then the backward of the normalisation."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu import tiles
from fastnce.backends._gpu.host import View, Walk, Work, on_device
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted


class Weights(NamedTuple):
    """What a pair weighs, as the tiles read it.

    vectors   per side (2 or 5, padded) float32, 0 in the padding: base, factor of the negatives, whose weight is factor * 2^(t - base);
              where positives are found in the tiles also base_pos, factor_pos, share of these: factor_pos * 2^(t - base_pos) + share
    pair      w of the aligned pairs that are kept out of the tiles, in the form that the backend's finish reads; empty without any
    kept      (padded,) or None: the factor alone, by which a kept output is multiplied
    lift      0-dim float32: a power of two that brings the largest weight near the top of float16. Tiles multiply by it
    center    0-dim float32: a t around which sums of w t lose less
    scalars   float64, for the backend's finish: sum_ij w_ij, and sums over the aligned pairs
    """

    vectors: list[Tensor]
    pair: tuple[Tensor, ...]
    kept: Tensor | None
    lift: Tensor
    center: Tensor
    scalars: Tensor


class Pass(NamedTuple):
    """One launch over the tiles for the gradient of one side. rows, columns: whose coefficients the weights have."""

    view: View
    walk: Walk
    row: Tensor
    column: Tensor
    rows: bool
    columns: bool
    dx: Tensor  # (splits, padded, depth)
    about: Tensor | None  # (splits, rows)


class Block(NamedTuple):
    """A rectangle of pairs whose weights are made at a time, in tiles: down x across, from (row0, column0)."""

    row0: int
    column0: int
    height: int
    width: int
    down: int
    across: int
    pitch: int


class Found(NamedTuple):
    """Sums over the tiles of both sides, (splits, padded, depth) each, times lift.

    about    (parts, rows or more) or None: lift * divide * sum of w (t - center) over the pairs of the tiles, in parts
    """

    dx: Tensor | None
    dy: Tensor | None
    about: Tensor | None
    divide: float


def backward(problem: Problem, kernels: ModuleType, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    if len(problem.q) == 0 or len(problem.keys) == 0:
        return _of_no_pair(problem, wanted)
    with on_device(problem.q):
        kept = stats[0].own_pos.dim() == 2 and not wanted.k
        work: Work = kernels.prepare(problem, queries_alone=kept)
        weights: Weights = kernels.coefficients(work, grads, stats, kept)
        found = from_output(stats[0].own_pos) if kept else over_tiles(work, weights, wanted)
        gradients: Gradients = kernels.finish(work, weights, found, wanted)
        return gradients


def _of_no_pair(problem: Problem, wanted: Wanted) -> Gradients:
    q, k, (dq_type, dk_type) = problem.q, problem.k, problem.gradient_dtypes
    dq = q.new_zeros(q.shape, dtype=dq_type) if wanted.q else None
    dk = k.new_zeros(k.shape, dtype=dk_type) if wanted.k and k is not None else None
    return Gradients(dq, dk, *(torch.zeros_like(problem.scale) if want else None for want in (wanted.scale, wanted.bias)))


def over_tiles(work: Work, weights: Weights, wanted: Wanted) -> Found:
    """The sums that the wanted gradients need."""
    if not (wanted.q or wanted.k or wanted.scale):
        return Found(None, None, None, 1.0)
    return _in_tiles(work, weights, wanted) if work.fits else _in_blocks(work, weights, wanted)


def from_output(mean: Tensor) -> Found:
    """No tiles: the forward pass has summed the keys, and t, by their weights: mean is (rows, D + 1)."""
    return Found(mean[None, :, :-1], None, mean[None, :, -1], 1.0)


def _in_tiles(work: Work, weights: Weights, wanted: Wanted) -> Found:
    """Tiles hold whole rows: one pass over the logits for each gradient, which adds up in registers."""
    problem, views = work.problem, [View(work, work.x, work.y, False), View(work, work.y, work.x, True)]
    both = problem.symmetric or problem.two_sided
    row, column = weights.vectors[0], weights.vectors[-1]
    passes = []
    if wanted.q or wanted.scale:
        passes.append(_pass(views[0], row, column, True, both, wanted.scale))
    if wanted.k and work.keyed:
        passes.append(_pass(views[1], column, row, problem.two_sided, True, False))
    work.kernels.backward_rows(passes, weights)
    dx = passes[0].dx if wanted.q else None
    dy = passes[-1].dx if wanted.k and work.keyed else None
    # Where k is q, each pair is met from both of its ends: `about` is twice the sum.
    return Found(dx, dy, passes[0].about, 2.0 if problem.symmetric else 1.0)


def _pass(view: View, row: Tensor, column: Tensor, rows: bool, columns: bool, moment: bool) -> Pass:
    walk, new = view.walk("gradient"), view.x.tiles.new_empty
    dx = new((walk.splits, view.x.padded, view.depth), dtype=torch.float32)
    about = new((walk.splits, view.x.rows), dtype=torch.float32) if moment else None
    return Pass(view, walk, row, column, rows, columns, dx, about)


def _in_blocks(work: Work, weights: Weights, wanted: Wanted) -> Found:
    """Long rows: the weights of one block of pairs at a time go into a workspace, then into plain matrix products, in a fixed order."""
    view = View(work, work.x, work.y, False)
    tile, most = view.tile("block"), tiles.BLOCK
    x, y, symmetric = work.x, work.y, work.problem.symmetric
    new, (_, parts, depth) = x.tiles.new_empty, x.tiles.shape
    dx = new((x.padded, depth), dtype=torch.float32) if wanted.q else None
    dy = dx if symmetric else new((y.padded, depth), dtype=torch.float32) if wanted.k else None
    pitch = min(most, max(x.padded, y.padded))
    for_rows, for_columns = (None if out is None else new((parts, pitch, pitch)) for out in (dx, dy))
    # Zeros: of symmetric logits, the blocks of the last rows are narrower.
    about = x.factor.new_zeros((min(most, y.padded) // tile.columns, x.padded)) if wanted.scale else None
    for row0 in range(0, x.padded, most):
        height = min(most, x.padded - row0)
        start = row0 if symmetric else 0
        for column0 in range(start, y.padded, most):
            width = min(most, y.padded - column0)
            block = Block(row0, column0, height, width, height // tile.rows, width // tile.columns, pitch)
            mirrored = symmetric and row0 != column0
            columns = for_columns if mirrored or not symmetric else None
            # A block on the diagonal of symmetric logits holds each of its pairs twice.
            share = 0.5 if symmetric and not mirrored else 1.0
            work.kernels.weights_block(view, tile, weights, block, for_rows, columns, about, share)
            # The first product of a row is stored, the others are added. Where k is q, rows are met as columns of the first row of blocks.
            first = (row0 == 0 and column0 == 0) if symmetric else column0 == 0
            work.kernels.products(view, block, for_rows, columns, dx, dy, first, row0 == 0)
    return Found(None if dx is None else dx[None], None if dy is None or symmetric else dy[None], about, 1.0)
