"""Shared by all tests: one thread, so that many small products do not wait for each other on a busy machine; who runs kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# A process has compiled or interpreted kernels: Triton reads this variable when it is imported, and again at each kernel's definition, so
# it is set before any test is collected. Where a GPU is, kernels are compiled for it, tests marked gpu run and those that import
# interpreter.py skip; anywhere else it is the other way round. CUDA_VISIBLE_DEVICES= pytest runs the interpreter on a GPU machine.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import emulated

from fastnce import build, native
from fastnce.backends import _gemm, torch_tiles

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
    """Tiles of 16 x 16 in the CPU backend: a problem of a hundred rows then has interior, diagonal, ragged and corner tiles. The compiled
    kernels' have one size."""
    monkeypatch.setattr(torch_tiles, "CPU_TILE", 16)
    monkeypatch.setattr(_gemm, "CPU_ROWS", 7)
    return 16


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated without a value holds nan, or a number far outside of any count: reading it before writing it shows."""

    def fill(empty: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            new = empty(*args, **kwargs)
            return new.fill_(torch.nan if new.is_floating_point() else 2**30)

        return filled

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", fill(Tensor.new_empty))


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    """The CUDA kernels compiled for this CPU, kept for the next run."""
    if reason := emulated.unsupported():
        pytest.skip(reason)
    return emulated.emulate(build.folder())


@pytest.fixture
def emulated_cuda(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """backend="cuda" takes tensors of the CPU, for one test."""
    others = native.library_path
    monkeypatch.delenv("FASTNCE_NATIVE", raising=False)
    monkeypatch.setattr(native, "library_path", lambda kind: emulated_library if kind == "cuda" else others(kind))
    native.objection.cache_clear()
    assert native.objection("cuda") is None and torch.ops.fastnce_cuda.emulated()
    yield
    native.objection.cache_clear()
