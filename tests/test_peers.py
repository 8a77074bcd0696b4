"""fastnce against other projects' losses, called live (pytest -m peers); skipped where they are not installed.

The fastnce call in place of a peer's loss, peer = factor x fastnce:

    info-nce-pytorch    info_nce(query, positive_key, negative_keys, ...)   1, the same arguments
    lightly             NTXentLoss(t)(a, b)                                 1, nt_xent(a, b, t)
                        NTXentLoss(t, memory_bank_size=...)                 1, moco_loss(q, k, queue, t)
    pytorch-metric-     SelfSupervisedLoss(NTXentLoss(t))(a, b)             1, nt_xent(a, b, t)
      learning          SupConLoss(t)(rows, labels)                         1, sup_con(..., no_positive="skip")
                        NTXentLoss(t)(rows, labels), several positives      no factor: one denominator per pair
    open_clip           ClipLoss()(image, text, logit_scale), normalised    1, clip_loss(image, text, logit_scale)
    SupContrast         SupConLoss(t)(features, labels)                     t / 0.07, sup_con(features, labels)
    SimCLR (TensorFlow) add_contrastive_loss                                2, nt_xent
    solo-learn          simclr_loss_func(rows, labels)                      1, less the mean of log|P|: variant="in"

The last three are no packages; golden/make.py restates them, and test_golden.py holds fastnce to them everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from named import IN_FLOAT64
from torch import Tensor

import fastnce
from bench import dense
from train_ref.truth.golden import make, packages

pytestmark = [pytest.mark.peers, pytest.mark.float64]
fused: Any = fastnce  # options come as dictionaries: a type checker cannot tell which
LOSS, GRADIENT = 1e-12, 1e-11  # float64, relative


@pytest.fixture(autouse=True)
def installed_peers() -> None:
    for module in ("info_nce", "pytorch_metric_learning"):
        pytest.importorskip(module)
    for load in (packages.lightly_nt_xent, packages.open_clip_loss):
        try:
            load()
        except ImportError as error:
            pytest.skip(str(error))


def views(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def agree(ours: Callable[[], Any], peers: Callable[[], Any], leaves: list[Tensor]) -> None:
    loss, expected = ours(), peers()
    assert loss.shape == expected.shape
    assert torch.allclose(loss, expected, rtol=LOSS, atol=0)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    for got, wanted in zip(*(torch.autograd.grad(f, leaves, upstream) for f in (loss, expected)), strict=True):
        assert (got - wanted).norm() <= GRADIENT * wanted.norm()


def test_golden_file_is_what_the_installed_peers_compute() -> None:
    stored = json.loads(make.FILE.read_text())
    live = [make.evaluate(case) for case in make.cases()]
    assert len(live) == len(stored["cases"])
    for now, then in zip(live, stored["cases"], strict=True):
        for key in ("function", "options", "inputs", "digest"):
            assert now[key] == then[key]
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-14)
        for name, gradient in then["gradients"].items():
            products, limit = now["gradients"][name]["products"], 1e-13 * gradient["norm"]
            assert products == pytest.approx(gradient["products"], rel=0, abs=limit)


@pytest.mark.parametrize("backend", IN_FLOAT64)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
def test_info_nce_pytorch(negatives: str | None, reduction: str, backend: str) -> None:
    shapes: list[tuple[int, ...]] = [(33, 21), (33, 21)]
    if negatives is not None:
        shapes.append((47, 21) if negatives == "unpaired" else (33, 6, 21))
    leaves = views(0, *shapes)
    options: dict[str, Any] = {"temperature": 0.2, "reduction": reduction, "negative_mode": negatives or "unpaired"}
    agree(
        lambda: fused.info_nce(*leaves, **options, backend=backend),
        lambda: packages.info_nce_pytorch()(*leaves, **options),
        leaves,
    )


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_lightly_nt_xent(backend: str) -> None:
    leaves = views(1, (33, 21), (33, 21))
    agree(
        lambda: fused.nt_xent(*leaves, 0.2, backend=backend),
        lambda: packages.lightly_nt_xent()(temperature=0.2)(*leaves),
        leaves,
    )


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_lightly_memory_bank_is_the_moco_queue(backend: str) -> None:
    """The loss reads the bank as it was; the batch enters it afterwards, in place, so its keys are copied out first."""
    q, k = views(2, (16, 21), (16, 21))
    peer: Any = packages.lightly_nt_xent()(temperature=0.2, memory_bank_size=(64, 21)).double()
    peer.memory_bank.bank = F.normalize(views(3, (64, 21))[0].detach(), dim=1)
    queue = peer.memory_bank.bank.clone()
    agree(lambda: fused.moco_loss(q, k.detach(), queue, 0.2, backend=backend), lambda: peer(q, k.detach()), [q])


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_pytorch_metric_learning(backend: str) -> None:
    from pytorch_metric_learning import losses

    pair = views(4, (23, 21), (23, 21))
    agree(
        lambda: fused.nt_xent(*pair, 0.2, backend=backend),
        lambda: losses.SelfSupervisedLoss(losses.NTXentLoss(0.2))(*pair),
        pair,
    )
    rows, labels = views(5, (24, 21)), torch.arange(24) % 7
    agree(
        lambda: fused.sup_con(rows[0], labels, temperature=0.2, backend=backend),
        lambda: losses.SupConLoss(0.2)(rows[0], labels),
        rows,
    )


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_anchors_without_a_positive(backend: str) -> None:
    """pytorch-metric-learning leaves them out of the mean, SupContrast counts them as 0: here 4 anchors against 6."""
    from pytorch_metric_learning import losses

    (rows,), labels = views(6, (6, 21)), torch.tensor([0, 0, 1, 1, 2, 3])
    options = {"temperature": 0.2, "backend": backend}
    skip, zero = (fused.sup_con(rows, labels, no_positive=policy, **options) for policy in ("skip", "zero"))
    assert torch.allclose(skip, losses.SupConLoss(0.2)(rows, labels), rtol=LOSS, atol=0)
    assert torch.allclose(zero, make.sup_con_formula(rows, labels, temperature=0.2) * 0.07 / 0.2, rtol=LOSS, atol=0)
    assert torch.allclose(zero, skip * 4 / 6, rtol=LOSS, atol=0)


def test_several_positives_differ_from_pytorch_metric_learnings_nt_xent() -> None:
    """Its NTXentLoss gives every positive pair a denominator without the other positives: a larger one is ours."""
    from pytorch_metric_learning import losses

    (rows,), labels = views(7, (24, 21)), torch.arange(24) % 3
    assert fused.sup_con(rows, labels, temperature=0.2) > losses.NTXentLoss(0.2)(rows, labels) * 1.05


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_open_clip(backend: str) -> None:
    leaves = [*views(8, (33, 21), (33, 21)), torch.tensor(1 / 0.07, dtype=torch.float64, requires_grad=True)]
    image, text, logit_scale = leaves
    agree(
        lambda: fused.clip_loss(image, text, logit_scale, backend=backend),
        lambda: packages.open_clip_loss()()(F.normalize(image, dim=1), F.normalize(text, dim=1), logit_scale),
        leaves,
    )
    agree(lambda: dense.open_clip_form(*leaves), lambda: fused.clip_loss(*leaves, backend=backend), leaves)
