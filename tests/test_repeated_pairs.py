"""Pairs of which some have the same id: as negatives, as neither, or as positives, in the batch and among mined hard negatives."""

from __future__ import annotations

import pytest
import torch
from named import IN_FLOAT64
from torch import Tensor

from train_ref.augment import halves
from train_ref.data import load_digits
from train_ref.implementations import LossFunctions, dense_losses, fused_losses
from train_ref.model import build_towers

# plain: a copy is a negative like any other. exclude: it is none. multi-positive: it is a positive.
IDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "exclude": ("exclude_query_ids", "exclude_key_ids"),
    "multi-positive": ("query_ids", "key_ids"),
}


def loss_of(variant: str, functions: LossFunctions, left: Tensor, right: Tensor, scale: Tensor, ids: Tensor, *mined: Tensor) -> Tensor:
    """Of pairs in both directions; mined are further right halves, which every left half meets, and their ids."""
    if mined:
        met = dict(zip(IDS[variant], (ids, torch.cat([ids, mined[1]])), strict=False))
        there = functions.info_nce(left, right, mined[0], scale=scale, in_batch=True, **met)
        return (there + functions.info_nce(right, left, scale=scale, **dict.fromkeys(IDS[variant], ids))) / 2
    if variant == "exclude":
        return functions.info_nce(left, right, scale=scale, exclude_query_ids=ids, symmetric=True)
    return functions.clip_loss(left, right, scale, image_ids=ids if variant == "multi-positive" else None)


def gradients(functions: LossFunctions, variant: str, left: Tensor, right: Tensor, scale: Tensor, *more: Tensor) -> list[Tensor]:
    """The loss and its gradients by all that is no id; more: ids, or ids, mined halves and their ids."""
    ids, mined = more[0], [t.clone().requires_grad_() for t in more[1:2]]
    leaves = [t.clone().requires_grad_() for t in (left, right, scale)] + mined
    loss = loss_of(variant, functions, *leaves[:3], ids, *mined, *more[2:])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def embedded_batch(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Both halves of digits through two towers, in float64, with the labels as ids: four pairs share one on average."""
    digits = load_digits()
    towers = build_towers(0, torch.device("cpu"), 1, 8, 4).double()
    with torch.no_grad():
        left, right = towers(*halves(digits.images[:n].double()).chunk(2))
    return left, right, digits.labels[:n]


@pytest.mark.parametrize("variant", IDS)
@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_fused_gradients_are_the_dense_ones_on_a_real_batch(variant: str, backend: str) -> None:
    left, right, ids = embedded_batch()
    scale = torch.tensor(12.0, dtype=torch.float64)
    fused = gradients(fused_losses(backend), variant, left, right, scale, ids)
    for got, expected in zip(fused, gradients(dense_losses(), variant, left, right, scale, ids), strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert expected.norm() > 0


@pytest.mark.parametrize("variant", IDS)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_fused_gradients_are_the_dense_ones_with_hard_negatives(variant: str, backend: str) -> None:
    """For 12 pairs, the two nearest right halves of others for each, moved a little: copies in the batch and among the mined."""
    left, right, ids = embedded_batch()
    cosine = torch.nn.functional.cosine_similarity(left[:12, None], right[None], dim=2)
    cosine[torch.arange(12), torch.arange(12)] = -torch.inf
    mined = cosine.topk(2, dim=1).indices.flatten()
    assert (ids[mined] == ids[:12].repeat_interleave(2)).any() and (ids[mined][:, None] == ids[:12]).sum() > 12
    batch = (left[:12], right[:12], torch.tensor(12.0, dtype=torch.float64), ids[:12], right[mined] + 0.01, ids[mined])
    dense = gradients(dense_losses(), variant, *batch)
    for got, expected in zip(gradients(fused_losses(backend), variant, *batch), dense, strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert expected.norm() > 0
    without = gradients(dense_losses(), variant, *batch[:4])
    assert (dense[0] - without[0]).abs() > 1e-3


def test_dense_losses_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    ids, scale = [4, 7, 4, 4, 1], 3.0
    cos = torch.nn.functional.cosine_similarity(left[:, None], right[None], dim=2) * scale
    expected = dict.fromkeys(IDS, 0.0)
    for s in (cos, cos.T):
        for i in range(5):
            copies = [j for j in range(5) if ids[j] == ids[i]]
            everyone = sum(s[i, j].exp() for j in range(5))
            others = sum(s[i, j].exp() for j in range(5) if j == i or j not in copies)
            expected["plain"] += (everyone.log() - s[i, i]).item() / 10
            expected["exclude"] += (others.log() - s[i, i]).item() / 10
            expected["multi-positive"] += (everyone.log() - sum(s[i, j] for j in copies) / len(copies)).item() / 10
    for variant in IDS:
        got = loss_of(variant, dense_losses(), left, right, torch.tensor(scale, dtype=torch.float64), torch.tensor(ids))
        assert got.item() == pytest.approx(expected[variant], rel=1e-13)
    assert len({round(value, 6) for value in expected.values()}) == 3


def test_dense_losses_with_hard_negatives_pair_by_pair() -> None:
    """The mined halves are met from left to right only, and a mined copy is a negative, nothing or a positive."""
    generator = torch.Generator().manual_seed(4)
    left, right, mined = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (4, 4, 6))
    ids, mined_ids, scale = [4, 7, 4, 1], [7, 4, 2, 4, 3, 1], 3.0
    there = torch.nn.functional.cosine_similarity(left[:, None], torch.cat([right, mined])[None], dim=2) * scale
    expected = dict.fromkeys(IDS, 0.0)
    for s, key_ids in ((there, ids + mined_ids), (there[:, :4].T, ids)):
        for i in range(4):
            copies = [j for j in range(len(key_ids)) if key_ids[j] == ids[i]]
            everyone = sum(s[i, j].exp() for j in range(len(key_ids)))
            others = sum(s[i, j].exp() for j in range(len(key_ids)) if j == i or j not in copies)
            expected["plain"] += (everyone.log() - s[i, i]).item() / 8
            expected["exclude"] += (others.log() - s[i, i]).item() / 8
            expected["multi-positive"] += (everyone.log() - sum(s[i, j] for j in copies) / len(copies)).item() / 8
    batch = (left, right, torch.tensor(scale, dtype=torch.float64), torch.tensor(ids), mined, torch.tensor(mined_ids))
    for variant in IDS:
        assert loss_of(variant, dense_losses(), *batch).item() == pytest.approx(expected[variant], rel=1e-13)


@pytest.mark.parametrize("functions", [dense_losses(), fused_losses("torch")], ids=["reference", "fused"])
def test_copies_with_one_embedding_make_plain_and_multi_positive_the_same(functions: LossFunctions) -> None:
    """And so their gradients in whatever comes before the embedding; excluding the copies is another loss."""
    _, right, ids = embedded_batch()
    sentences = torch.randn(int(ids.max()) + 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for variant in IDS:
        table, other = sentences.clone().requires_grad_(), right.clone().requires_grad_()
        loss = loss_of(variant, functions, table[ids], other, torch.tensor(12.0, dtype=torch.float64), ids)
        found[variant] = [loss.detach(), *torch.autograd.grad(loss, (table, other))]
    for plain, several, excluded in zip(*(found[variant] for variant in ("plain", "multi-positive", "exclude")), strict=True):
        assert (plain - several).norm() <= 1e-12 * plain.norm()
        assert (plain - excluded).norm() > 0.01 * plain.norm()


def test_mined_copies_with_the_embedding_of_the_positive_pull_less_but_never_push() -> None:
    """One query with its positive, a mined copy of that and a mined wrong one, all unit vectors of the plane: only an angle moves."""

    def pull(copy_apart: float, variant: str) -> tuple[float, float]:
        """The derivatives of the loss by how far the positive, and its copy, turn from the query's direction."""
        angles = torch.tensor([0.5, 0.5 + copy_apart], dtype=torch.float64, requires_grad=True)
        places = torch.cat([angles, torch.tensor([0.6], dtype=torch.float64)])
        keys = torch.stack([places.cos(), places.sin()], 1)
        query, id_of = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([7])
        scale = torch.tensor(10.0, dtype=torch.float64)
        loss = loss_of(variant, dense_losses(), query, keys[:1], scale, id_of, keys[1:], torch.tensor([7, 8]))
        positive, copy = torch.autograd.grad(loss, angles)[0].tolist()
        return positive, copy

    # Smaller angles are nearer: a positive derivative pulls.
    together, alone = sum(pull(0.0, "plain")), sum(pull(0.0, "exclude"))
    assert 0 < together < alone
    assert pull(0.2, "plain")[1] < 0 == pull(0.2, "exclude")[1] < pull(0.2, "multi-positive")[1]
