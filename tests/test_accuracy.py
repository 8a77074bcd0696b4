"""Corners of the accuracy contract, each held by one line of the backend; python -m bench accuracy runs the whole grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from named import widest
from torch import Tensor

import fastnce
from bench import accuracy
from bench.exact import Cosines
from train_ref.truth import contract, losses

CORNERS = [
    *(accuracy.Cell("clip", torch.float32, "cone", d, t) for d in (1, 5, 64) for t in (0.005, 0.05)),
    *(accuracy.Cell("nt_xent", torch.float32, "hardcone", d, t) for d in (5, 128) for t in (0.005, 0.5)),
    # Statistics in float32 would leave these errors: a rounding that is the same in every row stays in the mean.
    accuracy.Cell("nt_xent", torch.float32, "aligned", 1, 0.005),
    accuracy.Cell("nt_xent", torch.float32, "cone", 24, 0.005),
    accuracy.Cell("clip", torch.float32, "hardcone", 1, 0.01),
    *(accuracy.Cell(loss, torch.float32, "aligned", 24, 0.01) for loss in accuracy.LOSSES),
    *(accuracy.Cell("nt_xent", dtype, "aligned", 64, 0.05) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
    *(accuracy.Cell("clip", dtype, "random", 5, 0.02) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]

BY_NAME = [
    pytest.param(cell, backend, id=f"{backend} {cell.loss} {str(cell.dtype)[6:]} {cell.regime} D={cell.d} temperature={cell.temperature}")
    for cell in CORNERS
    for backend in ("torch", "cpu")
    if cell.dtype != torch.float64 or widest(backend) == torch.float64
]


@pytest.mark.parametrize(("cell", "backend"), BY_NAME)
def test_corner_is_inside_the_contract(cell: accuracy.Cell, backend: str) -> None:
    """N = 514: two tiles, the second of them ragged."""
    stored, parameter = accuracy.inputs(cell, 514)
    verdicts = accuracy.judge(cell, stored, parameter, Cosines.of(cell.loss, stored), backend)
    assert {name: verdict for name, verdict in verdicts.items() if verdict.used > 1} == {}


# Sums over thousands of rows -------------------------------------------------------------------------------------------------------------

LONG = 6144


def normal(rows: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))


CALLS: dict[str, Callable[[Callable[..., Any], Tensor, Tensor], Tensor]] = {
    "nt_xent": lambda loss, a, b: loss(torch.cat([a[: LONG // 2], b[: LONG // 2]]), temperature=0.5),
    "info_nce": lambda loss, a, b: loss(a, b, temperature=0.5),
    "clip_loss": lambda loss, a, b: loss(a, b, 2.0),
    "sup_con": lambda loss, a, b: loss(a, torch.arange(LONG) % 50, temperature=0.5),
    "moco_loss": lambda loss, a, b: loss(a[:48], b[:48], normal(16 * LONG).to(a.dtype), temperature=0.5),
}


def gradients(loss: Callable[..., Any], name: str, dtype: torch.dtype) -> list[Tensor]:
    leaves = [rows.to(dtype).requires_grad_() for rows in normal(2 * LONG).split(LONG)]
    found = torch.autograd.grad(CALLS[name](loss, *leaves), leaves, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_keep_the_contract_over_thousands_of_rows(name: str, compiled: None) -> None:
    """On both backends with tiles on a CPU: a sum of thousands of float32 products that are added one by one loses ten times what dense
    torch does. Exact: float64, in tiles, which is within 1e-13 of dense float64 (test_statistics.py) and fits into memory."""
    exact = gradients(partial(getattr(fastnce, name), backend="torch"), name, torch.float64)
    dense = gradients(lambda *z, **options: getattr(losses, name)(*z, **options).mean(), name, torch.float32)
    for backend in ("cpu", "torch"):
        found = gradients(partial(getattr(fastnce, name), backend=backend), name, torch.float32)
        for mine, theirs, e in zip(found, dense, exact, strict=True):
            allowed = contract.gradient(torch.float32, contract.relative(theirs, e))
            assert contract.relative(mine, e) <= allowed, backend
