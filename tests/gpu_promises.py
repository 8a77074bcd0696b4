"""Promises of both sets of GPU kernels: test_triton.py runs them in the checked interpreter, test_cuda*.py in the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import test_statistics
import torch
from every_loss import OF_VIEWS
from problems import Call
from torch import Tensor

import fastnce
from fastnce import contrastive_stats
from train_ref.truth import contract

Guard = Callable[[], AbstractContextManager[Any]]


def inside_nan(x: Tensor) -> Tensor:
    """The same numbers as a view into a larger storage that is nan everywhere else."""
    around = torch.full((x.shape[0] + 5, x.shape[1] + 9), torch.nan, dtype=x.dtype)
    view = around[3:-2, 4:-5]
    view.copy_(x)
    return view


def every_other(x: Tensor) -> Tensor:
    """A view of every other row, from an address that is aligned to nothing wider than an element."""
    around = torch.full((2 * x.shape[0] * (x.shape[1] + 1) + 1,), torch.nan, dtype=x.dtype)
    view = around.as_strided(x.shape, (2 * (x.shape[1] + 1), 1), 1)
    view.copy_(x)
    return view


def turned(x: Tensor) -> Tensor:
    """The same numbers column by column."""
    return x.T.contiguous().T


def nothing_beside_a_view_is_read(p: Call, dtype: torch.dtype, backend: str, guard: Guard = nullcontext, rtol: float = 0.0) -> None:
    """Results and gradients are those of a contiguous copy. rtol: for sums that are added to memory in any order."""
    tensors, found = p.tensors(dtype), []
    for view in (torch.clone, inside_nan, every_other, turned):
        q, k = (None if t is None else view(t).requires_grad_() for t in tensors[:2])
        with guard():
            stats = contrastive_stats(q, k, scale=tensors[2], bias=tensors[3], backend=backend, **p.call() | {"two_sided": False})
            some = torch.isfinite(stats.lse_neg) & torch.isfinite(stats.lse_pos)
            value = (stats.lse_neg[some] * 0.3).sum() + (stats.lse_pos[some] * 2 - stats.pos[some]).sum()
            grads = torch.autograd.grad(value, [t for t in (q, k) if t is not None])
        found.append([stats.lse_neg, stats.lse_pos, *grads])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=0.0)


def elements_may_lie_beyond_two_to_the_31(backend: str, guard: Guard = nullcontext) -> None:
    """Rows that lie 2^28 elements apart: an int32 product of index and stride wraps at row 8. The pages between them are never touched."""
    rows, apart, d = 12, 2**28, 8
    storage = torch.UntypedStorage(2 * ((rows - 1) * apart + d))
    view = torch.tensor([], dtype=torch.bfloat16).set_(storage, 0, (rows, d), (apart, 1))
    values = torch.randn(rows, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    view.copy_(values)
    losses = []
    for z in (view.requires_grad_(), values.requires_grad_()):
        with guard():
            loss = fastnce.info_nce(z, z.detach(), temperature=0.2, backend=backend)
            losses.append((loss, torch.autograd.grad(loss, z)[0]))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


def rows_may_be_of_any_length(length: float, dtype: torch.dtype, backend: str) -> None:
    """Finite for 1e-12 <= |x| <= 1e18, ordinary rows keep their budget beside such a row, and a shorter one counts as zero."""
    z = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    z[7] *= 1.01 * length if length < 1 else 0.99 * length
    z = z.to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()
    mine, ref = (fastnce.nt_xent(x, temperature=0.1, reduction="none", backend=b) for x, b in ((z, backend), (exact, "reference")))
    assert contract.row_error(mine, ref.detach()) <= contract.row(dtype, 0.0, 10.0)
    others = torch.arange(40) != 7
    (grad,), (expected,) = torch.autograd.grad(mine.sum(), z), torch.autograd.grad(ref.sum(), exact)
    assert contract.relative(grad[others], expected[others]) <= contract.gradient(dtype, 0.0) * 2
    if length < 1e-12:
        assert not grad[7].any()


def a_bad_row_makes_nan_of_what_it_meets_and_of_nothing_else(bad: float, dtype: torch.dtype, backend: str) -> None:
    q, k = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    q[3, 5] = k[20, 2] = bad
    ids = torch.arange(80)
    ids[17] = ids[40 + 20] = 99  # query 17 does not meet the bad key
    q.requires_grad_()
    found = contrastive_stats(q, k, scale=5.0, q_exclude_ids=ids[:40], k_exclude_ids=ids[40:], backend=backend)
    expected = torch.ones(40, dtype=torch.bool)
    expected[17] = False
    assert torch.equal(found.lse_neg.isnan(), expected)
    (grad,) = torch.autograd.grad(found.lse_neg.sum(), q)
    assert torch.equal(grad.isnan().any(1), expected)
    for scale in (-1.0, 0.0, torch.nan, torch.inf):
        assert contrastive_stats(q, k.nan_to_num(), scale=torch.tensor(scale), backend=backend).lse_neg.isnan().all()


def only_what_is_asked_for_gets_a_gradient(p: Call, subsets: Iterable[int], dtype: torch.dtype, backend: str) -> None:
    """Gradients of some of (q, k, scale, bias) are, bit by bit, those of all of them, whichever passes are left out."""
    _, whole = test_statistics.run(p, dtype, backend)
    for subset in subsets:
        leaves = [t if t is None else t.requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(p.tensors(dtype))]
        found = contrastive_stats(leaves[0], leaves[1], scale=leaves[2], bias=leaves[3], backend=backend, **p.call())
        real = [v for side in (found, found.columns) if side is not None for v in side[:3]]
        asked = [t for t in leaves if t is not None and t.requires_grad]
        upstream = [g.to(v.dtype) for g, v in zip(test_statistics.upstream(p, real), real, strict=True)]
        for grad, t in zip(torch.autograd.grad(real, asked, upstream), asked, strict=True):
            torch.testing.assert_close(grad, whole[[x is t for x in leaves].index(True)], rtol=2e-6, atol=1e-7)


def losses_are_within_the_budget(backend: str) -> None:
    """All of them, float32, through the public functions; the budget counts from the error of dense float32."""
    g = torch.Generator().manual_seed(0)
    a, b, queue = (torch.randn(24, 10, generator=g) for _ in range(3))

    def losses(x: Tensor, y: Tensor, name: str) -> list[Tensor]:
        return [
            *(loss(x, y, 50.0 if n == "nt_xent" else 10.0, backend=name) for n, loss in OF_VIEWS.items()),
            fastnce.info_nce(x, y, queue.to(x.dtype), temperature=0.1, symmetric=False, backend=name),
            fastnce.clip_loss(x, y, 100.0, -10.0, backend=name),
        ]

    found = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (a, b)]
        values = losses(*leaves, name)
        found.append([torch.stack(values).detach(), *torch.autograd.grad(sum(values), leaves)])
    mine, theirs, exact = found
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=3e-6, atol=1e-7)
    for grad, other, e in zip(mine[1:], theirs[1:], exact[1:], strict=True):
        assert contract.relative(grad, e) <= contract.gradient(torch.float32, contract.relative(other, e))
