"""A half-precision tensor that a loss uses more than once gets one gradient, summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from named import ON_CPU
from problems import PROBLEMS, Call
from torch import Tensor

import fastnce
from fastnce import backends
from fastnce.pairs import Pairs
from fastnce.problem import Gradients, Problem, SideGrad, Wanted
from fastnce.wide import shared

HALVES = (torch.bfloat16, torch.float16)
N, D = 24, 16


def features(rows: int, mean: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(rows, D, generator=g) + mean


Loss = Callable[..., Tensor]
OFFSETS = torch.arange(0, 2 * N + 1, 2)
LABELS = torch.arange(N) // 3
# Losses of a query q, keys k and more keys n (2 N rows); in each of them one tensor is used twice.
TWICE: dict[str, Loss] = {
    "moco": lambda q, k, n, **o: fastnce.moco_loss(q, k, n, 0.5, **o),
    "moco, key is query": lambda q, k, n, **o: fastnce.moco_loss(q, q, n, 0.5, **o),
    "moco, key is queue": lambda q, k, n, **o: fastnce.moco_loss(q, k, k, 0.5, **o),
    "negatives": lambda q, k, n, **o: fastnce.info_nce(q, k, n, 0.5, **o),
    "negatives too": lambda q, k, n, **o: fastnce.info_nce(q, k, n, 0.5, in_batch=True, **o),
    "keys twice": lambda q, k, n, **o: fastnce.info_nce(q, k, k, 0.5, in_batch=True, **o),
    "paired": lambda q, k, n, **o: fastnce.info_nce(q, k, n.view(N, 2, D), 0.5, negative_mode="paired", **o),
    "paired too": lambda q, k, n, **o: fastnce.info_nce(q, k, n.view(N, 2, D), 0.5, negative_mode="paired", in_batch=True, **o),
    "ragged": lambda q, k, n, **o: fastnce.info_nce(q, k, (n, OFFSETS), 0.5, **o),
    "ragged too": lambda q, k, n, **o: fastnce.info_nce(q, k, (n, OFFSETS), 0.5, in_batch=True, **o),
    "ids": lambda q, k, n, **o: fastnce.info_nce(
        q, k, n, 0.5, in_batch=True, query_ids=LABELS, key_ids=torch.cat([LABELS, LABELS, LABELS]), **o
    ),
    "query is key": lambda q, k, n, **o: fastnce.info_nce(q, q, temperature=0.5, **o),
    "symmetric": lambda q, k, n, **o: fastnce.info_nce(q, q, temperature=0.5, symmetric=True, **o),
    "image is text": lambda q, k, n, **o: fastnce.clip_loss(q, q, 2.0, **o),
    "view is view": lambda q, k, n, **o: fastnce.nt_xent(q, q, 0.5, **o),
    "one view": lambda q, k, n, **o: fastnce.sup_con(n.view(N, 2, D), LABELS, temperature=0.5, views="one", **o),
    "mask": lambda q, k, n, **o: fastnce.sup_con(q, mask=LABELS[:, None] < LABELS + 2, temperature=0.5, **o),
    "stats": lambda q, k, n, **o: fastnce.contrastive_stats(q, q, scale=2.0, offset=0, **o).lse_neg.mean(),
    "stats, mask": lambda q, k, n, **o: fastnce.contrastive_stats(
        q, scale=2.0, positive_mask=LABELS[:, None] < LABELS + 2, **o
    ).lse_pos.mean(),
}
ONCE: dict[str, Loss] = {
    "info_nce": lambda q, k, n, **o: fastnce.info_nce(q, k, temperature=0.5, **o),
    "nt_xent": lambda q, k, n, **o: fastnce.nt_xent(q, k, 0.5, **o),
    "sup_con": lambda q, k, n, **o: fastnce.sup_con(n.view(N, 2, D), LABELS, temperature=0.5, **o),
    "clip": lambda q, k, n, **o: fastnce.clip_loss(q, k, 2.0, **o),
}


def gradients(loss: Loss, leaves: tuple[Tensor, ...], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    leaves = tuple(x.to(dtype).requires_grad_() for x in leaves)
    found = torch.autograd.grad(loss(*leaves, **options), leaves, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mean", [None, 0.0, 1.0, 5.0], ids=["normalized", "0", "1", "5"])
@pytest.mark.parametrize("name", [*TWICE, *ONCE])
@pytest.mark.usefixtures("compiled")
def test_rounded_once(name: str, mean: float | None, dtype: torch.dtype) -> None:
    """Where the parts of a gradient cancel (rows that are not normalised, with a common part) and where they do not: the error is that of
    rounding the exact gradient, up to a tenth. Two gradients that are rounded and added have 1.7 times that when nothing cancels."""
    loss, common = (TWICE | ONCE)[name], mean or 0.0
    # Rows that are keys and queries at once have logits of the square of their mean: those stay where softmax has a gradient.
    alone = name in ("moco, key is query", "query is key", "symmetric", "image is text", "view is view", "one view", "mask", "sup_con")
    q = features(N, min(common, 1.0), 0) if alone or name.startswith("stats") else features(N, common / 20, 0)
    k, n = features(N, common, 1), features(2 * N, min(common, 1.0) if alone else common, 2)
    leaves = tuple(x.to(dtype) for x in (q, k, n))
    exact = gradients(loss, leaves, torch.float64, normalize=mean is None)
    for backend in ("auto", *ON_CPU):
        found = gradients(loss, leaves, dtype, normalize=mean is None, backend=backend)
        for g, e in zip(found, exact, strict=True):
            assert g.dtype == dtype
            assert (g.double() - e).norm() <= 1.1 * (e.to(dtype).double() - e).norm()


SOME = ("queue", "clip captions, aligned", "simclr:", "mask and ids", "not normalized:", "two partners")
CASES = [p for p in PROBLEMS if p.why.startswith(SOME)]


def a_gradient_that_is_added_to_is_not_rounded(p: Call, dtype: torch.dtype, backend: str) -> None:
    """Gradients of stand-ins are float32, hold more than half precision, and once rounded are those without stand-ins."""
    q, k, scale, bias = p.tensors(dtype)
    rules = p.rules()
    ids = (rules.get(name) for name in ("q_label", "k_label", "q_exclude", "k_exclude", "mask"))
    plain = Problem(q, k, scale, bias, Pairs(p.exclude_self, p.offset, *ids), p.two_sided, p.normalize)
    q_wide, k_wide = (None if t is None else shared(t, t)[0] for t in (q, k))
    module = backends.BACKENDS[backend]
    stats = module.forward(plain)
    g = torch.Generator().manual_seed(0)
    grads = [SideGrad(*(torch.randn(v.shape, generator=g).to(v.dtype) for v in side[:3])) for side in stats]
    wanted = Wanted(True, k is not None, False, False)
    found: list[Gradients] = [module.backward(x, grads, stats, wanted) for x in (plain, plain._replace(q_wide=q_wide, k_wide=k_wide))]
    for rounded, wide in zip(found[0][:2], found[1][:2], strict=True):
        if rounded is None or wide is None:
            assert rounded is wide
            continue
        assert (rounded.dtype, wide.dtype) == (dtype, torch.float32)
        assert torch.equal(wide.to(dtype), rounded)
        assert not torch.equal(wide, rounded.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("p", CASES, ids=str)
def test_a_gradient_that_is_added_to_is_not_rounded(p: Call, backend: str, dtype: torch.dtype) -> None:
    a_gradient_that_is_added_to_is_not_rounded(p, dtype, backend)


@pytest.mark.parametrize("p", CASES[:2], ids=str)
def test_the_same_in_tiles_of_torch(p: Call, small_tiles: int) -> None:
    a_gradient_that_is_added_to_is_not_rounded(p, torch.bfloat16, "torch")


@pytest.mark.parametrize("name", ["moco", "paired too", "mask"])
def test_compiled_and_under_transforms(name: str) -> None:
    """One cast in one graph, under torch.func.grad, and for each of a batch of vmap."""
    loss, leaves = TWICE[name], tuple(x.bfloat16() for x in (features(N, 0.1, 0), features(N, 2.0, 1), features(2 * N, 2.0, 2)))
    (expected, *_) = gradients(loss, leaves, torch.bfloat16, normalize=False)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, leaves, torch.bfloat16, normalize=False)[0], expected, rtol=2**-7, atol=1e-6)
    grad = torch.func.grad(lambda *x: loss(*x, normalize=False))
    assert torch.equal(grad(*leaves), expected)
    batch = torch.stack([leaves[0], leaves[0].flip(0)])
    found = torch.func.vmap(grad, (0, None, None))(batch, *leaves[1:])
    assert torch.equal(found, torch.stack([grad(x, *leaves[1:]) for x in batch]))


def test_stand_ins_take_no_memory() -> None:
    x, y = torch.zeros(5, 3, dtype=torch.float16), torch.zeros(4, 3, dtype=torch.float16)
    a, b, c = shared(x, y, x)
    assert b is None and a is not None and c is not None and a is not c
    assert a.shape == x.shape and a.dtype == torch.float32 and a.untyped_storage().nbytes() == 4
    assert shared(x.float(), x.double()) == [None, None]
    z = x.float()
    assert shared(z, z) == [None, None]
