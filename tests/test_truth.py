"""The truth itself: dense losses pair by pair in Python floats, and the table of losses, which every public loss is in."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from named import IN_FLOAT64
from torch import Tensor

import fastnce
from fastnce import selftest
from train_ref import truth
from train_ref.implementations import dense_losses
from train_ref.truth import LOSSES, Loss, Rows, losses

ROOT = Path(__file__).resolve().parent.parent
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


# The losses, pair by pair ---------------------------------------------------------------------------------------------------------------


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    inner = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return inner / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def log_sum(values: Sequence[float]) -> float:
    return math.log(math.fsum(math.exp(value) for value in values))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def hand_info_nce(query: Tensor, positive: Tensor, negatives: Callable[[int], Sequence[Tensor]], temperature: float) -> list[float]:
    """negatives(i) are the negative keys of query i."""
    values = []
    for i, q in enumerate(query):
        pos = cosine(q.tolist(), positive[i].tolist()) / temperature
        negative = [cosine(q.tolist(), key.tolist()) / temperature for key in negatives(i)]
        values.append(log_sum([pos, *negative]) - pos)
    return values


def hand_sup_con(z: Tensor, labels: Sequence[int], temperature: float, variant: str) -> list[float | None]:
    """The loss of every anchor, None for those without positives."""
    values: list[float | None] = []
    for i, anchor in enumerate(z):
        s = {j: cosine(anchor.tolist(), z[j].tolist()) / temperature for j in range(len(z)) if j != i}
        pos = [s[j] for j in s if labels[j] == labels[i] and labels[i] >= 0]
        if not pos:
            values.append(None)
        elif variant == "out":
            values.append(log_sum(list(s.values())) - mean(pos))
        else:
            values.append(log_sum(list(s.values())) - log_sum(pos) + math.log(len(pos)))
    return values


def agrees(values: Tensor, expected: Sequence[float]) -> None:
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected, rel=1e-13)


def test_info_nce_in_batch() -> None:
    query, key = rows(0, 5, 3), rows(1, 5, 3)
    expected = hand_info_nce(query, key, lambda i: [key[j] for j in range(5) if j != i], 0.3)
    agrees(losses.info_nce(query, key, temperature=0.3), expected)
    agrees(losses.info_nce(query, key, scale=1 / 0.3), expected)


def test_info_nce_shared_and_own_negatives() -> None:
    query, key, shared, own = rows(0, 5, 3), rows(1, 5, 3), rows(2, 7, 3), rows(3, 5, 4, 3)
    agrees(losses.info_nce(query, key, shared, 0.3), hand_info_nce(query, key, lambda i: list(shared), 0.3))
    agrees(losses.moco_loss(query, key, shared, 0.2), hand_info_nce(query, key, lambda i: list(shared), 0.2))
    agrees(losses.info_nce(query, key, own, 0.3), hand_info_nce(query, key, lambda i: list(own[i]), 0.3))
    both = hand_info_nce(query, key, lambda i: [*(key[j] for j in range(5) if j != i), *shared], 0.3)
    agrees(losses.info_nce(query, key, shared, 0.3, in_batch=True), both)


def test_nt_xent() -> None:
    first, second = rows(0, 4, 3), rows(1, 4, 3)
    z = torch.cat([first, second])
    partner = [4, 5, 6, 7, 0, 1, 2, 3]
    expected = hand_info_nce(z, z[partner], lambda i: [z[j] for j in range(8) if j not in (i, partner[i])], 0.4)
    agrees(losses.nt_xent(first, second, 0.4), expected)
    agrees(losses.nt_xent(z, temperature=0.4), expected)
    with pytest.raises(ValueError, match="z0 has 7 rows"):
        losses.nt_xent(z[:7])


def test_dcl_loss() -> None:
    z = rows(0, 8, 3).requires_grad_()
    cosines = [[cosine(a.tolist(), b.tolist()) / 0.4 for b in z] for a in z]
    partner = [4, 5, 6, 7, 0, 1, 2, 3]
    expected = [log_sum([cosines[i][j] for j in range(8) if j not in (i, partner[i])]) - cosines[i][partner[i]] for i in range(8)]
    agrees(losses.dcl_loss(z[:4], z[4:], 0.4), expected)
    agrees(losses.dcl_loss(z, temperature=0.4), expected)
    alone = losses.dcl_loss(z[:2])
    agrees(alone, [0.0, 0.0])
    assert not torch.autograd.grad(alone.sum(), z)[0].any()


def test_nt_xent_of_equal_rows_is_the_log_of_the_other_rows() -> None:
    z = torch.ones(6, 4, dtype=torch.float64)
    agrees(losses.nt_xent(z, z, 0.1), [math.log(11)] * 12)


@pytest.mark.parametrize("variant", ["out", "in"])
def test_sup_con_of_views(variant: Literal["out", "in"]) -> None:
    """Values come view by view."""
    features, labels = rows(0, 4, 2, 3), torch.tensor([1, 0, 1, 2])
    values = hand_sup_con(features.transpose(0, 1).flatten(0, 1), [1, 0, 1, 2, 1, 0, 1, 2], 0.3, variant)
    assert None not in values
    agrees(losses.sup_con(features, labels, 0.3, variant), [v for v in values if v is not None])


@pytest.mark.parametrize("variant", ["out", "in"])
def test_sup_con_anchors_without_positives(variant: Literal["out", "in"]) -> None:
    # Label 2 is alone, and the two -1 match nothing, not even each other.
    z, labels = rows(0, 7, 3), [0, 0, 1, 1, 2, -1, -1]
    values = hand_sup_con(z, labels, 0.3, variant)
    paired = [value for value in values if value is not None]
    assert len(paired) == 4
    z.requires_grad_()
    counted = losses.sup_con(z, torch.tensor(labels), 0.3, variant)
    agrees(counted, [value or 0.0 for value in values])
    agrees(losses.sup_con(z, torch.tensor(labels), 0.3, variant, "skip"), paired)
    assert torch.autograd.grad(counted.sum(), z)[0].isfinite().all()
    views = rows(1, 3, 2, 3)
    alone = torch.tensor([-1, 0, 0])
    kept = losses.sup_con(views, alone, 0.3, variant, "skip")
    assert torch.equal(kept, losses.sup_con(views, alone, 0.3, variant)[[1, 2, 4, 5]])


@pytest.mark.parametrize("how", ["zero", "skip"])
def test_sup_con_without_any_positive_is_zero(how: Literal["zero", "skip"]) -> None:
    z = rows(0, 3, 2).requires_grad_()
    values = losses.sup_con(z, torch.arange(3), no_positive=how)
    agrees(values, [0.0] * 3 if how == "zero" else [])
    assert torch.equal(torch.autograd.grad(values.sum(), z)[0], torch.zeros(3, 2))


def test_sup_con_refuses_what_it_does_not_know() -> None:
    z, labels = rows(0, 4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="variant is 'both'"):
        losses.sup_con(z, labels, variant="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no_positive is 'drop'"):
        losses.sup_con(z, labels, no_positive="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels has 3 entries, features 4"):
        losses.sup_con(z, labels[:3])


def test_clip_loss_and_the_gradient_of_its_scale() -> None:
    image, text = rows(0, 5, 3), rows(1, 5, 3)

    def expected(scale: float) -> list[float]:
        there = hand_info_nce(image, text, lambda i: [text[j] for j in range(5) if j != i], 1 / scale)
        back = hand_info_nce(text, image, lambda i: [image[j] for j in range(5) if j != i], 1 / scale)
        return [(one + other) / 2 for one, other in zip(there, back, strict=True)]

    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    values = losses.clip_loss(image, text, scale)
    agrees(values, expected(4.0))
    slope = (mean(expected(4.0 + 1e-4)) - mean(expected(4.0 - 1e-4))) / 2e-4
    assert torch.autograd.grad(values.mean(), scale)[0].item() == pytest.approx(slope, rel=1e-6)


def test_the_dense_twins_compute_half_precision_in_float32() -> None:
    z = rows(0, 8, 3).to(torch.bfloat16)
    loss = dense_losses().nt_xent(z)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(losses.nt_xent(z.double()).mean().item(), rel=1e-6)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_as_under_autocast(loss: Loss, dtype: torch.dtype) -> None:
    """In float32 outside, with the rounding of half-precision logits inside."""
    arguments, exact = example(loss, dtype), example(loss, torch.float64)
    values, true = loss.function(**arguments, **{loss.number: 14.3}), loss.function(**exact, **{loss.number: 14.3})
    assert values.dtype == torch.float32
    error = (values.double() - true).abs().max().item()
    step = torch.finfo(dtype).eps
    assert 0.01 * step < error < 14.3 * 4 * step


# The table ------------------------------------------------------------------------------------------------------------------------------


def example(loss: Loss, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second, queue = (torch.randn(n, 5, generator=generator).to(dtype) for n in (12, 12, 15))
    return loss.example(Rows(first, (first + second).to(dtype), queue, torch.arange(12) % 5))


def public_losses() -> set[str]:
    """The public names of fastnce that its modules of losses define."""
    modules = f"{fastnce.losses.__name__}."
    return {name for name in fastnce.__all__ if getattr(getattr(fastnce, name), "__module__", "").startswith(modules)}


def test_every_public_loss_has_its_truth() -> None:
    """Here, in the self-test of an installation, which is without this folder, and among the dense twins."""
    assert public_losses() == LOSSES.keys() == set(selftest.CASES) == dense_losses().losses.keys()
    assert {loss.module for loss in LOSSES.values()} <= set(fastnce.__all__)


@each_loss
def test_the_entry_describes_the_loss(loss: Loss) -> None:
    """Its name, its arguments, and what the documents say of it."""
    assert loss.function.__name__ == loss.name
    arguments = example(loss, torch.float64)
    assert loss.leaves == tuple(name for name, tensor in arguments.items() if tensor.is_floating_point())
    for function in (loss.function, getattr(fastnce, loss.name)):
        assert {*arguments, loss.number} <= set(inspect.signature(function).parameters)
    lines = [line for line in (ROOT / "docs" / "math.md").read_text().splitlines() if line.startswith("|") and f"`{loss.name}`" in line]
    assert any(line.endswith(f"| {loss.definition} |") for line in lines)


@each_loss
@pytest.mark.parametrize("backend", [*IN_FLOAT64, "auto"])
def test_values_and_gradients_are_the_dense_ones(loss: Loss, backend: str) -> None:
    """Row by row, with an upstream gradient of its own for each."""

    def run(function: Callable[..., Tensor], **options: str) -> list[Tensor]:
        arguments = example(loss, torch.float64)
        number = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        leaves = [arguments[name].requires_grad_() for name in loss.leaves]
        values = function(**arguments, **{loss.number: number}, **options)
        upstream = torch.randn(len(values), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return [values.detach(), *torch.autograd.grad(values, [*leaves, number], upstream)]

    found, expected = run(getattr(fastnce, loss.name), reduction="none", backend=backend), run(loss.function)
    for got, true in zip(found, expected, strict=True):
        assert true.norm() > 0
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-13)


def test_truth_imports_torch_alone() -> None:
    """And what other projects have computed, golden/, is no part of it."""
    for path in Path(truth.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        others = {name for name in imported if not re.fullmatch(r"torch(\..*)?|train_ref\.truth(\..*)?", name)}
        assert others <= {"__future__", "collections.abc", "math", "typing"}, path.name
