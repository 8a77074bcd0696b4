"""The networks: an encoder with the projection head that contrastive training puts on top of it, and two towers for pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16
FEATURES = 16 * WIDTH  # of the digits' encoder: 4 * WIDTH channels of 2x2
EMBEDDING = 64  # of the digits' head
# features, hidden units and embedding of every network.
SIZES = {"digits": (FEATURES, 128, EMBEDDING), "small": (512, 256, 128), "resnet18": (512, 1024, 128)}


def conv(in_channels: int, out_channels: int, pool: bool = False, stride: int = 1) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU; pooling comes before the norm, which then has a quarter of the pixels left."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return [*layers, nn.BatchNorm2d(out_channels), nn.ReLU()]


def digits_encoder(channels: int) -> nn.Sequential:
    """(B, channels, 8, 8) -> (B, FEATURES)."""
    return nn.Sequential(*conv(channels, WIDTH), *conv(WIDTH, 2 * WIDTH, pool=True), *conv(2 * WIDTH, 4 * WIDTH, pool=True), nn.Flatten())


def small_encoder(channels: int) -> nn.Sequential:
    """(B, channels, H, W) of about 30 pixels -> (B, 512): strides instead of pooling, for a CPU core's patience."""
    return nn.Sequential(
        *conv(channels, 16),
        *conv(16, 32, stride=2),
        *conv(32, 64, stride=2),
        *conv(64, 128, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )


# ResNet-18 for images of about 32 pixels: He et al. 2015 (arXiv:1512.03385), with a 3x3 first convolution and no pooling before the
# blocks, as Chen et al. 2020 (arXiv:2002.05709), appendix B.9, take it for CIFAR-10.
WIDTHS = (64, 128, 256, 512)
BLOCKS_PER_WIDTH = 2


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class Block(nn.Module):
    """Two 3x3 convolutions around which the input is added, through a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(in_channels, out_channels, 3, stride)
        self.second = conv_norm(out_channels, out_channels, 3, 1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_norm(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet18(channels: int) -> nn.Sequential:
    """(B, channels, H, W) -> (B, 512); 11.17 million parameters."""
    layers: list[nn.Module] = [conv_norm(channels, WIDTHS[0], 3, 1), nn.ReLU()]
    width = WIDTHS[0]
    for out_width in WIDTHS:
        for _ in range(BLOCKS_PER_WIDTH):
            layers.append(Block(width, out_width, stride=2 if width != out_width else 1))
            width = out_width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


ENCODERS = {"digits": digits_encoder, "small": small_encoder, "resnet18": resnet18}


class Network(nn.Module):
    """encoder: images (B, C, H, W) -> (B, features), kept and evaluated; head: -> (B, embedding), which the loss sees.

    With autocast, both compute in bfloat16 in training; embeddings are float32 all the same, and so is the loss.
    """

    def __init__(self, name: str = "digits", channels: int = 1, autocast: bool = False) -> None:
        super().__init__()
        features, hidden, self.embedding = SIZES[name]
        self.autocast = autocast
        self.encoder = ENCODERS[name](channels)
        self.head = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, self.embedding))

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            embedding: Tensor = self.head(self.encoder(images))
        return embedding.float()


def build_network(seed: int, device: torch.device, name: str = "digits", channels: int = 1, autocast: bool = False) -> Network:
    """A freshly initialised network, one of ENCODERS by name; the same seed gives the same weights, on any device.

    channels_last: one training step of 512 rows of digits takes 19 CPU ms instead of 26 on one AVX core.
    """
    torch.manual_seed(seed)
    network = Network(name, channels, autocast).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # one of its documented forms
    return network


TOWER_EMBEDDING = 128
TOWER_WIDTH = 32


def tower(channels: int, height: int, width: int) -> nn.Sequential:
    """(B, channels, height, width) -> (B, TOWER_EMBEDDING): three 3x3 convolutions, each halving the image, and one linear layer."""
    layers: list[nn.Module] = []
    for out in (TOWER_WIDTH, 2 * TOWER_WIDTH, 4 * TOWER_WIDTH):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        channels, height, width = out, math.ceil(height / 2), math.ceil(width / 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, TOWER_EMBEDDING))


class TwoTowers(nn.Module):
    """The left and the right half of every image in, (B, channels, height, width) each; two (B, TOWER_EMBEDDING) embeddings out."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.left, self.right = tower(channels, height, width), tower(channels, height, width)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(left), self.right(right)


def build_towers(seed: int, device: torch.device, channels: int, height: int, width: int) -> TwoTowers:
    """Freshly initialised towers for halves of that shape; the same seed gives the same weights, on any device."""
    torch.manual_seed(seed)
    return TwoTowers(channels, height, width).to(device)
