"""The library's passes over single rows and vectors, with the memory that they fill."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastnce.backends._gpu.gradients import Found, Weights
from fastnce.backends._gpu.host import NONE, Operand, Raw, Sums, View, Work, aligned
from fastnce.backends._gpu.statistics import unshifted_sums
from fastnce.backends.cuda.launches import backward_rows, forward_both, forward_rows, products, retrieval, tile, weights_block
from fastnce.precision import LN2, LOG2E, vector_dtype
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted

__all__ = [
    "backward_rows", "coefficients", "finish", "forward_both", "forward_rows", "keeps_output", "prepare", "products", "statistics", "tile",
    "weights_block", "with_metrics",
]  # fmt: skip


def keeps_output(problem: Problem) -> bool:
    """Never: the library has no such kernel."""
    return False


def prepare(problem: Problem, unshifted: bool = False, queries_alone: bool = False) -> Work:
    """Operands and all else that the launches over the tiles read."""
    pairs, scale = problem.pairs, problem.scale
    operands, (_, _, norms) = Operand.empty([Raw.of(problem.q), *([] if problem.k is None else [Raw.of(problem.k)])])
    x, y = operands[0], operands[-1]
    for o in operands:
        torch.ops.fastnce_cuda.prepare(o.raw.first, o.tiles, o.factor, o.r, problem.normalize)
    bound = scale
    if not problem.normalize:
        longest = [torch.linalg.vector_norm(o.raw.first, dim=1, dtype=torch.float32).amax() if o.rows else bound for o in (x, y)]
        bound = scale * longest[0] * longest[1]
    in_tile = not pairs.one_positive_at_most(x.rows, problem.symmetric)
    t = None
    if not in_tile:
        i, j = aligned(pairs, x.rows, y.rows, False, False)
        t = x.factor.new_empty(i.stop - i.start)
        torch.ops.fastnce_cuda.aligned(x.raw.first, y.raw.first, x.r, y.r, scale, i.start, j.start, t)
    labels, excludes = ranked(pairs.q_label, pairs.k_label, x, y), ranked(pairs.q_exclude, pairs.k_exclude, x, y)
    memory, sums = unshifted_sums([o.rows for o in operands[: 1 + problem.two_sided]], in_tile, x.factor) if unshifted else (None, ())
    if memory is not None:
        memory.zero_()
    return Work(problem, sys.modules[__name__], x, y, labels, excludes, scale, bound, in_tile, t, unshifted=sums, norms=norms)


def ranked(q: Tensor | None, k: Tensor | None, x: Operand, y: Operand) -> tuple[Tensor | None, Tensor | None]:
    """Ids as int32 that are equal where the int64 ids are: half the registers in a tile. Padded; an id that matches nothing is negative."""
    if q is None:
        return None, None
    ids = q if k is None else torch.cat([q, k])
    ordered, order = ids.sort()
    rank = torch.empty_like(ids, dtype=torch.int32)
    # The rank of an id: 0 for the smallest, one more at every change. The host reads no value, and no size depends on one.
    step = torch.cat([ids.new_zeros(1, dtype=torch.int32), (ordered[1:] != ordered[:-1]).to(torch.int32)])[: len(ids)]
    rank[order] = step.cumsum(0, dtype=torch.int32)
    sides = []
    for own, other, operand, nothing in ((ids[: len(q)], rank[: len(q)], x, -2), (ids[-y.rows :], rank[-y.rows :], y, -1)):
        padded = torch.full((operand.padded,), nothing, dtype=torch.int32, device=ids.device)
        padded[: operand.rows] = other.masked_fill(own < 0, nothing)
        sides.append(padded)
    return sides[0], sides[1]


def statistics(work: Work, sides: list[Sums], output: None) -> list[Side]:
    """The statistics of every side."""
    return [_side(view, side) for view, side in zip(work.views(), sides, strict=True)]


def _side(view: View, side: Sums) -> Side:
    rows, new = view.x.rows, view.x.factor.new_empty
    lse_neg, lse_pos, pos, own_neg, own_pos = (new(rows, dtype=torch.float64) for _ in range(5))
    n_pos = new(rows, dtype=torch.int64)
    unshifted, starts = side.unshifted or (None, None), [end.start for end in view.ends()]
    given = (side.sums, side.n_pos, *unshifted, view.work.t, starts, view.work.problem.bias)
    torch.ops.fastnce_cuda.statistics(*given, lse_neg, lse_pos, pos, n_pos, own_neg, own_pos)
    return Side(lse_neg, lse_pos, pos, n_pos, own_neg, own_pos)


def with_metrics(work: Work, sides: list[Side]) -> list[Side]:
    """The statistics of every side, and its ranks and hardest negatives, which take passes of their own over the tiles."""
    # Aligned pairs are looked for in the tiles too, because the same product gives equal rows the same bits.
    views = work._replace(in_tile=True).views()
    return [_with_metrics(view, side) for view, side in zip(views, sides, strict=True)]


def _with_metrics(view: View, side: Side) -> Side:
    problem = view.work.problem
    best = torch.zeros_like(side.pos)
    if problem.threshold is None:
        # The best positive must be known before the negatives above it are counted. The kernel passes over a positive that is nan; the mean
        # of the positives tells.
        best = _retrieve(view, best, best)[0][1].masked_fill(side.pos.isnan(), torch.nan)
    (hardest_logit, best), (rank, ties), hardest = _retrieve(view, *problem.tied(best, LOG2E))
    pos_max = _nats(best.masked_fill(side.pos.isnan(), torch.nan), problem.bias)
    logits = {"hardest_logit": _nats(hardest_logit, problem.bias), "pos_max": pos_max}
    return side._replace(rank=rank, ties=ties, hardest=hardest, **logits)


def _nats(t: Tensor, bias: Tensor | None) -> Tensor:
    s = t * LN2
    return s if bias is None else s + bias


def _retrieve(view: View, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(2, rows) largest t of negatives and of positives; (2, rows) negatives above `high`, and from `low` to it; column of the largest."""
    walk, rows = view.walk("retrieval"), view.x.rows
    largest = view.x.tiles.new_empty((2, walk.splits, rows), dtype=torch.float32)
    counts = torch.empty((3, walk.splits, rows), dtype=torch.int32, device=largest.device)
    retrieval(view, walk, torch.stack([low, high]).to(torch.float32), largest, counts)
    best, split = largest.max(1)
    # Of equal splits max() takes the first, as the kernel takes the first of equal columns.
    hardest = counts[2].gather(0, split[:1])[0]
    return best.to(vector_dtype(best)), counts[:2].sum(1), hardest.to(torch.int64)


def coefficients(work: Work, grads: list[SideGrad], stats: list[Side], kept: bool) -> Weights:
    """The weights from dL/d of the statistics. The library's vectors are multiplied by lift already."""
    i, j = work.aligned()
    factors, new = [work.x.factor, work.y.factor], work.x.factor.new_empty
    fields, some = 5 if work.in_tile else 2, i.stop > i.start
    vectors = [new((fields, len(factor))) for factor, _ in zip(factors, stats, strict=False)]
    pair, scalars = new(i.stop - i.start) if some else None, new(4, dtype=torch.float64)
    torch.ops.fastnce_cuda.coefficients(
        [g.contiguous() for grad, side in zip(grads, stats, strict=True) for g in grad.of_all(side)],
        [t for side in stats for t in side[:6]], factors, work.problem.bias, stats[0].own_pos[i] if some else None, [i.start, j.start],
        work.in_tile, work.problem.symmetric, vectors, pair, scalars,
    )  # fmt: skip
    lift, center = (scalars[n].to(torch.float32) for n in range(2))
    return Weights(vectors, () if pair is None else (pair,), None, lift, center, scalars)


def finish(work: Work, weights: Weights, found: Found, wanted: Wanted) -> Gradients:
    """The gradients of the inputs, rounded once, to their dtypes."""
    problem = work.problem
    dq = _features(work, weights, View(work, work.x, work.y, False), found.dx) if wanted.q and found.dx is not None else None
    dk = _features(work, weights, View(work, work.y, work.x, True), found.dy) if wanted.k and found.dy is not None else None
    dscale = dbias = None
    if wanted.scale or wanted.bias:
        dscale, dbias = torch.empty_like(problem.scale), torch.empty_like(problem.scale)
        about = [] if found.about is None else [found.about]
        torch.ops.fastnce_cuda.scale_gradient(weights.scalars, about, found.divide, problem.scale, dscale, dbias)
    return Gradients(dq, dk, dscale if wanted.scale else None, dbias if wanted.bias else None)


def _features(work: Work, weights: Weights, view: View, dx: Tensor) -> Tensor:
    """dL/dx of the raw rows from the sums over the tiles (splits, padded, depth)."""
    x, y, problem = view.x.raw.first, view.y.raw.first, work.problem
    w, ends = weights.pair, view.ends() if weights.pair else []
    if ends == [slice(0, len(x))]:
        pair = w[0]
    else:
        pair = torch.zeros_like(view.x.r)
        for own in ends:
            pair[own] = w[0]
    # The kernel writes the dtype that it reads. It reads rows of y on these diagonals alone: without one, a single row stands for all keys
    # and need not be converted.
    dtype, diagonals = problem.gradient_dtypes[1 if view.flip else 0], view.diagonals()[1:]
    rows, read = x.to(dtype), diagonals != (NONE, NONE) or dtype == y.dtype
    partners = y.to(dtype) if read else rows.new_zeros(1, rows.shape[1]).expand(y.shape)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.ops.fastnce_cuda.finish(
        dx, rows, partners, view.x.r, view.y.r, pair, problem.scale, weights.lift, *diagonals, problem.normalize, out
    )
    return out
