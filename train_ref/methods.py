"""SimCLR, SupCon and MoCo: from a batch of views to a loss, by either implementation of the losses, fused or dense."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from train_ref.implementations import LossFunctions
from train_ref.model import Network
from train_ref.presets import DIGITS

QUEUE_SIZE = DIGITS.queue_size
MOMENTUM = DIGITS.momentum
TEMPERATURES = DIGITS.temperatures
TITLES = {"simclr": "SimCLR", "supcon": "SupCon", "moco": "MoCo"}


class Method(Protocol):
    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        """0-dim loss of views (2B, C, H, W), all first views before all second views, with labels (B,)."""

    def after_step(self) -> None:
        """What has to happen once the optimiser has moved the network."""


class SimCLR:
    """The other view of an image is the positive, every other view in the batch a negative."""

    def __init__(self, network: Network, functions: LossFunctions, temperature: float) -> None:
        self.network, self.functions, self.temperature = network, functions, temperature

    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        first, second = self.network(views).chunk(2)
        return self.functions.nt_xent(first, second, temperature=self.temperature)

    def after_step(self) -> None:
        pass


class SupCon:
    """All views of all images with the same label are positives. The only method here that sees labels."""

    def __init__(self, network: Network, functions: LossFunctions, temperature: float) -> None:
        self.network, self.functions, self.temperature = network, functions, temperature

    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        first, second = self.network(views).chunk(2)
        return self.functions.sup_con(torch.stack([first, second], dim=1), labels, temperature=self.temperature)

    def after_step(self) -> None:
        pass


class MoCo:
    """A view's key is its other view in a slowly following copy of the network; the negatives are earlier keys.

    Symmetric: every view is a query once. Both networks see both views in one batch.
    """

    def __init__(
        self,
        network: Network,
        functions: LossFunctions,
        temperature: float,
        generator: torch.Generator,
        queue_size: int = QUEUE_SIZE,
        momentum: float = MOMENTUM,
    ) -> None:
        self.network, self.functions, self.temperature, self.momentum = network, functions, temperature, momentum
        self.key_network = copy.deepcopy(network).requires_grad_(False)
        device = next(network.parameters()).device
        self.queue = functions.queue(queue_size, network.embedding, device)
        # Random directions until real keys have replaced them: after two steps of 256 images with the digits' 1024.
        self.queue.enqueue(F.normalize(torch.randn(queue_size, network.embedding, generator=generator), dim=1).to(device))

    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            self.keys = F.normalize(self.key_network(views), dim=1)
        first, second = self.keys.chunk(2)
        return self.functions.moco_loss(self.network(views), torch.cat([second, first]), self.queue.keys, temperature=self.temperature)

    @torch.no_grad()
    def after_step(self) -> None:
        self.queue.enqueue(self.keys)
        for key_weight, weight in zip(self.key_network.parameters(), self.network.parameters(), strict=True):
            key_weight.lerp_(weight, 1 - self.momentum)


def build_method(
    name: str,
    network: Network,
    functions: LossFunctions,
    temperature: float,
    generator: torch.Generator,
    queue_size: int = QUEUE_SIZE,
    momentum: float = MOMENTUM,
) -> Method:
    """The method of that name; the generator fills what it starts with at random."""
    if name == "simclr":
        return SimCLR(network, functions, temperature)
    if name == "supcon":
        return SupCon(network, functions, temperature)
    if name == "moco":
        return MoCo(network, functions, temperature, generator, queue_size, momentum)
    raise ValueError(f"method is {name!r}; it must be one of {', '.join(TITLES)}")
