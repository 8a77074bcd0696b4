"""The error budget: how far a result may be from float64.

At most twice the error that dense torch makes in the same dtype on the same stored inputs, plus a few units in the last place of the
logits. Every tolerance of the numeric tests comes from here; docs/numerics.md states the contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-24


def relative(found: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; the absolute one where the exact value is 0."""
    error, size = (found.double() - exact).norm().item(), exact.norm().item()
    return error / size if size > 0 else error


def row_error(found: Tensor, exact: Tensor) -> float:
    """Largest absolute error over the rows that are finite; the infinite ones must be infinite in the same places."""
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(found), finite)
    assert torch.equal(found[~finite].double(), exact[~finite])
    return (found.double() - exact)[finite].abs().max().item() if finite.any() else 0.0


def row_budget(dtype: torch.dtype, dense_error: float, largest_logit: float) -> float:
    """For statistics and losses of single rows, in nats."""
    if dtype == torch.float64:
        return 1e-13 * max(1.0, largest_logit) * 32
    return 2 * dense_error + 32 * U * max(1.0, largest_logit)


def gradient_budget(dtype: torch.dtype, dense_error: float) -> float:
    """For relative Frobenius errors of gradients with respect to features: half results are also rounded once at the end."""
    floor = {torch.float64: 1e-11, torch.float32: 16 * U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    return floor if dtype != torch.float32 else 2 * dense_error + floor


def scalar_budget(dtype: torch.dtype, dense_error: float) -> float:
    """For relative errors of the gradients of scale, temperature and bias."""
    if dtype == torch.float64:
        return 1e-11
    return 2 * dense_error + 1e-5 if dtype == torch.float32 else 1e-3
