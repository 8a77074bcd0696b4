"""Small problems under pytest-benchmark (pytest bench --benchmark-enable); without it, ordinary tests.

What is asserted is the result, against dense float64: never a time. A contestant that computes something else, or a
faster wrong kernel, fails here before it can win anything in run.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import measure, peers

pytest.importorskip("pytest_benchmark")

D = 48
# The spread between correct float32 implementations of these losses, as in tests/test_golden.py.
LOSS, GRADIENT = 5e-6, 2e-5
CONTESTANTS = [(loss, name) for loss in peers.LOSSES for name in peers.FACTORIES[loss] if name not in peers.ON_REQUEST]


@pytest.mark.parametrize("n", [256, 514, 1024])
@pytest.mark.parametrize(("loss", "name"), CONTESTANTS)
def test_forward_and_backward(benchmark: Any, loss: str, name: str, n: int) -> None:
    try:
        function = peers.contestant(loss, name)
    except ImportError as error:
        pytest.skip(str(error))
    benchmark.group = f"{loss} N={n} D={D}"
    leaves = peers.leaves(loss, n, D)
    value = benchmark(measure.step, function, leaves)

    exact = tuple(leaf.detach().double().requires_grad_() if leaf.requires_grad else leaf.double() for leaf in leaves)
    exact = exact[:1] + leaves[1:] if loss == "sup_con" else exact  # labels stay integers
    assert value == pytest.approx(measure.step(peers.EAGER[loss], exact), rel=LOSS)
    for leaf, truth in zip(leaves, exact, strict=True):
        assert (leaf.grad is None) == (truth.grad is None) == (not leaf.requires_grad)
        if leaf.grad is None or truth.grad is None:
            continue
        assert torch.linalg.vector_norm(leaf.grad - truth.grad) <= GRADIENT * torch.linalg.vector_norm(truth.grad)
