"""The names of the backends in tests. For a test with the parameter "backend", conftest.py provides the library or the emulation that the
backend needs. "auto" is "torch" in a test, and "cpu" in one with the fixture `compiled`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

IN_FLOAT64 = ("reference", "torch")
IN_FLOAT32 = ("cpu", "triton", "cuda")
ON_CPU = (*IN_FLOAT64, "cpu")  # without the kernels of GPUs: interpreted or emulated they take a thousand times as long


def each(backends: Iterable[str]) -> list[Any]:
    """As parameters. Those of GPUs are marked slow: for sets of hundreds of calls."""
    return [name if name not in ("triton", "cuda") else pytest.param(name, marks=pytest.mark.slow) for name in backends]


def widest(backend: str) -> torch.dtype:
    """The widest dtype that a backend computes in."""
    return torch.float32 if backend in IN_FLOAT32 else torch.float64
