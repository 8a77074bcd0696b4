"""Shared by all tests: one thread, so that many small products do not wait for each other on a busy machine."""

from __future__ import annotations

import pytest
import torch

from fastnce.backends import cpu

torch.set_num_threads(1)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of 16 x 16 in the CPU backend: a problem of a hundred rows then has interior, diagonal, ragged and corner tiles."""
    monkeypatch.setattr(cpu, "CPU_TILE", 16)
    monkeypatch.setattr(cpu, "CPU_ROWS", 7)
    return 16
