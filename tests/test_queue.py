"""The queue of negatives, alone and inside MoCoLoss: a ring, in any order of calls."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from named import IN_FLOAT64, ON_CPU
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint
from twins import COPIES, rows

from fastnce import LogitScale, MoCoLoss, NegativeQueue, arguments, moco_loss

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


def test_queue_starts_again_in_place() -> None:
    queue, place = NegativeQueue(50, 8, dtype=torch.bfloat16), None
    queue.enqueue(rows(3, 8))
    place = queue.keys.data_ptr()
    queue.reset_parameters()
    torch.testing.assert_close(queue.keys.float().norm(dim=1), torch.ones(50), rtol=1e-2, atol=0)
    assert queue.pointer == 0 and queue.keys.data_ptr() == place


@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
def test_queue_is_read_in_place(backend: str) -> None:
    """There is no copy per step. So an update between forward and backward raises, with the remedy."""
    queue, q, k = NegativeQueue(8, 5), rows(3, 5), rows(3, 5, seed=1).detach()
    loss = moco_loss(q, k, queue, backend=backend)
    queue.enqueue(k)
    with pytest.raises(RuntimeError, match="Call NegativeQueue.enqueue after backward, or use MoCoLoss.*modified by an inplace operation"):
        loss.backward()
    loss = moco_loss(q, k, queue, backend=backend)
    before = queue.keys.clone()
    loss.backward()
    with pytest.raises(RuntimeError, match="^Trying to backward through the graph a second time"):
        loss.backward()
    queue.enqueue(k)
    assert torch.equal(loss, moco_loss(q, k, before, backend=backend))
    assert not torch.equal(loss, moco_loss(q, k, queue, backend=backend))


# MoCoLoss -------------------------------------------------------------------------------------------------------------------------------


def moco_in_plain_torch(q: Tensor, k: Tensor, keys: Tensor, temperature: float) -> Tensor:
    q, k, keys = (F.normalize(z, dim=1) for z in (q, k, keys))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ keys.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def as_float(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


class Steps:
    """A MoCoLoss in float64 beside plain torch: each call sees the keys of all calls before it and none of its own."""

    def __init__(self, module: MoCoLoss, run: Callable[..., Tensor] | None = None) -> None:
        self.module, self.run, self.seed = module.double(), module if run is None else run, 0
        self.ring, self.pending = Ring(module.queue), list[tuple[Tensor, Tensor, Tensor, Tensor]]()

    def call(self, n: int = 3) -> None:
        self.seed += 1
        q, k = rows(n, 5, seed=self.seed, dtype=torch.float64), rows(n, 5, seed=100 + self.seed, dtype=torch.float64).detach()
        keys = torch.tensor(self.ring.keys, dtype=torch.float64)
        self.pending.append((self.run(q, k), moco_in_plain_torch(q, k, keys, as_float(self.module.temperature)), q, k))
        if self.module.training:
            self.ring.enqueue(k)
        self.ring.check(self.module.queue)

    def backward(self, which: int = 0) -> None:
        found, expected, q, k = self.pending.pop(which)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        (wanted,) = torch.autograd.grad(expected, q)
        found.backward()
        torch.testing.assert_close(q.grad, wanted, rtol=1e-10, atol=1e-12)
        self.ring.check(self.module.queue)
        k.zero_()  # an encoder may write the next batch of keys into the same memory


def moco(**options: Any) -> MoCoLoss:
    return MoCoLoss(7, 5, temperature=0.2, **options)


@pytest.mark.parametrize("backend", ["auto", *IN_FLOAT64])
def test_moco_over_several_steps(backend: str) -> None:
    """Batches neither divide the queue nor fit into it."""
    steps = Steps(moco(backend=backend))
    for n in (3, 3, 3, 7, 1, 16, 4, 5):
        steps.call(n)
        steps.backward()


def load(steps: Steps) -> None:
    other = moco().double()
    steps.module.load_state_dict(other.state_dict())
    steps.ring = Ring(other.queue)


def enqueue(steps: Steps) -> None:
    keys = rows(2, 5, seed=50, dtype=torch.float64).detach()
    steps.module.queue.enqueue(keys)
    steps.ring.enqueue(keys)


BETWEEN: dict[str, Callable[[Steps], Any]] = {
    "nothing": lambda steps: None,
    "another call": lambda steps: steps.call(4),
    "a call as large as the queue": lambda steps: steps.call(9),
    "state_dict": lambda steps: steps.module.state_dict(),
    "load_state_dict": load,
    "enqueue": enqueue,
    "reset": lambda steps: (steps.module.queue.reset_parameters(), setattr(steps, "ring", Ring(steps.module.queue))),
    "eval": lambda steps: (steps.module.eval(), steps.call(), steps.module.train()),
    "a call without gradient": lambda steps: without_gradient(steps),
}


def without_gradient(steps: Steps) -> None:
    with torch.no_grad():
        steps.call()
    steps.pending.pop()


@pytest.mark.parametrize("what", BETWEEN)
@pytest.mark.parametrize("training", [True, False])
def test_moco_whatever_comes_between_forward_and_backward(what: str, training: bool) -> None:
    """Gradients of the queue that the loss was computed with, first call first or last call first."""
    for order in (0, -1):
        steps = Steps(moco().train(training))
        steps.call()
        for _ in range(2):
            BETWEEN[what](steps)
            steps.module.train(training)
            steps.call()
        while steps.pending:
            steps.backward(order)


def test_moco_keys_get_no_gradient() -> None:
    """Neither they nor their encoder, also where they ask for it."""
    encoder, q = nn.Linear(5, 5), rows(3, 5)
    moco()(q, encoder(rows(3, 5, seed=1))).backward()
    assert q.grad is not None and all(parameter.grad is None for parameter in encoder.parameters())


def inductor_without_code(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Inductor's graphs of forward and backward, run as they are: no C++ is compiled."""
    return compile_fx(graph, inputs, inner_compile=lambda graph, inputs, **_: make_boxed_func(graph.forward))


@pytest.mark.parametrize("backend", [lookup_backend("aot_eager"), inductor_without_code], ids=["aot_eager", "inductor"])
def test_moco_compiles_once_in_one_graph(backend: Any) -> None:
    """Also with two calls before one backward. Inductor computes cheap values again in the backward, such as a plain copy of the queue."""
    torch._dynamo.reset()
    module = MoCoLoss(7, 5, scale=LogitScale(5.0))
    graphs = []
    compiled = torch.compile(module, backend=lambda graph, inputs: graphs.append(graph) or backend(graph, inputs), fullgraph=True)
    steps = Steps(module, compiled)
    for order in (0, -1):
        steps.call()
        steps.call()
        steps.backward(order)
        steps.backward()
    assert len(graphs) == 1


def test_moco_in_eval_mode_enqueues_nothing() -> None:
    module, q = MoCoLoss(7, 5).eval(), rows(3, 5)
    ring = Ring(module.queue)
    assert torch.equal(module(q, q.detach()), module(q, q.detach()))
    ring.check(module.queue)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"loss": m})], ids=["alone", "inside another module"])
def test_moco_state_holds_every_key(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Saved after a call and restored into a module that has been used, training goes on as if nothing had happened."""
    steps, other = Steps(moco()), Steps(moco())
    for _ in range(3):
        steps.call()
        other.call(4)
    wrap(other.module).load_state_dict(copy.deepcopy(wrap(steps.module).state_dict()))
    other.seed, other.ring, other.pending = steps.seed, copy.deepcopy(steps.ring), []
    for _ in range(3):
        other.call()
        other.backward()


def test_moco_moves_between_two_calls() -> None:
    """To another device or dtype."""
    module, q = MoCoLoss(7, 5), rows(3, 5).detach()
    module(q, q)
    module.to(torch.float64)(q.double(), q.double())
    module.to("meta")(q.double().to("meta"), q.double().to("meta"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_moco_under_activation_checkpointing(reentrant: bool) -> None:
    """The second run of the forward, inside backward, sees the queue of the first and leaves it alone."""
    module = moco()
    steps = Steps(module, lambda q, k: checkpoint(module, q, k, use_reentrant=reentrant))
    for n in (3, 3, 7, 9, 2):
        steps.call(n)
        steps.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["another call", "a call of another size", "enqueue", "load_state_dict"])
def test_moco_refuses_what_checkpointing_cannot_repeat(what: str, reentrant: bool) -> None:
    module = moco()
    steps = Steps(module, lambda q, k: checkpoint(module, q, k, use_reentrant=reentrant))
    steps.call()
    between = {"another call": steps.call, "a call of another size": lambda: steps.call(4)}
    between.get(what, lambda: BETWEEN[what](steps))()
    with pytest.raises(RuntimeError, match="^MoCoLoss: a checkpointed call runs again.*leave the loss out of the checkpoint"):
        steps.backward()


def test_moco_refuses_a_checkpoint_around_compiled_code() -> None:
    module = moco()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    steps = Steps(module, lambda q, k: checkpoint(compiled, q, k, use_reentrant=False))
    steps.call()
    with pytest.raises(RuntimeError, match="^MoCoLoss: a compiled call runs again.*leave the loss out of the checkpoint"):
        steps.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_moco_where_values_are_not_read_it_is_nan_instead(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU outside debug mode: nothing waits for a value, and the wrong queue shows."""
    monkeypatch.setattr(arguments, "free_to_read", lambda x: False)
    module = moco()
    steps = Steps(module, lambda q, k: checkpoint(module, q, k, use_reentrant=reentrant))
    steps.call()
    steps.backward()
    steps.call()
    steps.call()
    loss, _, q, _ = steps.pending[0]
    loss.backward()
    assert q.grad.isnan().all()


def test_moco_twice_over_the_same_keys() -> None:
    """Two queries, one key: the second call has the keys of the first among its negatives."""
    module, k = moco(), rows(3, 5, seed=1).detach()
    before = module.queue.keys.clone()
    module(rows(3, 5), k)
    found = module(rows(3, 5, seed=2), k)
    assert torch.equal(found, moco_loss(rows(3, 5, seed=2), k, torch.cat([k, before[3:]]), 0.2))
