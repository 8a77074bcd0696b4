"""Trainings to replay: SimCLR, SupCon, MoCo, and two towers for the two halves of a digit with a learned logit scale.

A scene cuts a training step where the loss begins: embeddings out of the network, a loss out of embeddings. So the
same embeddings can be given to several implementations. It is a module whose parameters are those that train.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_ref.augment import two_views
from train_ref.implementations import LossFunctions
from train_ref.methods import MOMENTUM, TEMPERATURES
from train_ref.model import EMBEDDING, build_network

Embeddings = tuple[Tensor, ...]


class Scene(nn.Module):
    """SimCLR at temperature 0.5, and what the others share."""

    temperature = TEMPERATURES["simclr"]

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self.network = build_network(seed, device)

    def inputs(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The networks' inputs from (B, 1, 8, 8) images: two views of each."""
        return two_views(images, generator)

    def embed(self, inputs: Tensor) -> Embeddings:
        """The loss's inputs, part of the graph, in float32."""
        first, second = self.network(inputs).chunk(2)
        return first, second

    def loss(self, functions: LossFunctions, embeddings: Embeddings, labels: Tensor) -> Tensor:
        return functions.nt_xent(*embeddings, temperature=self.temperature)

    def after_step(self) -> None:
        """Called once the optimiser has moved the parameters."""


class SupCon(Scene):
    """Its temperature is the one of the paper."""

    temperature = TEMPERATURES["supcon"]

    def loss(self, functions: LossFunctions, embeddings: Embeddings, labels: Tensor) -> Tensor:
        return functions.sup_con(torch.stack(embeddings, dim=1), labels, temperature=self.temperature)


class MoCo(Scene):
    """First views against keys of the second from a copy that follows slowly, and a queue of two batches of 256."""

    queue_size = 512
    queue: Tensor

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        self.key_network = copy.deepcopy(self.network).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("queue", F.normalize(torch.randn(self.queue_size, EMBEDDING, generator=generator), dim=1).to(device))

    def embed(self, inputs: Tensor) -> Embeddings:
        first, second = inputs.chunk(2)
        with torch.no_grad():
            self.keys = F.normalize(self.key_network(second), dim=1)
        return (self.network(first),)

    def loss(self, functions: LossFunctions, embeddings: Embeddings, labels: Tensor) -> Tensor:
        # The next step replaces the queue by a new tensor, so that graphs over this one stay valid.
        return functions.moco_loss(embeddings[0], self.keys, self.queue, temperature=self.temperature)

    @torch.no_grad()
    def after_step(self) -> None:
        self.queue = torch.cat([self.queue, self.keys])[-self.queue_size :]
        for key_weight, weight in zip(self.key_network.parameters(), self.network.parameters(), strict=True):
            key_weight.lerp_(weight, 1 - MOMENTUM)


class Clip(Scene):
    """The left half of a digit finds its right half; one network each, and CLIP's logit scale, 1/0.07 at first."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        self.other = build_network(seed + 1, device)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))

    def embed(self, inputs: Tensor) -> Embeddings:
        view = inputs.chunk(2)[0]
        left = torch.arange(view.shape[-1], device=view.device) < view.shape[-1] // 2
        return self.network(view * left), self.other(view * ~left)

    def loss(self, functions: LossFunctions, embeddings: Embeddings, labels: Tensor) -> Tensor:
        return functions.clip_loss(*embeddings, self.log_scale.exp())


SCENES: dict[str, Callable[[int, torch.device], Scene]] = {"simclr": Scene, "supcon": SupCon, "moco": MoCo, "clip": Clip}
