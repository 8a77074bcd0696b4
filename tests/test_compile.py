"""torch.compile has the values, gradients and errors of eager mode, in one graph that is compiled a few times.

backend="aot_eager" has everything of torch.compile but the generated code, in a tenth of the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._dynamo.utils
from every_loss import FORMS, OF_VIEWS, arguments, each_form, parameter, q_and_k
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from twins import TWINS

import fastnce
from train_ref.truth import LOSSES


def fresh_counters() -> Counter[str]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters["stats"]


@each_form
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(name: str, dynamic: bool) -> None:
    """fullgraph=True, static and dynamic, equals eager; new batch sizes do not recompile without end."""
    graphs = fresh_counters()
    compiled = torch.compile(FORMS[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for _ in range(2):
        q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
        s = torch.tensor(3.0, requires_grad=True)
        found, expected = compiled(q, k, s), FORMS[name](q, k, s, backend="torch")
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
        for a, b in zip(torch.autograd.grad(found, (q, k, s)), torch.autograd.grad(expected, (q, k, s)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert graphs["unique_graphs"] == 1


@pytest.mark.slow
@each_form
def test_compile_without_gradient(name: str) -> None:
    """A validation loss: no input needs a gradient, or gradients are off."""
    torch._dynamo.reset()
    compiled = torch.compile(FORMS[name], fullgraph=True, backend="aot_eager")
    q, k = q_and_k(dtype=torch.float32)
    torch.testing.assert_close(compiled(q, k, 3.0 * torch.ones(())), FORMS[name](q, k, 3.0, backend="torch"), rtol=2e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q.requires_grad_(), k, 3.0 * torch.ones(())), FORMS[name](q, k, 3.0), rtol=2e-6, atol=1e-7)


def test_compile_dynamic_batch() -> None:
    """Five batch sizes, at most two compilations."""
    graphs = fresh_counters()
    compiled = torch.compile(lambda a, b: fastnce.nt_xent(a, b, 0.2), fullgraph=True, backend="aot_eager")
    for n in (8, 11, 20, 33, 70):
        q, k = (x.requires_grad_() for x in q_and_k(n, n, dtype=torch.float32))
        torch.testing.assert_close(compiled(q, k), fastnce.nt_xent(q, k, 0.2), rtol=2e-6, atol=0)
        compiled(q, k).backward()
    assert graphs["unique_graphs"] <= 2


SCALE = 3.0
# With one tensor as query and key, which autograd.Function.apply would see twice.
SAME: dict[str, Callable[[Tensor], Tensor]] = {name: lambda z, name=name: OF_VIEWS[name](z, z, SCALE) for name in LOSSES} | {
    "symmetric": lambda z: fastnce.info_nce(z, z, symmetric=True),
    "queue": lambda z: fastnce.moco_loss(z, z, z),
    "stats": lambda z: fastnce.contrastive_stats(z, z, scale=SCALE, offset=0).lse_neg.sum(),
}


def definition(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the definition, by plain backward: no transform, no compiler, no tiles."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves, backend="reference"), leaves)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def three_rows() -> tuple[Tensor, ...]:
    """q and k (3, 2), the scale, and a batch of two q."""
    q, k = q_and_k(3, 3, 2)
    return q, k, torch.tensor(SCALE, dtype=torch.float64), torch.stack([q, q.flip(0)])


@pytest.mark.slow
@each_form
def test_grad_inside(name: str) -> None:
    """compile(func.grad): gradients by q, k and scale, none of them zero or half."""
    q, k, s, _ = three_rows()
    torch._dynamo.reset()
    found = torch.compile(grad(FORMS[name], argnums=(0, 1, 2)), fullgraph=True, backend="aot_eager")(q, k, s)
    close(found, definition(FORMS[name], q, k, s))


@pytest.mark.parametrize("name", ["sup_con", "moco_loss"])
def test_backward_outside(name: str) -> None:
    """compile(vmap(loss)) with backward outside, beside a func.grad of the same leaves that is not differentiated again."""
    loss = FORMS[name]
    q, k, s, qs = three_rows()
    leaves = [x.clone().requires_grad_() for x in (qs, k, s)]

    def both(qs: Tensor, k: Tensor, s: Tensor) -> tuple[Any, Tensor]:
        return grad(loss, argnums=(0, 1, 2))(q, k, s), vmap(loss, (0, None, None))(qs, k, s)

    torch._dynamo.reset()
    inside, values = torch.compile(both, fullgraph=True, backend="aot_eager")(*leaves)
    one, other = (definition(loss, x, k, s) for x in qs)
    close(inside, one)
    close(torch.autograd.grad(values.sum(), leaves), (torch.stack([one[0], other[0]]), one[1] + other[1], one[2] + other[2]))


def test_more_transforms() -> None:
    """vjp, jacrev and vmap of grad, with a two-sided loss."""
    loss = FORMS["symmetric"]
    q, k, s, qs = three_rows()

    def all_of_them(q: Tensor, k: Tensor, s: Tensor, qs: Tensor) -> Any:
        _, pullback = vjp(loss, q, k, s)
        rows = jacrev(lambda q: loss(q, k, s, reduction="none"))(q)
        return pullback(s), rows, vmap(grad(loss), (0, None, None))(qs, k, s)

    torch._dynamo.reset()
    pulled, rows, batched = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(q, k, s, qs)
    close(pulled, tuple(x * s for x in definition(loss, q, k, s)))
    close(batched, torch.stack([definition(loss, x, k, s)[0] for x in qs]))
    leaf = q.clone().requires_grad_()
    values = loss(leaf, k, s, reduction="none", backend="reference")
    close(rows, torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]))


def test_inductor() -> None:
    """The generated code too, of a problem that eager mode gives to dense operations and of one that it does not."""
    for rows in (12, 600):
        q, k = q_and_k(rows, rows)
        s = torch.tensor(SCALE, dtype=torch.float64)
        torch._dynamo.reset()
        found = torch.compile(grad(FORMS["clip_loss"], argnums=(0, 1, 2)), fullgraph=True, dynamic=False)(q, k, s)
        close(found, definition(FORMS["clip_loss"], q, k, s))
        close(found, grad(FORMS["clip_loss"], argnums=(0, 1, 2))(q, k, s))


def learnt() -> nn.Parameter:
    return nn.Parameter(torch.tensor(SCALE))


MODULES: dict[str, Callable[[], nn.Module]] = {name: lambda name=name: TWINS[name].module(scale=learnt()) for name in TWINS} | {
    "InfoNCE, temperature": lambda: fastnce.InfoNCE(learnt()),
    "ClipLoss, its own": lambda: fastnce.ClipLoss(),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    """The parameter of every module gets its gradient from a compiled transform: the same as by backward."""
    inputs = TWINS[name.split(",")[0]].inputs(torch.float64)
    module = MODULES[name]().double().eval()  # a queue is then left as it is: torch refuses to write into it inside of a transform
    parameters = {n: p.detach().clone() for n, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], first: Tensor) -> Tensor:
        found: Tensor = functional_call(module, parameters, (first, *inputs[1:]))
        return found

    torch._dynamo.reset()
    by_parameters, by_first = torch.compile(grad(loss, argnums=(0, 1)), backend="aot_eager")(parameters, inputs[0])
    module(*inputs).backward()
    close(by_first, inputs[0].grad)
    close(by_parameters, {n: p.grad for n, p in module.named_parameters()})
    assert len(by_parameters) == 1


@pytest.mark.parametrize("name", SAME)
def test_same_tensor_twice(name: str) -> None:
    """Each of its places adds its part of the gradient."""
    z = q_and_k()[0].requires_grad_()
    torch._dynamo.reset()
    (found,) = torch.autograd.grad(torch.compile(SAME[name], fullgraph=True, backend="aot_eager")(z), z)
    (expected,) = torch.autograd.grad(SAME[name](z), z)
    close(found, expected)


def test_refusals() -> None:
    """Calls that raise in eager mode raise when they are traced: no gradient turns into zeros."""
    q, k, s, _ = three_rows()
    loss = FORMS["info_nce"]

    def twice(q: Tensor) -> Tensor:
        return grad(lambda q: grad(loss)(q, k, s).square().sum())(q)

    def tangent(q: Tensor) -> Tensor:
        result: Tensor = jvp(lambda q: loss(q, k, s), (q,), (q,))[1]
        return result

    for refused, message in ((twice, "second derivative of this loss is not implemented"), (tangent, "forward-mode derivatives")):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            torch.compile(refused, fullgraph=True, backend="aot_eager")(q)


def of_number(name: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda q, k, t: getattr(fastnce, name)(**arguments(LOSSES[name], q, k), **{parameter(LOSSES[name]): t})


NUMBERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {name: of_number(name) for name in LOSSES} | {
    "clip_loss, bias": lambda q, k, t: fastnce.clip_loss(q, k, t, t),
    "stats": lambda q, k, t: fastnce.contrastive_stats(q, k, scale=t, bias=t, offset=0).lse_neg.mean(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes(name: str) -> None:
    """Twelve values of a temperature, a scale or a bias: one compilation for the first, one for all others."""
    q, k = q_and_k(12, 12, 3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(NUMBERS[name], backend=counter, fullgraph=True)
    for step in range(12):
        value = 0.1 + 0.01 * step
        close(compiled(q, k, value), NUMBERS[name](q, k, value))
    assert counter.frame_count == 2


def test_a_bad_number_raises() -> None:
    """The first value, which is a constant of the traced code, and a later one, which is a symbol in it."""
    q, k = q_and_k()
    torch._dynamo.reset()
    compiled = torch.compile(NUMBERS["nt_xent"], backend="aot_eager")
    for value in (0.2, 0.3, -1.0):
        if value > 0:
            compiled(q, k, value)
            continue
        with pytest.raises(Exception, match="nt_xent: temperature must be a positive finite number, got -1.0"):
            compiled(q, k, value)


def test_an_attribute_that_changes() -> None:
    """The same for a number that lives in a module."""

    class Annealed(nn.Module):
        temperature = 0.1

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            loss: Tensor = fastnce.nt_xent(q, k, self.temperature)
            return loss

    q, k = q_and_k()
    module = Annealed()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for step in range(12):
        module.temperature = 0.1 + 0.01 * step
        close(compiled(q, k), module(q, k))
    assert counter.frame_count == 2
