"""Changes of a batch of images, each image by its own amount: plain tensor operations, on whatever device the batch is.

Images are (N, C, H, W) floats in 0..1, amounts (N,); an amount that changes nothing is named. torchvision's functions of
the same names are the definition (and PIL's before them); here a batch is one operation instead of a loop over images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop(images: Tensor, left: Tensor, top: Tensor, width: Tensor, height: Tensor, flip: Tensor) -> Tensor:
    """That part of each image, as fractions of its extent, bilinearly scaled to full size and mirrored where flip is true.

    left and top count from the image's edges. (0, 0, 1, 1, false) changes nothing.
    """
    mirrored = torch.where(flip, -width, width)
    nothing = torch.zeros_like(width)
    x = torch.stack([mirrored, nothing, 2 * left + width - 1], dim=1)
    y = torch.stack([nothing, height, 2 * top + height - 1], dim=1)
    grid = F.affine_grid(torch.stack([x, y], dim=1), list(images.shape), align_corners=False)
    # border: the outermost half pixel lies outside the centres that bilinear interpolation is between.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blend(images: Tensor, other: Tensor, amount: Tensor) -> Tensor:
    """amount of the image and 1 - amount of the other, also beyond 1, kept within 0..1."""
    return torch.lerp(other, images, amount[:, None, None, None]).clamp(0, 1)


def luma(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W) by ITU-R 601-2, PIL's "L"; a single channel is its own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def brightness(images: Tensor, amount: Tensor) -> Tensor:
    """Towards black or away from it; 1 changes nothing."""
    return blend(images, images.new_zeros(()), amount)


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Towards the mean luma of the image or away from it; 1 changes nothing."""
    return blend(images, luma(images).mean((1, 2, 3), keepdim=True), amount)


def saturation(images: Tensor, amount: Tensor) -> Tensor:
    """Towards the image's own luma or away from it; 1 changes nothing."""
    return blend(images, luma(images), amount)


def grayscale(images: Tensor, chosen: Tensor) -> Tensor:
    """The luma in all channels, where chosen (N,) is true."""
    return torch.where(chosen[:, None, None, None], luma(images), images)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """RGB images with the hue of their HSV form moved by that part of the colour circle, -0.5..0.5; 0 changes nothing.

    Smith 1978, Color gamut transform pairs: the hexcone. Channel c of (h, s, v) is v - v s max(0, min(k, 4 - k, 1)) with
    k = (n_c + 6 h) mod 6, n = 5, 3, 1 for red, green, blue.
    """
    value, brightest = images.max(1)
    spread = value - images.amin(1)
    red, green, blue = images.unbind(1)
    divisor = spread.clamp_min(torch.finfo(images.dtype).tiny)
    sixths = torch.stack([(green - blue) / divisor, 2 + (blue - red) / divisor, 4 + (red - green) / divisor])
    turned = sixths.gather(0, brightest.unsqueeze(0)).squeeze(0) + 6 * turn[:, None, None]
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]
    k = (n + turned.unsqueeze(1)) % 6
    return value.unsqueeze(1) - spread.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)
