"""The backend "cpu": the C++ kernels of csrc/cpu, where that library is built: the steps of torch_tiles.py in float32, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnce.backends._tiled.gradients import Parts
from fastnce.backends._tiled.operands import Work
from fastnce.backends._tiled.sums import Sums
from fastnce.compiled import find
from fastnce.precision import compute_dtype
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted

NAME = "cpu"
PITCH = 16  # floats: csrc/cpu/problem.h


def _objection() -> str | None:
    return find.objection(NAME)


# Dynamo traces unsupported() and takes the answer as a constant. torch.compiler.assume_constant_result does the same, but importing it
# takes a second.
_objection._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(problem: Problem) -> list[str]:
    """Why not, with what to do about it; empty: the library runs it. Reads no values."""
    reasons, dtype, device = [], problem.q.dtype, problem.q.device.type
    # The library is looked for last: a problem that it does not serve never loads it.
    if device != "cpu":
        reasons.append(f"device {device} (needs a CPU; backend='torch' runs on any device)")
    if compute_dtype(dtype) != torch.float32:
        reasons.append(f"dtype {str(dtype)[6:]} (supports float32, float16, bfloat16; backend='torch' computes in float64)")
    if not reasons and (objection := _objection()):
        reasons.append(f"library {objection}; backend='torch' computes the same without it")
    return reasons


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    work = Work.of(problem, PITCH)
    sums = Sums.of(work)
    if problem.metrics:
        _operators().best_positives(*_operands(work), [side.pos_max for side in sums])
        for side in sums:
            side.compare()
    _operators().forward(*_operands(work), [vector for side in sums for vector in _vectors(side)])
    return [side.result() for side in sums]


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    work = Work.of(problem, PITCH)
    parts = Parts.of(work, grads, stats, wanted)
    if parts.in_tiles:
        weights = [v for side in parts.weights for v in (side.negative, side.base_neg, side.positive, side.base_pos, side.mean)]
        center = 0.0 if parts.moment is None else float(parts.moment.center)
        moments = None if parts.moment is None else work.x.new_zeros(len(work.x), dtype=torch.float64)
        dy = None if problem.symmetric else parts.dy
        _operators().backward(*_operands(work), weights, center, parts.dx, dy, moments)
        if parts.moment is not None and moments is not None:
            parts.moment.add(moments)
    return parts.result()


def _operators() -> Any:
    """The operators of the library. Where another process traced the graph, this call is the one that loads it."""
    if objection := find.objection(NAME):
        raise NotImplementedError(f"fastnce: backend 'cpu' was chosen where this was traced, and here its library is {objection}")
    return torch.ops.fastnce_cpu


def _operands(work: Work) -> list[object]:
    """The first arguments of all operators, in their order: rows, flags, and which pair is what."""
    problem, pairs = work.problem, work.problem.pairs
    flags = [int(flag) for flag in (problem.two_sided, work.unshifted, work.in_tile, pairs.exclude_self)]
    k_label, k_exclude = (None, None) if problem.symmetric else (pairs.k_label, pairs.k_exclude)
    ids = [None if v is None else _aligned(v.to(torch.int64).contiguous()) for v in (pairs.q_label, k_label, pairs.q_exclude, k_exclude)]
    mask = None if pairs.mask is None else pairs.mask.contiguous()
    bias = 0.0 if work.bias is None else float(work.bias)
    return [work.x, None if problem.symmetric else work.y, problem.q.shape[1], bias, flags, pairs.offset, *ids, mask]


def _aligned(ids: Tensor) -> Tensor:
    """Ids at an address that is a multiple of their size: a user's own may lie in the middle of a file that numpy has mapped."""
    return ids if ids.data_ptr() % ids.element_size() == 0 else ids.clone()


def _vectors(side: Sums) -> list[Tensor]:
    """The vectors of one side that the library writes, in the order of csrc/cpu/bind.cpp; an empty tensor where one is not collected."""
    logs, classes = side.logs, [0, 1] if side.in_tile else [0]
    sums = [None if matrix is None else matrix[of_class, side.own] for of_class in classes for matrix in (logs.total, logs.top)]
    metrics = [side.low, side.high, side.rank, side.ties, side.hardest_logit, side.hardest] if side.problem.metrics else [None] * 6
    collected = [*sums, *[None] * (4 - len(sums)), side.tile_pos, side.n_pos, *metrics]
    nothing = side.pos.new_empty(0)
    return [nothing if vector is None else vector for vector in collected]
