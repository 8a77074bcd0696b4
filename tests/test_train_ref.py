"""The reference runs: dense losses against hand loops, honest evaluation, and the script from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train_ref.augment import two_views
from train_ref.data import DIGITS, N_CLASSES, N_TRAIN, load_digits
from train_ref.evaluate import evaluate_encoder, evaluate_features
from train_ref.implementations import DenseQueue, dense_losses
from train_ref.loop import LEARNING_RATE, History, learning_rate, train_network
from train_ref.methods import METHODS, MoCo
from train_ref.model import EMBEDDING, FEATURES, build_network
from train_ref.presets import DIGITS as PRESET
from train_ref.train import main
from train_ref.truth import losses

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train_ref" / "train.py"
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# Data, views, methods ------------------------------------------------------------------------------------------------


def test_the_digits() -> None:
    digits = load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert (digits.images.min().item(), digits.images.max().item()) == (0.0, 1.0)
    assert digits.labels[:N_TRAIN].bincount().tolist() == [128, 131, 128, 132, 130, 131, 130, 129, 128, 130]
    assert digits.labels[N_TRAIN:].bincount().tolist() == [50, 51, 49, 51, 51, 51, 51, 50, 46, 50]


def test_a_damaged_or_missing_file_is_refused(tmp_path: Path) -> None:
    content = bytearray(DIGITS.read_bytes())
    content[5000] ^= 1
    damaged = tmp_path / "digits.npz"
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"digits\.npz is damaged or another file: its sha256 is"):
        load_digits(damaged)
    with pytest.raises(FileNotFoundError, match=r"none\.npz is missing; train_ref/data/README\.md"):
        load_digits(tmp_path / "none.npz")


def test_views_are_distinct_and_reproducible() -> None:
    images = load_digits().images[:5]
    views = two_views(images, torch.Generator().manual_seed(0))
    assert views.shape == (10, 1, 8, 8)
    assert not torch.equal(views[:5], views[5:])
    assert torch.equal(views, two_views(images, torch.Generator().manual_seed(0)))
    # A view of a digit is still nearer to it than to the mean of the five, on average over many views.
    many = torch.stack([two_views(images, torch.Generator().manual_seed(seed))[:5] for seed in range(40)]).mean(0)
    assert torch.cdist(many.flatten(1), images.flatten(1)).argmin(1).tolist() == [0, 1, 2, 3, 4]


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([LEARNING_RATE * (step + 1) / 10 for step in range(10)])
    assert max(rates) == rates[9] == rates[10]
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] < 1e-3 * LEARNING_RATE
    assert learning_rate(0, 1) == LEARNING_RATE


def test_the_queue_keeps_the_last_keys() -> None:
    queue = DenseQueue(5, 1, CPU)
    for start in (1, 4, 7):
        queue.enqueue(torch.arange(start, start + 3).view(3, 1).float())
    assert sorted(queue.keys.flatten().tolist()) == [5, 6, 7, 8, 9]


def test_moco_follows_slowly_and_queues_its_keys() -> None:
    network = build_network(0, CPU)
    moco = MoCo(network, dense_losses(), 0.5, PRESET, torch.Generator().manual_seed(0))
    views = two_views(load_digits().images[:4], torch.Generator().manual_seed(0))
    start = moco.queue.keys.clone()
    loss = moco.loss(views, torch.zeros(4))
    with torch.no_grad():
        (q0, q1), (k0, k1) = network(views).chunk(2), moco.key_network(views).chunk(2)
        expected = (losses.moco_loss(q0, k1, start, 0.5).mean() + losses.moco_loss(q1, k0, start, 0.5).mean()) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert all(weight.grad is None for weight in moco.key_network.parameters())
    before = [weight.clone() for weight in moco.key_network.parameters()]
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(1)
    moco.after_step()
    for key_weight, old in zip(moco.key_network.parameters(), before, strict=True):
        assert torch.allclose(key_weight - old, torch.full_like(old, 1 - PRESET.momentum), atol=1e-6)
    assert moco.queue.keys.shape == (PRESET.queue_size, EMBEDDING)
    assert torch.equal(moco.queue.keys[:8], moco.keys)
    assert torch.equal(moco.queue.keys[8:], start[8:])


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_raw_pixels_score_what_is_known_of_them() -> None:
    digits = load_digits()
    found = evaluate_features(digits.images.flatten(1), digits)
    assert found.knn_20 == pytest.approx(0.956, abs=0.003)
    # scikit-learn's LogisticRegression(C=1) reaches 0.916 on this split.
    assert found.linear == pytest.approx(0.916, abs=0.004)
    assert found.one_shot == pytest.approx(0.62, abs=0.02)


def test_perfect_and_useless_features() -> None:
    digits = load_digits()
    noise = torch.randn(len(digits.labels), N_CLASSES, generator=torch.Generator().manual_seed(0))
    perfect = evaluate_features(nn.functional.one_hot(digits.labels, N_CLASSES) + 0.01 * noise, digits)
    assert (perfect.knn_20, perfect.linear, perfect.one_shot) == (1.0, 1.0, 1.0)
    useless = evaluate_features(noise, digits)
    assert max(useless.knn_20, useless.linear, useless.one_shot) < 0.2


def test_evaluation_leaves_the_encoder_as_it_was() -> None:
    encoder = build_network(0, CPU).encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    evaluate_encoder(encoder, load_digits())
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(weight.grad is None for weight in encoder.parameters())


class StillTraining(nn.BatchNorm2d):
    """Updates its running statistics even in eval mode."""

    def train(self, mode: bool = True) -> StillTraining:
        return super().train(True)


def test_evaluation_that_changes_the_encoder_raises() -> None:
    encoder = nn.Sequential(StillTraining(1), nn.Flatten())
    with pytest.raises(RuntimeError, match=r"evaluation changed the encoder \(0\.running_mean, 0\.running_var"):
        evaluate_encoder(encoder, load_digits())


class ZeroTurnsNegative(nn.Module):
    """A buffer keeps its value, but not its bits."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.zero.fill_(-0.0)
        return images.flatten(1)


def test_not_one_bit_may_change() -> None:
    with pytest.raises(RuntimeError, match=r"evaluation changed the encoder \(zero\)"):
        evaluate_encoder(ZeroTurnsNegative(), load_digits())


# Training ------------------------------------------------------------------------------------------------------------


def train(method: str, seed: int, epochs: int = 1) -> tuple[Any, History]:
    return train_network(
        METHODS[method],
        dense_losses(),
        load_digits(),
        seed=seed,
        temperature=0.5,
        epochs=epochs,
        batch_size=256,
        on_epoch=lambda history: None,
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_run(method: str) -> None:
    (network, history), (again, history_again), (_, other) = train(method, 0), train(method, 0), train(method, 1)
    assert len(history.step_losses) == 5
    assert history.step_losses == history_again.step_losses
    assert history.order_sha256 == history_again.order_sha256
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert history.step_losses != other.step_losses
    assert history.order_sha256 != other.order_sha256


def test_training_makes_features_that_need_fewer_labels() -> None:
    digits = load_digits()
    network, history = train("simclr", 0, epochs=8)
    assert history.epochs[-1].loss < history.epochs[0].loss - 0.5
    assert evaluate_encoder(network.encoder, digits).one_shot > 0.68  # raw pixels: 0.62


# The script ----------------------------------------------------------------------------------------------------------


def test_fused_and_reference_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    arguments = ["--quick", "--epochs", "1", "--loss", "both", "--method", "all", "--out", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out

    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert os.uname().nodename not in text
    result = json.loads(text)
    assert set(result) == {
        "schema",
        "data",
        "config",
        "versions",
        "seconds",
        "cpu_seconds",
        "summary",
        "comparisons",
        "baselines",
        "runs",
    }
    assert set(result["versions"]) == {"python", "numpy", "torch", "fastnce"}
    assert result["data"]["described"] == "digits: 1297 training images and 500 test images, from data/digits.npz"
    assert result["config"]["preset"] == "digits"
    assert result["config"]["seeds"] == [0]
    assert result["config"]["backend"] == "torch"
    assert result["config"]["temperatures"] == {"simclr": 0.5, "supcon": 0.1, "moco": 0.5, "clip": 0.1}
    labels = [row["row"] for row in result["summary"]]
    trained = [f"{name}, {loss}" for name in ("SimCLR", "SupCon", "MoCo") for loss in ("fused", "reference")]
    towers = [f"CLIP, {loss}" for loss in ("fused", "reference")]
    assert labels == ["raw pixels", "random network", *trained, "chance", "untrained towers", *towers]
    assert list(result["baselines"]) == ["raw pixels", "random network", "chance", "untrained towers"]
    assert all(label in shown for label in labels)

    runs = {(run["method"], run["loss"]): run for run in result["runs"]}
    assert len(runs) == 8
    for (method, loss), run in runs.items():
        assert f"{method:<7} {loss:<9} seed 0  epoch 1/1  loss {run['epochs'][0]['loss']:.4f}" in shown
        assert len(run["step_losses"]) == 5
        assert set(run["accuracies"]) == set(METHODS[method].evaluation.metrics)
        reference = runs[method, "reference"]
        assert run["order_sha256"] == reference["order_sha256"]
        assert run["step_losses"][0] == pytest.approx(reference["step_losses"][0], rel=1e-5)
    for comparison in result["comparisons"]:
        assert comparison["same_order"]
        assert comparison["first_step"] <= comparison["first_ten_steps"] <= comparison["all_steps"] < 1e-2

    picture = image.imread(tmp_path / "result.png")
    assert picture.shape[1] > picture.shape[0] > 500
    assert (picture[:4] == 1).all()  # opaque white, whatever is behind it


@pytest.mark.parametrize("method", ["simclr", "clip"])
def test_float32_on_a_gpu_is_float32(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions take TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert main(["--method", method, "--loss", "reference", "--quick", "--epochs", "1", "--out", str(tmp_path)]) == 0
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


WITHOUT = """
import runpy, sys
sys.modules["fastnce"] = sys.modules["matplotlib"] = None
sys.argv = [sys.argv[1], *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_reference_runs_anywhere_without_fastnce_and_matplotlib(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(TRAIN), "--loss", "reference", "--quick", "--epochs", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install matplotlib" in done.stdout
    (found,) = (tmp_path / "runs").iterdir()
    assert [file.name for file in found.iterdir()] == ["result.json"]
    assert found.name.endswith("Z-simclr-reference")
    assert "fastnce" not in json.loads((found / "result.json").read_text(encoding="utf-8"))["versions"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--epochs 0", "argument --epochs: '0' is not a whole number of at least 1"),
        ("--seeds two", "argument --seeds: 'two' is not a whole number of at least 1"),
        ("--temperature 0", "argument --temperature: '0' is not a positive number"),
        ("--temperature nan", "argument --temperature: 'nan' is not a positive number"),
        ("--batch-size 1", "argument --batch-size: '1' is not a whole number of at least 2"),
        ("--batch-size 2000", "argument --batch-size: 2000 images, and digits has 1297 that train"),
        ("--held-out 1297", "argument --held-out: 1297 cannot be held out of the 1297 training images of digits"),
        ("--held-out 1290 --batch-size 4", "argument --held-out: 1290 cannot be held out of the 1297 training images of digits"),
        ("--data-dir .", "argument --data-dir: digits ship with the project"),
        ("--temperature 0.001 --method clip", "argument --temperature: 0.001 is less than 0.01, and clip keeps its logit scale"),
        ("--batch-size 600 --method moco", "argument --batch-size: 600 images give 1200 keys a step"),
        ("--device nowhere", "argument --device: 'nowhere' cannot be used"),
        ("--device meta", "argument --device: 'meta' cannot be used"),
        ("--backend fastest", "argument --backend: 'fastest' cannot be used on cpu"),
        ("--backend torch --loss reference", "argument --backend: the reference losses have no backends"),
        ("--method byol", "argument --method: invalid choice: 'byol'"),
        ("--out {file}/below", "argument --out: cannot make the folder"),
    ],
)
def test_bad_options_are_named(arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as left:
        main([*arguments.format(file=file).split(), *([] if "--out" in arguments else ["--out", str(tmp_path / "out")])])
    assert left.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fused_without_fastnce_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "fastnce", None)
    with pytest.raises(SystemExit) as left:
        main(["--quick", "--out", str(tmp_path)])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "argument --loss: fused needs fastnce" in said
    assert "--loss reference" in said


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--loss", "reference", "--temperature", "1e-45", "--out", str(tmp_path)]) == 1
    assert "simclr, reference loss, seed 0: the loss is nan at step 1" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_features_and_embeddings_are_as_wide_as_they_say() -> None:
    network = build_network(0, CPU)
    assert network.encoder(torch.zeros(2, 1, 8, 8)).shape == (2, FEATURES)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, EMBEDDING)
