"""Forward: launches over the tiles, then O(N) arithmetic in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce import tiles
from fastnce.backends.triton import kernels, kernels_rows, limits
from fastnce.backends.triton.host import View, Work, launch, on_device
from fastnce.norms import vector_dtype
from fastnce.problem import Problem, Side

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    with on_device(problem.q):
        work = Work.of(problem)
        views = work.views()
        # Sums from both sides of a tile meet in memory in any order: not where the same bits are asked for every time.
        both = (problem.symmetric or problem.two_sided) and not torch.are_deterministic_algorithms_enabled()
        unshifted = _both(work, views) if both else [None] * len(views)
        pairs = _aligned(work)
        return [_side(view, sums, pairs) for view, sums in zip(views, unshifted, strict=True)]


class _Sums(NamedTuple):
    real: Tensor  # (1 or 3, rows): negatives; positives, t of the positives
    n_pos: Tensor | None


def _both(work: Work, views: list[View]) -> list[_Sums | None]:
    view = views[0]
    depth = view.x.tiles.shape[2]
    fields = 3 if work.in_tile else 1
    x = view.x.raw
    sums = [_Sums(x.new_zeros((fields, v.x.rows), dtype=torch.float32), _zeros(v) if work.in_tile else None) for v in views]
    tile = view.tile("both")
    across = -(-view.y.rows // tile.columns)
    blocks, splits, per_split = view.splits(tile, across // 2 + 1 if work.problem.symmetric else across)
    launch(
        kernels.forward_both, blocks * splits, *view.operands(), work.bound, *sums[0], *sums[-1], *view.rules(), depth,
        splits, per_split, int(work.problem.symmetric), **view.form(), **_sizes(tile),
    )  # fmt: skip
    return list(sums)


def _zeros(view: View) -> Tensor:
    return view.x.raw.new_zeros(view.x.rows, dtype=torch.int32)


def _sizes(tile: tiles.Tile) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.columns, "BD": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages}


def _aligned(work: Work) -> Tensor | None:
    """t of the aligned pairs that are kept out of the tiles."""
    if work.in_tile:
        return None
    i, j = work.aligned()
    x, y = work.x, work.y
    pairs = i.stop - i.start
    t = x.raw.new_empty(pairs, dtype=torch.float32)
    height, width = tiles.TRITON_ROWS
    launch(
        kernels_rows.aligned, -(-pairs // height), x.raw, y.raw, x.r, y.r, work.problem.scale, t,
        pairs, i.start, j.start, x.raw.stride(0), y.raw.stride(0), x.raw.shape[1], BR=height, BD=width,
    )  # fmt: skip
    return t


class _LogSum(NamedTuple):
    """log2 of a sum of 2^t per row, and the share 2^(top - log2) that each split's scale has in it."""

    log2: Tensor
    shares: Tensor

    @staticmethod
    def of(tops: Tensor, totals: Tensor, unshifted: Tensor | None) -> _LogSum:
        precise = vector_dtype(tops)
        tops, totals = tops.to(precise), totals.to(precise)
        if unshifted is not None:
            tops = torch.cat([tops, torch.zeros_like(tops[:1]).masked_fill(~(unshifted > 0), -torch.inf)])
            totals = torch.cat([totals, unshifted[None].to(precise)])
        top = tops.amax(0)
        base = top.masked_fill(top == -torch.inf, 0.0)
        log2 = (totals * torch.exp2(tops - base)).sum(0).log2() + base
        return _LogSum(log2, torch.exp2(tops - log2.masked_fill(log2 == -torch.inf, 0.0)))


def _side(view: View, unshifted: _Sums | None, pairs: Tensor | None) -> Side:
    work, problem, rows = view.work, view.work.problem, view.x.rows
    output = not view.flip and limits.keeps_output(problem)
    tile = view.tile("output" if output else "rows")
    blocks, splits, per_split = view.splits(tile, -(-view.y.rows // tile.columns))
    new, depth = view.x.raw.new_empty, view.x.tiles.shape[2]
    real = new((5 if work.in_tile else 2, splits, rows), dtype=torch.float32)
    count = new((splits, rows), dtype=torch.int32) if work.in_tile else None
    out = new((splits, view.x.padded, depth), dtype=torch.float32) if output else None
    moment = new((splits, rows), dtype=torch.float32) if output else None
    # Weights are at most 1, and float16 has 24 bits below 2^14 for the smaller ones.
    lift = None
    if output:
        largest = view.y.factor.nan_to_num(0.0).amax() if view.y.rows else view.x.factor.new_ones(())
        lift = torch.exp2((14 - largest.log2().ceil()).clamp(-100, 100))
    launch(
        kernels.forward_rows, blocks * splits, *view.operands(), work.bound, real, count, out, moment, lift,
        *view.rules(), depth, view.x.padded, splits, per_split, int(unshifted is None), **view.form(), **_sizes(tile),
    )  # fmt: skip
    negative = _LogSum.of(real[0], real[1], None if unshifted is None else unshifted.real[0])
    lse_neg = _nats(problem, negative.log2)
    if pairs is not None:
        pos, n_pos = _at_ends(view, pairs)
        t_pos, own_pos = pos, pos
    else:
        assert count is not None
        positive = _LogSum.of(real[2], real[3], None if unshifted is None else unshifted.real[1])
        pos, n_pos = real[4].sum(0, dtype=lse_neg.dtype), count.sum(0)
        if unshifted is not None:
            assert unshifted.n_pos is not None
            pos, n_pos = pos + unshifted.real[2], n_pos + unshifted.n_pos
        own_pos = positive.log2
    none = n_pos == 0
    pos = _nats(problem, pos / n_pos.clamp(min=1)).masked_fill(none, 0.0)
    lse_pos = torch.where(n_pos == 1, pos, _nats(problem, own_pos)).masked_fill(none, -torch.inf)
    if out is not None and moment is not None and lift is not None:
        own_pos = _mean_key(view, negative, out, moment, lift)
    side = Side(lse_neg, lse_pos, pos, n_pos, negative.log2, own_pos)
    return _with_metrics(view, side, t_pos if pairs is not None else None) if problem.metrics else side


def _at_ends(view: View, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(t of the row's aligned pair, 0 without one; 1 or 0): per row of the view."""
    pos = pairs.new_zeros(view.x.rows, dtype=vector_dtype(pairs))
    n_pos = torch.zeros(view.x.rows, dtype=torch.int64, device=pairs.device)
    for own in view.ends():
        pos[own] = pairs.to(pos.dtype)
        n_pos[own] = 1
    return pos, n_pos


def _mean_key(view: View, negative: _LogSum, out: Tensor, moment: Tensor, lift: Tensor) -> Tensor:
    """(rows, D + 1): sum_j p_ij k^_j and sum_j p_ij t_ij with p = 2^(t - log2), for a backward without tiles."""
    rows, columns = view.x.raw.shape
    found = out.new_empty((rows, columns + 1))
    factors = (negative.shares / lift).to(out.dtype)
    torch.mul(out[0, :rows, :columns], factors[0, :, None], out=found[:, :columns])
    for split in range(1, len(out)):
        found[:, :columns].addcmul_(out[split, :rows, :columns], factors[split, :, None])
    found[:, columns] = (moment * negative.shares).sum(0)
    return found


def _with_metrics(view: View, side: Side, t_pos: Tensor | None) -> Side:
    """Ranks and hardest negatives take passes of their own: training does not ask for them."""
    problem = view.work.problem
    given, bias = problem.threshold, problem.bias
    best = None if t_pos is None else t_pos.masked_fill(side.n_pos == 0, -torch.inf)
    if given is not None:
        least = (given if bias is None else given - bias) * LOG2E
    else:
        # The best positive must be known before the negatives above it are counted.
        least = best = _retrieve(view, torch.zeros_like(side.pos))[0][1] if best is None else best
    (hardest_logit, best_in_tile), rank, hardest = _retrieve(view, least + problem.tie * LOG2E)
    best = best_in_tile if best is None else best
    return side._replace(rank=rank, hardest=hardest, hardest_logit=_nats(problem, hardest_logit), pos_max=_nats(problem, best))


def _retrieve(view: View, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(2, rows) largest t of negatives and of positives; number of negatives above the threshold; column of the largest."""
    tile, depth, rows = view.tile("retrieval"), view.x.tiles.shape[2], view.x.rows
    blocks, splits, per_split = view.splits(tile, -(-view.y.rows // tile.columns))
    real = view.x.raw.new_empty((2, splits, rows), dtype=torch.float32)
    whole = torch.empty((2, splits, rows), dtype=torch.int32, device=real.device)
    launch(
        kernels.retrieval, blocks * splits, *view.operands(), threshold.to(torch.float32), real, whole,
        *view.rules(), depth, splits, per_split, **view.form(), **_sizes(tile),
    )  # fmt: skip
    best, split = real.max(1)
    # max() takes the first of equal splits, as the kernel takes the first of equal columns.
    hardest = whole[1].gather(0, split[:1])[0]
    return best.to(vector_dtype(best)), whole[0].sum(0), hardest.to(torch.int64)


def _nats(problem: Problem, t: Tensor) -> Tensor:
    s = t * LN2
    return s if problem.bias is None else s + problem.bias
