"""Tapes of launches: played with other tensors they do what was recorded, and whatever a recording depends on has a tape of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fused import CASES, random, run
from test_triton import family  # noqa: F401  a fixture
from torch import Tensor

import fastnce
from fastnce.backends import triton
from fastnce.backends.triton import losses, tape
from fastnce.backends.triton import statistics as triton_statistics
from fastnce.problem import LossProblem, LossWanted

pytestmark = pytest.mark.usefixtures("poisoned", "interpreted_triton")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LossProblem]:
    """What the backend is asked."""
    seen: list[LossProblem] = []

    def loss(ask: LossProblem) -> tuple[Tensor, Tensor]:
        seen.append(ask)
        return losses.loss(ask)

    monkeypatch.setattr(triton, "loss", loss)
    return seen


QUICK = ("nt_xent", "info_nce, weights", "clip_loss, captions", "moco_loss")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_other_tensors_of_the_form(name: str, asked: list[LossProblem], monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording serves them, bit for bit as if nothing had been recorded."""
    loss, tensors = CASES[name]
    others = {key: x.flip(0) * 1.1 if x.dim() else x * 1.1 for key, x in tensors.items()}
    run((loss, tensors), torch.float32, "triton")
    recorded = [(step.loss, dict(step.gradients)) for step in losses._STEPS.held.values()]
    run((loss, others), torch.float32, "triton")
    assert len(recorded) == 1 and [(step.loss, step.gradients) for step in losses._STEPS.held.values()] == recorded

    upstream = torch.tensor(0.37)
    ask = losses._contiguous(asked[-1])
    wanted = LossWanted(*(x is not None and x.requires_grad for x in ask.tensors[: len(LossWanted._fields)]))
    assert any(wanted)
    results = []
    for apart in (False, True):
        monkeypatch.setattr(tape, "APART", apart)
        value, memory = losses.loss(ask)
        results.append([value, *(g for g in losses.gradients(ask, memory, upstream, wanted) if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


MASK = random(37, 45) > 0
# Arguments of contrastive_stats beside query, key, scale and bias.
ASKED: dict[str, dict[str, Any]] = {
    "queue": {},
    "aligned": {"offset": 0},
    "both sides": {"offset": 3, "two_sided": True, "metrics": True},
    "thresholds": {"offset": 0, "metrics": True, "threshold": random(37).float()},
    "labels": {"q_labels": torch.arange(37) % 5, "k_labels": torch.arange(45) % 7, "metrics": True},
    "mask": {"positive_mask": MASK, "normalize": False},
}


@pytest.mark.parametrize("name", ASKED)
def test_statistics_of_other_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording of each direction serves them, bit for bit as if nothing had been recorded."""

    def statistics(seed: int) -> list[Tensor]:
        q, k = (random(rows, 20, seed=seed + n).float().requires_grad_() for n, rows in enumerate((37, 45)))
        scale, bias = (torch.tensor(x + seed, requires_grad=True) for x in (3.0, 0.5))
        found = fastnce.contrastive_stats(q, k, scale=scale, bias=bias, backend="triton", **ASKED[name])
        sides = [found, *([found.columns] if found.columns is not None else [])]
        vectors = [x for side in sides for x in side if isinstance(x, Tensor)]
        learned = [x for x in vectors if x.requires_grad]
        upstream = [random(len(x), seed=7 + n).to(x.dtype) for n, x in enumerate(learned)]
        return [x.detach() for x in vectors] + list(torch.autograd.grad(learned, (q, k, scale, bias), upstream))

    statistics(0)
    recorded = list(triton_statistics._TAPES.held.values())
    found = statistics(10)
    assert len(recorded) == 2 and list(triton_statistics._TAPES.held.values()) == recorded
    monkeypatch.setattr(tape, "APART", True)
    assert all(torch.equal(a, b) for a, b in zip(found, statistics(10), strict=True))


def close(found: Tensor, *asked: Tensor, true: Tensor) -> None:
    assert torch.allclose(found, true, rtol=1e-5)
    mine, other = (torch.autograd.grad(value, asked) for value in (found, true))
    for a, b in zip(mine, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, seed=n).float().requires_grad_() for n, shape in enumerate(shapes)]


def test_a_number_is_no_form() -> None:
    """A temperature that changes from step to step, up to where other kernels are right."""
    q, k = leaves((37, 20), (37, 20))
    for temperature in (0.1, 0.2, 0.05):
        close(fastnce.nt_xent(q, k, temperature, backend="triton"), q, k, true=fastnce.nt_xent(q, k, temperature, backend="reference"))
    assert len(losses._STEPS.held) == 1
    close(fastnce.nt_xent(q, k, 0.01, backend="triton"), q, k, true=fastnce.nt_xent(q, k, 0.01, backend="reference"))
    assert len(losses._STEPS.held) == 2


def views(base: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Queries and keys of one shape, in memory of several forms."""
    a, b = base[:37, :20], base[37:74, :20]
    return {
        "apart": (a.contiguous(), b.contiguous()),
        "parts of one tensor": (a, b),
        "the same": (a, a),
        "the same memory": (a, base[:37, :20]),
        "overlapping": (a, base[1:38, :20]),
        "not aligned": (base[:37, 1:21], base[37:74, 3:23]),
        "columns": (base.t()[:20, :37].t(), base.t()[:20, 37:74].t()),
        "lines": (base[:37, 4:24], base[37:74, 4:24]),
        "expanded": (a, base[:1, :20].expand(37, 20)),
    }


FORMS = tuple(views(torch.zeros(80, 40)))


def test_every_form_is_told_apart() -> None:
    """One after the other, forwards and backwards: a tape of another form would read other memory."""
    base = random(80, 40).float().requires_grad_()
    losses_of: list[Callable[..., Tensor]] = [
        lambda q, k, backend: fastnce.info_nce(q, k, scale=9.0, backend=backend),
        lambda q, k, backend: fastnce.clip_loss(q, k, 9.0, backend=backend),
    ]
    for form in (*FORMS, *FORMS[::-1]):
        for loss in losses_of:
            q, k = views(base)[form]
            close(loss(q, k, "triton"), base, true=loss(q, k, "reference"))


def calls_in_turn() -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Calls of the same tensors, each of which differs from another one in a flag."""
    weight, ids = random(12, seed=5).abs().float(), torch.arange(12) % 4
    kept = random(12, 6, seed=7).float()
    how = {"backend": "triton"}
    found: list[Callable[[Tensor, Tensor], Tensor]] = []
    for normalize in (True, False):
        for reduction in ("mean", "sum", "none") if normalize else ("mean",):
            given: dict[str, Any] = {"normalize": normalize, "reduction": reduction, **how}
            found += [
                lambda q, k, o=given: fastnce.info_nce(q, k, temperature=torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.info_nce(q, k, scale=torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.info_nce(q, k, temperature=torch.tensor(0.2), weight=weight, **o),
                lambda q, k, o=given: fastnce.clip_loss(q, k, torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.nt_xent(q, k, torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.dcl_loss(q, k, torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.sup_con(torch.stack([q, k], 1), ids, temperature=torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.sup_con(torch.stack([q, k], 1), ids, temperature=torch.tensor(0.2), variant="in", **o),
                lambda q, k, o=given: fastnce.sup_con(torch.stack([q, k], 1), temperature=torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.moco_loss(q, k.detach(), kept, torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.moco_loss(q, k, kept, torch.tensor(0.2), **o),
                lambda q, k, o=given: fastnce.info_nce(q, k.detach(), temperature=torch.tensor(0.2), **o),
            ]
        for offset, two_sided, metrics in itertools.product((None, 0, 3), (False, True), (False, True) if normalize else (True,)):
            asked: dict[str, Any] = {"offset": offset, "two_sided": two_sided, "metrics": metrics, "normalize": normalize, **how}
            found.append(lambda q, k, o=asked: of_statistics(fastnce.contrastive_stats(q, k, scale=torch.tensor(2.0), **o)))
        for exclude_self in (True, False):
            own: dict[str, Any] = {"exclude_self": exclude_self, "offset": 6, "normalize": normalize, **how}
            found.append(lambda q, k, o=own: of_statistics(fastnce.contrastive_stats(q, scale=torch.tensor(2.0), **o)))
    return found


def of_statistics(found: fastnce.ContrastiveStats) -> Tensor:
    sides = [found, *([found.columns] if found.columns is not None else [])]
    ranks = [side.rank.double() for side in sides if side.rank is not None]
    return sum((x.nan_to_num(0.0, 0.0, 0.0).sum() for side in sides for x in (side.lse_neg, side.pos, *ranks)), torch.zeros(()))


@pytest.mark.slow
def test_calls_that_differ_in_a_flag_take_turns() -> None:
    """Each gives the bits that it gives alone: no fact is missing in the key of a tape."""
    leaf = random(2, 12, 6).float().requires_grad_()

    def step(call: Callable[[Tensor, Tensor], Tensor], deterministic: bool) -> list[Tensor]:
        torch.use_deterministic_algorithms(deterministic)
        loss = call(*leaf.unbind())
        found = [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]
        torch.use_deterministic_algorithms(False)
        return found

    every = [(call, deterministic) for call in calls_in_turn() for deterministic in (False, True)]
    alone = []
    for one in every:
        tape.forget()
        alone.append(step(*one))
    tape.forget()
    turns = [step(*one) for one in every]
    wrong = [n for n, pair in enumerate(zip(alone, turns, strict=True)) if not all(map(torch.equal, *pair))]
    assert not wrong


def test_what_no_launch_needs_any_more_gives_its_place() -> None:
    """Of three tensors of 1,000 bytes the first and the last are never needed together."""
    from fastnce.backends.triton.launches import Launch

    given = torch.zeros(4)
    first, second, third = (torch.zeros(1000, dtype=torch.uint8) for _ in range(3))
    uses = [(first, given), (first, second), (second, third), (third, given)]
    of = {tape._storage(x): x for x in (first, second, third)}
    found, size = tape._reused(of, [Launch(None, 1, arguments, {}) for arguments in uses])
    assert size == 2 * 1024 and found[tape._storage(first)] == found[tape._storage(third)] != found[tape._storage(second)]


@pytest.fixture
def matmul() -> Iterator[Any]:
    """torch's settings of products, which are put back. (monkeypatch would delete them: they are no attributes of their own.)"""
    found = torch.backends.cuda.matmul
    before = found.fp32_precision
    yield found
    found.fp32_precision = before


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("before", ["ieee", "tf32"])
@pytest.mark.parametrize("columns", [20, 50])
def test_precision_that_changes_before_backward(
    before: str, kept: bool, columns: int, matmul: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward reads what forward has left in the precision of forward: rows that are short, and rows that are long in one of the two."""
    monkeypatch.setattr(losses, "KEPT_BYTES", (32 << 20) if kept else 0)
    after, found = {"ieee": "tf32", "tf32": "ieee"}[before], []
    for then in (before, after):
        matmul.fp32_precision = before
        q, k = leaves((37, columns), (37, columns))
        loss = fastnce.info_nce(q, k, temperature=0.1, backend="triton")
        matmul.fp32_precision = then
        found.append(torch.autograd.grad(loss, (q, k)))
        tape.forget()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_where_nothing_can_be_recorded(reduction: Any) -> None:
    """Without torch's dispatch to Python no operation is seen; nothing is recorded then, and the results are the same."""
    q, k = leaves((37, 20), (37, 20))

    def step() -> list[Tensor]:
        loss = fastnce.nt_xent(q, k, 0.1, reduction=reduction, backend="triton")
        return [loss.detach(), *torch.autograd.grad(loss.sum(), (q, k))]

    with torch._C._DisableTorchDispatch():
        found = step()
        of_statistics(fastnce.contrastive_stats(q, k, scale=2.0, offset=0, backend="triton"))
    assert not losses._STEPS.held and not triton_statistics._TAPES.held
    assert all(map(torch.equal, found, step()))


def test_memory_that_has_been_elsewhere() -> None:
    """What is kept for backward may come back at another address (offloading, checkpoints), and may be read twice."""
    q, k = leaves((37, 20), (37, 20))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        loss = fastnce.nt_xent(q, k, 0.1, backend="triton")
    true = torch.autograd.grad(fastnce.nt_xent(q, k, 0.1, backend="reference"), (q, k))
    for _ in range(2):
        for mine, other in zip(torch.autograd.grad(loss, (q, k), retain_graph=True), true, strict=True):
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_lengths_that_never_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape.Recent, "most", 2)
    for rows in (3, 4, 5, 4):
        z = random(rows, 20).float()
        fastnce.nt_xent(z, z.flip(1), 0.1, backend="triton")
    assert len(losses._STEPS.held) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ([x + 1], []),
        lambda x: ([x.contiguous()], []),
        lambda x: ([torch.ones(3)], []),
    ],
    ids=["arithmetic", "a copy", "numbers"],
)
def test_operations_cannot_be_recorded(function: Callable[[Tensor], Any]) -> None:
    x = torch.zeros(4, 6)[:, ::2]
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        tape.record(lambda: function(x), [x])


def test_results_have_memory_of_their_own() -> None:
    x = torch.zeros(4)
    for function in (lambda: ([x[:2]], []), lambda: ([x.new_empty(4)[:2]], []), lambda: ([], [x.new_empty(4)] * 2)):
        with pytest.raises(RuntimeError, match="share memory, or are not new"):
            tape.record(function, [x])


def test_memory_of_nobody_cannot_be_recorded() -> None:
    from fastnce.backends.triton import kernels_rows, launches

    x, hidden = torch.zeros(4), torch.zeros(4)

    def function() -> tuple[list[Tensor], list[Tensor]]:
        launches.launch(kernels_rows.finish, 1, x, hidden)
        return [], []

    with pytest.raises(RuntimeError, match="neither new nor an argument's"):
        tape.record(function, [x])


def test_compiled_kernels_are_called_directly(tmp_path: Path) -> None:
    """In a process where kernels are compiled: see direct_calls.py."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "tests/direct_calls.py"], cwd=root, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
