"""The towers, and the learnable scale of their cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from train_ref.two_towers.data import Images, PairData
from train_ref.two_towers.text import ROWS, Bags

EMBEDDING = 128
WIDTH = 32
LARGEST_SCALE = 100.0


class TextTower(nn.Module):
    """Bags of n-grams -> (B, EMBEDDING): the mean of one learned vector per hashed n-gram."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, EMBEDDING, mode="mean", include_last_offset=True)
        # Rows of length one, so that a learning rate means the same here as in the other tower.
        nn.init.normal_(self.bag.weight, std=EMBEDDING**-0.5)

    def forward(self, bags: Bags) -> Tensor:
        embedding: Tensor = self.bag(bags.values, bags.offsets.to(bags.values.dtype))
        return embedding


class ImageTower(nn.Module):
    """(B, C, H, W) -> (B, EMBEDDING): three 3x3 convolutions with batch norm, each halving the image, and one linear layer."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, height, width = shape
        for out in (WIDTH, 2 * WIDTH, 4 * WIDTH):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            channels, height, width = out, math.ceil(height / 2), math.ceil(width / 2)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, EMBEDDING))

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.layers(images)
        return embedding


class TwoTowers(nn.Module):
    """The left and the right half of every pair in, two (B, EMBEDDING) embeddings out."""

    def __init__(self, data: PairData) -> None:
        super().__init__()
        self.left, self.right = (ImageTower(side.shape) if isinstance(side, Images) else TextTower() for side in (data.left, data.right))

    def forward(self, left: Tensor | Bags, right: Tensor | Bags) -> tuple[Tensor, Tensor]:
        return self.left(left), self.right(right)


class LogitScale(nn.Module):
    """exp of a parameter, at most 100: fastnce.LogitScale in plain torch. Radford et al. 2021 (arXiv:2103.00020), section 2.5."""

    def __init__(self, init: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(init)))

    def forward(self) -> Tensor:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        return self.log_scale.exp()


def build_towers(data: PairData, seed: int, device: torch.device) -> TwoTowers:
    """Freshly initialised towers; the same seed gives the same weights, on any device."""
    torch.manual_seed(seed)
    return TwoTowers(data).to(device)
