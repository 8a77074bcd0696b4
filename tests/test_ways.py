"""Every way to ask for a gradient: right at both sizes of a batch, or refused at both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from every_loss import FORMS, each_form, q_and_k
from torch import Tensor

import fastnce

# 24 rows are computed by dense operations, 520 by a backend. The size of a batch decides nothing else.

KINDS: dict[str, Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], object]] = {}


def kind(of: Callable[..., object]) -> Callable[..., object]:
    KINDS[of.__name__] = of
    return of


def made_in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def gradients(loss: Tensor, *inputs: Tensor, **options: object) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, **options)  # type: ignore[arg-type]


@kind
def plain(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return gradients(loss(q, k, s), q, k, s)


@kind
def frozen_teacher(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return gradients(loss(q, made_in_inference_mode(k), made_in_inference_mode(s)), q)[0], None, None


@kind
def frozen_student(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return None, *gradients(loss(made_in_inference_mode(q), k, s), k, s)


@kind
def only_scale(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return None, None, gradients(loss(made_in_inference_mode(q), made_in_inference_mode(k), s), s)[0]


@kind
def inference_weight(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    rows = loss(q, k, s, reduction="none")
    weight = made_in_inference_mode(torch.ones(len(rows), dtype=q.dtype))
    return gradients(loss(q, k, s, weight=weight), q, k, s)


@kind
def batched(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    found = gradients(loss(q, k, s), q, k, s, grad_outputs=torch.tensor([1.0, -2.0], dtype=q.dtype), is_grads_batched=True)
    assert all(torch.allclose(x[1], -2 * x[0]) for x in found)
    return tuple(x[0] for x in found)


@kind
def jacobian(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return torch.autograd.functional.jacobian(loss, (q, k, s), vectorize=True)


@kind
def create_graph(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return tuple(x.detach() for x in gradients(loss(q, k, s), q, k, s, create_graph=True))


@kind
def twice(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return gradients(gradients(loss(q, k, s), q, create_graph=True)[0].square().sum(), q)


@kind
def tangent(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return torch.func.jvp(lambda q: loss(q, k, s), (q.detach(),), (q.detach(),))


@kind
def tangent_without_grad(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        return loss(torch.autograd.forward_ad.make_dual(q, q), k, s)


@kind
def transformed(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return torch.func.grad(loss, argnums=(0, 1, 2))(q.detach(), k.detach(), s.detach())


@kind
def tangent_of_transformed(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return torch.func.jvp(torch.func.grad(lambda q: loss(q, k, s)), (q.detach(),), (q.detach(),))


@kind
def transformed_twice(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return torch.func.grad(lambda q: torch.func.grad(lambda q: loss(q, k, s))(q).square().sum())(q.detach())


@kind
def outside_of_transformed(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return gradients(torch.func.grad(lambda q: loss(q, k, s))(q).square().sum(), q)


@kind
def mapped_keys(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    values = torch.func.vmap(lambda k: loss(q, k, s))(k[None].expand(2, *k.shape))
    return tuple(x / 2 for x in gradients(values.sum(), q, k, s))


@kind
def hooked(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    inner = q * 1.0
    inner.register_hook(lambda g: 2 * g)
    dq, dk, ds = gradients(loss(inner, k, s), q, k, s)
    return dq / 2, dk, ds


@kind
def strided(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    return gradients(loss(q.T.contiguous().T, torch.stack([k, -k], 1)[:, 0], s.expand(1)), q, k, s)


@kind
def nothing_recorded(loss: Callable[..., Tensor], q: Tensor, k: Tensor, s: Tensor) -> object:
    with torch.no_grad():
        value = loss(q, k, s)
    with torch.inference_mode():
        assert torch.equal(value, loss(q, k, s))
    assert not value.requires_grad
    return plain(loss, q, k, s)


REFUSED = {
    "twice": "second derivative of this loss is not implemented",
    "transformed_twice": "second derivative of this loss is not implemented",
    "outside_of_transformed": "second derivative of this loss is not implemented",
    "tangent": "forward-mode derivatives",
    "tangent_without_grad": "forward-mode derivatives",
    "tangent_of_transformed": "forward-mode derivatives",
}


@each_form
@pytest.mark.parametrize("how", KINDS)
def test_size_decides_nothing(name: str, how: str) -> None:
    """Every way to ask for a gradient: right at both sizes, or refused at both with one message."""
    for rows in (24, 520):
        inputs = (*q_and_k(rows, rows, 3), torch.tensor(3.0, dtype=torch.float64))
        leaves = [x.clone().requires_grad_() for x in inputs]
        if how in REFUSED:
            with pytest.raises((RuntimeError, NotImplementedError), match=REFUSED[how]):
                KINDS[how](FORMS[name], *leaves)
            continue
        found = KINDS[how](FORMS[name], *leaves)
        assert isinstance(found, tuple)
        expected = torch.autograd.grad(FORMS[name](*leaves, backend="reference"), leaves)
        for a, b in zip(found, expected, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ids", "labels", "mask", "queue", "bias"])
@pytest.mark.parametrize("rows", [24, 520])
def test_tensors_of_inference_mode(name: str, rows: int) -> None:
    """Ids, labels and masks may come from inference mode too, with any number of rows."""
    q, k = q_and_k(rows, rows, 3)
    groups = made_in_inference_mode(torch.arange(rows) // 3)
    with torch.inference_mode():
        mask, queue, bias = groups[:, None] == groups, k.flip(0).clone(), torch.tensor(0.5, dtype=torch.float64)
    losses: dict[str, Callable[..., Tensor]] = {
        "ids": lambda q, **o: fastnce.info_nce(q, k, query_ids=groups, exclude_query_ids=groups, **o),
        "labels": lambda q, **o: fastnce.sup_con(q, groups, **o),
        "mask": lambda q, **o: fastnce.sup_con(q, mask=mask, **o),
        "queue": lambda q, **o: fastnce.moco_loss(q, k, queue, **o),
        "bias": lambda q, **o: fastnce.contrastive_stats(q, k, scale=3.0, bias=bias, offset=0, **o).lse_neg.sum(),
    }
    leaf = q.requires_grad_()
    found, expected = (torch.autograd.grad(losses[name](leaf, backend=b), leaf)[0] for b in ("auto", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
