"""The queue of negatives, alone and inside MoCoLoss: a ring, in any order of calls."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from twins import COPIES, assert_same, rows

from fastnce import MoCoLoss, NegativeQueue, moco_loss

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


