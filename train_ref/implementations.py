"""Implementations of the losses, one value each: what a training or a gate calls without knowing whose code it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from train_ref import losses as dense


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


@dataclass(frozen=True)
class LossFunctions:
    """One implementation of every loss: the fused ones, their dense twins, or one that is put to the test."""

    name: str
    info_nce: Callable[..., Tensor]
    nt_xent: Callable[..., Tensor]
    sup_con: Callable[..., Tensor]
    clip_loss: Callable[..., Tensor]
    moco_loss: Callable[..., Tensor]
    queue: Callable[[int, int, torch.device], Queue]


def dense_losses() -> LossFunctions:
    """The reference losses. Nothing here imports fastnce."""
    return LossFunctions("reference", dense.info_nce, dense.nt_xent, dense.sup_con, dense.clip_loss, dense.moco_loss, DenseQueue)


def fused_losses(backend: str) -> LossFunctions:
    """fastnce's losses on the given backend. Raises ModuleNotFoundError where fastnce is not installed."""
    import fastnce

    def queue(size: int, dim: int, device: torch.device) -> Queue:
        ring: Queue = fastnce.NegativeQueue(size, dim).to(device)
        return ring

    def on_backend(loss: Callable[..., Any]) -> Callable[..., Tensor]:
        return partial(loss, backend=backend)

    return LossFunctions(
        "fused",
        on_backend(fastnce.info_nce),
        on_backend(fastnce.nt_xent),
        on_backend(fastnce.sup_con),
        on_backend(fastnce.clip_loss),
        on_backend(fastnce.moco_loss),
        queue,
    )
