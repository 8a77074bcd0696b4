"""What the kernels can run, from metadata alone."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import torch

from fastnce import tiles
from fastnce.problem import Problem

OLDEST = (3, 6)
try:
    INSTALLED: str | None = version("triton")
except PackageNotFoundError:
    INSTALLED = None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 8192  # columns
LARGEST = 2**30 - 2**16  # rows: differences of indices are int32, and the last tile ends above


def unsupported(problem: Problem) -> list[str]:
    """Why not, with what to do about it; empty: these kernels run it. Reads no values."""
    q, reasons = problem.q, []
    if INSTALLED is None:
        reasons.append("triton is not installed (python -m pip install triton)")
    elif tuple(int(part) for part in INSTALLED.split(".")[:2]) < OLDEST:
        reasons.append(f"triton {INSTALLED} is too old (python -m pip install 'triton>={OLDEST[0]}.{OLDEST[1]}')")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {str(q.dtype)[6:]} (supports float32, float16, bfloat16)")
    if q.shape[1] > LONGEST:
        reasons.append(f"{q.shape[1]} columns (supports up to {LONGEST})")
    if max(q.shape[0], problem.keys.shape[0]) > LARGEST:
        reasons.append(f"{max(q.shape[0], problem.keys.shape[0])} rows (supports up to {LARGEST})")
    if q.device.type == "cuda":
        if not torch.cuda.is_available():
            reasons.append("no CUDA device is available")
        elif torch.version.hip is not None:
            reasons.append("AMD GPUs: the kernels compile for gfx942, but nothing has run on one")
        elif torch.cuda.get_device_capability(q.device) < (8, 0):
            reasons.append("compute capability below 8.0")
    elif not (q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        reasons.append(f"device {q.device.type} (needs CUDA, or TRITON_INTERPRET=1 for Triton's interpreter on the CPU)")
    return reasons


def parts(dtype: torch.dtype) -> int:
    """In how many float16 numbers an element is held: float32 takes two, unless torch may use TF32 for its products.

    All three of torch's switches show here; torch.get_float32_matmul_precision raises after the newest of them was used.
    """
    return 2 if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32" else 1


def whole(problem: Problem) -> bool:
    """Whether a row fits into a tile."""
    return tiles.triton_depth(problem.q.shape[1]) * parts(problem.q.dtype) <= tiles.TRITON_WHOLE


def keeps_output(problem: Problem) -> bool:
    """Whether forward also answers, in own_pos (M, D + 1), the mean of the keys and of the logits under p: then backward needs no tiles."""
    rows_only = not (problem.symmetric or problem.two_sided)
    alone = problem.pairs.offset is None and not problem.pairs.positives_by_content()
    return problem.frozen and rows_only and alone and whole(problem)
