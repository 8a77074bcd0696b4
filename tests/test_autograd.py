"""How the losses behave under autograd and its transforms: checked derivatives, and a clear refusal of the ones that do not exist."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import PROBLEMS, of
from problems import Problem as Case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastnce
from fastnce import ops
from fastnce.pairs import Pairs
from fastnce.problem import Problem

SOME = [
    p
    for p in PROBLEMS
    if p.why.startswith(("queue", "clip captions, aligned", "simclr:", "mask and ids", "not normalized:", "two partners"))
]


def q_and_k(m: int = 12, n: int = 12, d: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(m, d, generator=g, dtype=dtype), torch.randn(n, d, generator=g, dtype=dtype)


def paired(k: Tensor) -> Tensor:
    return torch.stack([k.roll(1, 0), k.roll(2, 0)], 1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda q, k, s, **o: fastnce.info_nce(q, k, scale=s, **o),
    "symmetric": lambda q, k, s, **o: fastnce.info_nce(q, k, scale=s, symmetric=True, **o),
    "unpaired": lambda q, k, s, **o: fastnce.info_nce(q, k, k.flip(0), scale=s, in_batch=True, **o),
    "paired": lambda q, k, s, **o: fastnce.info_nce(q, k, paired(k), scale=s, negative_mode="paired", in_batch=True, **o),
    "ragged": lambda q, k, s, **o: fastnce.info_nce(q, k, (paired(k).flatten(0, 1), torch.arange(0, 25, 2)), scale=s, **o),
    "nt_xent": lambda q, k, s, **o: fastnce.nt_xent(q, k, scale=s, **o),
    "sup_con": lambda q, k, s, **o: fastnce.sup_con(torch.stack([q, k], 1), torch.arange(len(q)) % 5, scale=s, **o),
    "sup_con in": lambda q, k, s, **o: fastnce.sup_con(torch.stack([q, k], 1), torch.arange(len(q)) % 5, variant="in", scale=s, **o),
    "clip": lambda q, k, s, **o: fastnce.clip_loss(q, k, s, s * 0.1, **o),
    "moco": lambda q, k, s, **o: fastnce.moco_loss(q, k, k.flip(1), scale=s, **o),
}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_backend = pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])


@pytest.mark.float64
@each_loss
@each_backend
def test_gradcheck(name: str, backend: str) -> None:
    q, k = (x.requires_grad_() for x in q_and_k())
    s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: LOSSES[name](*a, backend=backend, reduction="none"), (q, k, s))
    assert torch.autograd.gradcheck(lambda *a: LOSSES[name](*a, backend=backend), (q, k, s))


@pytest.mark.parametrize("p", SOME, ids=str)
@pytest.mark.parametrize("metrics", [False, True])
def test_opcheck(p: Case, metrics: bool) -> None:
    """All four of torch's checks on both operators: schema, fake implementation, autograd registration, AOT dispatch."""
    q, k, scale, bias = p.tensors(torch.float32)
    rules = p.rules()
    ids = (rules.get("q_label"), rules.get("k_label"), rules.get("q_exclude"), rules.get("k_exclude"), rules.get("mask"))
    problem = Problem(q, k, scale, bias, Pairs(p.exclude_self, p.offset, *ids), p.two_sided, p.normalize, metrics)
    flat = ops.Arguments.of(problem, "cpu")
    torch.library.opcheck(torch.ops.fastnce.forward.default, tuple(flat))
    out = torch.ops.fastnce.forward(*flat)
    per_side = len(out) // (2 if p.two_sided else 1)
    grads = [torch.randn_like(v) for i, v in enumerate(out) if i % per_side < 3]
    stats = [v for i, v in enumerate(out) if i % per_side < 6]
    for wanted in ([True, k is not None, True, bias is not None], [True, False, False, False]):
        torch.library.opcheck(torch.ops.fastnce.backward.default, tuple(ops.Request(grads, stats, wanted, flat).flat()))


@each_loss
def test_func_grad_and_vmap(name: str) -> None:
    """torch.func.grad equals backward; vmap over a batch of problems equals a loop, values and gradients."""
    q, k = q_and_k()
    s = torch.tensor(3.0, dtype=torch.float64)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(LOSSES[name](leaf, k, s), leaf)
    grad = torch.func.grad(LOSSES[name])
    torch.testing.assert_close(grad(q, k, s), expected)
    qs = torch.stack([q, q * 2 + 1, q.flip(0)])
    torch.testing.assert_close(torch.func.vmap(LOSSES[name], (0, None, None))(qs, k, s), torch.stack([LOSSES[name](x, k, s) for x in qs]))
    torch.testing.assert_close(torch.func.vmap(grad, (0, None, None))(qs, k, s), torch.stack([grad(x, k, s) for x in qs]))


@each_loss
@each_backend
def test_second_derivative_is_refused(name: str, backend: str) -> None:
    """A gradient penalty must not silently lose terms."""
    q, k = (x.requires_grad_() for x in q_and_k())
    loss = LOSSES[name](q, k, torch.tensor(3.0, dtype=torch.float64), backend=backend)
    with pytest.raises(RuntimeError, match="second derivative of this loss is not implemented"):
        torch.autograd.grad(loss, q, create_graph=True)[0].square().sum().backward()


@each_loss
@each_backend
def test_forward_mode_is_refused(name: str, backend: str) -> None:
    q, k = q_and_k()
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(lambda x: LOSSES[name](x, k, torch.tensor(3.0, dtype=torch.float64), backend=backend), (q,), (q,))


@each_loss
@each_backend
def test_retain_graph_twice_is_bitwise(name: str, backend: str) -> None:
    q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
    before = q.detach().clone(), k.detach().clone()
    loss = LOSSES[name](q, k, 3.0, backend=backend)
    first = torch.autograd.grad(loss, (q, k), retain_graph=True)
    second = torch.autograd.grad(loss, (q, k), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])
    torch.autograd.grad(loss, (q, k))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (q, k))


@each_loss
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
    s = torch.tensor(3.0, requires_grad=True)
    expected = torch.autograd.grad(LOSSES[name](q, k, s), (q, k, s))
    checkpoint(LOSSES[name], q, k, s, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(expected, (q, k, s), strict=True))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Under autocast nothing is computed in less than float32: features of one dtype give the same bits as without."""
    q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
    s = torch.tensor(3.0, requires_grad=True)
    plain = LOSSES[name](q, k, s, backend="cpu")
    with torch.autocast("cpu", dtype=dtype):
        cast = LOSSES[name](q, k, s, backend="cpu")
        half = torch.nn.functional.linear(q, torch.eye(6))
        assert half.dtype == dtype
        assert LOSSES[name](half, half.detach(), s, backend="cpu").dtype == torch.float32
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
    q, k = (x.requires_grad_() for x in q_and_k())
    rows = fastnce.info_nce(q, k, reduction="none", backend=backend)
    g = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    upstream = {"random": g[:12], "expanded": g[:1].expand(12), "strided": g[::2], "zero": torch.zeros(12, dtype=torch.float64)}[kind]
    (found,) = torch.autograd.grad(rows, q, upstream, retain_graph=True)
    one_by_one = sum(upstream[i] * torch.autograd.grad(rows[i], q, retain_graph=True)[0] for i in range(12))
    torch.testing.assert_close(found, one_by_one)


def test_saved_for_backward() -> None:
    """What is kept between forward and backward: the inputs themselves and vectors, never a matrix of logits or a copy."""
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


@each_loss
def test_repeats_are_bitwise(name: str) -> None:
    q, k = (x.requires_grad_() for x in q_and_k(dtype=torch.float32))
    first = LOSSES[name](q, k, 3.0, backend="cpu")
    grads = torch.autograd.grad(first, (q, k))
    for _ in range(20):
        again = LOSSES[name](q, k, 3.0, backend="cpu")
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
