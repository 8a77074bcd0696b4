"""Building blocks of one's own losses under pytest-benchmark; without --benchmark-enable, ordinary tests of their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastnce
from bench import dense

pytest.importorskip("pytest_benchmark")

D = 48


@pytest.mark.parametrize("n", [256, 1024])
def test_contrastive_stats(benchmark: Any, n: int) -> None:
    """Forward and backward of the formula inside info_nce: log(exp(pos) + exp(lse_neg)) - pos."""
    query, key = dense.leaves("info_nce", n, D)

    def step() -> Tensor:
        query.grad = key.grad = None
        stats = fastnce.contrastive_stats(query, key, scale=1 / dense.TEMPERATURE, offset=0)
        loss = (torch.logaddexp(stats.pos, stats.lse_neg) - stats.pos).mean()
        torch.autograd.backward(loss)
        return loss.detach()

    benchmark.group = f"contrastive_stats N={n} D={D}"
    benchmark.extra_info |= {"n": n, "d": D}
    value = benchmark(step)
    found = query.grad, key.grad
    query.grad = key.grad = None
    wanted = dense.eager_info_nce(query, key)
    torch.autograd.backward(wanted)
    assert value.item() == pytest.approx(wanted.item(), rel=5e-6)
    for gradient, leaf in zip(found, (query, key), strict=True):
        assert gradient is not None and leaf.grad is not None
        assert torch.linalg.vector_norm(gradient - leaf.grad) <= 2e-5 * torch.linalg.vector_norm(leaf.grad)


@pytest.mark.parametrize("size", [1024, 65_536])
def test_enqueue(benchmark: Any, size: int) -> None:
    """Writing a batch costs the same whatever the queue holds."""
    keys = torch.nn.functional.normalize(torch.randn(256, D, generator=torch.Generator().manual_seed(0)), dim=1)
    queue = fastnce.NegativeQueue(size, D)
    benchmark.group = f"NegativeQueue.enqueue of 256 D={D}"
    benchmark.extra_info |= {"n": size, "d": D}
    benchmark(queue.enqueue, keys)
    last = (queue.pointer - 256 + torch.arange(256)) % size
    assert torch.equal(queue.keys[last], keys)
