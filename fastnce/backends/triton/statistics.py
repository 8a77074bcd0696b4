"""The statistics of a problem and their gradients, from tapes: see tape.py. The order of the launches is that of _gpu/statistics.py and
_gpu/gradients.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnce.backends._gpu import gradients, limits, statistics
from fastnce.backends._gpu.host import on_device
from fastnce.backends.triton import passes, tape
from fastnce.problem import FIELDS, Gradients, Problem, Side, SideGrad, Wanted

_TAPES: tape.Recent[tape.Tape] = tape.Recent()


def forward(problem: Problem) -> list[Side]:
    problem = passes.side_by_side(problem)
    flat = _played(problem, (), (), lambda: [x for side in statistics.forward(problem, passes) for x in side])
    return [Side(*flat[start : start + FIELDS]) for start in range(0, len(flat), FIELDS)]  # type: ignore[arg-type]


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    problem = passes.side_by_side(problem)
    grads = [SideGrad(*(None if g is None else g.contiguous() for g in side)) for side in grads]
    given = [x for side in (*grads, *stats) for x in side]
    return Gradients(*_played(problem, given, wanted, lambda: gradients.backward(problem, passes, grads, stats, wanted)))


def _played(
    problem: Problem, more: Sequence[Tensor | None], wanted: Sequence[bool], function: Callable[[], Sequence[Tensor | None]]
) -> Sequence[Tensor | None]:
    """What a function of a problem, and of more tensors, returns."""
    p, pairs = problem, problem.pairs
    if tape.unrecorded() or p.q.numel() == 0 or p.keys.numel() == 0:
        return function()
    ids = pairs.q_label, pairs.k_label, pairs.q_exclude, pairs.k_exclude
    given = p.q, p.k, p.scale, p.bias, *ids, pairs.mask, p.threshold, *more
    key = (
        *wanted, len(more), p.q.device, limits.parts(p.q.dtype), torch.are_deterministic_algorithms_enabled(), *p.gradient_dtypes,
        pairs.exclude_self, pairs.offset, p.two_sided, p.normalize, p.metrics, p.frozen, p.rounded, tape.form(given),
    )  # fmt: skip
    with on_device(p.q):
        recorded = _TAPES.of(key, lambda: tape.ready([tape.record(lambda: (function(), []), given)])[0])
        return recorded.play(given)[0]
