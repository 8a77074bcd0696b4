"""Problems that GPU kernels can run, by metadata alone: the limits that all backends with the operands of host.py have."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastnce.backends._gpu import tiles
from fastnce.problem import Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 8192  # columns
LARGEST = 2**30 - 2**16  # rows: differences of indices are int32, and the last tile ends above


def of_operands(problem: Problem) -> list[str]:
    """Objections to dtype and sizes."""
    q, reasons = problem.q, []
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {str(q.dtype)[6:]} (supports float32, float16, bfloat16)")
    if q.shape[-1] > LONGEST:
        reasons.append(f"{q.shape[-1]} columns (supports up to {LONGEST})")
    rows = max(q.shape[0], problem.keys.shape[0])
    if rows > LARGEST:
        reasons.append(f"{rows} rows (supports up to {LARGEST})")
    return reasons


def of_gpu(device: torch.device) -> list[str]:
    """Objections to a device of type cuda. In a ROCm build of torch that is an AMD GPU: whether kernels compile for it, Triton knows."""
    if not torch.cuda.is_available():
        return ["no CUDA device is available"]
    if torch.version.hip is not None:
        return []
    return ["compute capability below 8.0"] if torch.cuda.get_device_capability(device) < (8, 0) else []


class _Given(threading.local):
    parts: int | None = None


_given = _Given()


@contextmanager
def in_parts(count: int) -> Iterator[None]:
    """Inside, float32 is held in so many parts whatever torch's switches say: backward reads what forward has made under them."""
    before, _given.parts = _given.parts, count
    try:
        yield
    finally:
        _given.parts = before


def parts(dtype: torch.dtype) -> int:
    """In how many float16 numbers an element is held: float32 takes two, unless torch may use TF32 for its products.

    All three of torch's switches show here; torch.get_float32_matmul_precision raises after the newest of them was used.
    """
    if dtype != torch.float32:
        return 1
    return _given.parts or (1 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 2)


def fits(problem: Problem) -> bool:
    """Whether a tile holds whole rows."""
    return tiles.held_depth(parts(problem.q.dtype), tiles.padded_depth(problem.q.shape[-1])) > 0
