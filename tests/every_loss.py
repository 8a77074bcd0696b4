"""Every loss of the table by its name, as a function of two views and the number that multiplies the cosines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
