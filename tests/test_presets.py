"""Recipes for photographs: ResNet-18, the presets, evaluation of many images, and the GPU's whole path on a CPU."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from train_ref.augment import VIEWS
from train_ref.data import ImageData, load_digits
from train_ref.datasets import PUBLISHED
from train_ref.evaluate import CHUNK, evaluate_encoder, evaluate_features, linear_probe, nearest_neighbours
from train_ref.implementations import DenseQueue, LossFunctions, dense_losses
from train_ref.loop import build_optimizer, train_network
from train_ref.methods import METHODS, MOCO, SIMCLR, MoCo
from train_ref.model import SIZES, build_network, resnet18
from train_ref.presets import PRESETS, preset_for
from train_ref.train import main

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def groups(network: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(network.parameters())}]


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
    optimizer = build_optimizer(groups(build_network(0, CPU)), preset)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 5e-4)


def test_presets_and_data_fit_each_other() -> None:
    assert {preset_for(preset.data) for preset in PRESETS.values()} == {"digits", "fashion-mnist-cpu", "cifar10-cpu"}
    for preset in PRESETS.values():
        assert preset.data in VIEWS and preset.network in SIZES
        assert set(preset.temperatures) == {name for name, method in METHODS.items() if preset.data in method.views}
    adam = PRESETS["fashion-mnist-cpu"]
    assert isinstance(build_optimizer(groups(build_network(0, CPU)), adam), torch.optim.AdamW)
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
    assert "accuracy of frozen features on the 10 test images" in shown
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
    assert "accuracy of frozen features on the 10 held-out training images" in capsys.readouterr().out
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
        ("--method simclr clip --data cifar10", "argument --method: clip does not train on cifar10; use it with --data digits"),
        ("--method clip --preset fashion-mnist-cpu", "argument --method: clip does not train on fashion-mnist"),
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


def test_all_methods_are_those_that_the_data_are_for(tmp_path: Path) -> None:
    write_subset(tmp_path, "fashion_sub", 30, 10)
    options = (
        f"--method all --data fashion-mnist --data-dir {tmp_path} --loss reference --quick --epochs 1 --batch-size 15 --out {tmp_path}"
    )
    assert main(options.split()) == 0
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["config"]["methods"] == ["simclr", "supcon", "moco"]


# Training ---------------------------------------------------------------------------------------------------------------------------------


def test_a_training_follows_its_preset() -> None:
    sizes = []

    def queue(size: int, dim: int, device: torch.device) -> DenseQueue:
        sizes.append((size, dim))
        return DenseQueue(size, dim, device)

    preset = replace(PRESETS["digits"], network="small", optimizer="sgd", learning_rate=0.1, warm_up=0.5, queue_size=1300)
    network, history = train_network(
        MOCO,
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
    moco = MoCo(network, dense_losses(), 0.5, replace(preset, momentum=0.75), generator())
    before = [weight.clone() for weight in moco.key_network.parameters()]
    moco.loss(VIEWS["digits"](load_digits().images[:2], generator()), torch.zeros(2))
    moco.after_step()
    for weight, old, own in zip(moco.key_network.parameters(), before, network.parameters(), strict=True):
        assert torch.allclose(weight, torch.lerp(old, own, 0.25), atol=1e-7)


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
        SIMCLR, dense_losses(), data, seed=0, temperature=0.5, epochs=8, batch_size=64, on_epoch=lambda history: None, preset=preset
    )
    assert history.epochs[-1].loss < history.epochs[0].loss - 0.5
    assert evaluate_encoder(network.encoder, data).one_shot > before.one_shot
