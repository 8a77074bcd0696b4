"""A loss as one operator under torch's checks, compiler and transforms, by the Triton kernels in the interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_fused import CASES, run
from test_triton import deterministic, family  # noqa: F401  fixtures
from torch import Tensor

from fastnce import fused
from fastnce.problem import LossProblem

SLOW = ["nt_xent, a number", "info_nce, weights", "clip_loss", "sup_con, views"]
FORMS = ["nt_xent", "moco_loss", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", FORMS)
def test_opcheck(name: str, family: str, deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """All four of torch's checks on both operators, with the arguments of a public loss: schema, fake, autograd, AOT dispatch.

    They compare all that forward keeps: deterministic mode adds in one order, and fills with nan what no kernel writes.
    """
    monkeypatch.setattr(torch.testing, "assert_close", partial(torch.testing.assert_close, equal_nan=True))
    asked: list[LossProblem] = []
    of = fused._Arguments.of
    monkeypatch.setattr(fused._Arguments, "of", lambda ask, backend: (asked.append(ask), of(ask, backend))[1])
    loss, tensors = CASES[name]
    loss(**{key: x.float() for key, x in tensors.items()}, backend="triton")
    flat = of(asked[0], "triton")
    with torch._C._AutoDispatchBelowAutograd():  # above, `frozen` would be cleared: no tensor here has a gradient
        _, kept = torch.ops.fastnce.loss(*flat)
    torch.library.opcheck(torch.ops.fastnce.loss.default, tuple(flat))
    wanted = [x is not None for x in flat.differentiable]
    for some in (wanted, [wanted[0], *[False] * 6]):
        given = (torch.tensor(0.37), kept, some, *flat)
        torch.library.opcheck(torch.ops.fastnce.loss_gradients.default, given)


@pytest.mark.parametrize("name", FORMS)
def test_compile_is_one_graph(name: str, family: str) -> None:  # noqa: F811
    torch._dynamo.reset()
    eager = CASES[name]
    compiled = torch.compile(eager[0], fullgraph=True, backend="aot_eager")
    for a, b in zip(run((compiled, eager[1]), torch.float32, "triton"), run(eager, torch.float32, "triton"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FORMS)
def test_func_grad_and_vmap(name: str, family: str) -> None:  # noqa: F811
    """torch.func.grad equals backward; vmap over two problems equals a loop, values and gradients."""
    call, tensors = CASES[name]
    first, *rest = (x.float() for x in tensors.values())

    def loss(a: Tensor) -> Tensor:
        return call(**dict(zip(tensors, (a, *rest), strict=True)), backend="triton")

    both = torch.stack([first, 2 * first.flip(0) + 1])
    leaf = both.clone().requires_grad_()
    values = torch.stack([loss(a) for a in leaf])
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    for found, right in (
        (torch.func.grad(loss)(first), expected[0]),
        (torch.func.vmap(loss)(both), values),
        (torch.func.vmap(torch.func.grad(loss))(both), expected),
    ):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["nt_xent", "moco_loss"])
def test_other_derivatives_are_refused(name: str, family: str) -> None:  # noqa: F811
    call, tensors = CASES[name]
    first, *rest = (x.float() for x in tensors.values())

    def loss(a: Tensor) -> Tensor:
        return call(**dict(zip(tensors, (a, *rest), strict=True)), backend="triton")

    leaf = first.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative of this loss is not implemented"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0].square().sum().backward()
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(loss, (first,), (first,))
