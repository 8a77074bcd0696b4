"""How far from exact is right enough: the limits of tests and gates.

u = 2^-24 is half of float32's relative spacing at 1, L the exact loss in nats. m, the argument `dense`, is the error of dense torch on the
same stored inputs: in the same dtype, but for losses and rows of half-precision features in float32.

    quantity                                      float64               float32                    bfloat16, float16
    mean loss, in nats                                                  2 m + 4 u max(1, |L|)      as float32
    row, in nats                                  1e-13 max(1, t)       2 m + 32 u max(1, t)       as float32
    gradient of features, relative (Frobenius)    1e-12                 2 m + 16 u                 2^-8, 2^-10
    derivative by a scalar, relative              1e-12                 2 m + 1e-5                 1e-3

t, `largest`, is the largest logit of a row, 1 / temperature of normalised rows: a log-sum is rounded as they are. A call that needs more
room says why by the name of the argument that gives it.
"""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-24
STORED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}  # what rounding a half-precision gradient once may cost
FLOAT64 = 1e-13


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


def mean_loss(dense: float, exact: float, few_rows: float = 0.0) -> float:
    """few_rows: largest / number of rows, for the mean over a few is as uncertain as a row."""
    return 2 * dense + U * max(4 * max(1.0, abs(exact)), 32 * few_rows)


def row(dtype: torch.dtype, dense: float, largest: float) -> float:
    """For statistics and losses of single rows."""
    return FLOAT64 * max(1.0, largest) if dtype == torch.float64 else 2 * dense + 32 * U * max(1.0, largest)


def gradient(dtype: torch.dtype, dense: float) -> float:
    """For gradients of features: those of half precision are as exact as float32's until they are rounded, once, at the end."""
    if dtype == torch.float64:
        return 10 * FLOAT64
    return STORED[dtype] if dtype in STORED else 2 * dense + 16 * U


def scalar(dtype: torch.dtype, dense: float, cancelling: float = 0.0, single: float = 0.0) -> float:
    """For derivatives by scale, temperature and bias.

    cancelling  the rounding of a sum's terms, relative to what is left of them
    single      the error of dense float32 on half-precision features: solved rows, where it takes p - 1, leave it more than 5e-4
    """
    if dtype == torch.float64:
        return 10 * FLOAT64
    return (max(1e-3, 2 * single) if dtype in STORED else 2 * dense + 1e-5) + cancelling
