"""Promises of every backend by name: every loss, no rows, nan of any bits, ids of any size, infinite features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import entries
import gpu_promises
import pytest
import torch
import torch.nn.functional as F
from entries import ids, leaves_of, same, x
from every_loss import OF_VIEWS
from test_defined_values import EMPTY, assert_nothing_to_learn
from torch import Tensor

import fastnce
from fastnce import contrastive_stats
from fastnce.backends import BACKENDS
from train_ref.truth import LOSSES, Rows, contract

GPUS = ("triton", "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_loss(backend: str) -> None:
    gpu_promises.losses_are_within_the_budget(backend)


def test_a_column_of_tiny_elements(backend: str) -> None:
    """Its own gradient loses digits in GPU kernels, as docs/numerics.md says, and the gradient as a whole is inside the contract."""

    def errors(size: float) -> tuple[float, float]:
        """Of the gradient of the queries, and of its first column, whose elements are `size` of the others."""
        q, k = torch.randn(2, 32, 12, generator=torch.Generator().manual_seed(0))
        q[:, 0] *= size
        k[:, 0] *= size
        grads = []
        for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
            leaf = q.to(dtype).requires_grad_()
            loss = fastnce.info_nce(leaf, k.to(dtype), temperature=0.1, backend=name)
            grads += torch.autograd.grad(loss, leaf)
        found, exact = grads
        return contract.relative(found, exact), contract.relative(found[:, 0], exact[:, 0])

    of_all, of_column = zip(*(errors(size) for size in (1e-4, 1e-7, 1e-8, 1e-10)), strict=True)
    assert max(of_all) <= contract.gradient(torch.float32, 0.0)
    if backend not in GPUS:
        assert max(of_column) <= 1e-6
        return
    assert of_column[0] <= 1e-6
    assert 1e-4 < of_column[1] < 1e-3 < of_column[2] < 1e-2 < 0.1 < of_column[3] < 1


# No rows --------------------------------------------------------------------------------------------------------------------------------

NOTHING = torch.zeros(0, 5)
NONE = same(0)
# Arguments of contrastive_stats without queries. Where there are keys, each of them has met nothing.
EMPTY_STATISTICS: dict[str, Callable[[], dict[str, Any]]] = {
    "symmetric": lambda: {"offset": 1, "q_labels": NONE, "q_exclude_ids": NONE},
    "symmetric, mask": lambda: {"positive_mask": torch.zeros(0, 0, dtype=torch.bool)},
    "keys": lambda: {"k": x(3, 5), "offset": 0},
    "keys, ids": lambda: {"k": x(3, 5), "q_labels": NONE, "k_labels": ids(3), "q_exclude_ids": NONE, "k_exclude_ids": ids(3)},
    "keys, mask": lambda: {"k": x(3, 5), "positive_mask": torch.zeros(0, 3, dtype=torch.bool)},
    "two_sided": lambda: {"k": x(3, 5), "offset": 0, "two_sided": True},
    "two_sided, ids": lambda: {"k": x(3, 5), "q_labels": NONE, "k_labels": ids(3), "two_sided": True},
    "two_sided, exclude ids": lambda: {"k": x(3, 5), "offset": 0, "q_exclude_ids": NONE, "k_exclude_ids": ids(3), "two_sided": True},
    "two_sided, mask": lambda: {"k": x(3, 5), "positive_mask": torch.zeros(0, 3, dtype=torch.bool), "two_sided": True},
    "no keys either": lambda: {"k": NOTHING, "q_labels": NONE, "k_labels": NONE, "two_sided": True},
}
# Beside the empty batches of test_defined_values.py.
EMPTY_LOSSES: dict[str, tuple[str, dict[str, Callable[[], Any]]]] = {
    **EMPTY,
    "more keys, ids": ("ids", {"positive_key": lambda: x(3, 5), "key_ids": lambda: ids(3), "exclude_key_ids": lambda: ids(3)}),
    "unpaired, in-batch, ids": (
        "ids",
        {
            "negative_keys": lambda: x(7, 5),
            "in_batch": lambda: True,
            "key_ids": lambda: ids(7),
            "exclude_key_ids": lambda: ids(7),
        },
    ),
    "captions of one side": ("captions", {"text_ids": lambda: None}),
    "mask, views": ("views", {"features": lambda: x(0, 2, 5), "labels": lambda: None, "mask": lambda: torch.zeros(0, 0, dtype=torch.bool)}),
    "mask, one view": (
        "views",
        {
            "features": lambda: x(0, 2, 5),
            "labels": lambda: None,
            "mask": lambda: torch.zeros(0, 0, dtype=torch.bool),
            "views": lambda: "one",
        },
    ),
}


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("case", EMPTY_STATISTICS)
def test_statistics_without_rows(case: str, metrics: bool, backend: str) -> None:
    arguments = leaves_of({"q": NOTHING.clone(), "scale": torch.tensor(2.0), "bias": torch.tensor(1.0)} | EMPTY_STATISTICS[case]())
    counted = {"threshold": torch.zeros(0)} if metrics and case == "keys" else {}
    whole = contrastive_stats(**arguments, **counted, metrics=metrics, backend=backend)
    loss = torch.zeros(())
    for found, rows in ((whole, 0), (whole.columns, len(arguments.get("k", ())))):
        if found is None:
            assert "two_sided" not in arguments
            continue
        assert found.lse_neg.tolist() == found.lse_pos.tolist() == [-torch.inf] * rows
        assert found.pos.tolist() == found.n_pos.tolist() == [0] * rows
        if metrics:
            assert found.rank.tolist() == [0] * rows and found.hardest.tolist() == [-1] * rows
            assert found.hardest_logit.tolist() == found.pos_max.tolist() == [-torch.inf] * rows
        loss = loss + (found.lse_neg + found.lse_pos + found.pos).sum()
    for name, gradient in entries.gradients(loss, arguments).items():
        assert torch.equal(gradient, torch.zeros_like(arguments[name])), name


@pytest.mark.parametrize("case", EMPTY_LOSSES)
def test_losses_without_rows(case: str, backend: str) -> None:
    """none: an empty vector; sum: 0 with zero gradients; mean: an error."""
    name, changes = EMPTY_LOSSES[case]
    entry = entries.ENTRIES[name]
    arguments = {n: v[:0] if isinstance(v, Tensor) else v for n, v in entry.arguments().items()}
    arguments = leaves_of(arguments | {n: make() for n, make in changes.items()} | {entry.scale: torch.tensor(0.5)})
    with entries.raises(ValueError, f"{entry.name}: expected at least 1 row for reduction='mean', got 0"):
        entry.function(**arguments, backend=backend)
    for reduction, shape in (("none", (0,)), ("sum", ())):
        loss = entry.function(**arguments, reduction=reduction, backend=backend)
        assert loss.shape == shape and loss.dtype == torch.float32
        assert_nothing_to_learn(loss, arguments)


@pytest.mark.parametrize("name", entries.LOSSES)
def test_a_few_rows(name: str, backend: str) -> None:
    """Every way into every loss has the values and gradients of the reference."""
    entry = entries.ENTRIES[name]
    found = []
    for asked in (backend, "reference"):
        arguments = leaves_of(entry.arguments() | {entry.scale: torch.tensor(0.5)})
        loss = entry.function(**arguments, backend=asked)
        found.append([loss.detach(), *entries.gradients(loss, arguments).values()])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


# nan, infinite features, ids and upstream gradients at the ends of their ranges ----------------------------------------------------------

ROWS, KEYS = 20, 40


def statistics(q: Tensor, k: Tensor, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """lse_neg, lse_pos and pos of rows and columns, and the gradients of their sum, for one positive a row at the diagonal."""
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    found = contrastive_stats(*leaves, offset=0, two_sided=True, **options)
    values = [v for side in (found, found.columns) for v in side[:3]]
    return [v.detach() for v in values], list(torch.autograd.grad(sum(v.where(v > -torch.inf, 0.0).sum() for v in values), leaves))


NANS = (0x7FC00000, 0x7FFFFFFF, 0x7FC00001, 0x7F800001, 0x7FC00180, 0xFFC00000, 0xFFFFFFFF, 0xFF800001)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_nan_of_any_bits_is_nan_in_everything_it_meets(scale: float, backend: str) -> None:
    """In the log-sum and the gradient of every row, and of no other key. GPUs make 0x7fffffff, and so do norms of float16."""
    for n, bits in enumerate(NANS[:3] if backend in GPUS else NANS):
        # In the first lane of a register, where a sum has nothing before it, and in another.
        at = 32 + n % 2
        q, k = x(ROWS, 5), x(KEYS, 5, seed=1)
        k[at, 2] = torch.tensor([bits - (1 << 32) if bits >= 1 << 31 else bits], dtype=torch.int32).view(torch.float32)[0]
        (lse_neg, _, pos, of_keys, _, _), (dq, dk) = statistics(q, k, scale=scale, backend=backend)
        assert lse_neg.isnan().all() and not pos.isnan().any() and dq.isnan().all(), hex(bits)
        # The weights of all rows are nan, and with them the gradients of all keys.
        assert of_keys.isnan().nonzero().tolist() == [[at]] and dk.isnan().all(), hex(bits)
    half = x(6, 8).half()
    half[3] = torch.nan
    assert contrastive_stats(x(ROWS, 8).half(), half, scale=scale, backend=backend).lse_neg.isnan().all()


def dense(q: Tensor, k: Tensor, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """The statistics by torch's own operations."""
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    s = scale * leaves[0] @ leaves[1].T
    diagonal = torch.eye(*s.shape, dtype=torch.bool)
    values = []
    for t, d in ((s, diagonal), (s.T, diagonal.T)):
        pos = t.masked_fill(~d, 0.0).sum(1)
        values += [t.masked_fill(d, -torch.inf).logsumexp(1), pos.masked_fill(~d.any(1), -torch.inf), pos]
    return [v.detach() for v in values], list(torch.autograd.grad(sum(v.where(v > -torch.inf, 0.0).sum() for v in values), leaves))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "key of an aligned pair", "both", "several"])
def test_an_infinite_feature_is_what_it_is_in_dense_torch(where: str, bad: float, backend: str) -> None:
    """Without normalisation: a log-sum is inf where torch.logsumexp gives inf, nan where that gives nan; -inf adds nothing. Gradients are
    not finite where those of dense torch are not. On a GPU the row is nan in all that it meets."""
    q, k = x(ROWS, 3), x(KEYS, 3, seed=1)
    if where in ("query", "both"):
        q[7, 1] = bad
    if where in ("key", "both", "several"):
        k[33, 1] = bad
    if where == "key of an aligned pair":
        k[4, 0] = bad
    if where == "several":
        k[34, 1], k[35, 0] = -bad, bad
    expected, gradients = dense(q, k, 3.0)
    assert any(v.isposinf().any() for v in expected) and any((~g.isfinite()).any() for g in gradients)
    found, mine = statistics(q, k, scale=3.0, normalize=False, backend=backend)
    if backend in GPUS:
        for got, want in zip(found, expected, strict=True):
            assert got[~want.isfinite() & (want > -torch.inf) | want.isnan()].isnan().all()
        return
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)
    for got, want in zip(mine, gradients, strict=True):
        assert torch.equal(got.isfinite().all(1), want.isfinite().all(1))
        finite = want.isfinite().all(1)
        torch.testing.assert_close(got[finite], want[finite], rtol=1e-4, atol=1e-5)


ENDS = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 2, 2**63 - 1, -1, -2, -(2**31), -(2**63) + 1, -(2**63)])


@pytest.mark.parametrize("kind", ["labels", "exclude_ids"])
def test_ids_at_the_ends_of_int64(kind: str, backend: str) -> None:
    """Ids are compared for equality alone: large ones give the results of small ones in the same order."""
    i = torch.arange(ROWS) * 5 % len(ENDS), torch.arange(KEYS) * 3 % len(ENDS)
    small = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1, -1])
    given = [{f"q_{kind}": values[i[0]], f"k_{kind}": values[i[1]]} for values in (ENDS, small)]
    found, expected = (statistics(x(ROWS, 5), x(KEYS, 5, seed=1), scale=5.0, backend=backend, **ids) for ids in given)
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    same = small[i[0]][:, None].eq(small[i[1]]) & (small[i[0]] >= 0)[:, None]
    same[torch.arange(ROWS), torch.arange(ROWS)] = kind == "labels"
    if kind == "labels":
        n_pos = contrastive_stats(x(ROWS, 5), x(KEYS, 5, seed=1), scale=5.0, offset=0, backend=backend, **given[0]).n_pos
        assert torch.equal(n_pos, same.sum(1))


@pytest.mark.parametrize("two_sided", [False, True])
def test_any_offset_between_rows_that_there_may_be(two_sided: bool, backend: str) -> None:
    """Where it pairs nothing, every pair is a negative; beyond, an error that says so."""
    q, k = x(ROWS, 5), x(KEYS, 5, seed=1)
    options: dict[str, Any] = {"scale": 2.0, "two_sided": two_sided, "backend": backend}
    expected = contrastive_stats(q, k, **options)
    some = {"q_exclude_ids": torch.arange(ROWS), "k_exclude_ids": torch.arange(KEYS) + ROWS}
    for offset in (2**30, 2**31 - 1, -(2**31) + 1) if backend in GPUS else (KEYS, -ROWS, 2**30, -(2**30), 2**31 - 1, -(2**31) + 1):
        for content in ({}, some) if backend not in GPUS or offset == 2**31 - 1 else ({},):
            found = contrastive_stats(q, k, offset=offset, **options, **content)
            torch.testing.assert_close(found.lse_neg, expected.lse_neg)
            assert not found.n_pos.any() and (found.lse_pos == -torch.inf).all()
    alone = contrastive_stats(q, offset=2**31 - 1, scale=2.0, backend=backend)
    torch.testing.assert_close(alone.lse_neg, contrastive_stats(q, scale=2.0, backend=backend).lse_neg)
    for offset in (2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 10**30):
        with entries.raises(ValueError, f"contrastive_stats: offset is {offset}; as there are at most 2^31 - 1 rows"):
            contrastive_stats(q, k, offset=offset, **options)


@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("what", ["key", "upstream"])
def test_a_nan_stays_away_from_excluded_keys(what: str, temperature: float, backend: str) -> None:
    """A row that is nan, by one of its keys or by what comes down for it, makes nan of the gradients of the keys that it is compared with.
    Keys that are excluded from every query have none, as in dense torch."""
    rows, keys = x(4, 5), x(8, 5)
    if what == "key":
        keys[2] = torch.nan
    upstream = torch.tensor([1.0, torch.nan if what == "upstream" else 1.0, 1.0, 1.0])
    excluded = torch.arange(8) >= 4

    def gradient(of: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = keys.clone().requires_grad_()
        return torch.autograd.grad(of(leaf), leaf, upstream)[0]

    def dense(leaf: Tensor) -> Tensor:
        s = F.normalize(rows, dim=1) @ F.normalize(leaf, dim=1).T / temperature
        return F.cross_entropy(s.masked_fill(excluded, -torch.inf), torch.arange(4), reduction="none")

    ids = {"exclude_query_ids": torch.ones(4, dtype=torch.int64), "exclude_key_ids": excluded.long() * 2 - 1}
    found = gradient(lambda leaf: fastnce.info_nce(rows, leaf, temperature=temperature, reduction="none", backend=backend, **ids))
    assert torch.equal(found.isnan(), gradient(dense).isnan())
    assert not found[4:].any()


@pytest.mark.parametrize("temperature", [0.5, 0.026, 0.01])
@pytest.mark.parametrize("upstream", [1e-25, 1e-34, 1e30])
def test_upstream_gradients_of_any_size(upstream: float, temperature: float, backend: str) -> None:
    """The gradient of a multiple is the multiple of the gradient: a loss in float32 that is multiplied by 1e-34, at the limit of the range
    without a running maximum too."""
    if backend in GPUS and (upstream, temperature) != (1e-25, 0.026):
        pytest.skip("GPUs: down to 2^-85, as docs/numerics.md says; one of these, which take time without a GPU")
    z = x(66, 24)
    names = ("nt_xent",) if backend in GPUS else tuple(OF_VIEWS)

    def gradients(leaf: Tensor, scale: Tensor, by: float, on: str) -> list[Tensor]:
        losses = (OF_VIEWS[name](leaf[:33], leaf[33:], scale, backend=on) for name in names)
        return [g.double() / by for loss in losses for g in torch.autograd.grad(loss * by, (leaf, scale))]

    exact = gradients(z.double().requires_grad_(), torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True), 1.0, "reference")
    scale = torch.tensor(1 / temperature, requires_grad=True)
    found = gradients(z.clone().requires_grad_(), scale, upstream, backend)
    usual = gradients(z.clone().requires_grad_(), scale, 1.0, backend)
    least = 2.0**-126 / upstream  # a smaller one is no normal number when it is stored
    for mine, plain, e in zip(found, usual, exact, strict=True):
        # The derivative by scale is a small sum of large terms, cosines by weights that add up to about 2; float32 keeps 2^-24 of these.
        more = 2e-6 * e.norm() if e.dim() else 5e-5 * e.norm() + 4 * 2.0**-24
        assert (mine - e).norm() <= (plain - e).norm() + more + least * e.numel() ** 0.5


@pytest.mark.parametrize("lengths", ["equal", "different"])
def test_the_scale_has_no_gradient_where_all_rows_point_the_same_way(lengths: str, backend: str) -> None:
    """Every logit of a collapsed batch is scale: no loss depends on it. The contract, of terms that are cosines of 1 by weights that add up
    to 1, allows 1e-5. Rows that are equal bit by bit give exactly 0 in the compiled kernels, as their logits are rounded alike; MoCo's two
    parts are not."""
    g = torch.Generator().manual_seed(0)
    gpu, exactly = backend in GPUS, lengths == "equal" and backend == "cpu"
    for d, temperature in [(17, 0.07)] if gpu else [(d, t) for d in (3, 17, 130) for t in (0.5, 0.07, 0.01)]:
        row, n = torch.randn(d, generator=g), 24 if gpu else 96
        a, b, queue = (row.repeat(rows, 1) for rows in (n, n, 70))
        if lengths == "different":
            a, b, queue = (rows * (0.1 + torch.rand(len(rows), 1, generator=g)) for rows in (a, b, queue))
        scale = torch.tensor(1 / temperature, requires_grad=True)
        rows = Rows(a, b, queue, torch.arange(n) % 3)
        for name, loss in LOSSES.items():
            value = getattr(fastnce, name)(**loss.example(rows), **{loss.number: scale}, backend=backend)
            (found,) = torch.autograd.grad(value, scale)
            of_two_parts = "queue" in loss.leaves  # two derivatives, each rounded: rule 8 of docs/numerics.md
            assert abs(found) <= (0.0 if exactly and not of_two_parts else 1e-5), (name, d, temperature)
