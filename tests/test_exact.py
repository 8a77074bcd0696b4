"""The exact answer is the definition's, has its digits where the definition has none, and does not depend on its blocks."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train_ref.truth import LOSSES, Loss, Rows, contract, exact

SCALE = 7.0
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def tensors(loss: Loss) -> dict[str, Tensor]:
    """Some labels of one row, some negative: anchors without a positive, with one, and with several."""
    generator = torch.Generator().manual_seed(0)
    first, second, queue = (torch.randn(n, 9, generator=generator, dtype=torch.float64) for n in (31, 31, 45))
    labels = torch.arange(31) // 3
    labels[:4], labels[4:6], labels[6] = -1, 50, 51
    return loss.example(Rows(first, first + second, queue, labels))


@each_loss
@pytest.mark.parametrize("block", [exact.BLOCK, 150])
def test_exact_is_the_definition(loss: Loss, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By autograd through the whole matrix in float64."""
    monkeypatch.setattr(exact, "BLOCK", block)
    arguments = tensors(loss)
    leaves = [arguments[leaf].requires_grad_() for leaf in loss.leaves]
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    rows = loss.function(**arguments, **{loss.number: scale})
    *gradients, by_scale = torch.autograd.grad(rows.mean(), [*leaves, scale])
    found, sizes = exact.exact(loss, {name: tensor.detach() for name, tensor in arguments.items()}, SCALE)
    torch.testing.assert_close(found.rows, rows.detach(), rtol=1e-13, atol=1e-13)
    assert found.mean == pytest.approx(rows.mean().item(), rel=1e-14)
    assert found.by_scale == pytest.approx(by_scale.item(), rel=1e-12)
    assert 0 < abs(found.by_scale) <= sizes.by_scale
    joined = exact.sides_of(loss, dict(zip(loss.leaves, gradients, strict=True)))
    for mine, truth, size in zip(found.gradients, joined, sizes.gradients, strict=True):
        assert (mine - truth).norm() <= 1e-13 * truth.norm()
        assert 0 < mine.norm() <= size


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip_loss"])
def test_exact_holds_at_tiny_losses(name: str) -> None:
    """Two pairs of equal unit rows at right angles: log(1 + n exp(-scale)), n negatives, where the definition in float64 has 0."""
    loss, eye = LOSSES[name], torch.eye(2, dtype=torch.float64)
    true, _ = exact.exact(loss, dict.fromkeys(loss.leaves, eye), 100.0)
    small = (2 if loss.symmetric else 1) * math.exp(-100)
    assert true.mean == pytest.approx(small, rel=1e-13)
    assert true.by_scale == pytest.approx(-small, rel=1e-13)
    assert loss.function(**dict.fromkeys(loss.leaves, eye), **{loss.number: 100.0}).mean() == 0


@each_loss
def test_digits_beyond_float64_are_added(loss: Loss) -> None:
    """A logit that is larger by dt makes its row larger by its weight times dt."""
    arguments = tensors(loss)
    sides = [torch.nn.functional.normalize(side, dim=1) for side in exact.sides_of(loss, arguments)]

    def logits(side: int, block: slice, positive: Tensor) -> tuple[Tensor, Tensor]:
        t = SCALE * exact.less_positives(sides[side][block] @ sides[-1 - side].T, positive)
        return t, 1e-9 * t

    found, _ = exact.exact(loss, arguments, SCALE, logits)
    plain, _ = exact.exact(loss, arguments, SCALE)
    more, _ = exact.exact(loss, arguments, SCALE * (1 + 1e-9))
    torch.testing.assert_close(found.rows - plain.rows, more.rows - plain.rows, rtol=1e-5, atol=1e-14)
    assert (found.rows - plain.rows).abs().max() > 1e-11


def test_a_row_without_negatives_or_without_positives_is_zero() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    for loss in (loss for loss in LOSSES.values() if loss.leaves == ("z0", "z1")):
        true, _ = exact.exact(loss, {"z0": eye[:1], "z1": eye[1:]}, 5.0)
        assert true.mean == true.by_scale == 0 and not true.gradients[0].any()
    true, _ = exact.exact(LOSSES["sup_con"], {"features": eye, "labels": torch.tensor([0, -1])}, 5.0)
    assert true.mean == true.by_scale == 0 and not true.gradients[0].any()


def test_the_documented_limits_are_the_contracts() -> None:
    """Every cell of the table in docs/numerics.md, evaluated at some m, L and scale."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "numerics.md").read_text()
    table = [line.strip("| ").split(" | ") for line in text[text.index("| float64 |") :].split("\n\n")[0].splitlines()]
    names = {"u": contract.U, "m": 3e-7, "L": 2.5, "scale": 20.0, "max": max}

    def limit(cell: str) -> float:
        found: float = eval(re.sub(r"(?<=\w) (?=[a-zA-Z])", "*", cell.replace("^", "**")), names)
        return found

    lines = {name: cells for name, *cells in table}
    assert list(lines) == ["float64", "float32", "bfloat16", "float16"]
    for name, cells in lines.items():
        dtype, m = getattr(torch, name), names["m"]
        documented = [limit(lines["float32"][at] if cell == "the float32 line" else cell) for at, cell in enumerate(cells)]
        in_contract = [contract.mean_loss(dtype, m, 2.5), contract.row_loss(dtype, m, 20.0, 2.5)]
        in_contract += [contract.gradient(dtype, m), contract.scalar(dtype, m)]
        assert documented == pytest.approx(in_contract, rel=1e-12), name
