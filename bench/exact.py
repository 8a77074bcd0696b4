"""What the losses of accuracy.py should be: inputs of four kinds, the answer in float64, and dense torch in a dtype."""

from __future__ import annotations

import math
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


class Cosines(NamedTuple):
    """Unit rows of both sides, their inverse norms, their cosines, and the positive column of every row."""

    units: list[Array]
    inverse: list[Array]
    cosines: Array
    partner: Array

    @staticmethod
    def of(loss: str, stored: list[Tensor]) -> Cosines:
        # float64's own rounding would fail float64's contract: there the logits are made in extended precision.
        wide = np.longdouble if stored[0].dtype == torch.float64 else np.float64
        sides = [tensor.double().numpy().astype(wide) for tensor in stored]
        inverse = [1 / np.sqrt((side * side).sum(1, keepdims=True)) for side in sides]
        units = [side * r for side, r in zip(sides, inverse, strict=True)]
        n = len(units[0])
        partner = np.roll(np.arange(n), n // 2) if loss == "nt_xent" else np.arange(n)
        return Cosines(units, inverse, units[0] @ units[-1].T, partner)


class Sizes(NamedTuple):
    """The sums of magnitudes of the terms of each gradient and of dL/dscale.

    They measure the error where the exact value is 0, as every gradient is for D = 1.
    """

    gradients: list[float]
    scale: float


def exact(cos: Cosines, scale: Any) -> tuple[Answer, Sizes]:
    """The answer in float64, from the negatives alone: log(1 + sum over negatives of exp(s - pos)).

    It loses nothing at small losses; logsumexp minus the positive is itself wrong in float64 below a loss of 1e-13.
    """
    n = len(cos.cosines)
    rows, symmetric = np.arange(n), len(cos.units) == 1
    negative = np.ones((n, n), dtype=bool)
    negative[rows, cos.partner] = False
    if symmetric:
        np.fill_diagonal(negative, False)
    # Where the sides differ there are two directions, rows as anchors and columns as anchors, each counting one half.
    share = 1.0 if symmetric else 0.5
    values: Array = np.zeros(n)
    weights: Array = np.zeros((n, n))
    terms: list[float] = []
    for cosines, into in ((cos.cosines, weights), (cos.cosines.T, weights.T))[: 1 if symmetric else 2]:
        difference = cosines - cosines[rows, cos.partner][:, None]
        above = np.where(negative, scale * difference, -np.inf)
        most = above.max(1)
        gap = most + np.log(np.exp(above - most[:, None]).sum(1))
        value = np.maximum(gap, 0) + np.log1p(np.exp(-np.abs(gap)))
        probability = share / n * np.exp(above - value[:, None])
        values = values + share * value
        into += probability.astype(np.float64)
        into[rows, cos.partner] -= probability.sum(1).astype(np.float64)
        terms.append(float((probability * difference).sum()))
    units = [unit.astype(np.float64) for unit in cos.units]

    def products(w: Array, sides: list[Array]) -> list[Array]:
        """The gradients of the raw rows before their radial part, which normalisation removes, is removed."""
        by_unit = [(w + w.T) @ sides[0]] if symmetric else [w @ sides[1], w.T @ sides[0]]
        return [float(scale) * r.astype(np.float64) * g for r, g in zip(cos.inverse, by_unit, strict=True)]

    raw, magnitudes = products(weights, units), products(np.abs(weights), [np.abs(unit) for unit in units])
    tangent = [g - (g * unit).sum(1, keepdims=True) * unit for g, unit in zip(raw, units, strict=True)]
    answer = Answer(float(values.mean()), values.astype(np.float64), tangent, sum(terms))
    sizes = [float(np.linalg.norm(g)) for g in magnitudes]
    return answer, Sizes(sizes, float(np.abs(weights * cos.cosines).sum()))


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
