"""The nn.Module twins, the learnable scale and the queue: what they hold, and that they hold nothing else."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnce
from fastnce import (
    ClipLoss,
    InfoNCE,
    LogitScale,
    MoCoLoss,
    NegativeQueue,
    NTXentLoss,
    SupConLoss,
    clip_loss,
    info_nce,
    moco_loss,
    nt_xent,
    sup_con,
)


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def on_disk(module: nn.Module) -> nn.Module:
    """Through torch.save and back, as a checkpoint of the whole module."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": on_disk,
}


# NegativeQueue --------------------------------------------------------------------------------------------------------------------------


def counted(start: int, n: int, dim: int = 2) -> Tensor:
    """n keys that tell their number."""
    return torch.arange(start, start + n, dtype=torch.float32)[:, None].expand(n, dim)


class Ring:
    """The queue in plain Python."""

    def __init__(self, queue: NegativeQueue) -> None:
        self.keys, self.pointer = queue.keys.tolist(), int(queue.pointer)

    def enqueue(self, keys: Tensor) -> None:
        for key in keys.tolist():
            self.keys[self.pointer] = key
            self.pointer = (self.pointer + 1) % len(self.keys)

    def check(self, queue: NegativeQueue) -> None:
        assert queue.keys.tolist() == self.keys
        assert int(queue.pointer) == self.pointer


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_queue_is_a_ring(size: int) -> None:
    """Batches of every size up to twice the queue and more, in random order, none dividing it in particular."""
    queue, order = NegativeQueue(size, 2), random.Random(size)
    ring, total, place = Ring(queue), 0, queue.keys.data_ptr()
    sizes = [*range(2 * size + 2), 5 * size + 3, *(order.randrange(2 * size + 2) for _ in range(40))]
    order.shuffle(sizes)
    for n in sizes:
        queue.enqueue(counted(total, n))
        ring.enqueue(counted(total, n))
        ring.check(queue)
        total += n
    assert queue.keys.data_ptr() == place, "the buffer is written in place"


def test_queue_starts_with_random_unit_rows() -> None:
    torch.manual_seed(0)
    queue = NegativeQueue(50, 8)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(50))
    assert len(queue.keys.unique(dim=0)) == 50 and queue.pointer == 0
    assert repr(queue) == "NegativeQueue(size=50, dim=8)"


def test_queue_state_is_saved_and_restored() -> None:
    queue, other = NegativeQueue(5, 2), NegativeQueue(5, 2)
    queue.enqueue(counted(0, 3))
    state = queue.state_dict()
    assert list(state) == ["keys", "pointer"]
    other.load_state_dict(copy.deepcopy(state))
    for q in (queue, other):
        q.enqueue(counted(3, 4))
    Ring(queue).check(other)
    assert queue.keys[:, 0].tolist() == [5.0, 6.0, 2.0, 3.0, 4.0]


def test_queue_without_state() -> None:
    queue = NegativeQueue(5, 2, persistent=False)
    assert not queue.state_dict() and len(list(queue.buffers())) == 2
    NegativeQueue(9, 2, persistent=False).load_state_dict(queue.state_dict())


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_queue_are_independent(how: str) -> None:
    queue = NegativeQueue(5, 2)
    queue.enqueue(counted(0, 3))
    other, ring = COPIES[how](queue), Ring(queue)
    ring.check(other)
    other.enqueue(counted(3, 1))
    ring.check(queue)


def test_queue_keeps_no_graph_and_its_own_dtype() -> None:
    queue = NegativeQueue(5, 2, dtype=torch.bfloat16)
    queue.enqueue(rows(3, 2, dtype=torch.float64))
    assert not queue.keys.requires_grad and queue.keys.dtype == torch.bfloat16
    queue.to(torch.float64).enqueue(rows(3, 2))
    assert queue.keys.dtype == torch.float64 and queue.pointer.dtype == torch.int64 and queue.pointer == 1


def test_queue_is_read_in_place() -> None:
    """No copy per step, so that an update between forward and backward must not go unnoticed."""
    queue, q, k = NegativeQueue(8, 5), rows(3, 5), rows(3, 5, seed=1).detach()
    loss = moco_loss(q, k, queue)
    queue.enqueue(k)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = moco_loss(q, k, queue)
    before = queue.keys.clone()
    loss.backward()
    queue.enqueue(k)
    assert torch.equal(loss, moco_loss(q, k, before))
    assert not torch.equal(loss, moco_loss(q, k, queue))


# LogitScale -----------------------------------------------------------------------------------------------------------------------------


def test_logit_scale_starts_as_clip_does() -> None:
    scale = LogitScale()
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert list(scale.state_dict()) == ["log_scale"] and scale.log_scale.shape == ()
    assert LogitScale(3.0, None)().item() == pytest.approx(3.0, rel=1e-6)
    assert repr(scale) == "LogitScale(max=100.0)"


@pytest.mark.parametrize("limit", [1.0, 50.0, 100.0])
def test_logit_scale_is_clamped(limit: float) -> None:
    """To within the rounding of log and exp in float32, and for good: the parameter itself comes back to the limit."""
    scale = LogitScale(0.5, limit)
    with torch.no_grad():
        scale.log_scale.fill_(math.log(limit) + 3.0)
    assert scale().item() == pytest.approx(limit, rel=5e-7)
    assert scale.log_scale.item() == pytest.approx(math.log(limit), abs=1e-6)


def test_logit_scale_below_the_limit_or_without_one_is_left_alone() -> None:
    assert LogitScale(99.0)().item() == pytest.approx(99.0, rel=1e-6)
    scale = LogitScale(1.0, None)
    with torch.no_grad():
        scale.log_scale.fill_(20.0)
    assert scale().item() == pytest.approx(math.exp(20.0), rel=1e-5)


def test_logit_scale_comes_down_from_the_limit() -> None:
    """A clamp inside the graph would have gradient 0 there, and the scale could never fall again."""
    scale = LogitScale(100.0)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1e-3)
    for push, moves in ((-1.0, False), (-1.0, False), (1.0, True), (1.0, True)):
        before = scale().item()
        optimizer.zero_grad()
        (push * scale()).backward()
        assert scale.log_scale.grad.item() == pytest.approx(push * before, rel=1e-5)
        optimizer.step()
        assert (scale().item() < before * 0.95) == moves
        assert scale().item() <= 100.0 * (1 + 5e-7)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_logit_scale(how: str) -> None:
    scale = LogitScale(7.0, 9.0)
    other = COPIES[how](scale)
    assert torch.equal(other(), scale()) and other.max == 9.0
    with torch.no_grad():
        other.log_scale.fill_(5.0)
    assert other().item() == pytest.approx(9.0, rel=1e-6) and scale().item() == pytest.approx(7.0, rel=1e-6)
    scale.load_state_dict(other.state_dict())
    assert torch.equal(other(), scale())


# Twins ----------------------------------------------------------------------------------------------------------------------------------


class Twin(NamedTuple):
    """A module, its function, their inputs, and another value of every option."""

    module: Callable[..., nn.Module]
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [rows(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(self.shapes)]


COMMON = {"reduction": "sum", "normalize": False, "backend": "reference"}
PAIR = ((6, 5), (6, 5))


def clip_function(image: Tensor, text: Tensor, **options: Any) -> Any:
    """As the module: its own scale, unless the scale is given."""
    return clip_loss(image, text, LogitScale()(), **options)


def moco_module(**options: Any) -> MoCoLoss:
    module = MoCoLoss(7, 5, **options)
    module.queue.enqueue(rows(7, 5, seed=9).detach())
    return module


def moco_function(q: Tensor, k: Tensor, **options: Any) -> Any:
    return moco_loss(q, k, rows(7, 5, seed=9).detach(), **options)


TWINS = {
    "InfoNCE": Twin(InfoNCE, info_nce, PAIR, COMMON | {"temperature": 0.3, "symmetric": True}),
    "InfoNCE unpaired": Twin(InfoNCE, info_nce, (*PAIR, (7, 5)), COMMON | {"temperature": 0.3, "in_batch": True}),
    "NTXentLoss": Twin(NTXentLoss, nt_xent, PAIR, COMMON | {"temperature": 0.3}),
    "SupConLoss": Twin(
        SupConLoss, sup_con, ((6, 3, 5),), COMMON | {"temperature": 0.3, "variant": "in", "views": "one", "no_positive": "skip"}
    ),
    "ClipLoss": Twin(ClipLoss, clip_function, PAIR, COMMON),
    "MoCoLoss": Twin(moco_module, moco_function, PAIR, COMMON | {"temperature": 0.3}),
}


def run(loss_of: Callable[..., Any], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss and the gradients of its inputs."""
    loss = loss_of(*inputs, **options)
    return [loss, *torch.autograd.grad(loss.sum(), inputs)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("module", "function", "own"),
    [
        (InfoNCE, info_nce, set()),
        (NTXentLoss, nt_xent, set()),
        (SupConLoss, sup_con, set()),
        (ClipLoss, clip_loss, {"init_scale", "max_scale"}),
        (MoCoLoss, moco_loss, {"queue_size", "dim"}),
    ],
)
def test_a_twin_has_every_argument_of_its_function(module: Any, function: Any, own: set[str]) -> None:
    """Once, in __init__ or in forward, with the same default; the queue is inside MoCoLoss."""
    given: dict[str, Any] = {}
    for method in (module.__init__, module.forward):
        new = {n: p.default for n, p in inspect.signature(method).parameters.items() if n not in {"self"} | own}
        assert not given.keys() & new.keys()
        given |= new
    wanted = {n: p.default for n, p in inspect.signature(function).parameters.items() if n != "queue"}
    if module is ClipLoss:
        wanted["logit_scale"] = None
    assert given == wanted


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_its_function(name: str) -> None:
    """Bit by bit, with defaults and with every option given another value."""
    twin = TWINS[name]
    expected = run(twin.function, twin.inputs())
    assert_same(run(twin.module(), twin.inputs()), expected)
    for option, value in twin.options.items():
        changed = run(twin.function, twin.inputs(), **{option: value})
        assert_same(run(twin.module(**{option: value}), twin.inputs()), changed)
        assert f"{option}={value!r}" in repr(twin.module(**{option: value}))
        if option not in ("backend", "no_positive"):
            assert not torch.equal(changed[0], expected[0]), "the option must matter here, or nothing was shown"


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_hands_on_what_belongs_to_a_batch(name: str) -> None:
    twin = TWINS[name]
    weight = torch.arange(1.0, 7.0)
    assert_same(run(twin.module(), twin.inputs(), weight=weight), run(twin.function, twin.inputs(), weight=weight))
    loss, metrics = twin.module(return_stats=True)(*twin.inputs())
    expected, wanted = twin.function(*twin.inputs(), return_stats=True)
    assert torch.equal(loss, expected) and torch.equal(metrics.rank, wanted.rank) and torch.equal(metrics.hardest, wanted.hardest)


def test_a_twin_hands_on_ids_labels_masks_and_scales() -> None:
    q, k, n, ids = rows(6, 5), rows(6, 5, seed=1), rows(6, 3, 5, seed=2), torch.arange(6) // 2
    mask, alone = ids[:, None] == ids, torch.tensor([0, 0, 1, 1, 2, 3])
    documents = {"exclude_query_ids": ids, "exclude_key_ids": ids.flip(0)}
    clip_documents = {"exclude_image_ids": ids, "exclude_text_ids": ids.flip(0)}
    shuffled = {"image_ids": ids, "text_ids": ids.flip(0), "aligned": False}
    scales = {"logit_scale": 3.0, "logit_bias": torch.tensor(-1.0)}
    for found, expected in (
        (InfoNCE()(q, k, query_ids=ids, key_ids=ids.flip(0)), info_nce(q, k, query_ids=ids, key_ids=ids.flip(0))),
        (InfoNCE()(q, k, **documents), info_nce(q, k, **documents)),
        (InfoNCE(negative_mode="paired")(q, k, n), info_nce(q, k, n, negative_mode="paired")),
        (NTXentLoss()(q), nt_xent(q)),
        (SupConLoss()(q, ids), sup_con(q, ids)),
        (SupConLoss()(q, mask=mask), sup_con(q, mask=mask)),
        (SupConLoss(no_positive="skip")(q, alone), sup_con(q, alone) * 6 / 4),
        (SupConLoss(unlabelled="own_views")(n, ids - 1), sup_con(n, ids - 1, unlabelled="own_views")),
        (ClipLoss()(q, k, image_ids=ids, text_ids=ids), clip_loss(q, k, LogitScale()(), image_ids=ids, text_ids=ids)),
        (ClipLoss()(q, k, **clip_documents), clip_loss(q, k, LogitScale()(), **clip_documents)),
        (ClipLoss()(q, k, **shuffled), clip_loss(q, k, LogitScale()(), **shuffled)),
        (ClipLoss()(q, k, **scales), clip_loss(q, k, **scales)),
        (ClipLoss(init_scale=2.0)(q, k), clip_loss(q, k, LogitScale(2.0)())),
        (ClipLoss(init_scale=2.0, max_scale=2.0)(q, k), clip_loss(q, k, LogitScale(2.0, 2.0)())),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", TWINS)
def test_copies_of_a_twin(name: str, how: str) -> None:
    """Fresh, and after a step: with keys that wait for the queue."""
    twin = TWINS[name]
    module = twin.module(**twin.options)
    for _ in range(2):
        other = COPIES[how](module)
        assert repr(other) == repr(module)
        assert_same(run(other, twin.inputs()), run(module, twin.inputs()))
        mine, its = module.state_dict(), other.state_dict()
        assert list(mine) == list(its)
        assert all(torch.equal(mine[n], its[n]) and mine[n].data_ptr() != its[n].data_ptr() for n in mine)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("name", [n for n, twin in TWINS.items() if "temperature" in twin.options])
def test_temperature_is_a_number_a_buffer_or_a_parameter(name: str, learnt: bool) -> None:
    twin = TWINS[name]

    def new(temperature: float) -> nn.Module:
        value = torch.tensor(temperature)
        return twin.module(temperature=nn.Parameter(value) if learnt else value)

    assert "temperature" not in twin.module(temperature=0.3).state_dict()
    module, other = new(0.3), new(0.7)
    assert [n for n, _ in module.named_parameters()] == ["temperature"] * learnt
    assert torch.equal(module.state_dict()["temperature"], torch.tensor(0.3))
    torch.testing.assert_close(run(module, twin.inputs()), run(twin.function, twin.inputs(), temperature=0.3), rtol=1e-5, atol=1e-6)
    other.load_state_dict(module.state_dict())
    assert_same(run(other, twin.inputs()), run(module, twin.inputs()))


@pytest.mark.parametrize("name", TWINS)
def test_a_learnt_temperature_trains(name: str) -> None:
    """Its gradient is that of the function, and following it lowers the loss."""
    twin = TWINS[name]
    inputs = [z.detach() for z in twin.inputs()]
    module = twin.module() if name == "ClipLoss" else twin.module(temperature=nn.Parameter(torch.tensor(0.5)))
    module.eval()
    (parameter,) = module.parameters()
    optimizer = torch.optim.SGD([parameter], lr=0.02)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = module(*inputs)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    step = 1e-3
    with torch.no_grad():
        start = parameter.clone()
        parameter.copy_(start + step)
        above = module(*inputs)
        parameter.copy_(start - step)
        slope = (above - module(*inputs)) / (2 * step)
        parameter.copy_(start)
    optimizer.zero_grad()
    module(*inputs).backward()
    assert parameter.grad.item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_moves_to_float64(name: str) -> None:
    twin = TWINS[name]
    module = twin.module() if name == "ClipLoss" else twin.module(temperature=nn.Parameter(torch.tensor(0.25)))
    single = module(*twin.inputs())
    if name == "MoCoLoss":
        module = twin.module(temperature=nn.Parameter(torch.tensor(0.25)))
    double = module.to(torch.float64)(*twin.inputs(torch.float64))
    assert double.dtype == torch.float64
    assert all(t.dtype == torch.float64 for t in module.state_dict().values() if t.is_floating_point())
    torch.testing.assert_close(double.float(), single, rtol=1e-5, atol=1e-6)


# MoCoLoss -------------------------------------------------------------------------------------------------------------------------------


def moco_in_plain_torch(q: Tensor, k: Tensor, keys: Tensor, temperature: float) -> Tensor:
    q, k, keys = (F.normalize(z, dim=1) for z in (q, k, keys))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ keys.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_moco_over_several_steps(backend: str) -> None:
    """Each step sees the keys of all steps before it and none of its own; batches neither divide the queue nor fit into it."""
    module = MoCoLoss(7, 5, temperature=0.2, backend=backend).double()
    ring = Ring(module.queue)
    for step, n in enumerate((3, 3, 3, 7, 1, 16, 4, 5)):
        q, k = rows(n, 5, seed=step, dtype=torch.float64), rows(n, 5, seed=100 + step, dtype=torch.float64)
        loss = module(q, k)
        expected = moco_in_plain_torch(q, k, torch.tensor(ring.keys, dtype=torch.float64), 0.2)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        wanted = torch.autograd.grad(expected, (q, k))
        torch.testing.assert_close(torch.autograd.grad(loss, (q, k)), wanted, rtol=1e-10, atol=1e-12)
        ring.enqueue(k.detach())
    module.flush()
    ring.check(module.queue)
    module.flush()
    ring.check(module.queue)


def test_moco_enqueues_the_keys_it_saw() -> None:
    """An encoder may write the next batch of keys into the same memory."""
    module, k = MoCoLoss(7, 5), rows(3, 5, seed=1).detach()
    ring, seen = Ring(module.queue), k.clone()
    module(rows(3, 5), k).backward()
    k.zero_()
    module.flush()
    ring.enqueue(seen)
    ring.check(module.queue)


def test_moco_in_eval_mode_enqueues_nothing() -> None:
    module, q = MoCoLoss(7, 5).eval(), rows(3, 5)
    ring = Ring(module.queue)
    first = module(q, q.detach())
    assert torch.equal(first, module(q, q.detach()))
    module.flush()
    ring.check(module.queue)
    module.train()
    module(q, q.detach())
    module.eval()
    module(q, rows(3, 5, seed=5).detach())
    module.state_dict()
    ring.enqueue(q)
    ring.check(module.queue)


def steps(module: MoCoLoss, seeds: range) -> Iterator[Tensor]:
    for seed in seeds:
        loss = module(rows(3, 5, seed=seed), rows(3, 5, seed=100 + seed).detach())
        loss.backward()
        yield loss.detach()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"loss": m})], ids=["alone", "inside another module"])
def test_moco_state_holds_every_key(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Saved after a step and restored, training goes on as if nothing had happened."""
    module, other = MoCoLoss(7, 5), MoCoLoss(7, 5)
    ring = Ring(module.queue)
    list(steps(module, range(3)))
    state = copy.deepcopy(wrap(module).state_dict())
    for seed in range(3):
        ring.enqueue(rows(3, 5, seed=100 + seed))
    ring.check(module.queue)
    wrap(other).load_state_dict(state)
    ring.check(other.queue)
    assert_same(list(steps(other, range(3, 6))), list(steps(module, range(3, 6))))


def test_moco_state_replaces_the_keys_that_wait() -> None:
    """A module that has been used goes back to exactly the state it is given: keys of the abandoned run do not follow."""
    module, other = MoCoLoss(7, 5), MoCoLoss(7, 5)
    list(steps(module, range(2)))
    list(steps(other, range(7, 9)))
    other.load_state_dict(module.state_dict())
    other.flush()
    Ring(module.queue).check(other.queue)


def test_moco_takes_the_keys_that_wait_along() -> None:
    """To another device or dtype between two steps."""
    module, q = MoCoLoss(7, 5), rows(3, 5).detach()
    module(q, q)
    module.to(torch.float64)(q.double(), q.double())
    module.to("meta")(q.double().to("meta"), q.double().to("meta"))


def test_moco_refuses_an_update_before_backward() -> None:
    """A second step, or saving the state, writes the queue that the first step's backward still needs."""
    for disturb in (lambda m: m(rows(3, 5), rows(3, 5).detach()), lambda m: m.state_dict(), lambda m: m.flush()):
        module = MoCoLoss(7, 5)
        loss = module(rows(3, 5), rows(3, 5, seed=1).detach())
        disturb(module)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_all_modules_are_tested_here() -> None:
    public = {n for n in fastnce.__all__ if inspect.isclass(getattr(fastnce, n)) and issubclass(getattr(fastnce, n), nn.Module)}
    assert public == {"LogitScale", "NegativeQueue"} | {name.split()[0] for name in TWINS}


@pytest.mark.parametrize("reentrant", [False, True])
def test_moco_under_activation_checkpointing(reentrant: bool) -> None:
    """The second run of the forward, inside backward, sees the queue of the first and enqueues nothing."""
    torch.manual_seed(0)
    twin = MoCoLoss(16, 5)
    queue = twin.queue.keys.clone()
    for _ in range(3):
        q, k = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
        twin.flush()
        queue.copy_(twin.queue.keys)
        pointer = int(twin.queue.pointer)
        (expected,) = torch.autograd.grad(moco_loss(q, k, queue), q)
        torch.utils.checkpoint.checkpoint(twin, q, k, use_reentrant=reentrant).backward()
        assert torch.equal(q.grad, expected)
        twin.flush()
        assert int(twin.queue.pointer) == (pointer + 6) % 16


def test_modules_take_a_scale() -> None:
    q, k = torch.randn(6, 5), torch.randn(6, 5)
    scale = nn.Parameter(torch.tensor(4.0))
    for twin, loss in ((InfoNCE(scale=scale), info_nce), (NTXentLoss(scale=scale), nt_xent)):
        assert list(twin.parameters()) == [scale]
        assert torch.equal(twin(q, k), loss(q, k, scale=scale))
