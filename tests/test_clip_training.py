"""CLIP on halves of digits: retrieval and its evaluation, the two towers, one training, and the script from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train_ref.augment import halves
from train_ref.data import N_TRAIN, load_digits
from train_ref.evaluate import DIRECTIONS, RETRIEVAL, chance, evaluate_towers, places, retrieval
from train_ref.implementations import LARGEST_SCALE, DenseLogitScale, LossFunctions, dense_losses, fused_losses
from train_ref.loop import History, train_network
from train_ref.methods import CLIP, SIMCLR
from train_ref.model import TOWER_EMBEDDING, TwoTowers, build_towers
from train_ref.presets import DIGITS
from train_ref.train import main

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# Halves and towers ------------------------------------------------------------------------------------------------------------------------


def test_halves_of_digits() -> None:
    images = load_digits().images[:5]
    left, right = halves(images).chunk(2)
    assert torch.equal(torch.cat([left, right], dim=3), images)
    in_bytes = halves((images * 255).byte())
    assert in_bytes.dtype == torch.float32 and in_bytes.max() <= 1


def test_towers_are_apart_and_as_wide_as_they_say() -> None:
    towers, again = (build_towers(0, CPU, 1, 8, 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(towers.parameters(), again.parameters(), strict=True))
    assert not torch.equal(towers.left[0].weight, towers.right[0].weight)
    left, right = towers(torch.zeros(2, 1, 8, 4), torch.zeros(2, 1, 8, 4))
    assert left.shape == right.shape == (2, TOWER_EMBEDDING)


def test_weight_decay_leaves_the_logit_scale_alone() -> None:
    learner = CLIP.learner(build_towers(0, CPU, 1, 8, 4), dense_losses(), 0.1, DIGITS, torch.Generator())
    towers, scale = learner.parameter_groups()
    assert len(towers["params"]) == len(list(learner.network.parameters())) and "weight_decay" not in towers
    assert [weight.item() for weight in scale["params"]] == pytest.approx([torch.tensor(10.0).log().item()])
    assert scale["weight_decay"] == 0
    assert learner.logit_scale() == pytest.approx(10)


def test_the_dense_logit_scale_stays_at_its_bound_or_below() -> None:
    scale = DenseLogitScale(2 * LARGEST_SCALE)
    assert scale().item() == pytest.approx(LARGEST_SCALE)
    (slope,) = torch.autograd.grad(scale(), scale.log_scale)
    assert slope.item() == pytest.approx(LARGEST_SCALE)


# Retrieval --------------------------------------------------------------------------------------------------------------------------------


def test_places_of_the_right_key() -> None:
    cosines = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3],  # its own, first
            [0.5, 0.4, 0.3, 0.2],  # behind key 0
            [0.8, 0.1, 0.2, 0.7],  # behind 0 and 3
            [0.6, 0.6, 0.6, 0.6],  # ties are lost: behind all others
        ]
    )
    place = places(cosines)
    assert place.tolist() == [1, 2, 3, 4]
    found = retrieval(place)
    assert (found["r1"], found["r5"]) == (0.25, 1.0)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert places(torch.zeros(6, 6)).tolist() == places(torch.full((6, 6), torch.nan)).tolist() == [6] * 6


def test_chance_is_what_random_scores_give() -> None:
    data = load_digits().hold_out(20)
    generator = torch.Generator().manual_seed(0)
    found = [retrieval(places(torch.rand(20, 20, generator=generator))) for _ in range(3000)]
    expected = chance(data)
    assert set(expected) == set(RETRIEVAL.metrics)
    for direction in DIRECTIONS:
        for metric in ("r1", "r5", "mrr"):
            mean = sum(f[metric] for f in found) / len(found)
            assert mean == pytest.approx(expected[f"{direction}_{metric}"], abs=0.006)
    assert expected["left_to_right_r1"] == pytest.approx(1 / 20) and expected["right_to_left_r5"] == pytest.approx(5 / 20)
    assert expected["left_to_right_mrr"] == pytest.approx(sum(1 / k for k in range(1, 21)) / 20)


class Fixed(nn.Module):
    """The pixels themselves, of a right half from right to left where `mirrored`; notes in which modes it is called."""

    def __init__(self, mirrored: bool = False, changes: bool = False) -> None:
        super().__init__()
        self.mirrored, self.changes, self.modes = mirrored, changes, set[bool]()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, half: Tensor) -> Tensor:
        self.modes.add(self.training)
        if self.changes:
            self.weight.mul_(1.001)
        return (half.flip(3) if self.mirrored else half).flatten(1)


def test_evaluation_finds_equal_embeddings_in_eval_mode() -> None:
    digits = load_digits()
    left, _ = halves(digits.images).chunk(2)
    symmetric = replace(digits, images=torch.cat([left, left.flip(3)], dim=3))
    towers = TwoTowers(1, 8, 4)
    towers.left, towers.right = Fixed(), Fixed(mirrored=True)  # type: ignore[assignment]
    found = evaluate_towers(towers, symmetric)
    assert list(found) == list(RETRIEVAL.metrics)
    assert found["left_to_right_r1"] == found["right_to_left_r1"] > 0.99  # a few halves are the same up to their brightness
    for tower in (towers.left, towers.right):
        assert tower.modes == {False} and tower.training
    towers.left = Fixed(changes=True)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"evaluation changed the encoder \(left\.weight\)"):
        evaluate_towers(towers, symmetric)


# Training ---------------------------------------------------------------------------------------------------------------------------------


def train(functions: LossFunctions) -> History:
    _, history = train_network(
        CLIP, functions, load_digits(), seed=0, temperature=0.1, epochs=2, batch_size=128, on_epoch=lambda history: None
    )
    return history


def test_the_logit_scale_learns_alike_in_both_implementations() -> None:
    dense, fused = train(dense_losses()), train(fused_losses("torch"))
    assert [e.logit_scale for e in dense.epochs] == pytest.approx([e.logit_scale for e in fused.epochs], rel=1e-5)
    assert dense.epochs[-1].logit_scale != pytest.approx(10.0, abs=1e-3)
    assert dense.order_sha256 == fused.order_sha256 and len(dense.step_losses) == 2 * (N_TRAIN // 128)


def test_all_methods_see_the_same_batches() -> None:
    simclr = train_network(
        SIMCLR, dense_losses(), load_digits(), seed=0, temperature=0.5, epochs=2, batch_size=128, on_epoch=lambda history: None
    )[1]
    assert simclr.order_sha256 == train(dense_losses()).order_sha256
    assert simclr.epochs[-1].logit_scale is None


# The script -------------------------------------------------------------------------------------------------------------------------------


def test_halves_find_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Among the last 300 training images, where settings are chosen."""
    options = ["--method", "clip", "--held-out", "300", "--seeds", "1", "--epochs", "15", "--out", str(tmp_path)]
    assert main(options) == 0
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    by_chance, untrained, trained = result["summary"]
    assert [row["row"] for row in result["summary"]] == ["chance", "untrained towers", "CLIP, fused"]
    assert by_chance["left_to_right_r1"] == {"mean": pytest.approx(1 / 300), "sd": None}
    assert trained["left_to_right_r1"]["mean"] > 0.06 and trained["right_to_left_r1"]["mean"] > 0.06
    assert untrained["left_to_right_r1"]["mean"] < 0.02
    assert result["config"]["temperatures"] == {"clip": 0.1}
    (run,) = result["runs"]
    scale = run["epochs"][-1]["logit_scale"]
    assert f"clip    fused     seed 0  epoch 15/15  loss {run['epochs'][-1]['loss']:.4f}  scale {scale:.2f}  lr" in capsys.readouterr().out
