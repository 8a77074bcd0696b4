"""Random views of digits: one affine warp, then contrast, brightness and noise. No flips: they change what it says."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = math.radians(15.0)
LOG_SCALE = 0.22
LOG_ASPECT = 0.15
SHEAR = 0.3
SHIFT = 0.2  # of half the image: 0.8 pixels
CONTRAST = 0.4
BRIGHTNESS = 0.1
NOISE = 0.1


def two_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1, H, W) -> (2B, 1, H, W): first views of all images, then second views of all images.

    Every view has its own warp. Numbers are drawn on the generator's device, so a CPU generator serves a GPU alike.
    """
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
