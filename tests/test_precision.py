"""Arithmetic of fastnce.precision, to the last place of its dtype."""

from __future__ import annotations

import pytest
import torch

from fastnce.precision import softplus

EXTREMES = (-torch.inf, -800.0, -104.0, -40.0, 0.0, 19.0, 21.0, 40.0, 79.0, 81.0, 800.0, torch.inf, torch.nan)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_softplus(dtype: torch.dtype, compiled: bool) -> None:
    """log(1 + exp x) and its derivative, also where exp x rounds the 1 away, leaves the dtype, or is 0."""
    function = torch.compile(softplus, backend="aot_eager", fullgraph=True) if compiled else softplus
    x = torch.cat([torch.tensor(EXTREMES, dtype=dtype), torch.linspace(-100, 100, 401, dtype=dtype)]).requires_grad_()
    value = function(x)
    (derivative,) = torch.autograd.grad(value.sum(), x)
    wide = x.detach().double()
    exact = wide.clamp(min=0.0) + (-wide.abs()).exp().log1p()
    rounding = torch.finfo(dtype)
    torch.testing.assert_close(value.double(), exact, rtol=2 * rounding.eps, atol=rounding.tiny, equal_nan=True)
    torch.testing.assert_close(derivative.double(), wide.sigmoid(), rtol=5 * rounding.eps, atol=rounding.tiny, equal_nan=True)
