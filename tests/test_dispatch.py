"""Operators are left out where nothing would see them, and only there: autograd.call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from named import ON_CPU
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastnce

BACKENDS = [*ON_CPU, "triton"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def q_and_k() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 6, generator=g).requires_grad_(), torch.randn(12, 6, generator=g).requires_grad_()


def info_nce(q: Tensor, k: Tensor, backend: str) -> Tensor:
    return fastnce.info_nce(q, k, temperature=0.2, backend=backend)


def paired(q: Tensor, k: Tensor, backend: str) -> Tensor:
    negatives = torch.stack([k.roll(1, 0), k.roll(2, 0)], 1)
    return fastnce.info_nce(q, k, negatives, temperature=0.2, negative_mode="paired", backend=backend)


def gradients(loss: Tensor, *asked: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, asked)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.names.add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def operators(backend: str, loss: Callable[..., Tensor]) -> set[str]:
    if loss is paired:
        return {"fastnce.listed", "fastnce.listed_backward"}
    return {"fastnce.loss", "fastnce.loss_gradients"} if backend == "triton" else {"fastnce.forward", "fastnce.backward"}


@each_backend
@pytest.mark.parametrize("loss", [info_nce, paired])
def test_a_mode_sees_operators_and_changes_nothing(backend: str, loss: Callable[..., Tensor]) -> None:
    q, k = q_and_k()
    with Seen() as seen:
        value = loss(q, k, backend)
        found = gradients(value, q, k)
    assert operators(backend, loss) <= seen.names
    with torch.profiler.profile() as profile:
        plain = loss(q, k, backend)
        others = gradients(plain, q, k)
    assert not [event.name for event in profile.events() or [] if event.name.startswith("fastnce::")]
    assert torch.equal(value, plain) and all(torch.equal(a, b) for a, b in zip(found, others, strict=True))


@each_backend
def test_a_tracer_sees_operators(backend: str) -> None:
    q, k = (x.detach() for x in q_and_k())
    traced = make_fx(lambda q, k: info_nce(q, k, backend))(q, k)
    assert operators(backend, info_nce) & {str(node.target).removesuffix(".default") for node in traced.graph.nodes}
    assert torch.equal(traced(q, k), info_nce(q, k, backend))


class Kind(Tensor):
    """A kind of tensor that wants to see every operator."""

    names: set[str] = set()

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        cls.names.add(str(func).removesuffix(".default"))
        inside = torch.utils._pytree.tree_map(lambda x: x.inner if isinstance(x, Kind) else x, (args, kwargs or {}))
        return func(*inside[0], **inside[1])


@each_backend
def test_a_kind_of_tensor_sees_operators(backend: str) -> None:
    q, k = (x.detach() for x in q_and_k())
    Kind.names.clear()
    assert torch.equal(info_nce(Kind(q), Kind(k), backend), info_nce(q, k, backend))
    assert operators(backend, info_nce) & Kind.names


@each_backend
def test_a_tracer_before_autograd_sees_operators(backend: str) -> None:
    q, k = (x.detach() for x in q_and_k())
    traced = make_fx(lambda q, k: info_nce(q, k, backend), pre_dispatch=True)(q, k)
    assert operators(backend, info_nce) & {str(node.target).removesuffix(".default") for node in traced.graph.nodes}


@each_backend
def test_numbers_that_wait_to_be_negated(backend: str) -> None:
    """The imaginary part of a conjugate is a view of numbers with the other sign."""
    q, k = (x.detach() for x in q_and_k())
    scale = torch.tensor(5.0 - 3.0j).conj().imag
    assert scale.is_neg() and torch._neg_view(q).is_neg()
    found = fastnce.info_nce(torch._neg_view(q), k, scale=scale, backend=backend)
    assert torch.equal(found, fastnce.info_nce(-q, k, scale=torch.tensor(3.0), backend=backend))


@each_backend
def test_batched_gradients(backend: str) -> None:
    q, k = q_and_k()
    loss = info_nce(q, k, backend)
    batched = torch.autograd.grad(loss, (q, k), torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True)
    for found, one in zip(batched, gradients(loss, q, k), strict=True):
        assert torch.allclose(found[0], one, rtol=1e-5) and torch.allclose(found[1], -2.0 * one, rtol=1e-5)


@each_backend
def test_forward_mode_and_second_derivatives_are_refused(backend: str) -> None:
    q, k = q_and_k()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        info_nce(torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q)), k.detach(), backend)
    (first,) = torch.autograd.grad(info_nce(q, k, backend), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@each_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: str, mode: Callable[[], Any]) -> None:
    q, k = q_and_k()
    with mode():
        found = info_nce(q, k, backend)
    assert not found.requires_grad and torch.equal(found, info_nce(q, k, backend).detach())
