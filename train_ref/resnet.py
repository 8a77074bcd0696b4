"""ResNet-18 for images of about 32 pixels: He et al. 2015 (arXiv:1512.03385), with a 3x3 first convolution and no pooling
before the blocks, as Chen et al. 2020 (arXiv:2002.05709), appendix B.9, take it for CIFAR-10."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

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
