"""Forward: launches over the tiles, then O(N) arithmetic in float64."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce.backends._gpu.host import UnshiftedSums, View, Work
from fastnce.backends._gpu.rows import LOG2E, close, nats, on_device, row_kernels
from fastnce.precision import vector_dtype
from fastnce.problem import Problem, Side


def forward(problem: Problem, kernels: ModuleType) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    with on_device(problem.q):
        work = Work.of(problem, kernels)
        views = work.views()
        # forward_both adds to memory in any order, so it does not run where torch is asked for the same bits every time.
        both = (problem.symmetric or problem.two_sided) and not torch.are_deterministic_algorithms_enabled()
        unshifted = _both(work, views) if both else [None] * len(views)
        pairs = _aligned(work)
        return [_side(view, sums, pairs) for view, sums in zip(views, unshifted, strict=True)]


def _both(work: Work, views: list[View]) -> list[UnshiftedSums | None]:
    fields, new = 3 if work.in_tile else 1, work.x.raw.new_zeros
    sums = []
    for view in views:
        count = new(view.x.rows, dtype=torch.int32) if work.in_tile else None
        sums.append(UnshiftedSums(new((fields, view.x.rows), dtype=torch.float32), count))
    work.kernels.forward_both(views[0], views[0].walk("both", half=work.problem.symmetric), sums[0], sums[-1])
    return list(sums)


def _aligned(work: Work) -> Tensor | None:
    """t of the aligned pairs that are kept out of the tiles."""
    if work.in_tile:
        return None
    i, j = work.aligned()
    x, y = work.x, work.y
    t = x.raw.new_empty(i.stop - i.start, dtype=torch.float32)
    row_kernels(work.kernels, x.raw).aligned(x.raw, y.raw, x.r, y.r, work.problem.scale, i.start, j.start, t)
    return t


def _side(view: View, unshifted: UnshiftedSums | None, pairs: Tensor | None) -> Side:
    work, problem, kernels, rows = view.work, view.work.problem, view.work.kernels, view.x.rows
    output = not view.flip and kernels.keeps_output(problem)
    walk, new = view.walk("output" if output else "rows"), view.x.raw.new_empty
    sums = new((5 if work.in_tile else 2, walk.splits, rows), dtype=torch.float32)
    count = new((walk.splits, rows), dtype=torch.int32) if work.in_tile else None
    if output:
        out = new((walk.splits, view.x.padded, view.depth), dtype=torch.float32)
        moment = new((walk.splits, rows), dtype=torch.float32)
        # The kernel rounds weight * factor to float16. Weights are at most 1, so `largest` bounds the product. A power of two brings the
        # bound just below 2^14: two bits under float16's limit.
        largest = view.y.factor.nan_to_num(0.0).amax() if view.y.rows else view.x.factor.new_ones(())
        lift = torch.exp2((14 - largest.log2().ceil()).clamp(-100, 100))
        kernels.forward_output(view, walk, sums, out, moment, lift)
    else:
        kernels.forward_rows(view, walk, unshifted is None, sums, count)
    unshifted_sums, unshifted_count = unshifted or (None, None)
    side = close(sums, count, unshifted_sums, unshifted_count, pairs, view.ends(), problem.bias)
    if output:
        side = side._replace(own_pos=_mean_key(view, sums[0], side.own_neg, out, moment, lift))
    return _with_metrics(view, side) if problem.metrics else side


def _mean_key(view: View, tops: Tensor, log2: Tensor, out: Tensor, moment: Tensor, lift: Tensor) -> Tensor:
    """(rows, D + 1): sum_j p_ij k^_j and sum_j p_ij t_ij with p = 2^(t - log2), for a backward without tiles."""
    rows, columns = view.x.raw.shape
    found = out.new_empty((rows, columns + 1))
    # The sums of a split are over 2^(t - top): its share is their part of the row.
    shares = torch.exp2(tops.to(log2.dtype) - log2.masked_fill(log2 == -torch.inf, 0.0))
    factors = (shares / lift).to(out.dtype)
    torch.mul(out[0, :rows, :columns], factors[0, :, None], out=found[:, :columns])
    for split in range(1, len(out)):
        found[:, :columns].addcmul_(out[split, :rows, :columns], factors[split, :, None])
    found[:, columns] = (moment * shares).sum(0)
    return found


def _with_metrics(view: View, side: Side) -> Side:
    """With ranks and hardest negatives, which take passes of their own over the tiles."""
    problem = view.work.problem
    # Aligned pairs are looked for in the tiles too, because the same product gives equal rows the same bits.
    view = view._replace(work=view.work._replace(in_tile=True))
    best = torch.zeros_like(side.pos)
    if problem.threshold is None:
        # The best positive must be known before the negatives above it are counted. The kernel passes over a positive that is nan; the mean
        # of the positives tells.
        best = _retrieve(view, best, best)[0][1].masked_fill(side.pos.isnan(), torch.nan)
    (hardest_logit, best), (rank, ties), hardest = _retrieve(view, *problem.tied(best, LOG2E))
    pos_max = nats(best.masked_fill(side.pos.isnan(), torch.nan), problem.bias)
    logits = {"hardest_logit": nats(hardest_logit, problem.bias), "pos_max": pos_max}
    return side._replace(rank=rank, ties=ties, hardest=hardest, **logits)


def _retrieve(view: View, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(2, rows) largest t of negatives and of positives; (2, rows) negatives above `high`, and from `low` to it; column of the largest."""
    walk, rows = view.walk("retrieval"), view.x.rows
    largest = view.x.raw.new_empty((2, walk.splits, rows), dtype=torch.float32)
    counts = torch.empty((3, walk.splits, rows), dtype=torch.int32, device=largest.device)
    view.work.kernels.retrieval(view, walk, torch.stack([low, high]).to(torch.float32), largest, counts)
    best, split = largest.max(1)
    # Of equal splits max() takes the first, as the kernel takes the first of equal columns.
    hardest = counts[2].gather(0, split[:1])[0]
    return best.to(vector_dtype(best)), counts[:2].sum(1), hardest.to(torch.int64)
