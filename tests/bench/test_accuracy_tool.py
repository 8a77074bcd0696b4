"""accuracy.py finds what is wrong, and its exact answer is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import accuracy, exact


@pytest.mark.parametrize("regime", exact.REGIMES)
@pytest.mark.parametrize("loss", accuracy.LOSSES)
def test_the_exact_answer_is_that_of_dense_float64(loss: str, regime: str) -> None:
    """Where the dense form is well conditioned, autograd through it confirms the analytic reference."""
    cell = accuracy.Cell(loss, torch.float64, regime, 24, 0.5)
    sides, parameter = accuracy.inputs(cell, 34)
    true, sizes = exact.exact(exact.Cosines.of(loss, sides), 2.0)
    dense = accuracy.answer(accuracy.dense(loss), sides, parameter, loss == "nt_xent", 1.0)
    for name, error in accuracy.errors(dense, true, sizes).items():
        assert error.max() < 1e-12 * (sizes.scale / abs(true.scale) if name == "scale" else 1), name


@pytest.mark.parametrize("loss", accuracy.LOSSES)
def test_the_exact_answer_does_not_depend_on_its_blocks(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of seven rows, the last of them ragged, and all at once."""
    sides, _ = accuracy.inputs(accuracy.Cell(loss, torch.float64, "aligned", 5, 0.5), 34)
    whole, sizes = exact.exact(exact.Cosines.of(loss, sides), 2.0)
    monkeypatch.setattr(exact, "HELD", 7 * 34)
    cosines = exact.Cosines.of(loss, sides)
    assert cosines.kept is None and [len(block) for _, block in cosines.blocks(0)] == [7, 7, 7, 7, 6]
    found, others = exact.exact(cosines, 2.0)
    assert (found.loss, found.scale) == pytest.approx((whole.loss, whole.scale), rel=1e-13)
    assert (*others.gradients, others.scale) == pytest.approx((*sizes.gradients, sizes.scale), rel=1e-13)
    for mine, expected in zip((found.rows, *found.gradients), (whole.rows, *whole.gradients), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-12, atol=1e-15)


def test_the_exact_answer_holds_at_tiny_losses() -> None:
    """Two negatives at cosine 0, the positive at 1: log(1 + 2 exp(-scale)), where dense float64 has 0."""
    z = torch.eye(2, dtype=torch.float64).repeat(2, 1)
    true, _ = exact.exact(exact.Cosines.of("nt_xent", [z]), np.longdouble(100))
    assert true.loss == pytest.approx(2 * np.exp(-100), rel=1e-13)
    assert true.scale == pytest.approx(-2 * np.exp(-100), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [None, "loss", "gradient"])
def test_accuracy_finds_a_planted_error(wrong: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of fastnce the dense loss in float64: as it is, with a loss 1e-4 too large, with 2 % less gradient."""
    loss_of = accuracy.dense("clip")

    def planted(sides: list[Tensor], parameter: Tensor, reduction: str) -> Tensor:
        wide = [side.double() for side in sides]
        if wrong == "gradient":
            wide[0] = 0.98 * wide[0] + 0.02 * wide[0].detach()
        value = loss_of(wide, parameter.double(), reduction)
        return value + 1e-4 if wrong == "loss" else value

    monkeypatch.setattr(accuracy, "fused", lambda loss, backend: planted)
    cell = accuracy.Cell("clip", dtype, "random", 24, 0.1)
    sides, parameter = accuracy.inputs(cell, 66)
    verdicts = accuracy.judge(cell, sides, parameter, exact.Cosines.of("clip", sides), "torch")
    outside = {name for name, verdict in verdicts.items() if not verdict.used <= 1}
    assert outside == ({wrong} if wrong != "loss" else {"loss", "row"}) - {None}
