"""The inputs of accuracy.py: rows of four kinds for every loss, and their logits with more digits than float64 has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train_ref.truth import Loss, Rows
from train_ref.truth.exact import BLOCK, sides_of

Array = NDArray[Any]
REGIMES = ("random", "aligned", "cone", "hardcone")


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


def example(loss: Loss, regime: str, n: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a call with n anchors, and as many keys in a queue."""
    views = features(regime, 2 * n if "queue" in loss.leaves else n // (1 + loss.symmetric), d, seed=0)
    first, second = (torch.from_numpy(view).to(dtype) for view in views)
    return call(loss, first, second)


def call(loss: Loss, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """The tensors of a call from two views. One half is pairs where a queue is needed; a label has two examples, four rows."""
    size = len(first) // 2 if "queue" in loss.leaves else len(first)
    labels = torch.arange(size, device=first.device) // 2
    tensors = loss.example(Rows(first[:size], second[:size], second[size:], labels))
    if "labels" in tensors:
        tensors = loss.example(Rows(torch.cat([first, second]), second, second, labels.repeat(2)))
    return tensors


class Extended:
    """The logits of a call in extended precision, for exact.exact: float64's own rounding would fail float64's contract."""

    def __init__(self, loss: Loss, arguments: dict[str, Tensor]) -> None:
        sides = [side.numpy().astype(np.longdouble) for side in sides_of(loss, arguments)]
        self.units = [side / np.sqrt((side * side).sum(1, keepdims=True)) for side in sides]
        self.kept: dict[int, Array] = {}  # by side, where they are few: such products are slow, and the same at every temperature

    def cosines(self, side: int, block: slice) -> Array:
        q, k = self.units[side], self.units[-1 - side]
        if len(q) * len(k) > BLOCK:
            return q[block] @ k.T
        if side not in self.kept:
            self.kept[side] = self.kept[1 - side].T if 1 - side in self.kept else q @ k.T
        return self.kept[side][block]

    def logits(self, scale: Any, side: int, block: slice, positive: Tensor) -> tuple[Tensor, Tensor]:
        """As in exact.Logits."""
        cosines, mask = self.cosines(side, block), positive.numpy()
        t = scale * (cosines - (cosines * mask).sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1))
        near = t.astype(np.float64)
        return torch.from_numpy(near), torch.from_numpy((t - near).astype(np.float64))
