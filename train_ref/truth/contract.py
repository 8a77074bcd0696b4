"""How far from exact is right enough: the limits of tests, gates and benchmarks.

u = 2^-24 is half of float32's relative spacing at 1, L the exact loss in nats. m, the argument `dense`, is the error of dense torch on the
same stored inputs: in the same dtype, but for losses and rows of half-precision features in float32.

    quantity                                      float64               float32                    bfloat16, float16
    mean loss, in nats                            1e-13 |L|             2 m + 4 u max(1, |L|)      as float32
    loss of a row, in nats                        1e-13 |L|             2 m + 32 u max(1, t)       as float32
    other statistic of a row, in nats             1e-13 max(1, t)       2 m + 32 u max(1, t)       as float32
    gradient of features, relative (Frobenius)    1e-12                 2 m + 16 u                 2^-8, 2^-10
    derivative by a scalar, relative              1e-12                 2 m + 1e-5                 1e-3

t, `largest`, is the largest logit of a row, 1 / temperature of normalised rows: a log-sum is rounded as they are. Half precision is
besides no worse than `autocast`, the error of dense torch in the same dtype, where a caller knows it: but for float32's roundings (the u
terms, 1e-5) and for the storing of a gradient. A call that needs more room says why by the name of an argument, after the `*`.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

U = 2.0**-24
STORED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}  # the cost of rounding a half-precision gradient once
FLOAT64 = 1e-13
UNDERFLOW = 1e-30  # a magnitude of the loss below which nothing is asked of half precision's derivatives: their terms leave float32

Each = TypeVar("Each", float, Tensor)


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


def mean_loss(dtype: torch.dtype, dense: float, exact: float, autocast: float = math.inf, *, few: float = 0.0, alike: float = 0.0) -> float:
    """few    largest / number of rows: the mean over a few rounds as their logits do
    alike  the logit of all pairs where rows are identical: dense torch's m is 0 by luck there, all its logits having the same bits
    """
    if dtype == torch.float64:
        return FLOAT64 * abs(exact)
    roundings = 4 * U * max(1.0, abs(exact), few, alike)
    return max(min(2 * dense + roundings, autocast), roundings)


def row_loss(dtype: torch.dtype, dense: Each, largest: float, exact: Each) -> Each:
    """For the loss of a single row, or of every row with the m of every row."""
    return FLOAT64 * abs(exact) if dtype == torch.float64 else row(dtype, dense, largest)


def row(dtype: torch.dtype, dense: Each, largest: float) -> Each:
    """For statistics of single rows."""
    return 0 * dense + FLOAT64 * max(1.0, largest) if dtype == torch.float64 else 2 * dense + 32 * U * max(1.0, largest)


def gradient(
    dtype: torch.dtype, dense: float, autocast: float = math.inf, *, storing: float = 0.0, low: float = 1.0, single: float = 0.0
) -> float:
    """For gradients of features: those of half precision are as exact as float32's until they are rounded, once, at the end.

    storing  the relative cost of that rounding, where it is known: float16's small numbers have few digits
    low      0.02 / temperature, below that temperature: logits of size 1 / temperature carry as many more roundings
    single   the error of dense float32 on half-precision features: little may be left of a gradient's terms, and float32 then rounds more
    """
    if dtype == torch.float64:
        return 10 * FLOAT64
    float32 = 2 * (single if dtype in STORED else dense) + 16 * U * low
    return max(min(STORED[dtype], autocast), float32 + storing) if dtype in STORED else float32


def scalar(dtype: torch.dtype, dense: float, autocast: float = math.inf, *, cancelling: float = 0.0, single: float = 0.0) -> float:
    """For derivatives by scale, temperature and bias.

    cancelling  the rounding of a sum's terms, relative to what is left of them
    single      the error of dense float32 on half-precision features: solved rows, where it takes p - 1, leave it more than 5e-4
    """
    if dtype == torch.float64:
        return 10 * FLOAT64 + cancelling
    return (max(min(1e-3, autocast), 1e-5, 2 * single) if dtype in STORED else 2 * dense + 1e-5) + cancelling
