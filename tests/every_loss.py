"""Every loss of the table by its name, and more forms of them, as functions of two views and the number that multiplies the cosines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnce
from train_ref.truth import LOSSES, Loss, Rows


def arguments(loss: Loss, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """A queue holds the second view turned round; five classes, and both views of an example where one tensor holds the features."""
    tensors = loss.example(Rows(first, second, second.flip(1), torch.arange(len(first), device=first.device) % 5))
    return tensors | {"features": torch.stack([first, second], 1)} if loss.leaves == ("features",) else tensors


def of_views(loss: Loss) -> Callable[..., Tensor]:
    def call(first: Tensor, second: Tensor, scale: Tensor | float, **options: Any) -> Tensor:
        value: Tensor = getattr(fastnce, loss.name)(**arguments(loss, first, second), **{loss.number: scale}, **options)
        return value

    return call


def parameter(loss: Loss) -> str:
    """The name of the number that every call may give: the temperature, or the scale of a loss that has none."""
    return "temperature" if loss.number == "scale" else loss.number


OF_VIEWS = {name: of_views(loss) for name, loss in LOSSES.items()}


def q_and_k(m: int = 12, n: int = 12, d: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(m, d, generator=g, dtype=dtype), torch.randn(n, d, generator=g, dtype=dtype)


def paired(k: Tensor) -> Tensor:
    return torch.stack([k.roll(1, 0), k.roll(2, 0)], 1)


# The losses of the table, and the forms that have other arguments or go other ways.
FORMS: dict[str, Callable[..., Tensor]] = OF_VIEWS | {
    "symmetric": lambda q, k, s, **o: fastnce.info_nce(q, k, scale=s, symmetric=True, **o),
    "unpaired": lambda q, k, s, **o: fastnce.info_nce(q, k, k.flip(0), scale=s, in_batch=True, **o),
    "paired": lambda q, k, s, **o: fastnce.info_nce(q, k, paired(k), scale=s, negative_mode="paired", in_batch=True, **o),
    "ragged": lambda q, k, s, **o: fastnce.info_nce(q, k, (paired(k).flatten(0, 1), torch.arange(0, 2 * len(k) + 1, 2)), scale=s, **o),
    "sup_con in": lambda q, k, s, **o: fastnce.sup_con(torch.stack([q, k], 1), torch.arange(len(q)) % 5, variant="in", scale=s, **o),
    "clip_loss, bias": lambda q, k, s, **o: fastnce.clip_loss(q, k, s, s * 0.1, **o),
}
each_form = pytest.mark.parametrize("name", FORMS)
