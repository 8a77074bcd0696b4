"""The oracle in blocks, which judges GPUs on large problems, is the oracle of the small ones."""

from __future__ import annotations

import block_oracle
import oracle
import pytest
import test_statistics
import torch
from block_oracle import blocked, kinds_of
from problems import PROBLEMS, Call


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_blocks_are_the_oracle(p: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_oracle, "BLOCK", 16)
    assert torch.equal(kinds_of(p, torch.arange(p.m), torch.arange(p.n)), oracle.classes(p))
    vectors, gradients, largest = blocked(p, torch.float64, "cpu", wide=True)
    exact, exact_gradients, exact_largest = test_statistics.exact_run(p, torch.float64)
    assert largest == pytest.approx(exact_largest)
    for a, b in zip(vectors, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    for found, expected in zip(gradients, exact_gradients, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert (found - expected).norm() <= 1e-12 * max(expected.norm().item(), largest)
