"""Pairs that are listed one by one (paired and ragged negatives, the positives of MoCo): right, and no memory as large as the keys."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastnce
from fastnce import autograd, listed, tiles
from train_ref.truth import contract

M, K, D = 7, 5, 11
COUNTS = torch.tensor([3, 0, 9, 1, 14, 0, 6])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keys_of(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Keys and the query of each. The first and the last of the ragged ones belong to no query."""
    if kind == "ragged":
        rows = torch.cat([torch.tensor([M]), torch.arange(M).repeat_interleave(COUNTS), torch.tensor([M])])
        return random(len(rows), D, seed=1).to(dtype), rows
    if kind == "expanded":
        return random(K, D, seed=1).to(dtype).expand(M, K, D), None
    if kind == "turned":
        return random(K, D, M, seed=1).to(dtype).permute(2, 0, 1), None
    return random(M, 1 if kind == "one" else K, D, seed=1).to(dtype), None


def defined(q: Tensor, keys: Tensor, rows: Tensor | None, scale: Tensor, normalize: bool) -> Tensor:
    """The formula in plain torch; 0 for keys of no query."""
    if normalize:
        q, keys = F.normalize(q, dim=-1, eps=0), F.normalize(keys, dim=-1, eps=0)
    own = q[:, None] if rows is None else torch.cat([q, torch.zeros_like(q[:1])])[rows]
    return scale * (keys * own).sum(-1)


KINDS = ("paired", "one", "expanded", "turned", "ragged")


@pytest.fixture(params=["sparse", "products", "sums"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """How pairs are multiplied on a CPU, on a GPU, and on a GPU where torch may round the factors of float32 matrix products."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    if request.param != "sparse":
        monkeypatch.setattr(listed, "_sparse", lambda keys: False)
    if request.param == "sums":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind: str, dtype: torch.dtype, normalize: bool, way: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the budget of float64, in pieces of two keys: every kind, dtype and subset of gradients."""
    monkeypatch.setattr(tiles, "CPU_LISTED", 2 * D)
    (keys, rows), q, scale = keys_of(kind, dtype), random(M, D).to(dtype), torch.tensor(3.0, dtype=dtype if dtype.itemsize > 2 else None)
    exact_inputs = [q.double().requires_grad_(), keys.double().requires_grad_(), scale.double().requires_grad_()]
    exact = defined(exact_inputs[0], exact_inputs[1], rows, exact_inputs[2], normalize)
    g = random(*exact.shape, seed=2)
    if rows is not None:
        g = g.masked_fill(rows == M, 0.0)
    wanted = torch.autograd.grad(exact, exact_inputs, g)
    for subset in (7, 1, 2, 4, 3):
        leaves = [x.detach().requires_grad_(bool(subset >> n & 1)) for n, x in enumerate((q, keys, scale))]
        s = autograd.listed_logits(listed.Listed(leaves[0], leaves[1], rows, leaves[2], None, None, normalize))
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        assert s.dtype == inner
        # One sum of 11 products and a norm: a few roundings of numbers up to the largest logit.
        assert contract.row_error(s.detach(), exact.detach()) <= contract.row(inner, 0.0, exact.abs().max().item())
        asked = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(s, asked, g.to(inner)))
        for x, e in zip(leaves, wanted, strict=True):
            if x.requires_grad:
                d = next(found)
                assert d.dtype == x.dtype
                allowed = contract.scalar if x.dim() == 0 else contract.gradient
                assert contract.relative(d, e) <= allowed(x.dtype, 0.0)


@pytest.mark.parametrize("length", [1.01e-12, 1e-6, 1e9, 0.99e18])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_keys_of_any_length(length: float, scale: float) -> None:
    """The square of 1 / |k| leaves float32; the gradient of each key keeps its digits, with large and with small gradients from above."""
    q, keys = random(M, D).float(), random(M, K, D, seed=1)
    keys = (keys / keys.norm(dim=-1, keepdim=True) * length).float()

    def grad(dtype: torch.dtype, upstream: float) -> Tensor:
        leaf = keys.to(dtype, copy=True).requires_grad_()
        s = autograd.listed_logits(listed.Listed(q.to(dtype), leaf, None, torch.tensor(scale, dtype=dtype), None, None, True))
        return torch.autograd.grad((s * upstream).sum(), leaf)[0]

    for upstream in (1.0, 1e-6):
        found, exact = grad(torch.float32, upstream).double(), grad(torch.float64, upstream)
        error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.max() <= contract.gradient(torch.float32, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    """Schema, fakes, autograd registration and AOT dispatch of both operators."""
    (keys, rows), q = keys_of(kind, torch.float32), random(M, D).float()
    for normalize in (True, False):
        flat = (q, keys, rows, torch.tensor(3.0), None, None, normalize)
        learned = tuple(x.detach().requires_grad_() if n in (0, 1, 3) else x for n, x in enumerate(flat))
        torch.library.opcheck(torch.ops.fastnce.listed.default, learned)
        s, r = torch.ops.fastnce.listed(*flat)
        torch.library.opcheck(torch.ops.fastnce.listed_backward.default, (torch.ones_like(s), s, r, [True, False, True], *flat))


def test_a_long_list_keeps_float32(way: None) -> None:
    """8,192 values of one query beside one of another: their sum must not lose a bit for each doubling, as one float32 total would."""
    q, values, k = random(2, 32).float(), random(8193, 32, seed=1).float(), random(2, 32, seed=2).float()
    offsets = torch.tensor([0, 8192, 8193])

    def grad(dtype: torch.dtype) -> Tensor:
        x = q.to(dtype, copy=True).requires_grad_()
        loss = fastnce.info_nce(x, k.to(dtype), (values.to(dtype), offsets), temperature=1.0)
        return torch.autograd.grad(loss, x)[0]

    assert contract.relative(grad(torch.float32), grad(torch.float64)) <= contract.gradient(torch.float32, 0.0)


class Allocated(TorchDispatchMode):
    """Bytes of the largest storage that any operation makes, beside those of given tensors."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.largest, self.given = 0, {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # The tensors inside a sparse matrix were made before it.
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["paired", "expanded", "ragged", "ragged, one query"])
def test_no_copy_of_the_keys(kind: str, dtype: torch.dtype, way: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor beside the inputs is a piece, the logits, or the queries; of the size of the keys there is their gradient only, in
    their dtype. Never a float32 copy, the query of every value, or expanded keys written out."""
    monkeypatch.setattr(tiles, "CPU_LISTED", 2048)
    m, k, d = 16, 32, 64
    q, scale = random(m, d).to(dtype), torch.tensor(3.0)
    keys = random(k, d, seed=1).to(dtype).expand(m, k, d) if kind == "expanded" else random(m, k, d, seed=1).to(dtype)
    rows = None
    if kind.startswith("ragged"):
        keys, rows = keys.flatten(0, 1), torch.zeros(m * k, dtype=torch.int64)
        rows = rows if "one" in kind else torch.arange(m).repeat_interleave(k)
    # Of a piece: the sums of a list are in float64. 8 bytes for each logit: positions.
    allowed = max(8 * 2048, 8 * m * k, 8 * (m + 1) * d)
    assert allowed < m * k * d * dtype.itemsize
    problem = listed.Listed(q, keys, rows, scale, None, None, True)
    for want_keys in (False, True):
        with Allocated(q, keys, scale) as seen:
            s, r = listed.forward(*problem)
            _, dkeys, _ = listed.backward(torch.ones_like(s), s, r, [True, want_keys, True], *problem)
        assert seen.largest <= (m * k * d * dtype.itemsize if want_keys else allowed)
        assert dkeys.shape == (keys.shape if want_keys else (0,))


# MiB that may be taken above the inputs, and the loss. Keys of 32 MiB in bfloat16 have a gradient of 32 MiB; a float32 copy of them would
# take 64 MiB more. Expanded keys written out would take 256 MiB; each of a few vectors of their logits takes 2 MiB.
WHOLE: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "paired": (48, lambda q, n: fastnce.info_nce(q, q.detach().flip(0), n, negative_mode="paired")),
    "ragged": (60, lambda q, n: fastnce.info_nce(q, q.detach().flip(0), (n.flatten(0, 1), torch.arange(0, 2**16 + 1, 64)))),
    "expanded": (
        24,
        lambda q, n: fastnce.info_nce(q, q.detach().flip(0), n[:8].detach().flatten(0, 1).expand(1024, 512, 256), 0.1, "mean", "paired"),
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_peak_memory(kind: str) -> None:
    """The real peak of a whole loss, forward and backward."""

    def resident(name: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

    q, negatives = random(1024, 256).bfloat16().requires_grad_(), random(1024, 64, 256, seed=1).bfloat16().requires_grad_()
    most, loss = WHOLE[kind]
    loss(q, negatives)  # makes the allocations that come once
    gc.collect()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    loss(q, negatives).backward()
    assert resident("VmHWM") - before <= most * 2**20
