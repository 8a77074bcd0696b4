"""A loss as one operator, by the Triton kernels in the checked interpreter: values, all gradients, launches, and input of every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import Checked
from test_triton import family, launched  # noqa: F401  fixtures
from torch import Tensor

import fastnce
from fastnce import fused
from fastnce.backends.triton import losses
from train_ref.truth import contract

pytestmark = pytest.mark.usefixtures("poisoned")
Case = tuple[Callable[..., Tensor], dict[str, Tensor]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cases() -> dict[str, Case]:
    """Losses of named tensors that all take a gradient. Rows are ragged, and fill more than one tile and split."""
    z0, z1, queue, t, w = random(37, 20), random(37, 20, seed=1), random(45, 20, seed=2), torch.tensor(0.1).double(), random(37).abs()
    # Keys without gradient, in numbers that bfloat16 holds: they are the same for every dtype.
    held, kept = z1.bfloat16().double(), queue.bfloat16().double()
    # One in five is negative.
    ids = torch.arange(37) % 5 - 1
    two, temperature = {"a": z0, "b": z1}, {"t": t}
    captions = torch.arange(45) % 7
    return {
        "nt_xent": (lambda a, b, t, **how: fastnce.nt_xent(a, b, t, **how), two | temperature),
        "nt_xent, a number": (lambda a, b, **how: fastnce.nt_xent(a, b, 0.1, **how), two),
        "nt_xent, one tensor": (lambda a, t, **how: fastnce.nt_xent(a[:36], None, t, **how), {"a": z0} | temperature),
        "nt_xent, low": (lambda a, b, **how: fastnce.nt_xent(a, b, 0.005, **how), two),
        "nt_xent, dot products": (lambda a, b, t, **how: fastnce.nt_xent(a / 4, b / 2, t, normalize=False, **how), two | temperature),
        "dcl_loss": (lambda a, b, t, **how: fastnce.dcl_loss(a, b, t, **how), two | temperature),
        "info_nce": (lambda a, b, t, **how: fastnce.info_nce(a, b, temperature=t, **how), two | temperature),
        "info_nce, weights": (
            lambda a, b, t, w, **how: fastnce.info_nce(a, b, temperature=t, weight=w, **how),
            two | temperature | {"w": w},
        ),
        "info_nce, exclude ids": (lambda a, b, **how: fastnce.info_nce(a, b, scale=9.0, exclude_query_ids=ids, **how), two),
        "info_nce, negatives": (
            lambda a, b, q, t, **how: fastnce.info_nce(a, b, q, t, **how),
            two | {"q": queue} | temperature,
        ),
        "clip_loss": (lambda a, b, t, c, **how: fastnce.clip_loss(a, b, 1 / t, c, **how), two | temperature | {"c": t * 20}),
        "clip_loss, sum": (
            lambda a, b, w, **how: fastnce.clip_loss(a, b, 20.0, weight=w, reduction="sum", **how),
            two | {"w": w},
        ),
        "clip_loss, captions": (
            lambda a, q, t, **how: fastnce.clip_loss(a, q, 1 / t, image_ids=ids, text_ids=captions, **how),
            {"a": z0, "q": queue} | temperature,
        ),
        "sup_con": (lambda a, t, **how: fastnce.sup_con(a, ids, temperature=t, **how), {"a": z0} | temperature),
        "sup_con, views": (
            lambda a, b, t, **how: fastnce.sup_con(torch.stack([a, b], 1), ids, temperature=t, variant="in", **how),
            two | temperature,
        ),
        "sup_con, no labels": (lambda a, b, t, **how: fastnce.sup_con(torch.stack([a, b], 1), temperature=t, **how), two | temperature),
        "moco_loss": (lambda a, t, **how: fastnce.moco_loss(a, held.to(a.dtype), kept.to(a.dtype), t, **how), {"a": z0} | temperature),
        "moco_loss, all": (
            lambda a, b, q, t, **how: fastnce.moco_loss(a, b, q, t, **how),
            two | {"q": queue} | temperature,
        ),
        "moco_loss, dot products": (
            lambda a, t, **how: fastnce.moco_loss(a / 4, held.to(a.dtype), kept.to(a.dtype), t, normalize=False, **how),
            {"a": z0} | temperature,
        ),
    }


CASES = cases()
# Losses with a value for each row. Captions have none: rows and columns are different things there.
BY_ROW = [name for name in CASES if name not in ("clip_loss, captions", "clip_loss, sum")]
LARGEST = {"nt_xent, low": 200.0, "nt_xent, dot products": 40.0, "moco_loss, dot products": 100.0}  # logit, where it is not about 10


def run(case: Case, dtype: torch.dtype, backend: str, only: set[str] | None = None, **how: Any) -> list[Tensor]:
    """The loss, then its gradients, with a random upstream gradient."""
    loss, tensors = case
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {name: x.detach().to(dtype if x.dim() == 2 else wide) for name, x in tensors.items()}
    asked = [x.requires_grad_() for name, x in leaves.items() if only is None or name in only]
    value = loss(**leaves, backend=backend, **how)
    upstream = random(*value.shape, seed=3) if value.dim() else torch.tensor(0.37)
    return [value.detach(), *torch.autograd.grad(value, asked, upstream.to(value.dtype))]


def check(name: str, dtype: torch.dtype, **how: Any) -> None:
    stored = {key: x.to(dtype).double() if x.dim() == 2 else x for key, x in CASES[name][1].items()}
    case = (CASES[name][0], stored)
    exact, dense = run(case, torch.float64, "reference", **how), run(case, dtype, "reference", **how)
    with Checked(arguments=True) as checked:
        found = run(case, dtype, "triton", **how)
    assert not checked.races
    if exact[0].dim():
        assert found[0].dtype == torch.float32 and found[0].shape == exact[0].shape
        bound = contract.row_loss(dtype, (dense[0].double() - exact[0]).abs(), LARGEST.get(name, 10.0), exact[0])
        assert ((found[0].double() - exact[0]).abs() <= bound).all()
    else:
        error = abs(float(found[0]) - float(exact[0])) / float(exact[0].abs())
        assert error <= contract.mean_loss(dtype, abs(float(dense[0]) / float(exact[0]) - 1), float(exact[0]))
    for key, mine, other, true in zip(stored, found[1:], dense[1:], exact[1:], strict=True):
        assert mine.dtype == other.dtype and mine.shape == true.shape
        if key == "c":  # the bias cancels
            assert float(mine) == 0.0
        elif true.dim() == 2:
            assert contract.relative(mine, true) <= contract.gradient(dtype, contract.relative(other, true)), key
        else:
            assert contract.relative(mine, true) <= contract.scalar(dtype, contract.relative(other, true)), key


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, family: str) -> None:  # noqa: F811
    check(name, torch.float32)


@pytest.mark.parametrize("name", BY_ROW)
def test_values_of_rows_and_their_gradients(name: str, family: str) -> None:  # noqa: F811
    """Each row has an upstream gradient of its own, some of them negative."""
    check(name, torch.float32, reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["long"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_long_rows(name: str, family: str) -> None:  # noqa: F811
    check(name, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_half_precision(name: str, family: str) -> None:  # noqa: F811
    check(name, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["long"], indirect=True)
@pytest.mark.parametrize("name", BY_ROW)
def test_values_of_long_rows(name: str, dtype: torch.dtype, family: str) -> None:  # noqa: F811
    check(name, dtype, reduction="none")


# The launches of a step: those that pairs of a plain mean are promised, and of losses beside it.
LAUNCHES = {"clip_loss, captions": 8, "nt_xent, dot products": 6}


@pytest.mark.parametrize("name", [name for name in CASES if "weights" not in name])
def test_a_handful_of_launches(name: str, family: str, launched: list[str]) -> None:  # noqa: F811
    run(CASES[name], torch.float32, "triton")
    assert 4 <= len(launched) <= LAUNCHES.get(name, 6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["nt_xent", "moco_loss, all", "clip_loss", "info_nce, weights"])
def test_only_what_is_asked_for_gets_a_gradient(name: str, reduction: str, family: str) -> None:  # noqa: F811
    every = run(CASES[name], torch.float32, "triton", reduction=reduction)[1:]
    for number, key in enumerate(CASES[name][1]):
        found = run(CASES[name], torch.float32, "triton", {key}, reduction=reduction)[1]
        torch.testing.assert_close(found, every[number], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "reduction"),
    [("clip_loss, captions", "mean")]
    + [(name, how) for name in ("nt_xent", "info_nce", "clip_loss", "sup_con") for how in ("mean", "none")],
)
def test_operands_that_were_not_kept_are_made_again(name: str, reduction: str, family: str, monkeypatch: Any) -> None:  # noqa: F811
    torch.use_deterministic_algorithms(True)
    try:
        kept = run(CASES[name], torch.float32, "triton", reduction=reduction)
        monkeypatch.setattr(losses, "KEPT_BYTES", 0)
        again = run(CASES[name], torch.float32, "triton", reduction=reduction)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction: Any, family: str) -> None:  # noqa: F811
    """Also after a backward with another upstream gradient."""
    z0, z1, t = (x.float().requires_grad_() for x in (random(37, 20), random(37, 20, seed=1), torch.tensor(0.1)))
    loss = fastnce.nt_xent(z0, z1, t, reduction=reduction, backend="triton")
    once = torch.autograd.grad(loss, (z0, z1, t), torch.ones_like(loss), retain_graph=True)
    torch.autograd.grad(loss, (z0, z1, t), torch.full_like(loss, 1e3), retain_graph=True)
    twice = torch.autograd.grad(loss, (z0, z1, t), torch.ones_like(loss))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("name", ["weight", "ids", "labels", "features"])
def test_strides(name: str, family: str) -> None:  # noqa: F811
    """Columns of a batch, every other row, one number for all: as their contiguous copies."""
    a, b = random(18, 20).float(), random(18, 20, seed=1).float()
    table = torch.stack([torch.arange(18) % 4, torch.arange(18) % 3], 1)
    weight, one = random(36).abs().float()[::2], torch.ones(()).expand(18)
    how: dict[str, Any] = {"backend": "triton"}
    calls: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
        "weight": lambda of: fastnce.info_nce(a, b, weight=of(weight), **how) + fastnce.info_nce(a, b, weight=of(one), **how),
        "ids": lambda of: fastnce.info_nce(a, b, query_ids=of(table[:, 0]), reduction="none", **how).sum(),
        "labels": lambda of: fastnce.sup_con(a, of(table[:, 0]), **how),
        "features": lambda of: fastnce.nt_xent(of(a.T.contiguous().T), of(random(36, 20).float()[::2]), **how),
    }
    torch.testing.assert_close(calls[name](lambda x: x), calls[name](Tensor.contiguous), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip_loss, captions", "sup_con", "moco_loss", "dcl_loss"])
def test_a_row_that_is_no_number_makes_the_loss_none(name: str, family: str) -> None:  # noqa: F811
    loss, tensors = CASES[name]
    first = tensors["a"].clone()
    first[3, 2] = torch.nan
    found = run((loss, tensors | {"a": first}), torch.float32, "triton")
    assert found[0].isnan() and found[1][3].isnan().all()


def test_logits_far_below_any_exponential(family: str) -> None:  # noqa: F811
    z = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.01], [0.0, 1.0, 0.0]])
    for reduction in ("mean", "none"):
        found = fastnce.info_nce(z, z.clone(), temperature=0.0005, symmetric=True, reduction=reduction, backend="triton")
        assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bias_that_is_no_number_is_no_loss(bad: float, family: str) -> None:  # noqa: F811
    a, b = random(9, 20).float(), random(9, 20, seed=1).float()
    for how in ({}, {"image_ids": torch.arange(9) % 3, "text_ids": torch.arange(9) % 3, "aligned": False}):
        assert fastnce.clip_loss(a, b, 10.0, torch.tensor(bad), **how, backend="triton").isnan()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_take_no_part_have_no_gradient(bad: float, family: str) -> None:  # noqa: F811
    """Whatever comes down for them: here for a row whose label nobody else has."""
    labels, found = torch.tensor([0, 1, 0, 2, 1, 1]), []
    for backend in ("triton", "reference"):
        z = random(6, 20).float().requires_grad_()
        values = fastnce.sup_con(z, labels, temperature=0.1, reduction="none", backend=backend)
        found += torch.autograd.grad(values, z, torch.tensor([1.0, 2.0, -1.0, bad, 0.5, 3.0]))
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_losses_that_take_the_general_path() -> None:
    assert fused.serves("triton", random(2, 2)) and not fused.serves("torch", random(2, 2)) and not fused.serves("auto", random(2, 2))
    with fastnce.debug():
        assert not fused.enough(random(2))
    assert fused.enough(random(2)) and not fused.enough(None)
