"""A subject of the gates: an implementation of the losses and the dtype of the features it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from train_ref.implementations import Loss, LossFunctions, dense_losses


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Subject:
    """An implementation under test."""

    name: str
    functions: LossFunctions
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def label(self) -> str:
        return f"{self.name} {dtype_name(self.dtype)}"

    def loss(self, name: str) -> Loss:
        function: Loss = getattr(self.functions, name)
        return function

    def trained(self) -> LossFunctions:
        """Its losses for a float32 network: the network's features are cast to the dtype first, as autocast would."""

        def cast(value: Any) -> Any:
            features = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
            return value.to(self.dtype) if features else value

        return self.functions if self.dtype == torch.float32 else self.functions.mapped(of_changed(cast))


def of_changed(change: Callable[[Any], Any]) -> Callable[[Loss], Loss]:
    """From a loss to the same loss with every argument passed through `change` before."""

    def of(loss: Loss) -> Loss:
        @wraps(loss)
        def changed(*arguments: Any, **options: Any) -> Tensor:
            return loss(*map(change, arguments), **{name: change(value) for name, value in options.items()})

        return changed

    return of


def noise_control(order: str = "reversed") -> Subject:
    """The reference with the rows of every input reversed or "rotated": the same mathematics, rounded in another order.

    It has no fault, so it must pass every gate; and how far it drifts from the reference is how far rounding alone leads.
    """

    def reorder(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return value.flip(0) if order == "reversed" else value.roll(len(value) // 3, 0)

    name = "noise control" if order == "reversed" else f"noise control, {order}"
    return Subject(name, dense_losses().mapped(of_changed(reorder), name))


def offers(loss: Loss, option: str) -> bool:
    """Whether the loss has an argument of that name: not every implementation has reductions or several views."""
    return option in inspect.signature(loss).parameters
