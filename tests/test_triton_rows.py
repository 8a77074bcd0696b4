"""Triton's arithmetic with one number per row, interpreted, against the torch operations that define it (row_oracle.py)."""

from __future__ import annotations

from typing import Any

import pytest
import row_oracle
import torch
from interpreter import Checked
from problems import PROBLEMS, Call
from torch import Tensor

from fastnce import contrastive_stats
from fastnce.backends._gpu import statistics
from fastnce.backends._gpu.host import View
from fastnce.backends.triton import kernels_rows, passes
from fastnce.pairs import Pairs
from fastnce.problem import Problem, SideGrad
from train_ref.truth import contract

pytestmark = pytest.mark.usefixtures("interpreted_triton", "poisoned")
KINDS = ("in-batch", "clip:", "clip captions:", "simclr:", "supcon:", "not normalized:", "queue")
SOME = [p for p in PROBLEMS if p.why.startswith(KINDS)]


def problem_of(p: Call, rounded: bool = False) -> Problem:
    q, k, scale, bias = p.tensors(torch.float32)
    return Problem(q, k, scale, bias, Pairs(p.exclude_self, p.offset, **p.rules()), p.two_sided, p.normalize, rounded=rounded)


def agree(found: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=1e-13, equal_nan=True)


def close(view: View, sums: Any) -> Any:
    unshifted = sums.unshifted or (None, None)
    t = view.work.t
    return row_oracle.close(sums.sums, sums.n_pos, *unshifted, t, view.ends(), view.work.problem.bias)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("p", SOME, ids=str)
def test_statistics_and_coefficients(p: Call, rounded: bool) -> None:
    problem, generator = problem_of(p, rounded), torch.Generator().manual_seed(0)
    dtype = torch.float32 if rounded else torch.float64
    with Checked(arguments=True) as checked:
        work = passes.prepare(problem, unshifted=statistics.adds_in_memory(problem))
        sides = statistics.over_tiles(work)
        stats = passes.statistics(work, sides, None)
        precise = [close(view, side) for view, side in zip(work.views(), sides, strict=True)]
        for found, expected in zip(stats, precise, strict=True):
            assert all(vector.dtype == dtype for vector in found[:3])
            for a, b in zip(found[:6], expected[:6], strict=True):
                agree(a, b, contract.U if a.dtype == torch.float32 else 1e-13)
        grads = [SideGrad(*(torch.randn(3, len(side.pos), generator=generator, dtype=torch.float64) * 1e-3).to(dtype)) for side in stats]
        weights = passes.coefficients(work, grads, stats, False)
    assert not checked.races
    factors = [work.x.factor, work.y.factor]
    grads = [SideGrad(*(g.double() for g in grad)) for grad in grads]  # type: ignore[union-attr]
    if work.in_tile:  # the kernel reads the mean of several positives
        precise = [side._replace(pos=found.pos.double()) for side, found in zip(precise, stats, strict=True)]
    exact = row_oracle.coefficients(grads, precise, factors, problem.bias, work.aligned(), work.in_tile, problem.symmetric)
    lift, center, due, moment = exact.scalars
    # A power of two. The bound of normalised rows' factors, 2^-8, may be above the largest one.
    assert weights.lift.log2().frac() == 0 and (weights.lift <= lift if p.normalize else weights.lift == lift)
    for a, b in zip(weights.vectors, exact.vectors, strict=True):
        lifted = torch.tensor([1.0, lift, 1.0, lift, lift][: len(a)])[:, None]
        agree(a * lifted, b, 2 * contract.U)
    agree(weights.center, center, contract.U)
    scalars = weights.scalars
    agree(scalars[kernels_rows.DUE.value], due, 1e-11)
    of_pairs = scalars[kernels_rows.PAIR_MOMENT.value] - center * scalars[kernels_rows.PAIR_WEIGHT.value]
    torch.testing.assert_close(of_pairs, moment, rtol=1e-11, atol=1e-11)
    if exact.pair is not None:
        i, j = work.aligned()
        one = weights.pair[0][i]
        other = weights.pair[-1][j] if problem.symmetric or problem.two_sided else torch.zeros_like(one)
        # Of either end a float32 number is stored.
        assert ((one.double() + other - exact.pair.double()).abs() <= 4 * contract.U * torch.maximum(one.abs(), other.abs())).all()


@pytest.mark.parametrize(
    ("p", "threshold"), [(p, False) for p in SOME] + [(p, True) for p in SOME if not (p.symmetric or p.two_sided)], ids=str
)
def test_metrics_are_exact_where_logits_are(p: Call, threshold: bool) -> None:
    """Small whole numbers and a power of two as scale: no logit is rounded, many are equal, and every count is that of a dense sort. Of
    equal columns the first is the hardest. The bias is larger than any of them: nothing cancels."""
    sides = torch.randint(-2, 3, (2, max(p.m, p.n), p.d), generator=torch.Generator().manual_seed(0))
    q, k = sides[0, : p.m], None if p.symmetric else sides[1, : p.n]
    call = p.call() | {"normalize": False, "scale": 0.5, "bias": 128.0, "metrics": True}
    if threshold:  # every other one of a vector
        call["threshold"] = (torch.arange(2 * p.m) % 8 / 4 + 127)[::2]
    with Checked(arguments=True) as checked:
        found = contrastive_stats(q.float(), None if k is None else k.float(), backend="triton", **call)
    assert not checked.races
    dense = contrastive_stats(q.double(), None if k is None else k.double(), backend="reference", **call)
    for mine, exact in [(found, dense), (found.columns, dense.columns)][: 2 if p.two_sided else 1]:
        for name in ("rank", "ties", "hardest"):
            assert torch.equal(getattr(mine, name), getattr(exact, name)), name
        for name in ("hardest_logit", "pos_max"):
            agree(getattr(mine, name), getattr(exact, name), 4 * contract.U)


def test_ids_are_equal_where_they_were() -> None:
    """Ids of queries and keys as int32: far ones, negative ones, ids that only keys have, and more of them than are compared at a time."""
    big = 2**40
    q_id = torch.tensor([5, big + 5, -1, 7, 5, 0, big + 5, -(2**35)])
    k_id = torch.tensor([7, 5, big + 5, 99, -1, 0, big + 6, 5, -(2**35)])
    q, k = torch.randn(8, 4), torch.randn(9, 4)
    asked = Problem(q, k, torch.tensor(2.0), None, Pairs(q_label=q_id, k_label=k_id), False, True)
    for compared in (2, 256):
        with pytest.MonkeyPatch.context() as patch, Checked(arguments=True):
            patch.setattr(passes, "COMPARED", compared)
            work = passes.prepare(asked)
        row, column = (labels for labels in work.labels if labels is not None)
        same = row[:8, None] == column[None, :9]
        assert torch.equal(same, (q_id[:, None] == k_id) & (q_id >= 0)[:, None] & (k_id >= 0))
        assert not (row[8:, None] == column[None, :]).any() and not (column[9:, None] == row[None, :]).any()
