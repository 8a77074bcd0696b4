"""SimCLR, SupCon, MoCo and CLIP as values: the views of an image, the network that sees them, their loss, and the network's evaluation.

A new method is a Learner, a Method in METHODS, and its temperature in the presets that it is for.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_ref.augment import VIEWS, Views, halves
from train_ref.data import ImageData
from train_ref.evaluate import FEATURES, RETRIEVAL, Evaluation
from train_ref.implementations import LossFunctions
from train_ref.model import Network, TwoTowers, build_network, build_towers
from train_ref.presets import DIGITS, Preset

MOMENTUM = DIGITS.momentum
TEMPERATURES = DIGITS.temperatures

N = TypeVar("N", bound=nn.Module)


class Learner(ABC, Generic[N]):
    """The method's part of one training: from views to a loss, with an implementation of the losses, and after a step of the optimiser.

    start draws the random numbers that a method begins with.
    """

    def __init__(self, network: N, functions: LossFunctions, temperature: float, preset: Preset, start: torch.Generator) -> None:
        self.network, self.functions, self.temperature, self.preset = network, functions, temperature, preset

    @abstractmethod
    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        """0-dim loss of views (2B, C, H, W), all first views before all second views, with labels (B,)."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimiser."""
        return [{"params": list(self.network.parameters())}]

    def after_step(self) -> None:
        """Called once the optimiser has moved the network."""

    def logit_scale(self) -> float | None:
        """The learned 1 / temperature; none where the temperature stays."""
        return None


class SimCLR(Learner[Network]):
    """The other view of an image is the positive, every other view in the batch a negative."""

    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        first, second = self.network(views).chunk(2)
        return self.functions.nt_xent(first, second, temperature=self.temperature)


class SupCon(Learner[Network]):
    """All views of all images with the same label are positives. The only method here that sees labels."""

    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        first, second = self.network(views).chunk(2)
        return self.functions.sup_con(torch.stack([first, second], dim=1), labels, temperature=self.temperature)


class MoCo(Learner[Network]):
    """A view's key is its other view in a slowly following copy of the network; the negatives are earlier keys.

    Symmetric: every view is a query once. Both networks see both views in one batch.
    """

    def __init__(self, network: Network, functions: LossFunctions, temperature: float, preset: Preset, start: torch.Generator) -> None:
        super().__init__(network, functions, temperature, preset, start)
        self.key_network = copy.deepcopy(network).requires_grad_(False)
        device = next(network.parameters()).device
        self.queue = functions.queue(preset.queue_size, network.embedding, device)
        # Random directions until real keys have replaced them: after two steps of 256 images with the digits' 1024.
        self.queue.enqueue(F.normalize(torch.randn(preset.queue_size, network.embedding, generator=start), dim=1).to(device))

    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            self.keys = F.normalize(self.key_network(views), dim=1)
        first, second = self.keys.chunk(2)
        return self.functions.moco_loss(self.network(views), torch.cat([second, first]), self.queue.keys, temperature=self.temperature)

    @torch.no_grad()
    def after_step(self) -> None:
        self.queue.enqueue(self.keys)
        for key_weight, weight in zip(self.key_network.parameters(), self.network.parameters(), strict=True):
            key_weight.lerp_(weight, 1 - self.preset.momentum)


class Clip(Learner[TwoTowers]):
    """The left half of an image finds its right half, and the other way round; 1 / temperature is learned too."""

    def __init__(self, network: TwoTowers, functions: LossFunctions, temperature: float, preset: Preset, start: torch.Generator) -> None:
        super().__init__(network, functions, temperature, preset, start)
        self.scale = functions.logit_scale(1 / temperature).to(next(network.parameters()).device)

    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        left, right = self.network(*views.chunk(2))
        return self.functions.clip_loss(left, right, self.scale())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay would pull the scale towards 1; CLIP exempts it."""
        return [*super().parameter_groups(), {"params": list(self.scale.parameters()), "weight_decay": 0.0}]

    def logit_scale(self) -> float | None:
        scale: Tensor = self.scale()
        return scale.item()


def image_network(seed: int, data: ImageData, preset: Preset) -> Network:
    return build_network(seed, data.images.device, preset.network, data.images.shape[1], preset.bfloat16)


def half_towers(seed: int, data: ImageData, preset: Preset) -> TwoTowers:
    _, channels, height, width = data.images.shape
    return build_towers(seed, data.images.device, channels, height, width // 2)


@dataclass(frozen=True)
class Method(Generic[N]):
    """One contrastive method.

    name     of the option, title of the tables, and colour of the figure
    build    (seed, data, preset) -> a freshly initialised network on the data's device
    views    by the name of a data set; the method trains on these data alone
    """

    name: str
    title: str
    colour: str
    learner: type[Learner[N]]
    build: Callable[[int, ImageData, Preset], N]
    views: Mapping[str, Views]
    evaluation: Evaluation[N]


SIMCLR = Method("simclr", "SimCLR", "#1f6fb4", SimCLR, image_network, VIEWS, FEATURES)
SUPCON = Method("supcon", "SupCon", "#c4511a", SupCon, image_network, VIEWS, FEATURES)
MOCO = Method("moco", "MoCo", "#178a63", MoCo, image_network, VIEWS, FEATURES)
# Its towers are made for images as small as the digits.
CLIP = Method("clip", "CLIP", "#7d4aa8", Clip, half_towers, {"digits": halves}, RETRIEVAL)
METHODS: dict[str, Method[Any]] = {method.name: method for method in (SIMCLR, SUPCON, MOCO, CLIP)}
