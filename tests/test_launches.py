"""Launches of a step by the Triton backend, counted without a GPU.

No kernel runs: Triton's are counted where they would be launched, and torch's profiler sees every operation of torch, also those inside of
our operators, which hide them from a dispatch mode. An operation of torch is a launch unless it only makes a view, or allocates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastnce

pytest.importorskip("interpreter")
from fastnce.backends.triton import launches

# Operations that start nothing on a GPU. Some, as `contiguous`, call one that does: that one is seen as well.
FREE = frozenset(
    f"aten::{name}"
    for name in (
        "alias", "as_strided", "as_strided_", "chunk", "contiguous", "detach", "empty", "empty_like", "empty_strided", "expand",
        "lift_fresh", "narrow", "new_empty", "permute", "reshape", "resolve_conj", "resolve_neg", "result_type", "select", "slice",
        "split", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view",
    )
)  # fmt: skip
# Launches of a step that is no single number.
GENERAL = 15
# Operands above this many bytes are made again in backward.
KEPT_BYTES = 32 << 20


class Step(NamedTuple):
    """What a step launches: kernels of Triton by name, then operations of torch with the shapes that they are given."""

    kernels: list[str]
    operations: list[tuple[str, list[Any]]]

    @property
    def count(self) -> int:
        return len(self.kernels) + len(self.operations)


def launched(event: Any) -> list[tuple[str, list[Any]]]:
    """The innermost operations of torch that are launches."""
    inner = [found for child in event.cpu_children for found in launched(child)]
    own = event.name.startswith("aten::") and event.name not in FREE and not inner
    return [(event.name, event.input_shapes)] if own else inner


Counted = Callable[[Callable[[], object]], Step]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The launches of a call, which is made once before: the first one fills caches."""
    kernels: list[str] = []

    monkeypatch.setattr(launches.Launch, "start", lambda one: kernels.append(one.kernel.__name__))

    def counted(call: Callable[[], object]) -> Step:
        call()
        kernels.clear()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            call()
        events = [event for event in seen.events() or [] if event.cpu_parent is None]
        return Step(kernels, [found for event in events for found in launched(event)])

    return counted


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


N = 512
LABELS = torch.arange(N) % 9
WEIGHT = torch.rand(N, generator=torch.Generator().manual_seed(0))
TRITON: dict[str, Any] = {"backend": "triton"}
# The third argument is the temperature, or the scale where a loss takes one. It is a leaf: no operation of a test stands before the loss.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda q, k, t, **how: fastnce.info_nce(q, k, temperature=t, **TRITON, **how),
    "info_nce, sum": lambda q, k, t, **how: fastnce.info_nce(q, k, temperature=t, reduction="sum", **TRITON, **how),
    "info_nce, weights": lambda q, k, t, **how: fastnce.info_nce(q, k, temperature=t, weight=WEIGHT, **TRITON, **how),
    "nt_xent": lambda q, k, t, **how: fastnce.nt_xent(q, k, temperature=t, **TRITON, **how),
    "clip_loss": lambda q, k, t, **how: fastnce.clip_loss(q, k, t, **TRITON, **how),
    "sup_con": lambda q, k, t, **how: fastnce.sup_con(q, LABELS[: len(q)], temperature=t, **TRITON, **how),
    "sup_con, views": lambda q, k, t, **how: fastnce.sup_con(q.view(-1, 2, q.shape[1]), temperature=t, **TRITON, **how),
    "sup_con, labelled views": lambda q, k, t, **how: fastnce.sup_con(
        q.view(N // 2, 2, -1), LABELS[: N // 2], temperature=t, **TRITON, **how
    ),
    "moco_loss": lambda q, k, t, **how: fastnce.moco_loss(q, k.detach()[: len(q)], k.detach(), t, **TRITON, **how),
    "dcl_loss": lambda q, k, t, **how: fastnce.dcl_loss(q, k, temperature=t, **TRITON, **how),
}


def step_of(name: str, given: float | Tensor, rows: int, columns: int, **how: Any) -> Callable[[], None]:
    """Forward and backward, with the gradients of all features, and of the temperature where it is a tensor."""
    q, k, one = leaf(rows, columns), leaf(rows, columns), torch.ones(())

    def call() -> None:
        asked = [x for x in (q, k, given) if isinstance(x, Tensor)]
        loss = LOSSES[name](q, k, given, **how)
        torch.autograd.grad(loss, asked, one.expand(loss.shape), allow_unused=True)

    return call


@pytest.mark.parametrize("of_tensor", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_a_loss_is_six_launches_at_most(name: str, of_tensor: bool, step: Counted) -> None:
    """Means, weighted and summed too, with a temperature that the host knows and one that it does not; none is an operation of torch."""
    found = step(step_of(name, torch.tensor(0.1, requires_grad=True) if of_tensor else 0.1, N, 128))
    assert 0 < found.count <= 6 and not found.operations, found


@pytest.mark.parametrize("of_tensor", [False, True])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "info_nce, sum"])
def test_values_of_rows_are_fifteen_launches_at_most(name: str, of_tensor: bool, step: Counted) -> None:
    """Beside the kernels: weights, two sides added, an upstream gradient of equal numbers, and one cast to float32."""
    given = torch.tensor(0.1, requires_grad=True) if of_tensor else 0.1
    found = step(step_of(name, given, N, 128, reduction="none"))
    assert 0 < found.count <= GENERAL, found
    assert {operation for operation, _ in found.operations} <= {"aten::mul", "aten::add", "aten::copy_"}, found


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "clip_loss", "sup_con", "moco_loss", "dcl_loss"])
@pytest.mark.parametrize(("rows", "columns"), [(N, 1024), (6000, 320)])
def test_long_rows_are_eight_launches_and_two_a_block(name: str, rows: int, columns: int, step: Counted, monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "LABELS", torch.arange(rows) % 9)
    found = step(step_of(name, torch.tensor(0.1, requires_grad=True), rows, columns))
    blocks = found.kernels.count("weights_block")
    assert blocks > 0 and found.count <= 8 + 2 * blocks, found
    assert not any(operation == "aten::cat" for operation, _ in found.operations)


STATISTICS: dict[str, dict[str, Any]] = {
    "rows": {"offset": 0},
    "both sides": {"offset": 0, "two_sided": True},
    "labels and ids": {
        "offset": 0, "q_labels": LABELS, "k_labels": LABELS, "q_exclude_ids": LABELS + 1, "k_exclude_ids": LABELS, "two_sided": True,
    },
    "the keys are the queries": {"k": None, "q_labels": LABELS},
    "dot products": {"offset": 0, "two_sided": True, "normalize": False},
    "metrics": {"offset": 0, "metrics": True},
    "metrics from a threshold": {"offset": 0, "metrics": True, "threshold": WEIGHT},
    "metrics of both sides": {"offset": 0, "metrics": True, "two_sided": True},
    "metrics with labels": {"offset": 0, "q_labels": LABELS, "k_labels": LABELS, "two_sided": True, "metrics": True},
}  # fmt: skip


def step_of_statistics(how: dict[str, Any], of_tensors: bool) -> Callable[[], None]:
    """Forward and backward, with gradients of two of the three vectors of each side. of_tensors: scale and bias are tensors."""
    q, given = leaf(N, 128), {"k": leaf(N, 128), "scale": 10.0, "bias": 1.0} | how
    if of_tensors:
        given |= {name: torch.tensor(given[name], requires_grad=True) for name in ("scale", "bias")}
    asked = [q, *(given[name] for name in ("k", "scale", "bias") if isinstance(given[name], Tensor))]
    upstream = [torch.ones(N) for _ in range(4)]

    def call() -> None:
        found = fastnce.contrastive_stats(q, **given, backend="triton")
        vectors = [v for side in (found, found.columns) if side is not None for v in (side.lse_neg, side.pos)]
        torch.autograd.grad(vectors, asked, upstream[: len(vectors)])

    return call


@pytest.mark.parametrize("of_tensors", [False, True])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_fifteen_launches_at_most(name: str, of_tensors: bool, step: Counted) -> None:
    """No zeros are made for vectors without a gradient, and no number is rounded by a launch of its own."""
    found = step(step_of_statistics(STATISTICS[name], of_tensors))
    assert 0 < found.count <= GENERAL, found
    assert {operation for operation, _ in found.operations} <= {"aten::fill_", "aten::zero_"}, found  # a scale and a bias that are floats


@pytest.mark.parametrize("rows", [N, 65536])
def test_operands_are_kept_for_backward_up_to_32_mib(rows: int, step: Counted) -> None:
    """Larger ones are prepared once more, which is one launch."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    def call() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            step_of("info_nce", 0.1, rows, 128)()

    found = step(call)
    bytes_kept = sum(x.numel() for x in kept if x.dtype == torch.uint8) // 2  # of two calls
    vectors, operands = 2 * rows * 4 * 12, 2 * rows * 128 * 2 * 2
    assert bytes_kept <= vectors + (operands if operands <= KEPT_BYTES else 0)
    assert (bytes_kept >= operands) == (rows == N) and found.kernels.count("prepare") == (1 if rows == N else 2)
