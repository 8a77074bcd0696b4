"""What the proofs of statistics and of losses share: variants of the kernels, numbers of a problem, limits of an answer."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# Kernels keep no running maximum up to a scale of 40 (UNSHIFTED of triton/kernels.py), and above it they do: one scale for either.
SCALES = (10.0, 60.0)
SHAPES = ("rows", "two_sided", "symmetric")
# How pairs are told apart: by index alone, or by the tensors of these names. Two partners of one row are looked for in the tiles too.
RULES = ("index", "partners", "labels", "ids", "mask")
# The arguments of a LossProblem by which other kernels run than for statistics: a scale that is a number and no tensor, second, partners,
# weight, whose mean is over the sum of the weights, and by_row, "values". Beside them by_place is a rule of its own, "place".
GIVEN = ("number", "second", "partners", "weight", "weighted sum", "values")

U = 2.0**-24  # half of float32's relative spacing at 1
TF32 = 2.0**-11  # the same of TF32, of both factors of a product together
STORED = {"bfloat16": 2.0**-8, "float16": 2.0**-10}  # the cost of rounding a half-precision gradient once


class Variant(NamedTuple):
    """All that decides which kernels run. Keys that get no gradient are proven as well wherever the backend treats them apart."""

    dtype: str
    parts: int  # 1 where operands are one float16 number, also float32 where TF32 is allowed
    depth: int  # padded D of a tile that holds whole rows; 0: rows are longer
    shape: str  # of SHAPES
    rules: str  # of RULES, several joined by "+"
    aligned: bool  # positives by place
    normalize: bool = True
    bias: bool = False
    metrics: bool = False
    deterministic: bool = False
    loss: str = ""  # "": statistics. Otherwise the formula of a loss as one number
    given: str = ""  # of GIVEN, several joined by "+": the arguments that a loss has beside those of statistics

    def __str__(self) -> str:
        tf32 = " (TF32)" if self.dtype == "float32" and self.parts == 1 else ""
        columns = f"D <= {self.depth}" if self.depth else "long rows"
        flags = ["aligned"] * self.aligned + ["dot products"] * (not self.normalize)
        flags += [name for name in ("bias", "metrics", "deterministic") if getattr(self, name)]
        flags += [f"loss {self.loss}"] * bool(self.loss) + [self.given] * bool(self.given)
        return ", ".join([self.dtype + tf32, columns, self.shape, self.rules, *flags])


class Draw:
    """Random numbers. Equal calls give equal numbers; torch's own generator rests."""

    def __init__(self, of: Variant, columns: int, device: torch.device) -> None:
        self.of, self.columns, self.device, self.generator = of, columns, device, torch.Generator().manual_seed(0)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def ids(self, count: int, kinds: int) -> Tensor:
        """One in nine is negative, and matches nothing."""
        return torch.randint(-kinds // 8, kinds, (count,), generator=self.generator).to(self.device)

    def content(self, rows: int, keys: int) -> dict[str, Tensor]:
        """The labels and the ids that the rules name."""
        found: dict[str, Tensor] = {}
        for rule, name, kinds in (("labels", "label", rows // 8), ("ids", "exclude", rows // 4)):
            if rule in self.of.rules:
                of_keys = {} if self.of.shape == "symmetric" else {f"k_{name}": keys}
                found |= {end: self.ids(count, kinds) for end, count in ({f"q_{name}": rows} | of_keys).items()}
        return found

    def features(self, count: int, sign: int) -> Tensor:
        """Rows whose lengths rise, or with sign -1 fall, over many powers of ten."""
        columns = max(self.columns, 48 if self.columns % 16 == 0 else 33)
        x = torch.randn(count, columns, generator=self.generator, dtype=torch.float64)
        # Dot products of long rows would leave nothing but the largest.
        reach = sign * (3.0 if self.of.normalize else 0.3)
        lengths = torch.logspace(-reach, reach, count, dtype=torch.float64)[:, None]
        return (x / torch.linalg.vector_norm(x, dim=1, keepdim=True) * lengths).to(self.device, getattr(torch, self.of.dtype))


class Judged(NamedTuple):
    name: str
    error: Tensor
    limit: Tensor | float


class Case(NamedTuple):
    """One problem: how a backend answers it, by name, and how far the answers are from exact."""

    where: str
    answers: Callable[[ModuleType], dict[str, Tensor]]
    judge: Callable[[dict[str, Tensor]], list[Judged]]


class Limits(NamedTuple):
    """How far from exact is right enough.

    largest  no logit is larger, at least 1
    coarse   where TF32 is allowed no logit is more exact than its two rounded factors
    of_row   of a statistic of a row, in nats
    """

    of: Variant
    largest: Tensor
    coarse: Tensor | float
    of_row: Tensor

    @staticmethod
    def by(of: Variant, scale: Tensor, q: Tensor, k: Tensor) -> Limits:
        largest = scale.double() if of.normalize else scale.double() * lengths(q).amax() * lengths(k).amax()
        largest = largest.clamp(min=1.0)
        coarse = largest * TF32 if of.dtype == "float32" and of.parts == 1 else 0.0
        return Limits(of, largest, coarse, 32 * U * largest + coarse)

    def rows(self, name: str, found: Tensor, exact: Tensor, single: Tensor, times: Tensor | float = 1.0) -> Judged:
        """Numbers with the error of a row's statistic, times a number."""
        return Judged(name, row_error(found, exact), 2 * row_error(single, exact) + self.of_row * times)

    def features(self, name: str, found: Tensor, exact: Tensor, single: Tensor, x: Tensor) -> Judged:
        """The gradient of rows x, each times the length of its row: those of short rows, which are longer, would hide others."""
        length = lengths(x)
        one, other, true = (g.double() * length for g in (found, single, exact))
        bound = 2 * relative(other, true) + 16 * U * (self.largest / 50).clamp(min=1.0) + self.coarse
        if self.of.dtype in STORED:  # float16 holds the long rows' gradients in few digits
            stored = exact.to(getattr(torch, self.of.dtype)).double() * length
            bound = (bound + relative(stored, true)).clamp(min=STORED[self.of.dtype])
        return Judged(name, relative(one, true), bound)

    def scalar(self, name: str, found: Tensor, exact: Tensor, single: Tensor) -> Judged:
        float32 = 2 * relative(single, exact) + 1e-5 + self.coarse
        return Judged(name, relative(found, exact), float32.clamp(min=1e-3) if self.of.dtype in STORED else float32)


def lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)


def relative(found: Tensor, exact: Tensor) -> Tensor:
    """Relative error of a vector or matrix, by the root of the sum of squares."""
    return (found.double() - exact).norm() / exact.norm()


def row_error(found: Tensor, exact: Tensor) -> Tensor:
    """Largest absolute error over the rows; inf where an infinite one is not the same in both."""
    error = (found.double() - exact).abs()
    return torch.where(found.double() == exact, 0.0, error.nan_to_num(torch.inf)).amax()
