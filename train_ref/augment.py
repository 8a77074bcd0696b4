"""Random views of a batch, for every kind of images: what a network that follows them must come to ignore.

Every kind has one function (images (B, C, H, W), generator) -> (2B, C, H, W), floats in 0..1 or near it: first views of all
images, then second views of all images. Every view is drawn on its own. Numbers are drawn on the generator's device, so
a CPU generator gives all devices the same views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from train_ref import image_ops
from train_ref.data import as_float

Views = Callable[[Tensor, torch.Generator], Tensor]

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

    contrast, brightness = 1 + uniform(CONTRAST), uniform(BRIGHTNESS)
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images.device)
    return warped * contrast[:, None, None, None] + brightness[:, None, None, None] + NOISE * noise


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
    # All numbers in one copy to the device, for which nobody waits: it leaves the CPU before the call returns.
    drawn = torch.rand(N_DRAWN, len(images), generator=generator, device=generator.device).to(images.device, non_blocking=True)
    area, ratio, x, y, flip, jittered, bright, contrasting, saturated, hue, colourless = drawn.unbind()
    box = random_box(least_area + (1 - least_area) * area, LOG_RATIO * (2 * ratio - 1), x, y)
    views = image_ops.crop(images, *box, flip < 0.5)

    def amount(number: Tensor) -> Tensor:
        return torch.where(jittered < JITTERED, 1 + JITTER * (2 * number - 1), 1.0)

    views = image_ops.contrast(image_ops.brightness(views, amount(bright)), amount(contrasting))
    if images.shape[1] == 1:
        return views
    views = image_ops.saturation(views, amount(saturated))
    views = image_ops.hue(views, torch.where(jittered < JITTERED, HUE * (2 * hue - 1), 0.0))
    return image_ops.grayscale(views, colourless < gray)


# Gray .1 rather than SimCLR's .2: github.com/dkobak/simclr-cifar10, whose recipe the CIFAR-10 presets follow.
VIEWS: dict[str, Views] = {
    "digits": two_views,
    "fashion-mnist": partial(photo_views, least_area=0.2, gray=0.0),
    "cifar10": partial(photo_views, least_area=0.2, gray=0.1),
}
