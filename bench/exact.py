"""What the losses of accuracy.py should be: inputs of four kinds, the answer in float64, and dense torch in a dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
REGIMES = ("random", "aligned", "cone", "hardcone")


class Answer(NamedTuple):
    loss: float
    rows: Array
    gradients: list[Array]
    scale: float  # dL/d(1/temperature)


def features(regime: str, n: int, d: int, seed: int) -> tuple[Array, Array]:
    """Two views (n, d) with rows of unequal length.

    random    unrelated                            aligned   positives at cosine 0.92, the rest random
    cone      every pair of rows at cosine 0.9     hardcone  every pair of rows at cosine 0.997
    """
    rng = np.random.default_rng([seed, d, REGIMES.index(regime)])

    def unit(x: Array) -> Array:
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        return np.divide(x, norm, out=np.zeros_like(x), where=norm > 1e-9)

    first, second = unit(rng.standard_normal((n, d))), unit(rng.standard_normal((n, d)))
    if regime == "aligned":
        aside = unit(second - (second * first).sum(1, keepdims=True) * first)
        second = 0.92 * first + math.sqrt(1 - 0.92**2) * aside
    elif regime in ("cone", "hardcone"):
        cosine = 0.9 if regime == "cone" else 0.997
        along, across = math.sqrt(cosine), math.sqrt(1 - cosine)
        axis = unit(rng.standard_normal(d))
        first, second = (along * axis + across * unit(x - (x @ axis)[:, None] * axis) for x in (first, second))
    lengths = np.exp(0.5 * rng.standard_normal((2, n, 1)))
    return first * lengths[0], second * lengths[1]


HELD = 2**22  # cosines that are kept for the next temperature, and made at a time where there are more: 32 MiB, of float64


class Cosines(NamedTuple):
    """Unit rows of both sides, their inverse norms, the positive column of every row, and their cosines where these are few."""

    units: list[Array]
    inverse: list[Array]
    partner: Array
    kept: Array | None

    @staticmethod
    def of(loss: str, stored: list[Tensor]) -> Cosines:
        # float64's own rounding would fail float64's contract: there the logits are made in extended precision.
        wide = np.longdouble if stored[0].dtype == torch.float64 else np.float64
        sides = [tensor.double().numpy().astype(wide) for tensor in stored]
        inverse = [1 / np.sqrt((side * side).sum(1, keepdims=True)) for side in sides]
        units = [side * r for side, r in zip(sides, inverse, strict=True)]
        n = len(units[0])
        partner = np.roll(np.arange(n), n // 2) if loss == "nt_xent" else np.arange(n)
        return Cosines(units, inverse, partner, units[0] @ units[-1].T if n * n <= HELD else None)

    @property
    def wide(self) -> type:
        return self.units[0].dtype.type

    def blocks(self, side: int) -> Iterator[tuple[slice, Array]]:
        """Rows of one side, and their cosines with all of the other."""
        n, other = len(self.partner), self.units[-1 - side]
        for start in range(0, n, max(1, HELD // n)):
            rows = slice(start, min(n, start + max(1, HELD // n)))
            if self.kept is None:
                yield rows, self.units[side][rows] @ other.T
            else:
                yield rows, self.kept[rows] if side == 0 else self.kept[:, rows].T


class Sizes(NamedTuple):
    """The sums of magnitudes of the terms of each gradient and of dL/dscale.

    They measure the error where the exact value is 0, as every gradient is for D = 1.
    """

    gradients: list[float]
    scale: float


def exact(cos: Cosines, scale: Any) -> tuple[Answer, Sizes]:
    """The answer in float64, from the negatives alone, a block of rows at a time: log(1 + sum over negatives of exp(s - pos)).

    It loses nothing at small losses; logsumexp minus the positive is itself wrong in float64 below a loss of 1e-13.
    """
    n, symmetric = len(cos.partner), len(cos.units) == 1
    # Where the sides differ there are two directions, rows as anchors and columns as anchors, each counting one half.
    share = 1.0 if symmetric else 0.5
    values: Array = np.zeros(n, dtype=cos.wide)
    units = [unit.astype(np.float64) for unit in cos.units]
    # dL/dunit over scale, the same of the magnitudes, and sums of the terms of dL/dscale and of their magnitudes.
    by_unit, magnitudes = ([np.zeros_like(unit) for unit in units] for _ in range(2))
    by_scale, of_scale = 0.0, 0.0
    for side in range(len(units)):
        for rows, cosines in cos.blocks(side):
            at, partner = np.arange(len(cosines)), cos.partner[rows]
            difference = cosines - cosines[at, partner][:, None]
            above = scale * difference
            above[at, partner] = -np.inf
            if symmetric:
                above[at, np.arange(n)[rows]] = -np.inf
            most = above.max(1)
            gap = most + np.log(np.exp(above - most[:, None]).sum(1))
            value = np.maximum(gap, 0) + np.log1p(np.exp(-np.abs(gap)))
            probability = share / n * np.exp(above - value[:, None])
            values[rows] += share * value
            by_scale += float((probability * difference).sum())
            weights = probability.astype(np.float64)
            weights[at, partner] -= probability.sum(1).astype(np.float64)
            of_scale += float(np.abs(weights * cosines).sum())
            for sums, w, sides in ((by_unit, weights, units), (magnitudes, np.abs(weights), [np.abs(unit) for unit in units])):
                sums[side][rows] += w @ sides[-1 - side]
                sums[-1 - side] += w.T @ sides[side][rows]

    def raw(sums: list[Array]) -> list[Array]:
        """By the raw rows, before their radial part, which normalisation removes, is removed."""
        return [float(scale) * r.astype(np.float64) * g for r, g in zip(cos.inverse, sums, strict=True)]

    tangent = [g - (g * unit).sum(1, keepdims=True) * unit for g, unit in zip(raw(by_unit), units, strict=True)]
    sizes = [float(np.linalg.norm(g)) for g in raw(magnitudes)]
    return Answer(float(values.mean()), values.astype(np.float64), tangent, by_scale), Sizes(sizes, of_scale)


def materialised(loss: str, sides: list[Tensor], scale: Tensor) -> Tensor:
    """Row losses as users write them; half precision as autocast runs it.

    Autocast keeps norm and cross entropy in float32; the product and the division by the temperature are in half.
    """
    wide = torch.promote_types(sides[0].dtype, torch.float32)
    units = [F.normalize(side.to(wide), dim=1).to(side.dtype) for side in sides]
    logits = units[0] @ units[-1].T
    n = len(logits)
    labels = torch.arange(n, device=logits.device)
    if loss == "nt_xent":
        logits = (logits / scale).masked_fill(torch.eye(n, dtype=torch.bool, device=logits.device), -torch.inf)
        labels = labels.roll(n // 2)
    else:
        logits = scale * logits
    logits = logits.to(wide)
    by_row = F.cross_entropy(logits, labels, reduction="none")
    return by_row if loss == "nt_xent" else (by_row + F.cross_entropy(logits.T, labels, reduction="none")) / 2
