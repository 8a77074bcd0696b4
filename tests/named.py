"""The backends as tests name them. A test that is parametrised with "backend" gets what that one needs, see conftest.py. "auto" is "torch"
in a test, and "cpu" in one that has the fixture `compiled`."""

from __future__ import annotations

import torch

IN_FLOAT64 = ("reference", "torch")
IN_FLOAT32 = ("cpu", "triton", "cuda")
ON_CPU = (*IN_FLOAT64, "cpu")  # the kernels of GPUs are interpreted or emulated there, which takes a thousand times as long


def widest(backend: str) -> torch.dtype:
    """Of the dtypes that it computes in."""
    return torch.float32 if backend in IN_FLOAT32 else torch.float64
