"""Views of photographs: every change of an image against a loop, and how often views are changed."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from torch import Tensor

from train_ref import augment
from train_ref.augment import HUE, JITTER, LOG_RATIO, VIEWS, photo_views, random_box


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def colour_images(n: int, size: int = 6) -> Tensor:
    return torch.rand(n, 3, size, size, generator=generator())


# Changes of images ------------------------------------------------------------------------------------------------------------------------


def box(*sides: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([side]) for side in sides)


def hand_crop(image: Tensor, left: float, top: float, width: float, height: float, flip: bool) -> Tensor:
    """Bilinear between the centres of the pixels, which lie at half-integers; beyond the outermost centre, its value."""
    channels, rows, columns = image.shape
    found = torch.empty_like(image)
    for c in range(channels):
        for i in range(rows):
            for j in range(columns):
                across = (j + 0.5) / columns
                x = (left + width * (1 - across if flip else across)) * columns - 0.5
                y = (top + height * (i + 0.5) / rows) * rows - 0.5
                x, y = min(max(x, 0), columns - 1), min(max(y, 0), rows - 1)
                x0, y0 = min(int(x), columns - 2), min(int(y), rows - 2)
                fx, fy = x - x0, y - y0
                above = (1 - fx) * image[c, y0, x0] + fx * image[c, y0, x0 + 1]
                below = (1 - fx) * image[c, y0 + 1, x0] + fx * image[c, y0 + 1, x0 + 1]
                found[c, i, j] = (1 - fy) * above + fy * below
    return found


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sides", [(0.1, 0.3, 0.5, 0.6), (0.0, 0.0, 0.45, 1.0), (0.55, 0.2, 0.45, 0.8)])
def test_crop_is_a_bilinear_part(sides: tuple[float, float, float, float], flip: bool) -> None:
    image = colour_images(1)
    found = augment.crop(image, *box(*sides), torch.tensor([flip]))
    assert torch.allclose(found[0], hand_crop(image[0], *sides, flip), atol=2e-6)


def test_the_whole_image_is_itself_or_its_mirror_image() -> None:
    images = colour_images(2)
    whole = (torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2))
    found = augment.crop(images, *whole, torch.tensor([False, True]))
    assert torch.allclose(found[0], images[0], atol=1e-6)
    assert torch.allclose(found[1], images[1].flip(2), atol=1e-6)


def test_every_image_has_its_own_crop() -> None:
    images = colour_images(1).repeat(2, 1, 1, 1)
    left, top, width, height = torch.tensor([[0.0, 0.5], [0.25, 0.0], [0.5, 0.5], [0.5, 0.75]])
    found = augment.crop(images, left, top, width, height, torch.tensor([False, False]))
    for i in range(2):
        alone = augment.crop(images[i : i + 1], left[i : i + 1], top[i : i + 1], width[i : i + 1], height[i : i + 1], torch.tensor([False]))
        assert torch.allclose(found[i], alone[0], atol=1e-6)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.03, 0.1, 0.4])
def test_hue_is_that_of_hsv(turn: float) -> None:
    images = colour_images(4)
    images[0, :, 0, 0] = 0.3  # gray: has no hue
    images[0, :, 0, 1] = 0.0
    images[0, :, 0, 2] = torch.tensor([0.2, 0.7, 0.7])  # two brightest channels
    found = augment.hue(images, torch.full((4,), turn))
    for image, turned in zip(images.permute(0, 2, 3, 1).reshape(-1, 3), found.permute(0, 2, 3, 1).reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*image.tolist())
        assert turned.tolist() == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), abs=2e-6)


def test_brightness_contrast_and_saturation_of_one_pixel_after_the_other() -> None:
    images, amount = colour_images(3), torch.tensor([0.6, 1.4, 1.0])
    bright, contrasting, saturated = (op(images, amount) for op in (augment.brightness, augment.contrast, augment.saturation))
    for n, factor in enumerate(amount.tolist()):
        gray = [[sum(w * images[n, c, i, j].item() for c, w in enumerate((0.299, 0.587, 0.114))) for j in range(6)] for i in range(6)]
        middle = float(np.mean(gray))
        for c in range(3):
            for i in range(6):
                for j in range(6):
                    value = images[n, c, i, j].item()
                    for found, other in ((bright, 0.0), (contrasting, middle), (saturated, gray[i][j])):
                        expected = min(max(factor * value + (1 - factor) * other, 0.0), 1.0)
                        assert found[n, c, i, j].item() == pytest.approx(expected, abs=1e-6)


def test_grayscale_of_the_chosen() -> None:
    images = colour_images(2)
    found = augment.grayscale(images, torch.tensor([True, False]))
    assert torch.equal(found[1], images[1])
    assert torch.equal(found[0, 0], found[0, 1]) and torch.equal(found[0, 0], found[0, 2])
    assert torch.allclose(found[0, 0], images[0, 0] * 0.299 + images[0, 1] * 0.587 + images[0, 2] * 0.114, atol=1e-6)


# Views ------------------------------------------------------------------------------------------------------------------------------------


def test_boxes_have_the_area_and_shape_that_were_drawn_and_lie_inside() -> None:
    drawn = torch.rand(4, 1000, generator=generator())
    area, log_ratio = 0.2 + 0.8 * drawn[0], LOG_RATIO * (2 * drawn[1] - 1)
    left, top, width, height = random_box(area, log_ratio, drawn[2], drawn[3])
    free = (width < 1) & (height < 1)
    assert 500 < free.sum() < 1000  # some were cut to the image
    assert torch.allclose((width * height)[free], area[free], atol=1e-5)
    assert torch.allclose((width / height).log()[free], log_ratio[free], atol=1e-5)
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 1 + 1e-6).all() and (top + height <= 1 + 1e-6).all()
    assert left.min() < 0.01 and (left + width).max() > 0.99


@pytest.mark.parametrize(("data", "channels"), [("fashion-mnist", 1), ("cifar10", 3)])
def test_views_are_distinct_reproducible_and_in_order(data: str, channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 12, 12), generator=generator(), dtype=torch.uint8)
    views = VIEWS[data](images, generator(1))
    assert views.shape == (10, channels, 12, 12)
    assert views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1
    assert not torch.equal(views[:5], views[5:])
    assert torch.equal(views, VIEWS[data](images, generator(1)))
    assert not torch.equal(views, VIEWS[data](images, generator(2)))
    # First views of all images, then second views: the same image four rows on would be no pair.
    plain = torch.arange(0, 250, 50, dtype=torch.uint8)[:, None, None, None].expand(5, channels, 12, 12)
    means = photo_views(plain, generator(1), least_area=0.2, gray=0.0).mean((1, 2, 3)).view(2, 5)
    assert torch.allclose(means, plain[:, 0, 0, 0] / 255, rtol=JITTER, atol=0.01)


def test_how_often_views_are_mirrored_changed_and_without_colour() -> None:
    """Of 2000 views of an image with two halves of different hue; 4 standard deviations are 4.5 points at most."""
    left, right = (0.6, 0.4, 0.5), (0.4, 0.6, 0.5)  # so far from 0 and 1 that nothing is cut off, which would move the hue
    image = torch.tensor([left] * 4 + [right] * 4).T[None, :, None, :].expand(1000, 3, 8, 8)
    views = photo_views(image, generator(), least_area=0.999, gray=0.1)
    colourless = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-3
    assert colourless.float().mean().item() == pytest.approx(0.1, abs=0.03)
    coloured = views[~colourless]
    mirrored = coloured[:, 0, 4, 0] - coloured[:, 1, 4, 0] < coloured[:, 0, 4, 7] - coloured[:, 1, 4, 7]
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.045)
    corner = torch.where(mirrored[:, None], coloured[:, :, 4, 7], coloured[:, :, 4, 0])  # the corner that was the left one
    changed = (corner - torch.tensor(left)).abs().amax(1) > 1e-3
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.04)
    moved = [(colorsys.rgb_to_hsv(*colour)[0] - colorsys.rgb_to_hsv(*left)[0] + 0.5) % 1 - 0.5 for colour in corner.tolist()]
    assert max(moved) == pytest.approx(HUE, abs=0.005) and min(moved) == pytest.approx(-HUE, abs=0.005)
