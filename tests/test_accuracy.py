"""Corners of the accuracy contract, each held by one line of the backend; bench/accuracy.py runs the whole grid."""

from __future__ import annotations

import pytest
import torch

from bench import accuracy
from bench.exact import Cosines

CORNERS = [
    *(accuracy.Cell("clip", torch.float32, "cone", d, t) for d in (1, 5, 64) for t in (0.005, 0.05)),
    *(accuracy.Cell("nt_xent", torch.float32, "hardcone", d, t) for d in (5, 128) for t in (0.005, 0.5)),
    # Statistics in float32 leave these: what rounds the same way in every row stays in the mean.
    accuracy.Cell("nt_xent", torch.float32, "aligned", 1, 0.005),
    accuracy.Cell("nt_xent", torch.float32, "cone", 24, 0.005),
    accuracy.Cell("clip", torch.float32, "hardcone", 1, 0.01),
    *(accuracy.Cell(loss, torch.float32, "aligned", 24, 0.01) for loss in accuracy.LOSSES),
    *(accuracy.Cell("nt_xent", dtype, "aligned", 64, 0.05) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
    *(accuracy.Cell("clip", dtype, "random", 5, 0.02) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]


@pytest.mark.parametrize("cell", CORNERS, ids=lambda c: f"{c.loss} {str(c.dtype)[6:]} {c.regime} D={c.d} temperature={c.temperature}")
def test_corner_is_inside_the_contract(cell: accuracy.Cell) -> None:
    """N = 514: two tiles, the second of them ragged."""
    stored, parameter = accuracy.inputs(cell, 514)
    verdicts = accuracy.judge(cell, stored, parameter, Cosines.of(cell.loss, stored), "cpu")
    assert {name: verdict for name, verdict in verdicts.items() if verdict.used > 1} == {}
