"""Arithmetic of fastnce.precision, to the last place of its dtype."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastnce
from fastnce.precision import float32_sums, softplus

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


@pytest.fixture
def half_sums() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


@pytest.mark.parametrize("asked", [False, True])
def test_float32_sums(asked: bool, half_sums: None) -> None:
    """The switch is off inside, and afterwards as the caller had it, after an exception too."""
    torch.backends.cuda.matmul.allow_fp16_accumulation = asked
    with float32_sums():
        assert not torch.backends.cuda.matmul.allow_fp16_accumulation
        with float32_sums():
            assert not torch.backends.cuda.matmul.allow_fp16_accumulation
        assert not torch.backends.cuda.matmul.allow_fp16_accumulation
    assert torch.backends.cuda.matmul.allow_fp16_accumulation is asked
    with pytest.raises(ZeroDivisionError), float32_sums():
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.allow_fp16_accumulation is asked


def products_outside(tree: ast.AST) -> tuple[int, int]:
    """How many calls with out_dtype= there are, and how many of them are outside of `with float32_sums():`."""

    def calls(below: ast.AST) -> int:
        return sum(isinstance(node, ast.Call) and any(k.arg == "out_dtype" for k in node.keywords) for node in ast.walk(below))

    inside = sum(calls(node) for node in ast.walk(tree) if isinstance(node, ast.With) and "float32_sums()" in ast.unparse(node.items[0]))
    return calls(tree), calls(tree) - inside


def test_every_product_of_another_dtype_is_inside_float32_sums() -> None:
    assert products_outside(ast.parse("torch.mm(a, b, out_dtype=c)\nwith float32_sums():\n    torch.mm(a, b, out_dtype=c)")) == (2, 1)
    found = [products_outside(ast.parse(path.read_text())) for path in Path(fastnce.__file__).parent.rglob("*.py")]
    assert sum(every for every, _ in found) >= 1 and not any(outside for _, outside in found)
