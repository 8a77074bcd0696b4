"""Shared by all tests: one thread, so that many small products do not wait for each other on a busy machine; who runs kernels."""

from __future__ import annotations

import os

import pytest
import torch

# A process has compiled or interpreted kernels: Triton reads this variable when it is imported, and again at each kernel's definition, so
# it is set before any test is collected. Where a GPU is, kernels are compiled for it, tests marked gpu run and those that import
# interpreter.py skip; anywhere else it is the other way round. CUDA_VISIBLE_DEVICES= pytest runs the interpreter on a GPU machine.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from fastnce.backends import _native, cpu

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, not passed, where no kernel could run on a GPU."""
    if not torch.cuda.is_available():
        reason = "needs a CUDA device: torch.cuda.is_available() is False"
    elif os.environ["TRITON_INTERPRET"] == "1":
        reason = "needs compiled kernels: TRITON_INTERPRET=1 is set"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of 16 x 16 in the CPU backend: a problem of a hundred rows then has interior, diagonal, ragged and corner tiles. Of torch's
    operations also where the compiled kernels are built: theirs have one size."""
    monkeypatch.setattr(_native, "serves", lambda *_: False)
    monkeypatch.setattr(cpu, "CPU_TILE", 16)
    monkeypatch.setattr(cpu, "CPU_ROWS", 7)
    return 16
