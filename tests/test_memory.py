"""O((M + N) D) memory and no host synchronisation, proved without a GPU."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_loss import OF_VIEWS
from problems import PROBLEMS, Call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastnce
from fastnce import autograd, tiles
from fastnce.backends import torch_tiles
from fastnce.pairs import Pairs
from fastnce.problem import Problem, SideGrad, Wanted


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements of its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def pairs_of(p: Call, there: Callable[[Tensor | None], Tensor | None] = lambda x: x) -> Pairs:
    rules = p.rules()
    return Pairs(p.exclude_self, p.offset, *(there(rules.get(name)) for name in ("q_label", "k_label", "q_exclude", "k_exclude", "mask")))


def solve(p: Call, backend: Any, device: str = "cpu") -> None:
    """Forward and backward of one problem, called as the operators call them; on meta there are no values."""

    def there(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or device == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    q, k, scale, bias = (there(x) for x in p.tensors(torch.float32))
    assert q is not None
    assert scale is not None
    problem = Problem(q, k, scale, bias, pairs_of(p, there), p.two_sided, p.normalize, metrics=True)
    stats = backend.forward(problem)
    grads = [SideGrad(*(torch.ones_like(v) for v in side[:3])) for side in stats]
    backend.backward(problem, grads, stats, Wanted(True, k is not None, True, bias is not None))


TILED = [p for p in PROBLEMS if p.m > 9]


@pytest.mark.parametrize("p", TILED, ids=str)
def test_no_tensor_as_large_as_the_logits(p: Call, small_tiles: int) -> None:
    """Tiles are 16 x 16 here, of negatives, and of positives where some are found in tiles: nothing may be larger than the largest of an
    input, both tiles, and a caller's own mask."""
    with Largest() as seen:
        solve(p, torch_tiles)
    tile = (1 if pairs_of(p).one_positive_at_most(p.m, p.symmetric) else 2) * 16 * 16
    allowed = max(p.m * p.d, p.n * p.d, tile, p.mask[0] * p.mask[1] if p.mask else 0)
    assert seen.elements <= allowed
    if p.m * p.n > allowed:
        assert seen.elements < p.m * p.n


def test_the_detector_sees_the_dense_backend() -> None:
    from fastnce.backends import reference

    p = next(p for p in TILED if p.why.startswith("queue"))
    with Largest() as seen:
        solve(p, reference)
    assert seen.elements >= p.m * p.n


@pytest.mark.parametrize("p", TILED, ids=str)
def test_no_value_is_read_back_on_a_device(p: Call, small_tiles: int) -> None:
    """Meta tensors have no values: code that reads one back, as .item() does, raises."""
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        torch.empty((), device="meta").item()
    solve(p, torch_tiles, "meta")


LOSSES: dict[str, Callable[..., Tensor]] = OF_VIEWS | {
    "unpaired": lambda q, k, s: fastnce.info_nce(q, k, k[:50], temperature=s, in_batch=True),
    "ragged": lambda q, k, s: fastnce.info_nce(q, k, (k, torch.arange(601, device=q.device)), scale=s),
    "skip": lambda q, k, s: fastnce.sup_con(q, torch.arange(600, device=q.device) // 3, no_positive="skip", scale=s),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_synchronise(name: str, device: str) -> None:
    """Every loss, forward and backward, on tensors that have a shape and no values."""
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        q, k = (torch.empty(600, 16, device=device, requires_grad=True) for _ in range(2))
        loss = LOSSES[name](q, k, torch.ones((), device=device))
        assert loss.shape == ()
        assert loss.device.type == device
        loss.backward()
        assert q.grad is not None
        assert q.grad.shape == q.shape


def test_a_million_rows_need_no_matrix() -> None:
    """Shapes and memory of 2^20 rows under fake tensors: the operators themselves return vectors and input-shaped gradients only."""
    with FakeTensorMode(), Largest() as seen:
        z = torch.empty(2**20, 128, dtype=torch.bfloat16, requires_grad=True)
        fastnce.nt_xent(z).backward()
    assert seen.elements <= 2**20 * 128


# Launches and memory off the CPU ---------------------------------------------------------------------------------------------------------


def place(x: Tensor) -> tuple[Any, ...]:
    """Where the elements of a tensor lie."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.stride(), x.shape, x.dtype


class Device(TorchDispatchMode):
    """Launches of a device, and bytes that live there at a time, in and outside of the operators. A view launches nothing, nor does an
    allocation. An operation that torch composes of others counts as those."""

    INSIDE = {torch.ops.fastnce.forward.default: autograd._forward, torch.ops.fastnce.backward.default: autograd._backward}

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.live = self.peak = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.INSIDE:
            with self:
                return self.INSIDE[func](*args)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        # After x[i] += y, Python assigns the sum to x[i], where it is already: torch sees that and copies nothing.
        nothing = func is torch.ops.aten.copy_.default and place(args[0]) == place(args[1])
        if not (func.is_view or nothing or "empty" in func.__name__):
            self.launches += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.allocated(leaf.untyped_storage())
        return out

    def allocated(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.freed, key)

    def freed(self, key: int) -> None:
        self.live -= self.storages.pop(key)


# A step with 16,384 rows of logits: 10 tiles of symmetric logits, 16 of others. The derivative by a learned temperature is five launches
# and a matrix more in every tile. With the CPU's tiles each step would be above 11,000 launches.
NUMBERS: dict[str, Callable[[], Tensor | float]] = {
    "number": lambda: 1.0,
    "tensor": lambda: torch.ones((), device="meta"),
    "learned": lambda: torch.ones((), device="meta", requires_grad=True),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", OF_VIEWS)
def test_a_step_off_the_cpu_is_few_launches_and_few_tiles(name: str, number: str) -> None:
    rows, columns = 16384, 128
    views = rows // 2 if name in ("nt_xent", "dcl_loss", "sup_con") else rows
    q, k = (torch.empty(views, columns, device="meta", requires_grad=True) for _ in range(2))
    with Device() as seen:
        OF_VIEWS[name](q, k, NUMBERS[number]()).backward()
    most_launches, most_tiles = (620, 7) if number == "learned" else (500, 6)
    assert 250 < seen.launches <= most_launches
    tile = 4 * tiles.GPU_TILE**2
    assert 2 * tile < seen.peak <= most_tiles * tile


def test_the_device_sees_the_dense_form() -> None:
    """A product and its logarithms: two launches, two matrices."""
    with Device() as seen:
        q = torch.empty(4096, 16, device="meta")
        (q @ q.T).log_softmax(1)
    assert seen.launches == 2 and seen.peak == 4 * (4096 * 16 + 2 * 4096**2) and seen.live < seen.peak


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("kind", ["nt_xent", "clip", "sup_con"])
def test_peak_memory(kind: str, backend: str) -> None:
    """Real peak of resident memory above the inputs at 6,000 rows: the dense form's single matrix would take 144 MB."""
    clear = "/proc/self/clear_refs"
    try:
        open(clear, "w").close()
    except OSError:
        pytest.fail("this test resets the peak through /proc/self/clear_refs, which this system refuses")

    def resident(name: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

    q, k = (torch.randn(6000, 64, requires_grad=True) for _ in range(2))
    labels = torch.arange(6000) // 2
    loss = {
        "nt_xent": lambda: fastnce.nt_xent(q, backend=backend),
        "clip": lambda: fastnce.clip_loss(q, k, torch.tensor(10.0, requires_grad=True), backend=backend),
        "sup_con": lambda: fastnce.sup_con(q, labels, backend=backend),
    }[kind]
    loss().backward()
    q.grad = k.grad = None
    gc.collect()
    with open(clear, "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    loss().backward()
    assert resident("VmHWM") - before <= 40 * 2**20
