"""How the losses behave under autograd and its transforms: checked derivatives, and a clear refusal of the ones that do not exist."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from every_loss import FORMS, each_form, q_and_k
from named import ON_CPU, widest
from problems import PROBLEMS, Call, of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastnce
from fastnce import autograd
from fastnce.backends import torch_tiles
from fastnce.pairs import Pairs
from fastnce.problem import Problem

SOME = [
    p
    for p in PROBLEMS
    if p.why.startswith(("queue", "clip captions, aligned", "simclr:", "mask and ids", "not normalized:", "two partners"))
]
each_backend = pytest.mark.parametrize("backend", ["auto", *ON_CPU])


@pytest.mark.float64
@each_form
@each_backend
def test_gradcheck(name: str, backend: str) -> None:
    q, k = (x.requires_grad_() for x in q_and_k())
    s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: FORMS[name](*a, backend=backend, reduction="none"), (q, k, s))
    assert torch.autograd.gradcheck(lambda *a: FORMS[name](*a, backend=backend), (q, k, s))


@pytest.mark.parametrize("p", SOME, ids=str)
@pytest.mark.parametrize("metrics", [False, True])
def test_opcheck(p: Call, metrics: bool) -> None:
    """All four of torch's checks on both operators: schema, fake implementation, autograd registration, AOT dispatch."""
    q, k, scale, bias = p.tensors(torch.float32)
    rules = p.rules()
    ids = (rules.get("q_label"), rules.get("k_label"), rules.get("q_exclude"), rules.get("k_exclude"), rules.get("mask"))
    problem = Problem(q, k, scale, bias, Pairs(p.exclude_self, p.offset, *ids), p.two_sided, p.normalize, metrics)
    flat = autograd.Arguments.of(problem, "torch")
    torch.library.opcheck(torch.ops.fastnce.forward.default, tuple(flat))
    out = torch.ops.fastnce.forward(*flat)
    per_side = len(out) // (2 if p.two_sided else 1)
    grads = [torch.randn_like(v) for i, v in enumerate(out) if i % per_side < 3]
    stats = [v for i, v in enumerate(out) if i % per_side < 6]
    for wanted in ([True, k is not None, True, bias is not None], [True, False, False, False]):
        torch.library.opcheck(torch.ops.fastnce.backward.default, tuple(autograd.Request(grads, stats, wanted, flat).flat()))


@each_form
def test_func_grad_and_vmap(name: str) -> None:
    """torch.func.grad equals backward; vmap over a batch of problems equals a loop, values and gradients."""
    q, k = q_and_k()
    s = torch.tensor(3.0, dtype=torch.float64)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(FORMS[name](leaf, k, s), leaf)
    grad = torch.func.grad(FORMS[name])
    torch.testing.assert_close(grad(q, k, s), expected)
    qs = torch.stack([q, q * 2 + 1, q.flip(0)])
    torch.testing.assert_close(torch.func.vmap(FORMS[name], (0, None, None))(qs, k, s), torch.stack([FORMS[name](x, k, s) for x in qs]))
    torch.testing.assert_close(torch.func.vmap(grad, (0, None, None))(qs, k, s), torch.stack([grad(x, k, s) for x in qs]))


@each_form
@each_backend
def test_second_derivative_is_refused(name: str, backend: str) -> None:
    """A gradient penalty must not silently lose terms."""
    q, k = (x.requires_grad_() for x in q_and_k(dtype=widest(backend)))
    loss = FORMS[name](q, k, torch.tensor(3.0, dtype=q.dtype), backend=backend)
    with pytest.raises(RuntimeError, match="second derivative of this loss is not implemented"):
        torch.autograd.grad(loss, q, create_graph=True)[0].square().sum().backward()


@each_form
@each_backend
def test_forward_mode_is_refused(name: str, backend: str) -> None:
    q, k = q_and_k(dtype=widest(backend))
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(lambda x: FORMS[name](x, k, torch.tensor(3.0, dtype=q.dtype), backend=backend), (q,), (q,))


@each_form
@each_backend
def test_retain_graph_twice_is_bitwise(name: str, backend: str) -> None:
    q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
    before = q.detach().clone(), k.detach().clone()
    loss = FORMS[name](q, k, 3.0, backend=backend)
    first = torch.autograd.grad(loss, (q, k), retain_graph=True)
    second = torch.autograd.grad(loss, (q, k), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])
    torch.autograd.grad(loss, (q, k))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (q, k))


@each_form
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
    s = torch.tensor(3.0, requires_grad=True)
    expected = torch.autograd.grad(FORMS[name](q, k, s), (q, k, s))
    checkpoint(FORMS[name], q, k, s, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(expected, (q, k, s), strict=True))


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Under autocast nothing is computed in less than float32: features of one dtype give the same bits as without."""
    q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
    s = torch.tensor(3.0, requires_grad=True)
    plain = FORMS[name](q, k, s, backend="torch")
    with torch.autocast("cpu", dtype=dtype):
        cast = FORMS[name](q, k, s, backend="torch")
        half = torch.nn.functional.linear(q, torch.eye(6))
        assert half.dtype == dtype
        assert FORMS[name](half, half.detach(), s, backend="torch").dtype == torch.float32
    assert torch.equal(plain, cast)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(plain, (q, k, s)), torch.autograd.grad(cast, (q, k, s)), strict=True))


def test_grad_scaler_recovers_from_overflow() -> None:
    """float16 features with a loss scale that overflows: inf is seen, the step is skipped, the scale comes down, training goes on."""
    weight = torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) * 1e-3)
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    x, _ = q_and_k(dtype=torch.float32)
    before, steps = weight.detach().clone(), 0
    while scaler.get_scale() > 2.0**4 and torch.equal(before, weight):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            z = x @ weight
        scaler.scale(fastnce.nt_xent(z, temperature=0.1)).backward()
        scaler.step(optimizer)
        scaler.update()
        steps += 1
    assert steps > 1
    assert not torch.equal(before, weight)
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("kind", ["random", "expanded", "strided", "zero"])
@each_backend
def test_upstream_gradients(kind: str, backend: str) -> None:
    """Any gradient of reduction='none' is obeyed row by row, whatever its strides."""
    q, k = (x.requires_grad_() for x in q_and_k(dtype=widest(backend)))
    rows = fastnce.info_nce(q, k, reduction="none", backend=backend)
    g = torch.randn(24, dtype=q.dtype, generator=torch.Generator().manual_seed(4))
    upstream = {"random": g[:12], "expanded": g[:1].expand(12), "strided": g[::2], "zero": torch.zeros(12, dtype=q.dtype)}[kind]
    (found,) = torch.autograd.grad(rows, q, upstream, retain_graph=True)
    one_by_one = sum(upstream[i] * torch.autograd.grad(rows[i], q, retain_graph=True)[0] for i in range(12))
    torch.testing.assert_close(found, one_by_one)


def test_saved_for_backward() -> None:
    """Between forward and backward the inputs themselves and vectors are kept, never a matrix of logits or a copy."""
    q, k = (x.requires_grad_() for x in q_and_k(600, 600, 32, torch.float32))
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fastnce.clip_loss(q, k, torch.tensor(9.0, requires_grad=True))
    matrices = {x.data_ptr() for x in saved if x.numel() > 600}
    assert matrices == {q.data_ptr(), k.data_ptr()}


def test_inputs_changed_in_between_are_noticed() -> None:
    q, k = q_and_k(600, 600, 8, torch.float32)
    z = q.requires_grad_() * 1.0
    loss = fastnce.info_nce(z, k)
    with torch.no_grad():
        z += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_form
def test_repeats_are_bitwise(name: str) -> None:
    q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
    first = FORMS[name](q, k, 3.0, backend="torch")
    grads = torch.autograd.grad(first, (q, k))
    for _ in range(20):
        again = FORMS[name](q, k, 3.0, backend="torch")
        assert torch.equal(first, again)
        assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(again, (q, k)), strict=True))


def test_uninitialised_memory_is_never_read() -> None:
    """Deterministic mode fills torch.empty with nan."""
    p = of("clip captions:")
    q, k, scale, bias = p.tensors()
    torch.use_deterministic_algorithms(True)
    try:
        found = fastnce.contrastive_stats(q.requires_grad_(), k, scale=scale, bias=bias, metrics=True, **p.call())
        (grad,) = torch.autograd.grad(found.pos.sum() + found.columns.lse_neg.sum(), q)
        loss = fastnce.info_nce(q, k[:30], (k[:20], torch.arange(31).clamp(max=20)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(grad).all()
    assert torch.isfinite(loss)


@each_form
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_create_graph_keeps_vectors(name: str, backend: str, dtype: torch.dtype) -> None:
    """A second derivative is refused, so nothing is kept for it, and torch has nothing to warn of."""
    q, k = (x.requires_grad_() for x in q_and_k(40, 40, 2, dtype))
    s = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    loss, kept = FORMS[name](q, k, s, backend=backend), [0]

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(loss, (q, k, s), create_graph=True)
    assert len(kept) > 1
    assert max(kept) < 40 * 40 / 2


def test_operators_have_derivatives() -> None:
    """A call of an operator by hand has its gradient, or raises."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fastnce::"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"), f"{name} would be differentiated as a constant"
    q, k = (x.requires_grad_() for x in q_and_k())
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    arguments = autograd.Arguments.of(Problem(q, k, scale, None, Pairs(offset=0), False, True), "torch")
    lse_neg, _, pos, *_ = torch.ops.fastnce.forward(*arguments)
    found = torch.autograd.grad((lse_neg - pos).sum(), (q, k, scale), create_graph=True)
    s = 3.0 * torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(k).T
    expected = s.masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf).logsumexp(1) - s.diagonal()
    torch.testing.assert_close(found[:2], torch.autograd.grad(expected.sum(), (q, k), retain_graph=True))
    torch.testing.assert_close(found[2], (s * torch.autograd.grad(expected.sum(), s)[0]).sum() / 3.0)
    with pytest.raises(RuntimeError, match="second derivative of this loss is not implemented"):
        found[0].square().sum().backward()


def test_frozen_keys_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend is told that k will get no gradient where that is so in every level, and only there."""
    told: list[bool] = []
    forward = torch_tiles.forward

    def listening(problem: Problem) -> object:
        told.append(problem.frozen)
        return forward(problem)

    monkeypatch.setattr(torch_tiles, "forward", listening)
    q, k = q_and_k(5, 5, 3)
    leaf, learned, keys = q.clone().requires_grad_(), k.clone().requires_grad_(), k[None].expand(2, 5, 3)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return fastnce.contrastive_stats(q, k, scale=3.0, offset=0).lse_neg.sum()

    calls: dict[str, tuple[Callable[[], object], bool]] = {
        "queue": (lambda: loss(leaf, k).backward(), True),
        "a batch of queues": (lambda: torch.func.vmap(lambda k: loss(leaf, k))(keys).sum().backward(), True),
        "both learn": (lambda: loss(leaf, learned).backward(), False),
        "only the keys learn": (lambda: loss(q, learned).backward(), False),
        "one tensor": (lambda: loss(leaf, leaf).backward(), False),
        "nobody learns": (lambda: loss(q, k), False),
        "a batch of learned keys": (lambda: torch.func.vmap(lambda k: loss(leaf, k))(keys * learned).sum().backward(), False),
        "inside by q, outside by k": (lambda: torch.func.grad(lambda q: loss(q, learned))(q), False),
        "by k in a transform": (lambda: torch.func.grad(lambda k: loss(leaf, k))(k), False),
    }
    for name, (call, frozen) in calls.items():
        told.clear()
        call()
        assert set(told) == {frozen}, name
    with torch.no_grad():
        told.clear()
        loss(leaf, k)
        assert told == [False]
