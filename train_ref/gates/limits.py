"""How far from float64 the operator gate lets a call be: exact answer, error of dense torch, roundings, limits.

u = 2^-24, m = the error of dense torch in the same dtype on the same stored inputs, the largest of ORDERS orders of its rows and
coordinates, L = the exact mean loss, g = the upstream gradients, scale = 1/temperature, N = the rows of a gradient,
terms = 2 scale |g (1 - exp -L_i)|, which bounds what cancels in a gradient (twice that where every row is query and key).

    loss       2 m + 4 u max(1, L)           and 5e-6 L or 1e-6                     not below a row's / number of rows
    rows       2 m + 32 u max(1, scale)
    gradient   2 m + 16 u                    and 2e-5 + 1e-7 sqrt(N)               float32
               2^-8, float16 2^-10 + storing and 2 m + 2e-3, at most 3e-2          half precision, + float32's line of the same rows
    d/dscale   2 m + 1e-5, half 1e-3         + (16 + 2 scale) u sum |g (1 - exp -L_i)|

loss and rows are absolute, in nats, and ask of half precision what they ask of float32 on the same rounded features;
gradient and d/dscale are relative to the exact one, 1e-7 sqrt(N) and 16 u terms absolute. The left column is the contract of
docs/numerics.md, the right one is wider and fixed. Logits of size scale carry scale roundings: below a temperature of 0.02
the terms 16 u, 2e-5, 1e-7, 5e-6 and 1e-6 are multiplied by 0.02 / temperature.

m is a draw. Where one row carries nearly all of a gradient, as at low temperatures, it is the rounding of that row's few
logits, and small by luck in one order: with one order, 9 of 240 draws of MoCo's calls failed a sound backend. All gradients
of a call carry the same weights, so that m is the largest over them too, relative to each.

Where less than u terms is left of a gradient (identical rows, one dimension) it is the rounding of its terms: 2 m + 16 u terms,
as no fixed limit covers that. Of nearly solved rows the terms are as small as 1 - p, p the share of the positive. Dense torch
takes p - 1 and may be beyond the fixed line there itself; then 2 m remains. float64 knows 1e-13 of all terms.
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
from train_ref.truth import LOSSES, contract
from train_ref.truth.contract import U

CPU = torch.device("cpu")
ORDERS = 4


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

    def dense(dtype: torch.dtype, loss_scale: float = 1.0, order: int = 0) -> Answer:
        return call(of_rows(case, order), case, [side.to(dtype) for side in stored], drive, loss_scale, CPU)

    exact = dense(torch.float64)
    loss_scale = scale_for_float16(exact, stored) if dtype == torch.float16 else 1.0
    singles = [dense(torch.float32, order=order) for order in range(ORDERS)]
    sames = singles if dtype == torch.float32 else [dense(dtype, loss_scale, order) for order in range(ORDERS)]
    scale, given = 1 / case.temperature, effective(case, drive, len(exact.rows))
    low = max(1.0, 0.02 / case.temperature)

    mean = max(5e-6 * abs(exact.mean), 1e-6) * low
    # Of identical rows dense torch's logits have equal bits, and m is 0 by luck: an lse next to logits of size scale
    # rounds by u scale, in any order but that one.
    if case.kind != "identical":
        single = max(abs(single.mean - exact.mean) for single in singles)
        mean = min(mean, contract.mean_loss(single, exact.mean, few_rows=max(1.0, scale) / len(exact.rows)))
    rows = contract.row(torch.float32, max(largest(single.rows - exact.rows) for single in singles), scale)

    # What the weights of a row add up to is at most twice 1 - p, p the share of its positive: next to nothing where solved.
    mass = given if case.option == "weight" else given * LOSSES[case.loss].share(exact.rows)
    rated = (4 if LOSSES[case.loss].symmetric else 2) * scale
    terms = rated * mass.norm().item()
    # float64 takes differences too: of solved rows at low temperatures 1e-13 of all terms is all that it knows.
    unknown = 1e-13 * rated * given.norm().item()
    sizes = [size if size > U * terms else 1.0 for size in (true.norm().item() for true in exact.gradients)]
    something = [true.norm().item() > U * terms for true in exact.gradients]
    errors, singly = (relative_errors(answers, exact, sizes, something) for answers in (sames, singles))
    gradients = [
        gradient_limit(error * size, single * size, true, side, terms, unknown, loss_scale, low) / size
        for error, single, true, side, size in zip(errors, singly, exact.gradients, stored, sizes, strict=True)
    ]

    # Each weight carries the rounding of an lse of size scale, each cosine a few of its own.
    rounding = (16 + 2 * scale) * U * mass.abs().sum().item() + 1e-13 * scale * given.abs().sum().item()
    by_scale_size = abs(exact.by_scale) if abs(exact.by_scale) > rounding else 1.0
    error = max(abs(single.by_scale - exact.by_scale) for single in singles) / by_scale_size
    by_scale = contract.scalar(dtype, error, cancelling=rounding / by_scale_size, single=error)
    return Expected(exact, loss_scale, mean, rows, gradients, sizes, by_scale, by_scale_size)


def effective(case: Case, drive: Drive, n_rows: int) -> Tensor:
    """What reaches the loss of every row before its weight."""
    given, weights = upstream(drive, n_rows), case.weights()
    if weights is None:
        return given
    return given * weights * (n_rows / weights.sum() if drive == "mean" else 1.0)


def of_rows(case: Case, order: int = 0) -> Both:
    """The dense loss of a case, with rows and coordinates shuffled on their way in unless order is 0, and the values put back."""
    generator = torch.Generator().manual_seed(order)

    def shuffled(n: int) -> Tensor:
        return torch.randperm(n, generator=generator) if order else torch.arange(n)

    def both(sides: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        places = {n: shuffled(n) for n in sorted({len(side) for side in sides})}  # of sides that belong together the same
        own, coordinates = places[len(sides[0])], shuffled(case.d)
        labels, loss = case.labels(), LOSSES[case.loss]
        given = case.named_ids() | ({} if labels is None else {"labels": labels})
        moved = [side[places[len(side)]][:, coordinates] for side in sides]
        rows = loss.function(*moved, **{name: of_rows[own] for name, of_rows in given.items()}, **{loss.number: scale})
        rows = rows.view(-1, len(own))[:, own.argsort()].flatten()
        weights = case.weights()
        if weights is None:
            return rows, rows.mean()
        rows = rows * weights.to(rows)
        return rows, rows.sum() / weights.sum().to(rows)

    return both


def relative_errors(answers: Sequence[Answer], exact: Answer, sizes: Sequence[float], something: Sequence[bool]) -> list[float]:
    """m of every gradient, inf where dense torch overflows: of those of which something is left the same, the largest."""
    own = []
    for side, (true, size) in enumerate(zip(exact.gradients, sizes, strict=True)):
        found = [(answer.gradients[side] - true).norm().item() / size for answer in answers]
        own.append(max(error if math.isfinite(error) else math.inf for error in found))
    shared = max((error for error, some in zip(own, something, strict=True) if some), default=0.0)
    return [shared if some else error for error, some in zip(own, something, strict=True)]


def gradient_limit(
    error: float, single: float, true: Tensor, side: Tensor, terms: float, unknown: float, loss_scale: float, low: float
) -> float:
    """Absolute; error is the one of dense torch, single its error in float32."""
    size = true.norm().item()
    # What is left of terms that cancel is their rounding. Where something is left, the contract counts that alone.
    rounding = 16 * U * terms + unknown
    floor = 16 * U * low * size + unknown if size > U * terms else rounding
    in_float32 = 2 * single + floor
    if side.dtype == torch.float32:
        fixed = 2e-5 * low * size + max(1e-7 * math.sqrt(len(true)) * low if size > U * terms else rounding, unknown)
        # Where dense torch itself is beyond the fixed line, twice its error remains.
        return min(in_float32, fixed) if single <= fixed else in_float32
    stored = contract.STORED[side.dtype] * size + in_float32 + stored_error(true, side, loss_scale)
    # Dense half precision may overflow: then it sets no limit, and the others remain.
    return min(stored, 2 * error + 2e-3 * size + rounding, 3e-2 * size + in_float32)


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
