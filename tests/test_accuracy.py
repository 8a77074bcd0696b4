"""Corners of the accuracy contract, each held by one line of the backend; python -m bench accuracy runs the whole grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from named import widest
from torch import Tensor

import fastnce
from bench import accuracy
from train_ref.truth import LOSSES, Loss, Rows, contract, exact

CORNERS = [
    *(accuracy.Point("clip_loss", torch.float32, "cone", d, t) for d in (1, 5, 64) for t in (0.005, 0.05)),
    *(accuracy.Point("nt_xent", torch.float32, "hardcone", d, t) for d in (5, 128) for t in (0.005, 0.5)),
    # Statistics in float32 would leave these errors: a rounding that is the same in every row stays in the mean.
    accuracy.Point("nt_xent", torch.float32, "aligned", 1, 0.005),
    accuracy.Point("nt_xent", torch.float32, "cone", 24, 0.005),
    accuracy.Point("clip_loss", torch.float32, "hardcone", 1, 0.01),
    *(accuracy.Point(loss, torch.float32, "aligned", 24, 0.01) for loss in LOSSES),
    *(accuracy.Point("nt_xent", dtype, "aligned", 64, 0.05) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
    *(accuracy.Point("clip_loss", dtype, "random", 5, 0.02) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]

BY_NAME = [
    pytest.param(
        point, backend, id=f"{backend} {point.loss} {str(point.dtype)[6:]} {point.regime} D={point.d} temperature={point.temperature}"
    )
    for point in CORNERS
    for backend in ("torch", "cpu")
    if point.dtype != torch.float64 or widest(backend) == torch.float64
]


@pytest.mark.parametrize(("point", "backend"), BY_NAME)
def test_corner_is_inside_the_contract(point: accuracy.Point, backend: str) -> None:
    """N = 514: two tiles, the second of them ragged."""
    tensors, parameter = accuracy.inputs(point, 514)
    verdicts = accuracy.verdicts_of(accuracy.Exact(LOSSES[point.loss], tensors), parameter, backend)
    assert {name: verdict for name, verdict in verdicts.items() if verdict.used > 1} == {}


# Sums over thousands of rows -------------------------------------------------------------------------------------------------------------

LONG = 6144


def normal(rows: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))


def tensors(loss: Loss) -> dict[str, Tensor]:
    """Of a call with LONG rows on one side, and 16 times as many in a queue."""
    size = 48 if "queue" in loss.leaves else LONG // len(loss.sides[0])
    first, second = (rows[:size] for rows in normal(2 * LONG).split(LONG))
    return loss.example(Rows(first, second, normal(16 * LONG), torch.arange(size) % 50))


def gradients(function: Callable[..., Tensor], loss: Loss) -> list[Tensor]:
    arguments = tensors(loss)
    leaves = {leaf: arguments[leaf].requires_grad_() for leaf in loss.leaves}
    found = torch.autograd.grad(function(**arguments, **{loss.number: 2.0}), list(leaves.values()))
    return exact.sides_of(loss, dict(zip(leaves, found, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_keep_the_contract_over_thousands_of_rows(loss: Loss, compiled: None) -> None:
    """On both backends with tiles on a CPU: a sum of thousands of float32 products that are added one by one loses ten times what dense
    torch does."""
    true, _ = exact.exact(loss, tensors(loss), 2.0)
    dense = gradients(lambda **arguments: loss.function(**arguments).mean(), loss)
    for backend in ("cpu", "torch"):
        found = gradients(partial(getattr(fastnce, loss.name), backend=backend), loss)
        for mine, theirs, e in zip(found, dense, true.gradients, strict=True):
            allowed = contract.gradient(torch.float32, contract.relative(theirs, e))
            assert contract.relative(mine, e) <= allowed, backend
