"""Two views of every image of a batch: a network comes to ignore the difference between them.

Every kind of images has one function (images (B, C, H, W), generator) -> (2B, C, H, W'), floats in 0..1 or near it: first views of
all images, then second views of all images. Every random view is drawn on its own. Numbers are drawn on the generator's device, so a
CPU generator gives all devices the same views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from train_ref.data import as_float

Views = Callable[[Tensor, torch.Generator], Tensor]

# Changes of images, each by its own amount. Images are (N, C, H, W) floats in 0..1, amounts (N,); an amount that changes nothing is
# named. torchvision's functions of the same names are the definition, and PIL's before them; here a batch is one operation.


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


# Digits: one affine warp, then contrast, brightness and noise. No flips: they change what it says.
ROTATION = math.radians(15.0)
LOG_SCALE = 0.22
LOG_ASPECT = 0.15
SHEAR = 0.3
SHIFT = 0.2  # of half the image: 0.8 pixels
CONTRAST = 0.4
BRIGHTNESS = 0.1
NOISE = 0.1


def two_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Views of digits (B, 1, H, W)."""
    images = images.repeat(2, 1, 1, 1)
    n = len(images)

    def uniform(bound: float) -> Tensor:
        drawn = torch.rand(n, generator=generator, device=generator.device) * 2 - 1
        return drawn.to(images.device) * bound

    angle, shear, shift_x, shift_y = uniform(ROTATION), uniform(SHEAR), uniform(SHIFT), uniform(SHIFT)
    scale, aspect = uniform(LOG_SCALE).exp(), uniform(LOG_ASPECT).exp()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    row_x = torch.stack([cos * aspect, shear - sin, shift_x], dim=1)
    row_y = torch.stack([sin, cos / aspect, shift_y], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)

    gain, offset = 1 + uniform(CONTRAST), uniform(BRIGHTNESS)
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images.device)
    return warped * gain[:, None, None, None] + offset[:, None, None, None] + NOISE * noise


# Photographs, after Chen et al. 2020 (arXiv:2002.05709), appendix A and B.9, with the strengths of small images: half of
# those for ImageNet, and no blur.
LOG_RATIO = math.log(4 / 3)
JITTER = 0.4  # brightness, contrast, saturation
HUE = 0.1
JITTERED = 0.8
N_DRAWN = 11


def random_box(area: Tensor, log_ratio: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """left, top, width, height of a part with that area and that log (width / height), placed by x and y in 0..1.

    A side that would be longer than the image is cut to it.
    """
    width = (area.sqrt() * (log_ratio / 2).exp()).clamp(max=1)
    height = (area.sqrt() * (-log_ratio / 2).exp()).clamp(max=1)
    return x * (1 - width), y * (1 - height), width, height


def photo_views(images: Tensor, generator: torch.Generator, *, least_area: float, gray: float) -> Tensor:
    """Views of uint8 or float images with 1 or 3 channels: a random part, mirrored by half, then brightness and contrast,
    and for three channels saturation, hue and now and then gray.

    least_area  the smallest part of the image that a view shows; the largest is all of it
    gray        how often a view of a colour image has no colour

    Brightness, contrast, saturation and hue change 80 % of the views, in this order (torchvision draws the order).
    """
    images = as_float(images).repeat(2, 1, 1, 1)
    # All numbers go to the device in one copy that the host does not wait for: they leave the CPU before the call returns.
    drawn = torch.rand(N_DRAWN, len(images), generator=generator, device=generator.device).to(images.device, non_blocking=True)
    area, ratio, x, y, flip, jittered, bright, contrasting, saturated, turned, colourless = drawn.unbind()
    box = random_box(least_area + (1 - least_area) * area, LOG_RATIO * (2 * ratio - 1), x, y)
    views = crop(images, *box, flip < 0.5)

    def amount(number: Tensor) -> Tensor:
        return torch.where(jittered < JITTERED, 1 + JITTER * (2 * number - 1), 1.0)

    views = contrast(brightness(views, amount(bright)), amount(contrasting))
    if images.shape[1] == 1:
        return views
    views = saturation(views, amount(saturated))
    views = hue(views, torch.where(jittered < JITTERED, HUE * (2 * turned - 1), 0.0))
    return grayscale(views, colourless < gray)


# Gray .1 rather than SimCLR's .2: github.com/dkobak/simclr-cifar10, whose recipe the CIFAR-10 presets follow.
VIEWS: dict[str, Views] = {
    "digits": two_views,
    "fashion-mnist": partial(photo_views, least_area=0.2, gray=0.0),
    "cifar10": partial(photo_views, least_area=0.2, gray=0.1),
}


def halves(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The left and the right half of every image, whose width is even. Nothing is drawn at random."""
    return torch.cat(as_float(images).chunk(2, dim=3))
