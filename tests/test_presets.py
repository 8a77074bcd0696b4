"""Recipes for photographs: every change of an image against a loop, ResNet-18, the presets, and the GPU's whole path on a CPU."""

from __future__ import annotations

import colorsys
import gzip
import hashlib
import json
import math
import os
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train_ref import image_ops, results
from train_ref.augment import HUE, JITTER, LOG_RATIO, VIEWS, photo_views, random_box
from train_ref.data import ImageData, load_digits
from train_ref.datasets import PUBLISHED
from train_ref.evaluate import CHUNK, evaluate_encoder, evaluate_features, linear_probe, nearest_neighbours
from train_ref.implementations import DenseQueue, LossFunctions, dense_losses
from train_ref.loop import build_optimizer, train_network
from train_ref.methods import TITLES, MoCo, build_method
from train_ref.model import SIZES, build_network
from train_ref.presets import PRESETS, preset_for
from train_ref.resnet import resnet18
from train_ref.train import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    found = image_ops.crop(image, *box(*sides), torch.tensor([flip]))
    assert torch.allclose(found[0], hand_crop(image[0], *sides, flip), atol=2e-6)


def test_the_whole_image_is_itself_or_its_mirror_image() -> None:
    images = colour_images(2)
    whole = (torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2))
    found = image_ops.crop(images, *whole, torch.tensor([False, True]))
    assert torch.allclose(found[0], images[0], atol=1e-6)
    assert torch.allclose(found[1], images[1].flip(2), atol=1e-6)


def test_every_image_has_its_own_crop() -> None:
    images = colour_images(1).repeat(2, 1, 1, 1)
    left, top, width, height = torch.tensor([[0.0, 0.5], [0.25, 0.0], [0.5, 0.5], [0.5, 0.75]])
    found = image_ops.crop(images, left, top, width, height, torch.tensor([False, False]))
    for i in range(2):
        alone = image_ops.crop(
            images[i : i + 1], left[i : i + 1], top[i : i + 1], width[i : i + 1], height[i : i + 1], torch.tensor([False])
        )
        assert torch.allclose(found[i], alone[0], atol=1e-6)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.03, 0.1, 0.4])
def test_hue_is_that_of_hsv(turn: float) -> None:
    images = colour_images(4)
    images[0, :, 0, 0] = 0.3  # gray: has no hue
    images[0, :, 0, 1] = 0.0
    images[0, :, 0, 2] = torch.tensor([0.2, 0.7, 0.7])  # two brightest channels
    found = image_ops.hue(images, torch.full((4,), turn))
    for image, turned in zip(images.permute(0, 2, 3, 1).reshape(-1, 3), found.permute(0, 2, 3, 1).reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*image.tolist())
        assert turned.tolist() == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), abs=2e-6)


def test_brightness_contrast_and_saturation_of_one_pixel_after_the_other() -> None:
    images, amount = colour_images(3), torch.tensor([0.6, 1.4, 1.0])
    bright, contrasting, saturated = (op(images, amount) for op in (image_ops.brightness, image_ops.contrast, image_ops.saturation))
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
    found = image_ops.grayscale(images, torch.tensor([True, False]))
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
    corner = torch.where(mirrored[:, None], coloured[:, :, 4, 7], coloured[:, :, 4, 0])  # what was left
    changed = (corner - torch.tensor(left)).abs().amax(1) > 1e-3
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.04)
    moved = [(colorsys.rgb_to_hsv(*colour)[0] - colorsys.rgb_to_hsv(*left)[0] + 0.5) % 1 - 0.5 for colour in corner.tolist()]
    assert max(moved) == pytest.approx(HUE, abs=0.005) and min(moved) == pytest.approx(-HUE, abs=0.005)


# Networks and presets ---------------------------------------------------------------------------------------------------------------------


def test_resnet_18_has_its_known_size() -> None:
    encoder = resnet18(3)
    # torchvision's 11,689,512 less the classifier's 513,000 and (7 x 7 - 3 x 3) x 3 x 64 of the first convolution.
    assert sum(weight.numel() for weight in encoder.parameters()) == 11_689_512 - 513_000 - 7_680
    assert sum(isinstance(module, nn.Conv2d) for module in encoder.modules()) == 20
    assert not any(isinstance(module, nn.MaxPool2d) for module in encoder.modules())
    sizes = []
    for module in encoder:
        module.register_forward_hook(lambda module, given, found: sizes.append(tuple(found.shape[1:])))
    encoder.eval()(torch.zeros(1, 3, 32, 32))
    assert sizes[:2] == [(64, 32, 32)] * 2
    assert sizes[2:] == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2 + [(512, 1, 1), (512,)]


def test_a_block_adds_its_input() -> None:
    block = resnet18(3)[2].eval()
    for norm in (block.first[1], block.second[1]):
        nn.init.zeros_(norm.weight)
    x = torch.randn(2, 64, 4, 4, generator=generator())
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("name", ["small", "resnet18"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_networks_take_both_kinds_of_images(name: str, channels: int, size: int) -> None:
    network = build_network(0, CPU, name, channels)
    images = torch.rand(2, channels, size, size)
    features, hidden, embedding = SIZES[name]
    assert network.encoder(images).shape == (2, features)
    assert network(images).shape == (2, embedding)
    assert network.head[0].weight.shape == (hidden, features)
    assert SIZES["resnet18"] == (512, 1024, 128)


def test_autocast_computes_in_bfloat16_and_gives_float32() -> None:
    images = torch.rand(4, 1, 28, 28)
    exact, rounded = (build_network(0, CPU, "small", 1, autocast) for autocast in (False, True))
    seen = []
    rounded.encoder[0].register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    found, expected = rounded(images), exact(images)
    assert seen == [torch.bfloat16]
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert {weight.dtype for weight in rounded.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["fashion-mnist-gpu", "cifar10-gpu"])
def test_the_gpu_presets_are_the_published_recipe(name: str) -> None:
    preset = PRESETS[name]
    assert (preset.network, preset.optimizer, preset.epochs, preset.batch_size) == ("resnet18", "sgd", 100, 512)
    assert preset.peak_learning_rate(512) == pytest.approx(0.12) and preset.peak_learning_rate(256) == pytest.approx(0.06)
    assert preset.temperatures == {"simclr": 0.5, "supcon": 0.1, "moco": 0.1}
    assert (preset.queue_size, preset.momentum, preset.weight_decay) == (4096, 0.99, 5e-4)
    assert preset.bfloat16 and preset.device == "cuda"
    optimizer = build_optimizer(build_network(0, CPU), preset)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 5e-4)


def test_presets_and_data_fit_each_other() -> None:
    assert {preset_for(preset.data) for preset in PRESETS.values()} == {"digits", "fashion-mnist-cpu", "cifar10-cpu"}
    for preset in PRESETS.values():
        assert preset.data in VIEWS and preset.network in SIZES and set(preset.temperatures) == set(TITLES)
    adam = PRESETS["fashion-mnist-cpu"]
    assert isinstance(build_optimizer(build_network(0, CPU), adam), torch.optim.AdamW)
    assert adam.peak_learning_rate(512) == adam.learning_rate


# Evaluation of many images ----------------------------------------------------------------------------------------------------------------


def test_neighbours_in_chunks_are_those_of_all_at_once() -> None:
    train, test = torch.randn(300, 8, generator=generator()), torch.randn(2 * CHUNK + 3, 8, generator=generator(1))
    labels = torch.arange(300) % 7
    found = nearest_neighbours(train, labels, test, 7)
    assert found.shape == (2 * CHUNK + 3,)
    for n in (0, CHUNK - 1, CHUNK, 2 * CHUNK + 2):
        cosine = nn.functional.cosine_similarity(train, test[n : n + 1])
        votes = [0.0] * 7
        for index in cosine.argsort(descending=True)[:20].tolist():
            votes[labels[index]] += math.exp(cosine[index].item() / 0.1)
        assert found[n].item() == votes.index(max(votes))


def test_the_probe_does_not_depend_on_the_unit_of_the_features() -> None:
    """Untrained networks have small features: a penalty that saw their unit would flatter every trained network beside them."""
    labels = torch.arange(600) % 10
    features = torch.randn(10, 16, generator=generator())[labels] + 2 * torch.randn(600, 16, generator=generator(1))
    data = ImageData("cifar10", torch.zeros(600, 3, 1, 1), labels, 400, 10, "made here", (50_000, 10_000))
    found, smaller = evaluate_features(features, data), evaluate_features(features * 2**-10, data)
    assert found == smaller
    assert 0.4 < found.linear < 0.9
    as_they_are = replace(data, unit_features=False)
    assert evaluate_features(features * 2**-10, as_they_are).linear != evaluate_features(features, as_they_are).linear
    assert not load_digits().unit_features


def test_the_linear_probe_reaches_the_minimum() -> None:
    """The gradient of its objective vanishes, so its boundary is that of a solver run to the end."""
    train, test = torch.randn(200, 5, generator=generator()), torch.randn(4000, 5, generator=generator(1))
    labels = (train @ torch.randn(5, 3, generator=generator(2)) + 2 * torch.randn(200, 3, generator=generator(3))).argmax(1)
    weight = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.cat([train.double(), torch.ones(200, 1)], dim=1)
    for _ in range(3000):
        value = nn.functional.cross_entropy(rows @ weight, labels) + weight[:5].square().sum() / 400
        (slope,) = torch.autograd.grad(value, weight)
        with torch.no_grad():
            weight -= 0.5 * slope
    assert slope.norm() < 1e-6
    expected = (torch.cat([test.double(), torch.ones(4000, 1)], dim=1) @ weight).argmax(1)
    assert (linear_probe(train, labels, test, 3) == expected).float().mean() > 0.999


# The command ------------------------------------------------------------------------------------------------------------------------------


def write_subset(folder: Path, name: str, n_train: int, n_test: int) -> None:
    """Ten classes of noise around ten patterns, as npz subsets of either data set."""
    rng = np.random.default_rng(0)
    n, shape = n_train + n_test, (3, 32, 32) if name == "cifar10_sub" else (28, 28)
    labels = (np.arange(n) % 10).astype(np.uint8)
    images = np.clip(rng.normal(128, 50, (10, *shape))[labels] + rng.normal(0, 20, (n, *shape)), 0, 255).astype(np.uint8)
    split = np.repeat(np.array([0, 2], np.uint8), (n_train, n_test))
    if name == "cifar10_sub":
        planes = images.copy()
        planes[:, [0, 2]] -= images[:, 1:2]
        coded = np.diff(np.diff(planes, axis=3, prepend=np.uint8(0)), axis=2, prepend=np.uint8(0))
        np.savez(folder / name, r=coded.transpose(1, 0, 2, 3), y=labels, split=split)
    else:
        np.savez(folder / name, x=images, y=labels, split=split)


@pytest.mark.slow
def test_the_gpu_preset_from_end_to_end_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ResNet-18 under bf16 autocast, channels_last, SGD, without and with a queue: two steps each."""
    write_subset(tmp_path, "cifar10_sub", 20, 10)
    options = f"--preset cifar10-gpu --device cpu --data-dir {tmp_path} --method simclr moco --seeds 1 --epochs 1 --batch-size 8"
    assert main([*options.split(), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "cifar10: 20 training images and 10 test images (a subset: the whole has 50000 and 10000), from cifar10_sub.npz" in shown
    assert "accuracy on the 10 test images" in shown
    text = (tmp_path / "out" / "result.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    result = json.loads(text)
    assert result["data"]["subset"] and result["data"]["source"] == "cifar10_sub.npz"
    written = hashlib.sha256((tmp_path / "cifar10_sub.npz").read_bytes()).hexdigest()
    assert result["data"]["files"] == {"cifar10_sub.npz": written} and result["data"]["unpublished"] == []
    assert "not the published file" not in shown
    config = result["config"]
    assert (config["preset"], config["network"], config["optimizer"], config["bfloat16"]) == ("cifar10-gpu", "resnet18", "sgd", True)
    assert (config["epochs"], config["batch_size"], config["queue_size"]) == (1, 8, 4096)
    assert config["learning_rate"] == pytest.approx(0.06 * 8 / 256)
    first = {run["method"]: run["step_losses"] for run in result["runs"]}
    assert [len(losses) for losses in first.values()] == [2, 2]
    # Views of one image are hardly told from 15 others yet, but from 4096 random keys they are.
    assert abs(first["simclr"][0] - math.log(15)) < 0.5
    assert first["moco"][0] < math.log(4097)
    assert (tmp_path / "out" / "result.png").stat().st_size > 10_000


def test_data_alone_picks_its_cpu_preset_and_options_change_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_subset(tmp_path, "fashion_sub", 60, 20)
    options = (
        f"--data fashion-mnist --data-dir {tmp_path}/fashion_sub.npz --loss reference --seeds 1 --epochs 2 --batch-size 25 --held-out 10"
    )
    assert main([*options.split(), "--learning-rate", "0.01", "--temperature", "0.3", "--out", str(tmp_path / "out")]) == 0
    assert "accuracy on the 10 held-out training images" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["config"]["preset"] == "fashion-mnist-cpu"
    assert result["config"]["temperatures"] == {"simclr": 0.3}
    assert result["config"]["learning_rate"] == 0.01
    assert (result["data"]["training_images"], result["data"]["held_out"]) == (50, True)
    assert len(result["runs"][0]["step_losses"]) == 4


def test_a_file_that_is_not_the_published_one_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, names = np.random.default_rng(0), list(PUBLISHED["fashion-mnist"].files)
    for i, n in enumerate((30, 12)):
        images = bytes([0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, 28, 0, 0, 0, 28]) + rng.bytes(n * 28 * 28)
        labels = bytes([0, 0, 8, 1, 0, 0, 0, n]) + bytes(j % 10 for j in range(n))
        for name, content in zip(names[2 * i :], (images, labels), strict=False):
            (tmp_path / name).write_bytes(gzip.compress(content))
    options = f"--data fashion-mnist --data-dir {tmp_path} --loss reference --seeds 1 --epochs 1 --batch-size 10 --out {tmp_path}/out"
    assert main(options.split()) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} is not the published file: it has another md5\n" in shown for name in names)
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["data"]["unpublished"] == names and list(result["data"]["files"]) == names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--preset cifar10-gpu --data fashion-mnist", "argument --data: preset cifar10-gpu is for cifar10, not fashion-mnist"),
        ("--preset cifar100", "argument --preset: invalid choice: 'cifar100'"),
        ("--data fashion-mnist", "argument --data-dir: no folder given. Fashion-MNIST is"),
        (
            "--data cifar10 --data-dir {tmp}",
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz  md5 c58f30108f718f92721af3b95e74349a",
        ),
        ("--data fashion-mnist --data-dir {tmp}/broken.npz", "broken.npz is damaged or no subset"),
        ("--learning-rate 0", "argument --learning-rate: '0' is not a positive number"),
        ("--method clip simclr", "argument --method: clip trains two towers on pairs, the others one network on images; run it alone"),
        ("--method clip all", "argument --method: clip trains two towers"),
        ("--meth clip", "unrecognized arguments: --meth clip"),
        ("--meth simclr", "unrecognized arguments: --meth simclr"),
    ],
)
def test_bad_options_are_named(arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.npz").write_bytes(b"broken")
    with pytest.raises(SystemExit) as left:
        main([*arguments.format(tmp=tmp_path).split(), "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_clip_is_handed_over_with_the_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    pairs = types.ModuleType("train_ref.train_pairs")
    pairs.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "train_ref.train_pairs", pairs)
    monkeypatch.setattr("train_ref.train_pairs", pairs, raising=False)
    assert main(["--seeds", "2", "--method", "clip", "--data", "emoji", "--help"]) == 7
    assert main(["--method=clip"]) == 7
    assert seen == [["--seeds", "2", "--data", "emoji", "--help"], []]


# Training ---------------------------------------------------------------------------------------------------------------------------------


def test_a_training_follows_its_preset() -> None:
    sizes = []

    def queue(size: int, dim: int, device: torch.device) -> DenseQueue:
        sizes.append((size, dim))
        return DenseQueue(size, dim, device)

    preset = replace(PRESETS["digits"], network="small", optimizer="sgd", learning_rate=0.1, warm_up=0.5, queue_size=1300)
    network, history = train_network(
        "moco",
        LossFunctions("reference", dense_losses().losses, queue),
        load_digits(),
        seed=0,
        temperature=0.5,
        epochs=2,
        batch_size=648,
        on_epoch=lambda history: None,
        preset=preset,
    )
    assert sizes == [(1300, network.embedding)]
    assert network.embedding == 128
    assert [epoch.lr for epoch in history.epochs] == pytest.approx([0.1 * 648 / 256, 0.1 * 648 / 256 / 2])
    moco = build_method("moco", network, dense_losses(), 0.5, generator(), 1300, 0.75)
    assert isinstance(moco, MoCo) and moco.momentum == 0.75


def test_training_on_photographs_tells_classes_apart(tmp_path: Path) -> None:
    """Ten patterns under noise, cropped and mirrored: without labels, in 24 steps."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 1, 4, 4)).repeat(7, 2).repeat(7, 3)
    labels = torch.arange(300) % 10
    images = torch.from_numpy(np.clip(patterns[labels] + rng.normal(0, 60, (300, 1, 28, 28)), 0, 255).astype(np.uint8))
    data = ImageData("fashion-mnist", images, labels, 200, 10, "made here", (60_000, 10_000))
    preset = PRESETS["fashion-mnist-cpu"]
    before = evaluate_encoder(build_network(0, CPU, preset.network).encoder, data)
    network, history = train_network(
        "simclr", dense_losses(), data, seed=0, temperature=0.5, epochs=8, batch_size=64, on_epoch=lambda history: None, preset=preset
    )
    assert history.epochs[-1].loss < history.epochs[0].loss - 0.5
    assert evaluate_encoder(network.encoder, data).one_shot > before.one_shot


# Recorded results -------------------------------------------------------------------------------------------------------------------------

IMAGES = {
    "data": {"described": "cifar10: 20 training images", "files": {"c.npz": "1f"}},
    "config": {
        "preset": "cifar10-gpu",
        "learning_rate": 0.12,
        "temperatures": {"simclr": 0.5, "moco": 0.1},
        "backend": None,
        "seeds": [0, 1],
    },
    "versions": {"torch": "2.13.0"},
    "seconds": 12.3,
    "cpu_seconds": 10.6,
    "summary": [
        {"row": "raw pixels", "knn_20": {"mean": 0.5, "sd": None}},
        {"row": "SimCLR, fused", "knn_20": {"mean": 0.61234, "sd": 0.0071}, "linear": {"mean": 0.7, "sd": 0.0}},
    ],
}
PAIRS = {
    "config": {"data": "emoji", "loss": "fused", "left": "image", "right": "name", "seeds": [0]},
    "versions": {"torch": "2.13.0"},
    "seconds": 1,
    "cpu_seconds": 1,
    "summary": [{"row": "CLIP", "left_to_right_r1": {"mean": 0.25, "sd": None}, "right_to_left_new": {"mean": 0.2, "sd": None}}],
}
EXPECTED = """before
<!-- results:begin (generated) -->

### emoji

data emoji. In %, mean ± standard deviation; seeds 0.

| | image → name, R@1 | name → image, new |
|---|--:|--:|
| CLIP | 25.0 | 20.0 |

loss fused; torch 2.13.0; 1 CPU s, 1 s for all of it.

### images

cifar10: 20 training images. In %, mean ± standard deviation; seeds 0, 1.

| | kNN-20 | linear probe |
|---|--:|--:|
| raw pixels | 50.0 |  |
| SimCLR, fused | 61.2 ± 0.7 | 70.0 ± 0.0 |

preset cifar10-gpu; learning rate 0.12; temperatures simclr 0.5, moco 0.1; c.npz sha256 1f; torch 2.13.0; 11 CPU s, 12 s for all of it.

<!-- results:end -->
after
"""


def test_recorded_runs_become_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, result in (("images", IMAGES), ("emoji", PAIRS), ("no-run", {"schema": 1})):
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n", encoding="utf-8")
    assert results.main(["--check"], page, tmp_path) == 1
    assert "page.md is not what" in capsys.readouterr().err
    assert "old" in page.read_text(encoding="utf-8")
    assert results.main([], page, tmp_path) == 0
    assert page.read_text(encoding="utf-8") == EXPECTED
    assert results.main(["--check"], page, tmp_path) == 0
    with pytest.raises(ValueError, match="once each and in this order"):
        results.render(f"{results.END} {results.BEGIN}", tmp_path)


def test_the_page_says_what_the_recorded_runs_say() -> None:
    assert results.main(["--check"]) == 0


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_recorded_runs_name_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<!\w)[/~]\w|[A-Z]:\\", text), "an absolute path"
    assert os.uname().nodename not in text
