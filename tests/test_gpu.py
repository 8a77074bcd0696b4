"""The GPU backends on a GPU: the problems of problems.py and larger ones against float64; streams, graphs, synchronisation, memory, indices
beyond 2^31, which only a device has. Every test runs with every kind of kernels, see bench.gpu.kernels.

FASTNCE_GPU_DRY_RUN=1 pytest tests/test_gpu.py runs every body at tiny sizes by backend="torch", on the CPU and without the marker. So no
test fails on a GPU for a reason that a CPU could have found. Only the few helpers that ask for the device are left out.
FASTNCE_GPU_DRY_RUN=emulated does the same with the kernels of csrc/cuda, where bench/gpu/run.sh --emulate has compiled them for the CPU.
FASTNCE_GPU_KERNELS=cuda,cuda-mma chooses among the kernels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when cuBLAS makes its handle: without it torch refuses matrix products in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import oracle
import pytest
import test_proof
import test_statistics
import torch
from block_oracle import blocked
from every_loss import OF_VIEWS
from problems import PROBLEMS, Call, of
from test_proof import cache  # noqa: F401  a fixture
from torch import Tensor

import fastnce
from bench.gpu import kernels as gpu_kernels
from bench.gpu import measure as gpu_measure
from bench.gpu.kernels import Kernels as Place
from fastnce import contrastive_stats
from train_ref.truth import contract

WHERE = gpu_kernels.where()
DRY = WHERE != "gpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIB = 2**20

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_mode = pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])


def on_gpu(test: Any) -> Any:
    """The marker, which conftest.py skips without a CUDA device; a dry run has none."""
    return test if DRY else pytest.mark.gpu(test)


@pytest.fixture(params=gpu_kernels.asked())
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The device and the backend that compute."""
    kernels = Place.of(request.param, WHERE)
    if objection := kernels.objection():
        pytest.skip(f"{kernels.name}: {objection}")
    with gpu_kernels.chosen(kernels):
        yield kernels
    if gpu_measure.lost():
        # The next test in this process would fail too. pytest-xdist starts another one.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{request.node.name} left a device that answers nothing")


@contextlib.contextmanager
def determinism(wanted: bool = True) -> Iterator[None]:
    """torch's deterministic mode, which also fills torch.empty with nan, so that memory that is never written shows."""
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def sized(large: int, small: int) -> int:
    """A number of rows, and that of a dry run."""
    return small if DRY else large


def wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


# Right numbers -------------------------------------------------------------------------------------------------------------------------


def run_on(place: Place, p: Call, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    """test_statistics.run on a device, its results on the CPU."""
    q, k, scale, bias = (None if t is None else t.to(place.device).requires_grad_() for t in p.tensors(dtype))
    call = {name: v.to(place.device) if isinstance(v, Tensor) else v for name, v in p.call().items()}
    found = contrastive_stats(q, k, scale=scale, bias=bias, backend=place.backend, **call)
    sides = [found] + ([found.columns] if p.two_sided else [])
    out = [v for side in sides for v in side[:4]]
    real = [v for v in out if v.is_floating_point()]
    upstream = test_statistics.upstream(p, [v.cpu() for v in real])
    present = [t for t in (q, k, scale, bias) if t is not None]
    grads = iter(torch.autograd.grad(real, present, [g.to(v) for v, g in zip(real, upstream, strict=True)]))
    return [v.detach().cpu() for v in out], [None if t is None else next(grads).cpu() for t in (q, k, scale, bias)]


@on_gpu
@each_mode
@each_dtype
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_problems(p: Call, dtype: torch.dtype, deterministic: bool, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels solve what the other backends solve, judged by the same check: the interpreter proves the algorithm, not what the
    compiler makes of it, nor how tensor cores round."""
    monkeypatch.setattr(test_statistics, "run", lambda p, dtype, _: run_on(place, p, dtype))
    with determinism(deterministic):
        test_statistics.check(p, dtype, place.backend)


LARGE = (
    of("simclr:", why="simclr 128", m=4098, offset=2049, d=128),
    of("simclr:", why="simclr 200: D is no power of two, padded in the tile", m=3002, offset=1501, d=200),
    of("simclr:", why="simclr 768: longer than a tile holds", m=3002, offset=1501, d=768),
    of("simclr solved", why="solved 256: small losses at a low temperature", m=2050, offset=1025, d=256),
    of("low temperature: 1/200", why="running maximum 128", m=3002, offset=1501, d=128),
    of("two partners", why="two partners 64: positives in tiles that are no neighbours", m=2500, offset=777, d=64),
    of("queue:", why="queue 128: every size ragged", m=1025, n_keys=5003, d=128),
    of("gathered", why="gathered 512: rows of another rank", m=1031, n_keys=4099, d=512, offset=2063),
    of("clip:", why="clip 256: both directions", m=3001, n_keys=3001, d=256),
    of("clip:", why="clip 300: both directions, long rows", m=3001, n_keys=3001, d=300),
    of("clip captions, aligned", why="captions 96: ids and the diagonal", m=2003, n_keys=2003, d=96, labels=400),
    of("supcon:", why="supcon 128: labels in every tile", m=3003, d=128, labels=100),
    of("supcon one view", why="supcon one view 320", m=1001, n_keys=3003, d=320, labels=100),
    of("mask:", why="mask 64: read tile by tile", m=3003, d=64, mask=(1001, 1001)),
    of("mask and ids", why="everything 96: mask, ids, labels", m=1003, n_keys=2004, d=96, mask=(1003, 501), excludes=60, labels=80),
    of("excluded symmetric", why="excluded 128", m=2050, offset=1025, d=128, excludes=200),
    of("excluded labels", why="excluded labels 384", m=1501, n_keys=1501, d=384, labels=100, excludes=100),
    of("not normalized, large", why="not normalized 128: logits of hundreds of nats", m=1501, n_keys=2003, d=128, scale=3.0),
    of("cone", why="cone 128: all similarities near 0.99", m=2003, n_keys=2003, d=128),
)


def shrunk(p: Call) -> Call:
    """A large problem at the size of a dry run."""

    def small(n: int) -> int:
        return max(n // 40, 1)

    offset = p.offset and (small(p.m) // 2 if p.symmetric and 2 * p.offset == p.m else small(p.offset))
    sizes = {"m": small(p.m) // 2 * 2, "n_keys": p.n_keys and small(p.n_keys) // 2 * 2, "d": min(p.d, 24), "offset": offset}
    return p._replace(**sizes, mask=p.mask and (small(p.mask[0]), small(p.mask[1])), labels=p.labels // 10, excludes=p.excludes // 10)


@on_gpu
@each_mode
@each_dtype
@pytest.mark.parametrize("p", LARGE, ids=str)
def test_large_problems(p: Call, dtype: torch.dtype, deterministic: bool, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, ragged edges, every rule and every family of kernels, against float64 in blocks on the same device."""
    p = shrunk(p) if DRY else p
    monkeypatch.setattr(test_statistics, "run", lambda p, dtype, _: run_on(place, p, dtype))
    monkeypatch.setattr(test_statistics, "exact_run", lambda p, dtype: blocked(p, dtype, place.device, wide=True))
    monkeypatch.setattr(test_statistics, "dense_run", lambda p, dtype: blocked(p, dtype, place.device, wide=False))
    with determinism(deterministic):
        test_statistics.check(p, dtype, place.backend)


@on_gpu
@pytest.mark.parametrize("p", [p for p in PROBLEMS if p.m > 9], ids=str)
def test_metrics(p: Call, place: Place) -> None:
    """Rank, ties, hardest negative and best positive; a rank may count a negative that is as near to the threshold as float32 rounds."""
    tensors = p.tensors(torch.float32)
    q, k, scale, bias = (None if t is None else t.to(place.device) for t in tensors)
    call = {name: v.to(place.device) if isinstance(v, Tensor) else v for name, v in p.call().items()}
    found = contrastive_stats(q, k, scale=scale, bias=bias, metrics=True, backend=place.backend, **call)
    wide_q, wide_k, wide_scale, wide_bias = (None if t is None else t.double() for t in tensors)
    s = oracle.logits(wide_q, wide_q if wide_k is None else wide_k, wide_scale, wide_bias, p.normalize)
    kinds = oracle.classes(p)
    near = 32 * contract.U * max(1.0, s.abs().max().item())
    for side, t, c in [(found, s, kinds), (found.columns, s.T, kinds.T)][: 2 if p.two_sided else 1]:
        rank, ties, hardest, hardest_logit, pos_max = (v.cpu() for v in side[4:9])
        negatives = t.masked_fill(c != oracle.NEGATIVE, -torch.inf)
        best = t.masked_fill(c != oracle.POSITIVE, -torch.inf).amax(1)
        some = (c == oracle.NEGATIVE).any(1)
        assert (rank >= (negatives > best[:, None] + near).sum(1)).all()
        assert (rank + ties <= (negatives > best[:, None] - near).sum(1)).all()
        assert contract.row_error(pos_max, best) <= near
        assert contract.row_error(hardest_logit, negatives.amax(1)) <= near
        assert torch.equal(hardest >= 0, some)
        there = negatives.gather(1, hardest.clamp(min=0)[:, None])[some, 0]
        assert (there >= negatives.amax(1)[some] - near).all()


def inputs(n: int, d: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two views of n rows and a scale, all learning."""
    g = torch.Generator().manual_seed(n + d)
    q = torch.randn(n, d, generator=g)
    k = q + 0.7 * torch.randn(n, d, generator=g)
    return tuple(t.to(device).requires_grad_() for t in (q.to(dtype), k.to(dtype), torch.tensor(12.0)))


def labels_of(n: int, device: str) -> Tensor:
    return torch.arange(n, device=device) % max(n // 8, 1)


LOSSES: dict[str, Callable[..., Tensor]] = OF_VIEWS | {
    "symmetric": lambda q, k, s, **o: fastnce.info_nce(q, k, scale=s, symmetric=True, **o),
    "unpaired": lambda q, k, s, **o: fastnce.info_nce(q, k, k.detach().flip(1), scale=s, in_batch=True, **o),
    "sup_con in": lambda q, k, s, **o: fastnce.sup_con(torch.cat([q, k]), labels_of(2 * len(q), q.device), variant="in", scale=s, **o),
    "clip_loss, bias": lambda q, k, s, **o: fastnce.clip_loss(q, k, s, s * 0.1, **o),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@on_gpu
@each_loss
@each_dtype
@pytest.mark.parametrize("d", [40, 300])
def test_losses(name: str, dtype: torch.dtype, d: int, place: Place) -> None:
    """The public losses, row values and gradients, against the dense backend in float64 on the same stored inputs."""
    n = sized(700, 30)
    leaves = inputs(n, d, place.device, dtype)

    def solve(leaves: tuple[Tensor, ...], backend: str) -> list[Tensor]:
        rows = LOSSES[name](*leaves, reduction="none", backend=backend)
        upstream = torch.linspace(0.5, 1.5, len(rows), dtype=rows.dtype, device=rows.device)
        return [rows.detach().double(), *torch.autograd.grad(rows, leaves, upstream)]

    found = solve(leaves, place.backend)
    exact, dense = (
        solve(tuple(t.detach().to(kind).requires_grad_() for t in leaves), "reference") for kind in (torch.float64, torch.float32)
    )
    errors = [(f.double() - e).norm() / e.norm() for f, e in zip(dense, exact, strict=True)]
    largest = leaves[2].item()
    assert contract.row_error(found[0], exact[0]) <= contract.row(dtype, contract.row_error(dense[0], exact[0]), largest)
    for f, e, dense_error in zip(found[1:3], exact[1:3], errors[1:3], strict=True):
        assert f.dtype == dtype
        assert contract.relative(f, e) <= contract.gradient(dtype, dense_error.item())
    assert contract.relative(found[3], exact[3]) <= contract.scalar(dtype, errors[3].item())


# Only on a device ----------------------------------------------------------------------------------------------------------------


class Step:
    """One forward and backward on tensors that stay where they are; loss and gradients are read from it afterwards."""

    def __init__(self, loss: str | Callable[..., Tensor], leaves: tuple[Tensor, ...], backend: str) -> None:
        self.function, self.leaves, self.backend = LOSSES[loss] if isinstance(loss, str) else loss, leaves, backend
        self.loss = leaves[0].new_empty(())

    def __call__(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.loss = self.function(*self.leaves, backend=self.backend)
        self.loss.backward()

    def results(self) -> list[Tensor]:
        return [self.loss.detach().clone(), *(leaf.grad.clone() for leaf in self.leaves if leaf.grad is not None)]


def agree(found: list[Tensor], expected: list[Tensor], exactly: bool) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(b).all()
        assert torch.equal(a, b) if exactly else contract.relative(a, b.double()) <= contract.gradient(torch.float32, 0.0)


class Late:
    """A side stream, and a kernel that keeps a stream busy. Without a device everything happens at once and in order."""

    def __init__(self) -> None:
        self.stream = None if DRY else torch.cuda.Stream()

    def on_side(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def sleep(self) -> None:
        """About half a second of the current stream."""
        if self.stream is not None:
            torch.cuda._sleep(1_000_000_000)

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


@on_gpu
@each_loss
def test_kernels_follow_the_current_stream(name: str, place: Place) -> None:
    """Inputs are written late on a side stream. A kernel on another stream would not wait for them and would read what was there."""
    leaves, late = inputs(sized(1500, 30), 64, place.device), Late()
    with determinism():
        step = Step(name, leaves, place.backend)
        step()
        expected = step.results()
        values = [leaf.detach().clone() for leaf in leaves[:2]]
        with torch.no_grad():
            for leaf in leaves[:2]:
                leaf.fill_(1.0)
        wait()
        with late.on_side():
            late.sleep()
            with torch.no_grad():
                for leaf, value in zip(leaves[:2], values, strict=True):
                    leaf.copy_(value)
            step()
            found = step.results()
        late.finish()
        agree(found, expected, exactly=True)


@on_gpu
def test_a_side_stream_waits_for_no_other(place: Place) -> None:
    """With the default stream busy for half a second, forward and backward on a side stream are done before it: nothing is launched on,
    or waits for, the default stream."""
    leaves, late = inputs(sized(1500, 30), 64, place.device), Late()
    step = Step("clip_loss", leaves, place.backend)
    step()
    expected = step.results()
    with late.on_side():
        step()  # its allocations are made: a new one might wait for the device
    wait()
    late.sleep()
    busy = None if DRY else torch.cuda.current_stream().record_event()
    with late.on_side():
        step()
        found = step.results()
    late.finish()
    assert busy is None or not busy.query(), "the side stream ended after the default stream"
    wait()
    agree(found, expected, exactly=False)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs a second CUDA device")
@each_loss
def test_the_device_of_the_inputs_is_used(name: str, place: Place) -> None:
    """Tensors on cuda:1 while cuda:0 is current: launched on the wrong device, kernels fault or read another's memory."""
    first = Step(name, inputs(sized(600, 30), 64, place.device), place.backend)
    other = Step(name, inputs(sized(600, 30), 64, "cpu" if DRY else "cuda:1"), place.backend)
    with determinism():
        first()
        other()
    assert DRY or torch.cuda.current_device() == 0
    agree([x.cpu() for x in other.results()], [x.cpu() for x in first.results()], exactly=True)
    assert all(x.device == other.leaves[0].device for x in other.results())


def captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph, after three calls on a side stream; without a device, the step."""
    if DRY:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for leaf in step.leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@on_gpu
@each_loss
@each_mode
@pytest.mark.parametrize("d", [64, 300])
def test_graph_replay(name: str, d: int, deterministic: bool, place: Place) -> None:
    """Captured once, replayed with other inputs and other scales: at 12 no logit exceeds 40 nats, at 90 a running maximum is needed, and
    the device has to decide that at every replay, because the host does not run."""
    n = sized(900, 30)
    step = Step(name, inputs(n, d, place.device), place.backend)
    with determinism(deterministic):
        replay = captured(step)
        for seed, scale in ((1, 12.0), (2, 90.0), (3, 12.0), (4, 0.5)):
            g = torch.Generator().manual_seed(seed)
            fresh = [torch.randn(n, d, generator=g).to(place.device) * seed for _ in range(2)] + [torch.tensor(scale, device=place.device)]
            with torch.no_grad():
                for leaf, value in zip(step.leaves, fresh, strict=True):
                    leaf.copy_(value)
            replay()
            found = step.results()
            eager = Step(name, tuple(value.requires_grad_() for value in fresh), place.backend)
            eager()
            agree(found, eager.results(), exactly=deterministic)


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Calls that make the host wait for the device raise."""
    if DRY:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@each_loss
@pytest.mark.parametrize("d", [64, 300])
def test_nothing_waits_for_the_device(name: str, d: int, place: Place) -> None:
    """Forward and backward with a learnable scale, whose value only the device knows."""
    step = Step(name, inputs(sized(900, 30), d, place.device), place.backend)
    step()  # compiled, allocated
    with no_synchronisation():
        step()
    assert all(torch.isfinite(x).all() for x in step.results())


@on_gpu
def test_the_detector_sees_a_synchronisation(place: Place) -> None:
    """It would pass everything if it were off."""
    with contextlib.nullcontext() if DRY else pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        torch.ones((), device=place.device).item()


# Called with nothing that needs memory of its own. moco's keys learn nothing.
PLAIN: dict[str, Callable[..., Tensor]] = {
    "nt_xent": lambda q, s, **o: fastnce.nt_xent(q, scale=s, **o),
    "sup_con": lambda q, s, **o: fastnce.sup_con(q, labels_of(len(q), q.device), scale=s, **o),
    "clip": lambda q, k, s, **o: fastnce.clip_loss(q, k, s, **o),
    "moco": lambda q, k, s, **o: fastnce.moco_loss(q, k.detach(), k.detach(), scale=s, **o),
}


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("d", [128, 256, 512, 1024])
@pytest.mark.parametrize("name", PLAIN)
def test_peak_memory(name: str, d: int, dtype: torch.dtype, place: Place) -> None:
    """Above inputs and gradients at most three times the inputs; where rows are long, and weights go through a workspace, 128 MiB more.

    The logits alone would be 1 GiB in float32 at 16,390 rows.
    """
    q, k, s = inputs(sized(16_390, 30), d, place.device, dtype)
    step = Step(PLAIN[name], (q, s) if name in ("nt_xent", "sup_con") else (q, k, s), place.backend)
    step()  # libraries keep their workspaces from now on
    if DRY:
        return
    for leaf in step.leaves:
        leaf.grad = None
    step.loss = step.leaves[0].new_empty(())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    stored, learned = (sum(leaf.nbytes for leaf in leaves) for leaves in (step.leaves, [x for x in step.leaves if x.grad is not None]))
    assert peak <= learned + 3 * stored + (0 if d <= 256 else 128 * MIB)


@on_gpu
@pytest.mark.parametrize(("name", "n", "d"), [("nt_xent", 1501, 128), ("clip_loss", 1003, 512), ("sup_con", 777, 64)])
def test_a_thousand_repeats_are_bitwise_equal(name: str, n: int, d: int, place: Place) -> None:
    """In deterministic mode: a race, or a sum in an order left to chance, changes a bit sooner or later."""
    step = Step(name, inputs(sized(n, 30), d, place.device, torch.bfloat16), place.backend)
    with determinism():
        step()
        first = step.results()
        different = torch.zeros((), dtype=torch.int64, device=place.device)
        for _ in range(sized(1000, 3)):
            step()
            for a, b in zip(step.results(), first, strict=True):
                different += (a != b).sum()
    assert torch.isfinite(first[0])
    assert different.item() == 0


@on_gpu
@pytest.mark.parametrize("many", ["keys", "queries"])
def test_more_than_2_to_the_31_elements(many: str, place: Place) -> None:
    """(2^22 + 3) x 512 bfloat16: an offset of 32 bits wraps around and reads, or writes, other rows. Values and gradients of the last rows
    against float64, and of all rows of the short side."""
    n, m, d = sized(2**22 + 3, 515), sized(67, 17), sized(512, 24)
    g = torch.Generator(place.device).manual_seed(0)
    long = torch.empty(n, d, dtype=torch.bfloat16, device=place.device)
    for part in long.split(2**18):
        part.copy_(torch.randn(part.shape, generator=g, device=place.device))
    short = torch.randn(m, d, generator=g, device=place.device).bfloat16()
    # Copies among the last rows: they hold most of the sum, so that a row that was never met shows.
    long[-m:] = short
    q, k = (short, long) if many == "keys" else (long, short)
    q.requires_grad_()
    k.requires_grad_()
    offset = n - m if many == "keys" else None
    found = contrastive_stats(q, k, scale=20.0, offset=offset, backend=place.backend)
    upstream = torch.linspace(0.5, 1.5, len(q), device=place.device)
    dq, dk = torch.autograd.grad(found.lse_neg, (q, k), upstream)
    assert torch.isfinite(dq).all()
    assert torch.isfinite(dk).all()

    tail = slice(n - 4 * m, n)
    unit_short = torch.nn.functional.normalize(short.detach().double(), dim=1)

    def cosines(rows: slice) -> Tensor:
        return unit_short @ torch.nn.functional.normalize(long.detach()[rows].double(), dim=1).T

    own = torch.arange(m, device=place.device)

    def negatives(rows: slice) -> Tensor:
        """Logits (m, rows) of the negatives."""
        s = 20.0 * cosines(rows)
        return s if offset is None else s.masked_fill(torch.arange(n, device=s.device)[rows] == own[:, None] + offset, -torch.inf)

    blocks = [slice(start, min(start + 2**16, n)) for start in range(0, n, 2**16)]
    if many == "keys":
        lse = torch.stack([negatives(rows).logsumexp(1) for rows in blocks]).logsumexp(0)
        weights = [(negatives(rows) - lse[:, None]).exp() * upstream.double()[:, None] for rows in [*blocks, tail]]
        assert contract.row_error(found.lse_neg.detach(), lse) <= contract.row(torch.bfloat16, 0.0, 20.0)
    else:
        lse = torch.cat([negatives(rows).logsumexp(0) for rows in blocks])
        weights = [(negatives(rows) - lse[rows]).exp() * upstream.double()[rows] for rows in [*blocks, tail]]
        assert contract.row_error(found.lse_neg.detach(), lse) <= contract.row(torch.bfloat16, 0.0, 20.0)

    def gradient(unit: Tensor, norm: Tensor, by_unit: Tensor) -> Tensor:
        return 20.0 * (by_unit - (by_unit * unit).sum(1, keepdim=True) * unit) / norm

    of_short, of_long = (dq, dk) if many == "keys" else (dk, dq)
    by_short = torch.zeros_like(unit_short)
    for rows, w in zip(blocks, weights, strict=False):
        by_short += w @ torch.nn.functional.normalize(long.detach()[rows].double(), dim=1)
    norms = [x.detach().double().norm(dim=1, keepdim=True) for x in (short, long[tail])]
    exact_short = gradient(unit_short, norms[0], by_short)
    exact_tail = gradient(torch.nn.functional.normalize(long.detach()[tail].double(), dim=1), norms[1], weights[-1].T @ unit_short)
    assert contract.relative(of_short, exact_short) <= contract.gradient(torch.bfloat16, 0.0)
    assert contract.relative(of_long[tail], exact_tail) <= contract.gradient(torch.bfloat16, 0.0)


@on_gpu
@each_loss
def test_compile_is_one_graph(name: str, place: Place) -> None:
    """fullgraph=True through the compiler that a GPU user gets; the operators stay what they are."""
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager" if DRY else "inductor")
    leaves = inputs(sized(600, 30), 64, place.device)
    eager = Step(name, leaves, place.backend)
    with determinism():
        eager()
        loss = compiled(*leaves, backend=place.backend)
        gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.grad is not None])
    agree([loss.detach(), *gradients], eager.results(), exactly=False)


@on_gpu
@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype, place: Place) -> None:
    """Autocast would run products that must be in float32 in half precision; inside an operator it is off."""
    step = Step(name, inputs(sized(600, 30), 64, place.device), place.backend)
    with determinism():
        step()
        plain = step.results()
        with torch.autocast(place.device, dtype=dtype):
            step()
    agree(step.results(), plain, exactly=True)


@on_gpu
def test_backward_from_another_thread(place: Place) -> None:
    """Autograd runs the backward of CUDA tensors on a thread of its own, where a launch needs the device and the stream of the forward;
    eight threads at once must not get in each other's way."""
    from concurrent.futures import ThreadPoolExecutor

    def solve(seed: int) -> list[Tensor]:
        step = Step("nt_xent", inputs(sized(500, 20) + seed, 64, place.device), place.backend)
        step()
        return step.results()

    with determinism():
        expected = [solve(seed) for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(solve, range(8)))
    for a, b in zip(found, expected, strict=True):
        agree(a, b, exactly=True)


# The proof -----------------------------------------------------------------------------------------------------------------------------


def on_gpu() -> test_proof.Problem:
    of = test_proof.problem(torch.bfloat16)
    assert of.k is not None
    return of._replace(q=of.q.cuda(), k=of.k.cuda(), scale=of.scale.cuda())


@pytest.mark.gpu
def test_a_gpu_gets_its_kernels_after_a_proof(cache: Path) -> None:  # noqa: F811
    """In a process of its own; the next variant here; no synchronisation from then on."""
    of = on_gpu()
    assert test_proof.said(of) == ("triton", [])
    assert test_proof.said(of._replace(normalize=False)) == ("triton", [])
    assert {why for why, *_ in test_proof.recorded(cache).values()} == {""} and len(test_proof.recorded(cache)) == 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert test_proof.said(of) == ("triton", [])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_makes_a_loss_after_a_proof_of_its_own(cache: Path) -> None:  # noqa: F811
    q, k = torch.randn(2, 40, 64, device="cuda")
    first = fastnce.nt_xent(q, k, 0.1)
    (line,) = test_proof.recorded(cache)
    assert line.endswith("loss out, number+second") and test_proof.recorded(cache)[line][0] == ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = fastnce.nt_xent(q, k, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(again, first)


@pytest.mark.gpu
def test_a_capture_without_a_verdict_gets_torch(cache: Path) -> None:  # noqa: F811
    of = on_gpu()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        name, (line,) = test_proof.said(of)
    assert name == "torch" and "before the capture" in line
    assert test_proof.said(of) == ("triton", [])
