"""Small problems under pytest-benchmark (pytest tests/bench --benchmark-enable); without it, ordinary tests.

Results are compared with dense float64, and no time is asserted. A contestant that computes something else, or a faster wrong kernel, fails
here before it can win.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import dense, measure, peers

pytest.importorskip("pytest_benchmark")

D = 48
# The spread between correct float32 implementations of these losses, as in tests/test_golden.py.
LOSS, GRADIENT = 5e-6, 2e-5
SIZES = (256, 514, 1024)
CASES = [
    (loss, name, n)
    for loss in dense.LOSSES
    for name in peers.FACTORIES[loss]
    for n in (SIZES[:1] if (loss, name) == peers.CUBIC else SIZES)
    if name not in peers.COMPILED
]


def exact(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same leaves in float64; labels stay integers."""
    return tuple(leaf.detach().double().requires_grad_(leaf.requires_grad) if leaf.is_floating_point() else leaf for leaf in leaves)


def agrees(loss: str, value: float, leaves: tuple[Tensor, ...]) -> None:
    """Value and gradients with those of the dense loss in float64."""
    truth = exact(leaves)
    assert value == pytest.approx(measure.step(dense.EAGER[loss], truth), rel=LOSS)
    for leaf, wanted in zip(leaves, truth, strict=True):
        assert (leaf.grad is None) == (wanted.grad is None) == (not leaf.requires_grad)
        if leaf.grad is None or wanted.grad is None:
            continue
        assert torch.linalg.vector_norm(leaf.grad - wanted.grad) <= GRADIENT * torch.linalg.vector_norm(wanted.grad)


@pytest.mark.parametrize(("loss", "name", "n"), CASES)
def test_forward_and_backward(benchmark: Any, loss: str, name: str, n: int) -> None:
    try:
        function = peers.contestant(loss, name)
    except ImportError as error:
        pytest.skip(str(error))
    benchmark.group = f"{loss} N={n} D={D}"
    benchmark.extra_info |= {"n": n, "d": D}
    leaves = dense.leaves(loss, n, D)
    agrees(loss, benchmark(measure.step, function, leaves), leaves)


@pytest.mark.parametrize("loss", dense.CHUNKED)
def test_chunks_that_do_not_divide_the_rows(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "CHUNK", 33)
    leaves = dense.leaves(loss, 1040, 24)  # 65 queries for moco
    agrees(loss, measure.step(dense.CHUNKED[loss], leaves), leaves)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled() -> None:
    leaves = dense.leaves("nt_xent", 66, 24)
    agrees("nt_xent", measure.step(peers.contestant("nt_xent", "compile"), leaves), leaves)
