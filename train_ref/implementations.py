"""Implementations of the losses, one value each: a training or a gate calls one without knowing whose code it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train_ref.truth import LOSSES

Loss = Callable[..., Tensor]


class Queue(Protocol):
    """A ring of the last `size` keys."""

    keys: Tensor  # (size, D)

    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest keys in place."""


class DenseQueue:
    """The queue in plain torch. `enqueue` writes in place: call it after the backward pass that needs the old keys."""

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self.keys = torch.zeros(size, dim, device=device)
        self.oldest = 0

    def enqueue(self, keys: Tensor) -> None:
        slots = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[slots] = keys
        self.oldest = (self.oldest + len(keys)) % len(self.keys)


LARGEST_SCALE = 100.0


class DenseLogitScale(nn.Module):
    """exp of a parameter, at most LARGEST_SCALE: fastnce.LogitScale in plain torch. Radford et al. 2021 (arXiv:2103.00020), section 2.5."""

    def __init__(self, init: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(init)))

    def forward(self) -> Tensor:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        return self.log_scale.exp()


class LossFunctions:
    """One implementation of the losses by name: the fused ones, their dense twins, or one that is put to the test.

    Each is an attribute too, functions.nt_xent; a loss that the implementation lacks raises AttributeError. queue and logit_scale make
    the two modules with a state that belong to losses.
    """

    def __init__(
        self,
        name: str,
        losses: Mapping[str, Loss],
        queue: Callable[[int, int, torch.device], Queue] = DenseQueue,
        logit_scale: Callable[[float], nn.Module] = DenseLogitScale,
    ) -> None:
        self.name, self.losses, self.queue, self.logit_scale = name, dict(losses), queue, logit_scale

    def __getattr__(self, name: str) -> Loss:
        losses: dict[str, Loss] = vars(self).get("losses", {})
        if name not in losses:
            raise AttributeError(f"{vars(self).get('name')} has no {name}")
        return losses[name]

    def but(self, name: str = "", **losses: Loss) -> LossFunctions:
        """The same with other losses, under the same name or a new one."""
        return LossFunctions(name or self.name, self.losses | losses, self.queue, self.logit_scale)

    def mapped(self, change: Callable[[Loss], Loss], name: str = "") -> LossFunctions:
        """The same with every loss changed."""
        return self.but(name, **{of: change(loss) for of, loss in self.losses.items()})


def dense_losses() -> LossFunctions:
    """The means of the dense losses of truth/, in float32 of half-precision features. Nothing here imports fastnce."""

    def mean_of(loss: Loss) -> Loss:
        @wraps(loss)
        def mean(*arguments: Any, **options: Any) -> Tensor:
            return loss(*map(widened, arguments), **{name: widened(value) for name, value in options.items()}).mean()

        return mean

    return LossFunctions("reference", {name: mean_of(loss.function) for name, loss in LOSSES.items()})


def widened(value: Any) -> Any:
    """Half precision in float32, everything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def fused_losses(backend: str) -> LossFunctions:
    """fastnce's losses on the given backend. Raises ModuleNotFoundError where fastnce is not installed."""
    import fastnce

    def queue(size: int, dim: int, device: torch.device) -> Queue:
        ring: Queue = fastnce.NegativeQueue(size, dim).to(device)
        return ring

    losses = {name: partial(getattr(fastnce, name), backend=backend) for name in LOSSES}
    return LossFunctions("fused", losses, queue, fastnce.LogitScale)
