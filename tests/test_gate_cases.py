"""The calls of the operator gate and their limits: sizes reach behind tiles, and no verdict hangs on the seed."""

from __future__ import annotations

import math

import pytest
import torch
from named import ON_CPU

from fastnce.backends.triton import tiles
from fastnce.tiles import CPU_TILE
from train_ref import validate
from train_ref.gates import cases, limits
from train_ref.gates.operator import operator
from train_ref.gates.subject import Subject, noise_control
from train_ref.implementations import fused_losses
from train_ref.truth import LOSSES

FLOAT32 = torch.float32


def test_sizes_reach_behind_tiles_and_paddings() -> None:
    """Of every loss; two views have two rows per pair, so never an odd number."""
    for loss in LOSSES:
        found = [case for case in cases.cases() if case.loss == loss]
        rows = {case.rows for case in found}
        assert {128, 130, 258} <= rows if LOSSES[loss].leaves == ("z0", "z1") else {128, 129, 257} <= rows
        assert {128, 129, 257, 520} <= {case.d for case in found}
        assert max(rows) > CPU_TILE
        interpreted = [case for case in validate.INTERPRETED.cases() if case.loss == loss]
        assert max(case.rows for case in interpreted) > max(tile.rows for tile in tiles.TILES.values())
        assert {128, 129, 257, 520} <= {case.d for case in interpreted} and 1e15 in {case.length for case in interpreted}
        assert {"random", "aligned", "solved", "identical", "orthogonal"} == {case.kind for case in interpreted}
        assert {case.option for case in interpreted} == {case.option for case in found}
    thinned = [[(c.kind, c.temperature) for c in validate.INTERPRETED.cases() if c.loss == loss] for loss in list(LOSSES)[:2]]
    assert thinned[0] != thinned[1]


@pytest.mark.parametrize("seed", range(100, 106))
@pytest.mark.parametrize("backend", ON_CPU)
def test_limits_do_not_hang_on_the_seed(backend: str, seed: int) -> None:
    """Where one row carries nearly all of a gradient, m of one order was small by luck."""
    drawn = [
        cases.Case("moco_loss", kind, temperature=t, seed=seed)
        for kind in ("random", "aligned", "solved")
        for t in cases.TEMPERATURES
        if kind != "random" or t < 0.1
    ]
    for who in (Subject(backend, fused_losses(backend)), noise_control()):
        verdict = operator(who, drawn)
        assert verdict.checks and verdict.status == "pass", verdict.failed


def test_limits_of_nearly_solved_batches_are_no_wider_than_dense_torch_needs() -> None:
    """A gradient of 4e-8, where the rounding of its terms would be 3e-5: one that is 100 times too large fails."""
    case = cases.Case("info_nce", "solved", temperature=0.02)
    found = limits.expected(case, "mean", FLOAT32)
    assert max(found.gradients) * max(found.gradient_sizes) < 1e-6
    for loss, kind, t in ((loss, kind, t) for loss in LOSSES for kind in ("random", "aligned", "solved") for t in (0.05, 0.1, 0.5)):
        found = limits.expected(cases.Case(loss, kind, temperature=t), "mean", FLOAT32)
        rows = [len(gradient) for gradient in found.exact.gradients]
        for limit, size, n in zip(found.gradients, found.gradient_sizes, rows, strict=True):
            assert limit * size <= 2e-5 * size + 1e-7 * math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_limit_of_a_small_derivative_by_scale_is_the_contracts(dtype: torch.dtype) -> None:
    """Nothing cancels where positives are aligned: the terms are as small as 1 - p. Where all rows are equal nothing else is left."""
    found = limits.expected(cases.Case("clip_loss", "aligned", pairs=130, temperature=0.02), "mean", dtype)
    assert 0 < abs(found.exact.by_scale) == found.by_scale_size
    assert 1e-3 <= found.by_scale < 2e-3
    found = limits.expected(cases.Case("clip_loss", "identical", temperature=0.5), "mean", dtype)
    assert found.by_scale_size == 1.0 and abs(found.exact.by_scale) < found.by_scale < 1e-5
