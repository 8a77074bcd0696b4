"""The backends as tests name them. A test that is parametrised with "backend" gets what that one needs, see conftest.py. "auto" is "torch"
in a test, and "cpu" in one that has the fixture `compiled`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

IN_FLOAT64 = ("reference", "torch")
IN_FLOAT32 = ("cpu", "triton", "cuda")
ON_CPU = (*IN_FLOAT64, "cpu")  # the kernels of GPUs are interpreted or emulated there, which takes a thousand times as long


def each(backends: Iterable[str]) -> list[Any]:
    """As parameters. Those of GPUs are marked slow: for sets of hundreds of calls."""
    return [name if name not in ("triton", "cuda") else pytest.param(name, marks=pytest.mark.slow) for name in backends]


def widest(backend: str) -> torch.dtype:
    """Of the dtypes that it computes in."""
    return torch.float32 if backend in IN_FLOAT32 else torch.float64
