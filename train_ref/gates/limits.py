"""How far from float64 the operator gate lets a call be: the contract of train_ref/truth/contract.py, and what its m and terms are here.

u = 2^-24, L_i = the exact loss of row i, g = its upstream gradient, scale = 1 / temperature. The arguments by which the gate gives the
contract more room, each with its reason there:

    loss        few, where there are more pairs than one; alike, for identical rows
    gradient    storing; low, below a temperature of 0.02; single
    d/dscale    cancelling = (16 + 2 scale) u sum |g (1 - exp -L_i)|; single

Two lines bound the mean loss and float32's gradients besides, however large m is: 5e-6 |L| or 1e-6 nats, and 2e-5 + 1e-7 sqrt(N) of N rows,
both times 0.02 / temperature below a temperature of 0.02. The first is not for identical rows, the second not for gradients of which dense
torch itself is beyond it.

m, the error of dense torch in the same dtype on the same stored inputs, is a draw. Where one row carries nearly all of a gradient, as at
low temperatures, it is the rounding of that row's few logits, and small by luck in one order: with one order, 9 of 240 draws of MoCo's
calls failed a sound backend. So m is the largest of ORDERS orders of rows and coordinates. All gradients of a call carry the same weights,
so that m is the largest over them too, relative to each.

terms = 2 scale |g (1 - exp -L_i)| bounds what cancels in a gradient (twice that where every row is query and key). Where less than u terms
is left, as of identical rows and of one dimension, the limit is 16 u terms and the storing. Where less than `cancelling` is left of
d/dscale, the limit is that and twice dense float32's error. float64 itself knows 1e-13 of all terms.
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

    single = max(abs(single.mean - exact.mean) for single in singles)
    few = scale / len(exact.rows) if case.pairs > 1 else 0.0  # of one pair the loss is 0
    alike = scale if case.kind == "identical" and case.pairs > 1 else 0.0
    mean = contract.mean_loss(torch.float32, single, exact.mean, few=few, alike=alike)
    if not alike:
        mean = min(mean, max(5e-6 * abs(exact.mean), 1e-6) * low)
    rows = contract.row(torch.float32, max(largest(single.rows - exact.rows) for single in singles), scale)

    # The weights of a row add up to at most twice 1 - p, p the share of its positive: next to nothing where solved.
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
    error = max(abs(single.by_scale - exact.by_scale) for single in singles)
    if (by_scale_size := abs(exact.by_scale)) > rounding:
        by_scale = contract.scalar(dtype, error / by_scale_size, cancelling=rounding / by_scale_size, single=error / by_scale_size)
    else:  # nothing is left of terms that cancel but their rounding, and that of dense float32
        by_scale, by_scale_size = rounding + 2 * error, 1.0
    return Expected(exact, loss_scale, mean, rows, gradients, sizes, by_scale, by_scale_size)


def effective(case: Case, drive: Drive, n_rows: int) -> Tensor:
    """The upstream gradient of the loss of every row, before its weight."""
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
    size, storing = true.norm().item(), stored_error(true, side, loss_scale)
    if size <= U * terms:  # nothing is left of terms that cancel but their rounding
        return 16 * U * terms + unknown + storing
    # Sums in other tiles are as good: not dense half precision's own error, but twice that, as in float32.
    of_size = contract.gradient(side.dtype, single / size, 2 * error / size, storing=storing / size, low=low, single=single / size)
    limit, fixed = of_size * size, (2e-5 * size + 1e-7 * math.sqrt(len(true))) * low
    if side.dtype == torch.float32 and single <= fixed:  # dense torch itself may be beyond that line
        limit = min(limit, fixed)
    return limit + unknown


def largest(values: Tensor) -> float:
    """Largest magnitude; nan if there is one."""
    return values.abs().max().item() if len(values) else 0.0


def scale_for_float16(exact: Answer, stored: Sequence[Tensor]) -> float:
    """As GradScaler would have found it: the largest power of two up to 65536 at which gradients stay in range."""
    most = max(largest(gradient / lengths(side)) for gradient, side in zip(exact.gradients, stored, strict=True))
    return 2.0 ** min(16, math.floor(math.log2(torch.finfo(torch.float16).max / 2 / max(most, 1e-30))))


def stored_error(true: Tensor, side: Tensor, loss_scale: float) -> float:
    """The error of the exact gradient once it is rounded to the dtype of the features."""
    exact = true / lengths(side) * loss_scale
    return ((exact.to(side.dtype).double() - exact) * lengths(side) / loss_scale).norm().item()
