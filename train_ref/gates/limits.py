"""How far from float64 the operator gate lets a call be: exact answer, error of dense torch, roundings, limits.

u = 2^-24, m = the error of dense torch in the same dtype on the same stored inputs, L = the exact mean loss, g = the
upstream gradients, scale = 1/temperature, terms = 2 scale |g|, which bounds what cancels in a gradient (twice that where
every row is query and key).

    loss       2 m + 4 u max(1, L)           and 5e-6 L or 1e-6                     not below a row's / number of rows
    rows       2 m + 32 u max(1, scale)
    gradient   2 m + 16 u                    and 2e-5                              float32; + 16 u terms of what cancels
               2^-8, float16 2^-10 + storing and 2 m + 2e-3, at most 3e-2          half precision, the same
    d/dscale   2 m + 1e-5, half 1e-3         + (16 + 2 scale) u sum |g|

loss and rows are absolute, in nats, and ask of half precision what they ask of float32 on the same rounded features;
gradient and d/dscale are relative to the exact one. The left column is the contract of docs/numerics.md, the right one is
wider and fixed. Logits of size scale carry scale roundings: below a temperature of 0.02 the terms 16 u, 2e-5, 5e-6 and
1e-6 are multiplied by 0.02 / temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from train_ref.gates.call import Answer, Both, Drive, call, lengths, upstream
from train_ref.gates.cases import Case
from train_ref.gates.dense_rows import row_losses

U = 2.0**-24
STORED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Expected:
    """The exact answer of a call and the limits, the last two relative to sizes: 1 where the exact value is rounding."""

    exact: Answer
    loss_scale: float
    mean: float
    rows: float
    gradients: Sequence[float]
    gradient_sizes: Sequence[float]
    by_scale: float
    by_scale_size: float


@cache
def expected(case: Case, drive: Drive, dtype: torch.dtype) -> Expected:
    """The same for all subjects of that dtype."""
    stored = case.sides(dtype)

    def dense(dtype: torch.dtype, loss_scale: float = 1.0) -> Answer:
        return call(of_rows(case), case, [side.to(dtype) for side in stored], drive, loss_scale, CPU)

    exact = dense(torch.float64)
    loss_scale = scale_for_float16(exact, stored) if dtype == torch.float16 else 1.0
    single = dense(torch.float32)
    same = single if dtype == torch.float32 else dense(dtype, loss_scale)
    scale, given = 1 / case.temperature, upstream(drive, len(exact.rows))
    low = max(1.0, 0.02 / case.temperature)

    mean = max(5e-6 * exact.mean, 1e-6) * low
    # Of identical rows dense torch's logits have equal bits, and m is 0 by luck: an lse next to logits of size scale
    # rounds by u scale, in any order but that one.
    if case.kind != "identical":
        # The mean of a few rows is as uncertain as a row.
        few = max(4 * max(1.0, exact.mean), 32 * max(1.0, scale) / len(exact.rows))
        mean = min(mean, 2 * abs(single.mean - exact.mean) + U * few)
    rows = 2 * largest(single.rows - exact.rows) + 32 * U * max(1.0, scale)

    terms = (4 if case.loss in ("nt_xent", "sup_con") else 2) * scale * given.norm().item()
    sizes = [size if size > U * terms else 1.0 for size in (true.norm().item() for true in exact.gradients)]
    gradients = [
        gradient_limit((found - true).norm().item(), true, side, terms, loss_scale, low) / size
        for found, true, side, size in zip(same.gradients, exact.gradients, stored, sizes, strict=True)
    ]

    relative = 2 * abs(single.by_scale - exact.by_scale) + 1e-5 * abs(exact.by_scale)
    if dtype != torch.float32:
        relative = 1e-3 * abs(exact.by_scale)
    # Each weight carries the rounding of an lse of size scale, each cosine a few of its own.
    rounding = (16 + 2 * scale) * U * given.abs().sum().item()
    by_scale_size = abs(exact.by_scale) if abs(exact.by_scale) > rounding else 1.0
    by_scale = (relative + rounding) / by_scale_size
    return Expected(exact, loss_scale, mean, rows, gradients, sizes, by_scale, by_scale_size)


def of_rows(case: Case) -> Both:
    """The dense loss of a case."""

    def both(sides: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        rows = row_losses(case.loss, sides, case.labels(), scale)
        return rows, rows.mean()

    return both


def gradient_limit(error: float, true: Tensor, side: Tensor, terms: float, loss_scale: float, low: float) -> float:
    """Absolute; error is the one of dense torch."""
    size = true.norm().item()
    # What is left of terms that cancel is their rounding. Where something is left, the contract counts that alone.
    rounding = 16 * U * terms
    floor = 16 * U * low * size if size > U * terms else rounding
    # Dense half precision may overflow: then it sets no limit, and the others remain.
    twice = 2 * error if math.isfinite(error) else math.inf
    if side.dtype == torch.float32:
        return min(twice + floor, 2e-5 * low * size + rounding)
    contract = STORED[side.dtype] * size + floor + stored_error(true, side, loss_scale)
    return min(contract, twice + 2e-3 * size + rounding, 3e-2 * size + rounding)


def largest(values: Tensor) -> float:
    """Largest magnitude; nan if there is one."""
    return values.abs().max().item() if len(values) else 0.0


def scale_for_float16(exact: Answer, stored: Sequence[Tensor]) -> float:
    """As GradScaler would have found it: the largest power of two up to 65536 at which gradients stay in range."""
    most = max(largest(gradient / lengths(side)) for gradient, side in zip(exact.gradients, stored, strict=True))
    return 2.0 ** min(16, math.floor(math.log2(torch.finfo(torch.float16).max / 2 / max(most, 1e-30))))


def stored_error(true: Tensor, side: Tensor, loss_scale: float) -> float:
    """What rounding the exact gradient to float16 costs, whose smallest numbers have fewer digits; 0 for others."""
    if side.dtype != torch.float16:
        return 0.0
    exact = true / lengths(side) * loss_scale
    return ((exact.half().double() - exact) * lengths(side) / loss_scale).norm().item()
