"""The primitive on every problem: each backend of the CPU, one tile and many, four dtypes, random upstream gradients, against float64."""

from __future__ import annotations

from functools import cache

import oracle
import pytest
import torch
from named import ON_CPU, widest
from problems import PROBLEMS, Call, of
from torch import Tensor

from fastnce import contrastive_stats, merge, tiles
from fastnce.backends._tiled import operands
from train_ref.truth import contract

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def upstream(p: Call, finite: list[Tensor]) -> list[Tensor]:
    """Random gradients of every differentiable statistic, of very different sizes."""
    g = torch.Generator().manual_seed(p.seed + 2)
    return [
        torch.randn(v.shape, generator=g, dtype=torch.float64) * 10.0 ** (-index % 3) * torch.isfinite(v) for index, v in enumerate(finite)
    ]


@cache
def dense_run(p: Call, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None], float]:
    """Statistics and gradients of the oracle, evaluated in dtype."""
    return _dense(p, *p.tensors(dtype))


@cache
def exact_run(p: Call, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None], float]:
    """The oracle in float64 on inputs as they are stored in dtype."""
    return _dense(p, *(None if t is None else t.double() for t in p.tensors(dtype)))


def _dense(p: Call, q: Tensor, k: Tensor | None, scale: Tensor, bias: Tensor | None) -> tuple[list[Tensor], list[Tensor | None], float]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in (q, k, scale, bias)]
    q, k, scale, bias = leaves
    s = oracle.logits(q, q if k is None else k, scale, bias, p.normalize)
    kinds = oracle.classes(p)
    views = [(s, kinds), (s.T, kinds.T)][: 2 if p.two_sided else 1]
    out = [v for view in views for v in oracle.statistics(*view)]
    real = [v for v in out if v.is_floating_point()]
    loss = sum((v.masked_fill(~torch.isfinite(v), 0.0) * g.to(v.dtype)).sum() for v, g in zip(real, upstream(p, real), strict=True))
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(loss, present, allow_unused=True, materialize_grads=True))
    return [v.detach() for v in out], [None if t is None else next(grads) for t in leaves], s.detach().abs().max().item()


def run(p: Call, dtype: torch.dtype, backend: str) -> tuple[list[Tensor], list[Tensor | None]]:
    """The same through the package."""
    q, k, scale, bias = (None if t is None else t.requires_grad_() for t in p.tensors(dtype))
    found = contrastive_stats(q, k, scale=scale, bias=bias, backend=backend, **p.call())
    sides = [found] + ([found.columns] if p.two_sided else [])
    out = [v for side in sides for v in side[:4]]
    real = [v for v in out if v.is_floating_point()]
    grads_in = [g.to(v.dtype) for v, g in zip(real, upstream(p, real), strict=True)]
    present = [t for t in (q, k, scale, bias) if t is not None]
    grads = iter(torch.autograd.grad(real, present, grads_in))
    return [v.detach() for v in out], [None if t is None else next(grads) for t in (q, k, scale, bias)]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_values_and_gradients(p: Call, dtype: torch.dtype, backend: str, small_tiles: int) -> None:
    check(p, dtype, backend)


@pytest.mark.parametrize("waiting", [2, tiles.GPU_WAITING])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_as_off_the_cpu(p: Call, dtype: torch.dtype, waiting: int, small_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no value is read back, every sum has a maximum, and sums of several tiles wait for each other."""
    monkeypatch.setattr(tiles, "CPU_WAITING", waiting)
    monkeypatch.setattr(operands, "UNSHIFTED", dict.fromkeys(operands.UNSHIFTED, -1.0))
    check(p, dtype, "torch")


@pytest.mark.parametrize("waiting", [1, tiles.GPU_WAITING])
def test_infinite_logits(waiting: int, small_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that leave float32, in one tile of several: a row with inf has the log-sum inf, -inf adds nothing, and nan stays nan."""
    monkeypatch.setattr(tiles, "CPU_WAITING", waiting)
    q, k = torch.ones(4, 2), torch.ones(70, 2)
    q[1], q[2], q[3, 0] = 1e20, -1e20, torch.nan
    k[20] = 1e20
    for keys in (k, k.flip(0), k[20:21]):
        tiled, dense = (contrastive_stats(q, keys, scale=1.0, normalize=False, backend=name).lse_neg for name in ("torch", "reference"))
        torch.testing.assert_close(tiled, dense, equal_nan=True)
        assert tiled[1] == torch.inf and tiled[3].isnan() and tiled[2] == (-torch.inf if len(keys) == 1 else dense[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "p", [p for p in PROBLEMS if p.why.startswith(("simclr solved", "clip captions:", "mask:", "low temperature"))], ids=str
)
def test_real_tiles(p: Call) -> None:
    """The shipped tile size, with a ragged second."""
    grown = p._replace(m=700, n_keys=0 if p.symmetric else 600, offset=None if p.offset is None else 350, d=16, labels=p.labels * 20)
    check(grown._replace(mask=(350, 350)) if p.mask else grown, torch.float32, "torch")


def check(p: Call, dtype: torch.dtype, backend: str) -> None:
    exact, exact_grads, largest = exact_run(p, dtype)
    dense, dense_grads, _ = dense_run(p, dtype)
    found, grads = run(p, dtype, backend)
    for name, f, d, e in zip(("lse_neg", "lse_pos", "pos", "n_pos") * 2, found, dense, exact, strict=False):
        if name == "n_pos":
            assert torch.equal(f, e)
            continue
        dense_error = (d.double() - e)[torch.isfinite(e)].abs().max().item() if torch.isfinite(e).any() else 0.0
        full = dense_error if dtype == torch.float32 else 0.0
        assert contract.row_error(f, e) <= contract.row(dtype, full, largest), name
    for name, f, d, e in zip(("dq", "dk", "dscale", "dbias"), grads, dense_grads, exact_grads, strict=True):
        if e is None:
            assert f is None
            continue
        assert f.dtype == (torch.float32 if name in ("dscale", "dbias") and dtype != torch.float64 else dtype)
        assert f.shape == e.shape
        own = contract.gradient if name in ("dq", "dk") else contract.scalar
        error, dense_error = (f.double() - e).norm().item(), (d.double() - e).norm().item()
        # A result that is exactly 0 but the sum of terms that cancel is judged by their size: the radial part of dq, which is all of it
        # where D = 1, and the sums that dscale and dbias are.
        size = e.norm().item() or 1.0
        if name in ("dscale", "dbias"):
            size = max(size, 1e-3)
        elif p.d == 1:
            size = 100 * largest * (1 / p.tensors()[["dq", "dk"].index(name)].abs()).norm().item()
        assert error / size <= own(dtype, dense_error / size), name


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("p", [p for p in PROBLEMS if p.m > 9], ids=str)
def test_metrics(p: Call, backend: str, small_tiles: int) -> None:
    """Rank, ties, hardest negative and best positive equal a dense sort, rows and columns."""
    dtype = widest(backend)
    q, k, scale, bias = p.tensors(dtype)
    found = contrastive_stats(q, k, scale=scale, bias=bias, metrics=True, backend=backend, **p.call())
    wide = (None if t is None else t.double() for t in (q, q if k is None else k, scale, bias))
    s, kinds = oracle.logits(*wide, p.normalize), oracle.classes(p)
    near, rtol = (1e-12 * p.scale, 1e-7) if dtype == torch.float64 else (1e-6 * p.scale, 1.3e-6)
    for side, t, c in [(found, s, kinds), (found.columns, s.T, kinds.T)][: 2 if p.two_sided else 1]:
        negatives = t.masked_fill(c != oracle.NEGATIVE, -torch.inf)
        best = t.masked_fill(c != oracle.POSITIVE, -torch.inf).amax(1)
        some = (c == oracle.NEGATIVE).any(1)
        # Of random float64 rows no two logits are nearer without being equal. Those that float32 does not tell apart may be above or tie.
        close = near if p.normalize else near * (1 + t.abs().max().item())
        above, level = (negatives > best[:, None] + close).sum(1), ((negatives - best[:, None]).abs() <= close).sum(1)
        if dtype == torch.float64:
            assert torch.equal(side.rank, above) and torch.equal(side.ties, level)
        else:
            assert (above <= side.rank).all() and (side.rank + side.ties <= above + level).all()
        torch.testing.assert_close(side.pos_max.double(), best, rtol=rtol, atol=max(close, 1e-7))
        torch.testing.assert_close(side.hardest_logit.double(), negatives.amax(1), rtol=rtol, atol=max(close, 1e-7))
        assert torch.equal(side.hardest >= 0, some)
        chosen = negatives.gather(1, side.hardest.clamp(min=0)[:, None])[some, 0]
        torch.testing.assert_close(chosen, side.hardest_logit.double()[some], rtol=rtol, atol=max(close, 1e-7))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    """Every subset of (q, k, scale, bias) gives the same gradients as all of them."""
    p = of("clip:")
    _, whole = run(p, torch.float64, "torch")
    for subset in range(1, 16):
        leaves = [t.requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(p.tensors())]
        found = contrastive_stats(leaves[0], leaves[1], scale=leaves[2], bias=leaves[3], **p.call())
        real = [v for side in (found, found.columns) for v in side[:3]]
        asked = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(real, asked, upstream(p, real), allow_unused=True)
        for grad, t in zip(grads, asked, strict=True):
            expected = whole[[x is t for x in leaves].index(True)]
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cut", [0, 1, 23, 69, 70])
def test_merge_of_disjoint_keys(cut: int) -> None:
    """Splitting the keys anywhere and merging gives the whole: values, gradients and metrics."""
    p = of("mask and ids", mask=None, n_keys=70, excludes=9)
    q, k, scale, _ = (None if t is None else t.requires_grad_() for t in p.tensors())
    call, best = p.call(), None
    whole = contrastive_stats(q, k, scale=scale, metrics=True, **call)
    best = whole.pos_max
    parts = []
    for keys in (slice(0, cut), slice(cut, 70)):
        if keys.stop > keys.start:
            part = call | {"k_labels": call["k_labels"][keys], "k_exclude_ids": call["k_exclude_ids"][keys]}
            parts.append(contrastive_stats(q, k[keys], scale=scale, metrics=True, threshold=best, **part))
    merged = merge(parts[0], parts[1], cut) if len(parts) == 2 else parts[0]
    for name in ("lse_neg", "lse_pos", "pos", "n_pos", "rank", "ties", "hardest", "hardest_logit", "pos_max"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12, msg=name)
    some = torch.isfinite(whole.lse_pos) & torch.isfinite(whole.lse_neg)

    def gradient(found: object) -> tuple[Tensor, ...]:
        value = (found.lse_neg[some] * 0.3 + found.lse_pos[some].sin() + found.pos[some] * 2).sum()
        return torch.autograd.grad(value, (q, k, scale))

    for a, b in zip(gradient(merged), gradient(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
