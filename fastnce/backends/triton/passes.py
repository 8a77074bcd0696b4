"""Every launch of a Triton kernel over single rows, with the memory that it fills."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu.gradients import Found, Weights
from fastnce.backends._gpu.host import Operand, Raw, Sums, Work, aligned
from fastnce.backends._gpu.statistics import unshifted_sums
from fastnce.backends.triton import kernels_loss, kernels_retrieval, kernels_rows, kernels_statistics, launches
from fastnce.backends.triton import tiles as triton_tiles
from fastnce.backends.triton.launches import (
    backward_rows,
    forward_both,
    forward_output,
    forward_rows,
    products,
    slot,
    tile,
    weights_block,
)
from fastnce.backends.triton.limits import keeps_output
from fastnce.precision import vector_dtype
from fastnce.problem import Gradients, LossProblem, Problem, Side, SideGrad, Wanted

__all__ = [
    "backward_rows", "coefficients", "finish", "forward_both", "forward_output", "forward_rows", "keeps_output", "prepare", "products",
    "statistics", "tile", "weights_block", "with_metrics",
]  # fmt: skip

# Rows per program of the arithmetic with one number per row, and programs whose sums the last one adds up at a time: rows of several sums,
# and single ones.
VECTOR_ROWS, AT_A_TIME, SUMMED = 128, 32, 512
# Ids that a row is compared with at a time.
COMPARED = 128
SLOTS, STATE, SCALARS = 32, 8, 4


def rows(x: Tensor | None) -> Any:
    """x with numbers that lie side by side in each row."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def vector(x: Tensor | None) -> Any:
    return None if x is None else x.contiguous()


def side_by_side(problem: Problem) -> Problem:
    """With numbers side by side in rows and in vectors: a copy cannot be recorded."""
    pairs = problem.pairs
    ids = {name: vector(getattr(pairs, name)) for name in ("q_label", "k_label", "q_exclude", "k_exclude")}
    return problem._replace(q=rows(problem.q), k=rows(problem.k), threshold=vector(problem.threshold), pairs=pairs._replace(**ids))


class Layout(NamedTuple):
    """The sides of a problem, and where its positives are found."""

    raw: list[Raw]
    partners: Tensor | None
    in_tile: bool
    pairs: tuple[slice, slice]  # rows and columns of the aligned pairs that are kept out of the tiles

    @staticmethod
    def of(problem: Problem, loss: LossProblem | None, queries_alone: bool) -> Layout:
        keyed, partners = problem.k is not None and not queries_alone, None
        raw = [Raw.of(problem.q, None if loss is None else loss.second), *([Raw.of(problem.keys)] if keyed else [])]
        if loss is not None and loss.partners is not None:
            partners = Raw.of(loss.partners).first
        by_content = problem.pairs.positives_by_content() or (loss is not None and loss.by_place)
        one = problem.pairs.one_positive_at_most(raw[0].rows, problem.symmetric)
        in_tile = not queries_alone and partners is None and (by_content or not one)
        apart = in_tile or (queries_alone and partners is None)
        return Layout(raw, partners, in_tile, aligned(problem.pairs, raw[0].rows, raw[-1].rows, apart, partners is not None))

    @property
    def keyed(self) -> bool:
        return len(self.raw) > 1


def prepare(problem: Problem, unshifted: bool = False, queries_alone: bool = False, loss: LossProblem | None = None) -> Work:
    """Operands and all else that the launches over the tiles read. queries_alone: for a backward that visits no tiles."""
    given = loss or LossProblem(problem, "", False, scale=problem.scale)
    layout, pairs = Layout.of(problem, loss, queries_alone), problem.pairs
    raw, partners, in_tile, (i, j) = layout
    keyed = layout.keyed
    operands, whole = Operand.empty(raw)
    x, y = operands[0], operands[-1]
    new = x.factor.new_empty
    t = None if in_tile or (queries_alone and partners is None) else new(i.stop - i.start)
    partner_r = None if partners is None else new(i.stop - i.start)
    labels = _ranks(whole[1], x.padded, keyed, (pairs.q_label is not None or given.by_place) and not queries_alone)
    excludes = _ranks(whole[1], x.padded, keyed, pairs.q_exclude is not None and not queries_alone)
    memory, sums = unshifted_sums([o.rows for o in operands[: 1 + problem.two_sided]], in_tile, x.factor) if unshifted else (None, ())
    slots = new(SLOTS)
    state = (new if problem.normalize else x.factor.new_zeros)(STATE, dtype=torch.int32)
    (first, second), (height, width) = raw[0], triton_tiles.ROWS
    parts, depth = x.tiles.shape[1:]
    programs, zeros = len(whole[1]) // height, 0 if memory is None else len(memory)
    launches.launch(
        kernels_rows.prepare, programs, first, second, raw[1].first if keyed else None, partners,
        given.scale, problem.bias if loss else None, given.value, int(given.inverse), *whole, partner_r, t, memory, state, slots,
        *_ids(labels, pairs.q_label, pairs.k_label), *_ids(excludes, pairs.q_exclude, pairs.k_exclude),
        x.rows, raw[0].in_first, max(1, first.shape[0]), y.rows if keyed else 0, x.padded, *_strides(first), _stride(second),
        _stride(raw[1].first if keyed else None), _stride(partners), raw[0].columns, i.start, j.start, i.stop - i.start,
        *_counts(pairs.q_label, pairs.k_label, first.shape[0]), int(given.by_place), *_counts(pairs.q_exclude, pairs.k_exclude, 1), zeros,
        -(-zeros // max(programs, 1)), depth,
        NORMALIZE=problem.normalize, PARTS=parts, BR=height, BD=min(width, depth & -depth), BC=COMPARED,
    )  # fmt: skip
    scale, bound = (slots[place.value] for place in (kernels_rows.SCALE, kernels_rows.BOUND))
    return Work(
        problem,
        sys.modules[__name__],
        x,
        y,
        labels[0],
        excludes[0],
        scale,
        bound,
        in_tile,
        t,
        partners,
        partner_r,
        sums,
        whole[2],
        slots,
        state,
    )


Ranks = tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]


def _ranks(like: Tensor, padded: int, keyed: bool, asked: bool) -> Ranks:
    """Memory for the ids of (rows, columns), and the same as prepare takes it: of queries and keys, or of both in one and of columns."""
    if not asked:
        return (None, None), (None, None)
    rank = torch.empty_like(like, dtype=torch.int32)
    if keyed:
        return (rank[:padded], rank[padded:]), (rank, None)
    of_columns = torch.empty_like(rank)
    return (rank, of_columns), (rank, of_columns)


def _ids(ranks: Ranks, q: Tensor | None, k: Tensor | None) -> tuple[Tensor | None, ...]:
    if ranks[1][0] is None:
        return None, None, None, None
    return *(None if t is None else t.contiguous() for t in (q, k)), *ranks[1]


def _counts(q: Tensor | None, k: Tensor | None, by_place: int) -> tuple[int, int]:
    """How many ids there are on either side: rows beyond have those of the first ones again."""
    return by_place if q is None else len(q), 0 if k is None else len(k)


def _strides(x: Tensor) -> tuple[int, int]:
    """From view to view, from example to example."""
    return (x.stride(1), x.stride(0)) if x.dim() == 3 else (0, x.stride(0))


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def statistics(work: Work, sides: list[Sums], output: tuple[Sums, Tensor, Tensor] | None) -> list[Side]:
    """The statistics of every side; where the output is kept, own_pos is (rows, D + 1), see Side."""
    views, new = work.views(), work.x.factor.new_empty
    vectors = []
    for view in views:
        kinds = [_of_vectors(work)] * 3 + [torch.int64] + [vector_dtype(work.x.factor)] * 2
        vectors.append([new(view.x.rows, dtype=kind) for kind in kinds])
    programs = [programs_of(view.x.rows) for view in views]
    given = [*sums_of(sides[0]), *(sums_of(sides[1]) if len(sides) == 2 else [None] * 4)]
    ends = ends_of(work)
    launches.launch(
        kernels_statistics.statistics, sum(programs), *given, work.t, work.problem.bias, *vectors[0],
        *(vectors[1] if len(views) == 2 else [None] * 6), work.x.rows, work.y.rows, sides[0].splits, sides[-1].splits, *ends, programs[0],
        IN_TILE=work.in_tile, BR=VECTOR_ROWS,
    )  # fmt: skip
    found = [Side(*side) for side in vectors]
    return found if output is None else [found[0]._replace(own_pos=mean_key(work, output, found[0].own_neg))]


def _of_vectors(work: Work) -> torch.dtype:
    return torch.float32 if work.problem.rounded else vector_dtype(work.x.factor)


def with_metrics(work: Work, sides: list[Side]) -> list[Side]:
    """The statistics of every side, and its ranks, hardest negatives and best positives."""
    # Aligned pairs are looked for in the tiles too, because the same product gives equal rows the same bits.
    views, new, problem = work._replace(in_tile=True).views(), work.x.factor.new_empty, work.problem
    walks, ranks, vectors = [view.walk("retrieval") for view in views], [], []
    for view, walk, side in zip(views, walks, sides, strict=True):
        by_split = (walk.splits, view.x.rows)
        ranks.append(launches.Ranks(side.pos, new(by_split), new(by_split), new((3, *by_split), dtype=torch.int32)))
        vectors.append([new(view.x.rows, dtype=kind) for kind in [torch.int64] * 3 + [_of_vectors(work)] * 2])
    if problem.threshold is None:
        launches.retrieval(views, walks, ranks, count=False)
    launches.retrieval(views, walks, ranks, count=True)
    programs, two = [programs_of(view.x.rows) for view in views], len(views) == 2
    launches.launch(
        kernels_retrieval.metrics, sum(programs), *ranks[0], *(ranks[1] if two else [None] * 4), problem.bias, *vectors[0],
        *(vectors[1] if two else [None] * 5), work.x.rows, work.y.rows, walks[0].splits, walks[-1].splits, programs[0],
        COLUMNS=two, BR=VECTOR_ROWS,
    )  # fmt: skip
    of_metrics = ("rank", "ties", "hardest", "hardest_logit", "pos_max")
    return [side._replace(**dict(zip(of_metrics, found, strict=True))) for side, found in zip(sides, vectors, strict=True)]


def mean_key(work: Work, output: tuple[Sums, Tensor, Tensor], own_neg: Tensor) -> Tensor:
    """(rows, D + 1): sum_j p_ij k^_j and sum_j p_ij t_ij with p = 2^(t - own_neg), for a backward without tiles."""
    sums, out, moment = output
    assert sums.sums is not None
    rows, columns = work.x.rows, work.x.raw.columns
    mean, height = out.new_empty((rows, columns + 1)), triton_tiles.ROWS[0]
    launches.launch(
        kernels_statistics.mean_key, -(-rows // height), out, sums.sums, moment, own_neg, work.slots, mean,
        rows, work.x.padded, sums.splits, columns, DP=out.shape[2], BR=height,
    )  # fmt: skip
    return mean


def sums_of(side: Sums) -> list[Tensor | None]:
    unshifted = side.unshifted or (None, None)
    return [side.sums, side.n_pos, *unshifted]


def ends_of(work: Work) -> tuple[int, int, int, int]:
    """How many aligned pairs are kept out of the tiles, their first row, the first of their other ends (where k is q), and column."""
    i, j = work.aligned()
    return i.stop - i.start, i.start, j.start if work.problem.symmetric else i.start, j.start


def programs_of(rows: int) -> int:
    return -(-rows // VECTOR_ROWS)


def coefficients(work: Work, grads: list[SideGrad], stats: list[Side], kept: bool) -> Weights:
    """The weights from dL/d of the statistics."""
    weights, partial, programs = empty_weights(work, kept)
    two = len(stats) == 2
    given = [[*_contiguous(grad), *side[:5], None if kept else side.own_pos] for grad, side in zip(grads, stats, strict=True)]
    launches.launch(
        kernels_loss.coefficients, sum(programs), *given[0], *(given[1] if two else [None] * 9), work.problem.bias,
        work.x.factor, work.y.factor, weights.vectors[0], weights.vectors[-1], *two_of(weights.pair), weights.kept, work.slots,
        weights.scalars, partial, work.state, work.x.rows, work.y.rows, work.x.padded, work.y.padded, *programs,
        IN_TILE=work.in_tile, KEPT=kept, COLUMNS=two, SYMMETRIC=work.problem.symmetric, NORMALIZE=work.problem.normalize,
        BR=VECTOR_ROWS, BP=AT_A_TIME,
    )  # fmt: skip
    return weights


def _contiguous(grad: SideGrad) -> list[Tensor | None]:
    return [None if g is None else g.contiguous() for g in grad]


def two_of(pair: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    return (*pair, None, None)[:2]  # type: ignore[return-value]


def empty_weights(work: Work, kept: bool) -> tuple[Weights, Tensor, tuple[int, int]]:
    """Memory for the weights, for the sums of the programs that make them, and how many programs the rows and the columns have.

    Vectors are padded: the programs write zeros there."""
    two = work.problem.two_sided
    sides, new = [work.x, work.y][: 1 + two], work.x.factor.new_empty
    fields = 5 if work.in_tile else 2
    vectors = [new((1 if kept else fields, side.padded)) for side in sides]
    paired = work.t is not None or (not work.in_tile and work.aligned()[0].stop > work.aligned()[0].start)
    pair = tuple(new(side.padded) for side in sides) if paired else ()
    # Without columns the programs of the keys look at factors that are not bounded.
    of_keys = two or (work.keyed and not work.problem.normalize and not kept)
    programs = (programs_of(work.x.padded), programs_of(work.y.padded) if of_keys else 0)
    partial = new((sum(programs), kernels_loss.SUMS.value), dtype=torch.float64)
    lift, center = slot(work, kernels_rows.LIFT), slot(work, kernels_rows.CENTER)
    kept_factor = new(work.x.padded) if kept else None
    return Weights(vectors, pair, kept_factor, lift, center, new(SCALARS, dtype=torch.float64)), partial, programs


def finish(work: Work, weights: Weights, found: Found, wanted: Wanted) -> Gradients:
    """The gradients of the inputs, rounded once, to their dtypes."""
    problem, q = work.problem, work.problem.q
    dq_type, dk_type = problem.gradient_dtypes
    out = Outputs(
        q.new_empty(q.shape, dtype=dq_type) if wanted.q else None,
        None,
        problem.k.new_empty(problem.k.shape, dtype=dk_type) if wanted.k and problem.k is not None else None,
        None,
        torch.empty_like(problem.scale) if wanted.scale else None,
        torch.empty_like(problem.scale) if wanted.bias else None,
    )
    write(work, weights, found, out)
    return Gradients(out.first, out.keys, out.scale, out.bias)


class Outputs(NamedTuple):
    """Memory for gradients; None where not asked for. They are contiguous."""

    first: Tensor | None
    second: Tensor | None
    keys: Tensor | None
    partners: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


def write(work: Work, weights: Weights, found: Found, out: Outputs, upstream: Tensor | None = None, inverse: bool = False) -> None:
    """Fill the outputs, times upstream and the factor of a loss where there is one. inverse: the scale was given as 1 over it."""
    x, y, scalars = work.x, work.y, out.scale is not None or out.bias is not None
    (first, second), k = x.raw, y.raw.first if work.keyed else None
    height, width = triton_tiles.FINISH[not work.problem.normalize or (work.keyed and not weights.pair)]
    i, j = work.aligned()
    programs = (
        -(-x.rows // height) if scalars or out.first is not None or out.second is not None else 0,
        -(-y.rows // height) if out.keys is not None else 0,
        0 if out.partners is None else -(-len(out.partners) // height),
    )
    partial = x.factor.new_empty(sum(programs), dtype=torch.float64) if scalars else None
    dx, dy, about = found.dx, found.dy, found.about
    launches.launch(
        kernels_rows.finish, sum(programs), dx, dy, first, second, k, work.partners, work.norms, work.partner_r, *two_of(weights.pair),
        weights.kept, work.slots, weights.scalars, upstream, about, partial, work.state, *out,
        x.rows, x.raw.in_first, max(1, first.shape[0]), y.rows, x.padded, i.stop - i.start, i.start, j.start, *_strides(first),
        _stride(second), _stride(k), _stride(work.partners), *_strides(first if out.first is None else out.first), x.raw.columns,
        *_layout(dx), *_layout(dy), *_about(about), found.divide, int(inverse), *programs[:2],
        NORMALIZE=work.problem.normalize, SYMMETRIC=work.problem.symmetric, BR=height, BD=width, BP=SUMMED,
    )  # fmt: skip


def _layout(dx: Tensor | None) -> tuple[int, int, int]:
    """From row to row, how many splits, from split to split."""
    return (0, 0, 0) if dx is None else (dx.stride(1), len(dx), dx.stride(0))


def _about(about: Tensor | None) -> tuple[int, int, int]:
    """How many parts, from part to part, from row to row."""
    return (0, 0, 0) if about is None else (len(about), about.stride(0), about.stride(1))
