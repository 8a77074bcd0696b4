"""A loss and its gradient in a handful of launches:

    prepare         operands of all sides, logits of the aligned pairs, ids, zeroed sums
    forward_both    sums over the tiles; forward_rows where logits may be too large for it, or the loss has rows alone
    close           value, coefficients of the gradient, largest weight
    backward_rows   sums over the tiles for the gradient; one launch for each side that has weights of its own
    finish          gradients of all sides, times the upstream gradient

Keys without gradient let the forward pass keep the mean key, and the fourth launch goes. Of a loss by row, close is launched once more in
backward: it then weights every row with the upstream gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce.backends._gpu import limits
from fastnce.backends._gpu.gradients import Weights, from_output, over_tiles
from fastnce.backends._gpu.host import Operand, Sums, Work, on_device
from fastnce.backends._gpu.statistics import adds_in_memory, keep_output
from fastnce.backends._gpu.statistics import over_tiles as sums_over_tiles
from fastnce.backends.triton import kernels, kernels_loss, kernels_rows, launches, passes, tape
from fastnce.backends.triton.limits import keeps_output
from fastnce.problem import LossProblem, LossWanted, Wanted

# Operands are kept for backward up to this many bytes. Larger ones are made again, which takes one launch more.
KEPT_BYTES = 32 << 20
FORMULAS = {"out": kernels_loss.OUT, "in": kernels_loss.IN, "decoupled": kernels_loss.DECOUPLED}


class Kept(NamedTuple):
    """What backward needs of forward; empty where there is nothing of the kind. No two share memory.

    Ids of queries and keys, which lie side by side, are one tensor; column_* are those of the columns where the keys are the queries.
    """

    operand: Tensor
    factor: Tensor
    norms: Tensor
    partner_r: Tensor
    label: Tensor
    column_label: Tensor
    exclude: Tensor
    column_exclude: Tensor
    row_vectors: Tensor
    column_vectors: Tensor
    row_pair: Tensor
    column_pair: Tensor
    factor_of_mean: Tensor
    mean: Tensor
    values: Tensor
    column_values: Tensor
    known: Tensor
    column_known: Tensor
    slots: Tensor
    scalars: Tensor
    state: Tensor


def loss(ask: LossProblem) -> tuple[Tensor, Tensor]:
    """The loss, float32, and the memory that its gradient needs, (bytes / parts, parts): so many parts has an operand."""
    ask, parts = _contiguous(ask), limits.parts(ask.problem.q.dtype)
    with on_device(ask.problem.q):
        if tape.unrecorded():
            number, kept = _loss(ask)
            memory = _together(kept)
            return _of_rows(ask, kept) if ask.by_row else number, memory.view(-1, parts)
        step = _step(ask, parts)
        (found,), memory = step.loss.play(ask.tensors, ask.value)
        if ask.by_row:
            found = _of_rows(ask, Kept(*step.loss.of(memory)))
        assert found is not None
        return found, memory.view(-1, parts)


def fake_loss(ask: LossProblem) -> tuple[Tensor, Tensor]:
    """The same for tensors without values: nothing is launched."""
    with launches.handed_to(lambda _: None):
        found, kept = _loss(_contiguous(ask))
    parts = limits.parts(ask.problem.q.dtype)
    memory = ask.problem.q.new_empty((tape.packed(kept)[1] // parts, parts), dtype=torch.uint8)
    return _of_rows(ask, kept) if ask.by_row else found, memory


def _of_rows(ask: LossProblem, kept: Kept) -> Tensor:
    """The loss of every row."""
    values = kept.values + kept.column_values if ask.problem.two_sided else kept.values
    return (values if ask.weight is None else values * ask.weight).to(torch.float32)


def gradients(ask: LossProblem, kept: Tensor, upstream: Tensor, wanted: LossWanted) -> list[Tensor | None]:
    """The gradients that LossWanted names, in its order; None where not asked for."""
    parts = kept.shape[1]
    if parts != limits.parts(ask.problem.q.dtype):
        with limits.in_parts(parts):
            return gradients(ask, kept, upstream, wanted)
    ask, memory = _contiguous(ask), kept.view(-1)
    with on_device(ask.problem.q):
        factor = upstream.contiguous()
        if ask.by_row and ask.weight is not None:
            factor = ask.weight.to(torch.float64) * upstream  # in float64, as the product enters the sums
        if tape.unrecorded():
            held = _taken_apart(ask, memory)
            found = _gradients(ask, held, factor, wanted)
        else:
            step = _step(ask, parts)
            if memory.numel() != step.loss.sizes[0]:
                raise RuntimeError("fastnce: what the loss has kept is of another problem")
            found, _ = _tape_of_gradients(ask, step, memory, factor, wanted).play((*ask.tensors, memory, factor))
            if not wanted.weight:
                return [*found, None]
            held = Kept(*step.loss.of(memory))
        return [*found, _of_weights(ask, held, upstream) if wanted.weight else None]


def _together(kept: Kept) -> Tensor:
    """What a tape keeps, in one memory, of a loss that no tape has played."""
    places, size = tape.packed(kept)
    memory = kept.operand.new_empty(size, dtype=torch.uint8)
    for x, place in zip(kept, places, strict=True):
        tape.Like.of(x).at(memory, place).copy_(x)
    return memory


def _taken_apart(ask: LossProblem, memory: Tensor) -> Kept:
    """The reverse of _together."""
    with launches.handed_to(lambda _: None):
        _, like = _loss(ask)
    places, _ = tape.packed(like)
    return Kept(*(tape.Like.of(x).at(memory, place).clone() for x, place in zip(like, places, strict=True)))


def _contiguous(ask: LossProblem) -> LossProblem:
    """With numbers side by side in rows and in vectors. A copy cannot be recorded."""
    if all(x is None or x.is_contiguous() for x in ask.tensors):
        return ask

    more = {"second": passes.rows(ask.second), "partners": passes.rows(ask.partners), "weight": passes.vector(ask.weight)}
    return ask._replace(problem=passes.side_by_side(ask.problem), **more)


# Tapes ----------------------------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The tapes of a loss and, by which of them are asked for, of its gradients."""

    loss: tape.Tape
    gradients: dict[tuple[Any, ...], tape.Tape]


_STEPS: tape.Recent[Step] = tape.Recent()


def _step(ask: LossProblem, parts: int) -> Step:
    p = ask.problem
    key = (
        p.q.device, parts, torch.are_deterministic_algorithms_enabled(), p.pairs.exclude_self, p.pairs.offset,
        p.two_sided, p.normalize, p.frozen, ask.by_place, ask.by_row, ask.mean, ask.inverse, ask.formula,
        ask.value <= kernels.UNSHIFTED.value, tape.form(ask.tensors),
    )  # fmt: skip
    return _STEPS.of(key, lambda: _recorded(ask))


def _recorded(ask: LossProblem) -> Step:
    """The tapes of a loss and of all gradients that its tensors have, so that their kernels are compiled beside each other."""

    def function() -> tuple[list[Tensor], Kept]:
        found, kept = _loss(ask._replace(value=tape.Number(ask.value)))
        return [found], kept

    of_loss = tape.record(function, ask.tensors)
    wanted = LossWanted(*(x is not None and x.requires_grad for x in ask.tensors[: len(LossWanted._fields)]))
    if not any(wanted):
        return Step(tape.ready([of_loss])[0], {})
    new = ask.problem.q.new_empty
    memory = new(of_loss.tape.sizes[0], dtype=torch.uint8)
    rows = Kept(*of_loss.tape.of(memory)).values.shape
    upstream = new(rows if ask.by_row else (), dtype=torch.float64 if ask.by_row and ask.weight is not None else torch.float32)
    of_gradients = _record_gradients(ask, of_loss.tape, memory, upstream, wanted)
    loss, gradients = tape.ready([of_loss, of_gradients])
    return Step(loss, {_form_of_gradients(memory, upstream, wanted): gradients})


def _form_of_gradients(memory: Tensor, upstream: Tensor, wanted: LossWanted) -> tuple[Any, ...]:
    return *wanted, tape.form((memory, upstream))


def _tape_of_gradients(ask: LossProblem, step: Step, memory: Tensor, upstream: Tensor, wanted: LossWanted) -> tape.Tape:
    key = _form_of_gradients(memory, upstream, wanted)
    found = step.gradients.get(key)
    if found is None:
        (found,) = tape.ready([_record_gradients(ask, step.loss, memory, upstream, wanted)])
        step.gradients[key] = found
    return found


def _record_gradients(ask: LossProblem, loss: tape.Tape, memory: Tensor, upstream: Tensor, wanted: LossWanted) -> tape.Recording:
    def function() -> tuple[list[Tensor | None], list[Tensor]]:
        return _gradients(ask, Kept(*loss.of(memory)), upstream, wanted), []

    return tape.record(function, (*ask.tensors, memory, upstream))


# What is recorded -----------------------------------------------------------------------------------------------------------------------


def _loss(ask: LossProblem) -> tuple[Tensor, Kept]:
    """The loss as one number, unless it is one of each row, and what its gradient needs, the values of rows too."""
    problem, two = ask.problem, ask.problem.two_sided
    # A scale that the host knows tells which of the two kernels is right. For one that only the device knows both are launched, and the
    # loop of one of them is empty.
    small = ask.scale is not None or not problem.normalize or ask.value <= kernels.UNSHIFTED.value
    both = adds_in_memory(problem) and small
    rows = not both or ask.scale is not None or not problem.normalize
    work = passes.prepare(problem, unshifted=both, loss=ask)
    kept_output = keeps_output(problem) and not work.in_tile
    if kept_output:
        output = keep_output(work)
        sides = [output[0]]
    else:
        sides = sums_over_tiles(work, rows)
    new, ends = work.x.factor.new_empty, [work.x, work.y] if two else [work.x]
    weighted = ask.weight is not None or ask.by_row
    values = [new(o.rows if weighted else 0, dtype=torch.float64) for o in ends]
    known = [new((4, o.rows if ask.by_row or kept_output else 0), dtype=torch.float64) for o in ends]
    weights, found = _close(ask, work, sides, None if ask.by_row else ask.weight, values, known, kept_output)
    mean = passes.mean_key(work, output, known[0][0]) if kept_output else None
    if ask.by_row:
        return found, _kept(work, weights._replace(vectors=[], pair=(), kept=None), mean, values, known)
    return found, _kept(work, weights, mean, values, [])


def _close(
    ask: LossProblem, work: Work, sides: list[Sums], weight: Tensor | None, values: list[Tensor], known: list[Tensor], kept_output: bool
) -> tuple[Weights, Tensor]:
    """The weights of the gradient and the loss as one number; values and known are filled. Without `sides` known is read instead."""
    weights, partial, programs = passes.empty_weights(work, kept_output)
    two, found = ask.problem.two_sided, work.x.factor.new_empty((), dtype=torch.float32)
    half = 0.5 if two else 1.0
    of_columns = half * (work.x.rows / work.y.rows if ask.mean else 1.0)
    sums = [t for side in sides for t in passes.sums_of(side)]
    launches.launch(
        kernels_loss.close, sum(programs), *sums, *[None] * (8 - len(sums)), work.t, weight,
        work.x.factor, work.y.factor, found, *_two(values), weights.vectors[0], weights.vectors[-1], *passes.two_of(weights.pair),
        weights.kept, *_two(known), work.slots, weights.scalars, partial, work.state, work.x.rows, work.y.rows, work.x.padded,
        work.y.padded, *([sides[0].splits, sides[-1].splits] if sides else [0, 0]), *passes.ends_of(work), half, of_columns,
        1.0 / work.x.rows if ask.mean else 1.0, *programs,
        WEIGHTED_MEAN=weight is not None and ask.mean, IN_TILE=work.in_tile, FORMULA=FORMULAS[ask.formula].value, KEPT=kept_output,
        COLUMNS=two, SYMMETRIC=ask.problem.symmetric, NORMALIZE=ask.problem.normalize, BR=passes.VECTOR_ROWS, BP=passes.AT_A_TIME,
    )  # fmt: skip
    return weights, found


def _two(tensors: list[Tensor]) -> list[Tensor | None]:
    """Of the rows and of the columns; None where there is nothing."""
    return [None if t.numel() == 0 else t for t in tensors] + [None] * (2 - len(tensors))


def _kept(work: Work, weights: Weights, mean: Tensor | None, values: list[Tensor], known: list[Tensor]) -> Kept:
    assert work.norms is not None and work.slots is not None and work.state is not None
    x, y = work.x, work.y
    operand, factor = (_whole(a, b, work.keyed) for a, b in ((x.tiles, y.tiles), (x.factor, y.factor)))
    if mean is not None or operand.numel() * operand.element_size() > KEPT_BYTES:
        operand = operand.new_empty(0)

    def some(t: Tensor | None) -> Tensor:
        return work.x.factor.new_empty(0) if t is None else t

    vectors, pair, two = _two(weights.vectors if mean is None else []), passes.two_of(weights.pair), work.problem.two_sided
    of_rows, of_columns = _two(known)
    label, exclude = (_ids(ids, work.keyed) for ids in (work.labels, work.excludes))
    return Kept(
        operand, factor, work.norms, some(work.partner_r), some(label[0]), some(label[1]), some(exclude[0]), some(exclude[1]),
        some(vectors[0]), some(vectors[1]), some(pair[0]), some(pair[1]), some(weights.kept), some(mean), values[0],
        some(values[1] if two else None), some(of_rows), some(of_columns), work.slots, weights.scalars, work.state,
    )  # fmt: skip


def _ids(ids: tuple[Tensor | None, Tensor | None], keyed: bool) -> tuple[Tensor | None, Tensor | None]:
    """Ids of rows and columns, in the form of Kept."""
    row, column = ids
    return (_whole(row, column, True), None) if keyed and row is not None and column is not None else ids


def _whole(first: Tensor, second: Tensor, keyed: bool) -> Tensor:
    """Two sides that follow each other in memory, as one tensor."""
    if not keyed:
        return first
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    return first.as_strided(shape, first.stride())


def _gradients(ask: LossProblem, kept: Kept, upstream: Tensor, wanted: LossWanted) -> list[Tensor | None]:
    """The gradients of all but the weights."""
    problem = ask.problem
    work, weights = _again(ask, kept, upstream)
    if kept.mean.numel():
        found = from_output(kept.mean)
    else:
        over = Wanted(wanted.q or wanted.second, wanted.k, wanted.scale, False)
        found = over_tiles(work, weights, over)
    q, type_of_q, type_of_k = problem.q, *problem.gradient_dtypes
    out = passes.Outputs(
        q.new_empty(q.shape, dtype=type_of_q) if wanted.q else None,
        torch.empty_like(ask.second, memory_format=torch.contiguous_format) if wanted.second and ask.second is not None else None,
        problem.k.new_empty(problem.k.shape, dtype=type_of_k) if wanted.k and problem.k is not None else None,
        ask.partners.new_empty(ask.partners.shape) if wanted.partners and ask.partners is not None else None,
        torch.empty_like(ask.scale) if wanted.scale and ask.scale is not None else None,
        torch.empty_like(problem.bias) if wanted.bias and problem.bias is not None else None,
    )
    passes.write(work, weights, found, out, None if ask.by_row else upstream, ask.inverse)
    return [*out]


def _again(ask: LossProblem, kept: Kept, upstream: Tensor) -> tuple[Work, Weights]:
    """The operands and weights of forward. Operands that were not kept are made once more. Weights of a loss by row are made here."""
    problem, without_tiles = ask.problem, bool(kept.mean.numel())
    layout = passes.Layout.of(problem, ask, queries_alone=without_tiles)
    operand = kept.operand
    if not without_tiles and not operand.numel():
        again = passes.prepare(problem, loss=ask)
        operand = _whole(again.x.tiles, again.y.tiles, again.keyed)
    sides = Operand.over(layout.raw, operand, kept.factor, kept.norms)

    def some(t: Tensor) -> Tensor | None:
        return t if t.numel() else None

    def ids(whole: Tensor, of_columns: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows = sides[0].padded
        return (whole[:rows], whole[rows:]) if layout.keyed and whole.numel() else (some(whole), some(of_columns))

    scale, bound, lift, center = (
        kept.slots[place.value] for place in (kernels_rows.SCALE, kernels_rows.BOUND, kernels_rows.LIFT, kernels_rows.CENTER)
    )
    labels, excludes = ids(kept.label, kept.column_label), ids(kept.exclude, kept.column_exclude)
    work = Work(
        problem, passes, sides[0], sides[-1], labels, excludes, scale, bound, layout.in_tile,
        partners=layout.partners, partner_r=some(kept.partner_r), norms=kept.norms, slots=kept.slots, state=kept.state,
    )  # fmt: skip
    if ask.by_row:
        known = [kept.known, kept.column_known][: 1 + problem.two_sided]
        return work, _close(ask, work, [], upstream, [], known, without_tiles)[0]
    vectors = [kept.row_vectors, *([kept.column_vectors] if problem.two_sided else [])]
    pair = tuple(t for t in (kept.row_pair, kept.column_pair) if t.numel())
    return work, Weights(vectors, pair, some(kept.factor_of_mean), lift, center, kept.scalars)


def _of_weights(ask: LossProblem, kept: Kept, upstream: Tensor) -> Tensor:
    """dL/dweight_i: the value of row i, less the loss where that is a mean, times the factor of the loss."""
    assert ask.weight is not None
    values = kept.values + kept.column_values if ask.problem.two_sided else kept.values
    over = kept.scalars[kernels_rows.OVER.value]
    if ask.mean:
        values = values - (values * ask.weight).sum() * over
    return (values * (over * upstream)).to(ask.weight.dtype)
