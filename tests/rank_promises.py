"""Promises of every backend about ranks, ties and hardest negatives. test_metrics.py runs them on the CPU, test_triton.py and test_cuda.py
on GPU kernels.

The right values are counted in a float64 matrix of similarities, as docs/numerics.md says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import RetrievalStats, contrastive_stats, retrieval, tiles

U = 2.0**-24
# Two random similarities differ by more, two equal ones after rounding by less.
NEAR = 1e-6
# A difference that float32 must rank as float64 does, at 24 columns: the band is 3 u, and the rounding of two logits less than as much
# again.
DECIDED = 8 * U


class Asked(NamedTuple):
    """One call, and the float64 similarities of its negatives and positives; -inf where there is no such pair."""

    name: str
    run: Callable[..., RetrievalStats]  # run(backend, number of hardest negatives)
    negatives: Tensor
    positives: Tensor


def similarities(q: Tensor, k: Tensor) -> Tensor:
    return F.normalize(q.double(), dim=-1) @ F.normalize(k.double(), dim=-1).mT


def without(s: Tensor, mask: Tensor) -> Tensor:
    return s.masked_fill(mask, -torch.inf)


SLOW = ("triton", "cuda")  # interpreted, or emulated: a hundred times as long
# The calls whose tiles differ: both sides, more keys than queries, keys that are the queries, positives by content, a queue.
ON_KERNELS = ("columns", "more keys", "views", "ids", "queue")


def asked_of(backend: str, q: Tensor, k: Tensor, more: Tensor) -> list[Asked]:
    """All calls; where kernels are slow, only those whose tiles differ."""
    return [asked for asked in all_calls(q, k, more) if backend not in SLOW or asked.name in ON_KERNELS]


def all_calls(q: Tensor, k: Tensor, more: Tensor) -> list[Asked]:
    """Every way to say which pairs are positive, over q, k (M, D) and negatives of one's own, more (M, D)."""
    m = len(q)
    eye, s, own = torch.eye(m, dtype=torch.bool), similarities(q, k), similarities(q, more)
    batch, pos = without(s, eye), s.diagonal()[:, None]
    z, labels = torch.cat([q, k]), torch.arange(m) // 3
    zz, itself = similarities(z, z), torch.eye(2 * m, dtype=torch.bool)
    partner, same = eye.repeat(2, 2) & ~itself, (labels[:, None] == labels).repeat(2, 2)
    chosen = labels[:, None] == labels
    both, last = torch.cat([k, more]), torch.arange(m) + m
    # Every query and every key of the batch has one id, so that a query meets its own key and the queue.
    queue = {
        "exclude_query_ids": torch.zeros_like(labels),
        "exclude_key_ids": torch.zeros(2 * m, dtype=torch.int64).index_fill(0, last, -1),
    }
    none = torch.full_like(s, -torch.inf)

    def by(*args: Tensor, columns: bool = False, **options: Any) -> Callable[..., RetrievalStats]:
        def run(backend: str, count: int = 1) -> RetrievalStats:
            found = retrieval(*args, backend=backend, hardest=count, **options)
            return found.columns if columns and found.columns is not None else found

        return run

    def statistics(columns: bool) -> Callable[..., RetrievalStats]:
        """The metrics of contrastive_stats, at a scale and with a bias of its own."""

        def run(backend: str, count: int = 1) -> RetrievalStats:
            found = contrastive_stats(q, k, scale=10.0, bias=-3.0, offset=0, two_sided=True, metrics=True, backend=backend)
            side: Any = found.columns if columns else found
            hits = {n: (side.rank + side.ties < n) & (side.pos_max > -torch.inf) for n in (1, 5)}
            mrr = (1 / (1 + side.rank + side.ties / 2)).masked_fill(~(side.pos_max > -torch.inf), 0.0).mean()
            return RetrievalStats(side.rank, side.ties, hits, mrr, side.hardest[:, None], (side.hardest_logit[:, None] + 3.0) / 10.0)

        return run

    return [
        Asked("rows", by(q, k), batch, pos),
        Asked("both sides", by(q, k, two_sided=True), batch, pos),
        Asked("columns", by(q, k, two_sided=True, columns=True), batch.T, pos),
        Asked("ids", by(q, k, query_ids=labels), without(s, chosen), without(s, ~chosen)),
        Asked("ids of columns", by(q, k, key_ids=labels, two_sided=True, columns=True), without(s, chosen).T, without(s, ~chosen).T),
        Asked("ids and place", by(q, k, query_ids=labels, key_ids=labels.flip(0), offset=0), *split(s, (chosen.flip(1)) | eye)),
        Asked("mask", by(q, k, positive_mask=chosen.roll(1, 0)), *split(s, chosen.roll(1, 0))),
        Asked("queue", by(q, both, **queue), torch.cat([none, own], 1), pos),
        Asked("more keys", by(q, both), torch.cat([batch, own], 1), pos),
        Asked("views", by(z, offset=m), without(zz, itself | partner), without(zz, ~partner)),
        Asked("labels", by(z, query_ids=torch.cat([labels] * 2)), without(zz, same), without(zz, ~same | itself)),
        Asked("statistics", statistics(False), batch, pos),
        Asked("statistics of columns", statistics(True), batch.T, pos),
    ]


def split(s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    return without(s, positive), without(s, ~positive)


def check(found: RetrievalStats, negatives: Tensor, positives: Tensor, name: str) -> None:
    """Compare with the definition on these similarities. A nan is above everything and below nothing, and never the hardest."""
    best = positives.amax(1, keepdim=True)
    counted = negatives != -torch.inf
    rank = (counted & ~(negatives <= best + NEAR)).sum(1)
    ties = (counted & ((negatives - best).abs() <= NEAR)).sum(1)
    there = (best > -torch.inf)[:, 0]
    assert torch.equal(found.rank, rank), name
    assert torch.equal(found.ties, ties), name
    for k, hits in found.hits.items():
        assert torch.equal(hits, (rank + ties < k) & there), name
    mrr = (1 / (1 + rank + ties.double() / 2)).masked_fill(~there, 0.0).mean()
    torch.testing.assert_close(found.mrr.double(), mrr, rtol=1e-6, atol=0, msg=name)
    wanted = sorted_negatives(negatives)[:, : found.hardest.shape[1]]
    similarity, hardest = found.hardest_similarity.double(), found.hardest
    assert torch.equal(hardest == -1, wanted == -torch.inf), name
    torch.testing.assert_close(similarity, wanted, rtol=0, atol=NEAR, msg=name)
    there_is = negatives.gather(1, hardest.clamp(min=0)).masked_fill(hardest == -1, -torch.inf)
    torch.testing.assert_close(there_is, similarity, rtol=0, atol=NEAR, msg=name)
    distinct = hardest.sort(1).values.diff(dim=1)
    assert ((distinct > 0) | (hardest.sort(1).values[:, 1:] == -1)).all(), name


def sorted_negatives(negatives: Tensor) -> Tensor:
    """From the hardest on, without those that are nan; -inf behind the last."""
    real = negatives.masked_fill(negatives.isnan(), -torch.inf)
    return F.pad(real.sort(1, descending=True).values, (0, 50), value=-torch.inf)


def features(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def every_call_counts_as_a_sort_does(backend: str) -> None:
    q, k, more = (features(22, 24, seed) for seed in range(3))
    for asked in asked_of(backend, q, q + k, more + q.roll(1, 0)):
        check(asked.run(backend), asked.negatives, asked.positives, asked.name)


def nan_ranks_last(backend: str) -> None:
    """All nan: behind every negative. One query, key or negative that is nan: behind, or above, whatever it meets."""
    q, k, more = (features(22, 24, seed) for seed in range(3))
    for where in ("everywhere", "a key") if backend in SLOW else ("everywhere", "a query", "a key", "a negative"):
        rows = [t.clone() for t in (q, q + k, more)]
        if where == "everywhere":
            rows = [torch.full_like(t, torch.nan) for t in rows]
        else:
            rows[("a query", "a key", "a negative").index(where)][5, 3] = torch.nan
        for asked in asked_of(backend, *rows):
            found = asked.run(backend)
            check(found, asked.negatives, asked.positives, f"{asked.name}: {where}")
            if where == "everywhere":
                assert torch.equal(found.rank, (asked.negatives != -torch.inf).sum(1)) and not any(h.any() for h in found.hits.values())


def equal_rows_tie(backend: str) -> None:
    """A collapsed model, and rows that are there twice: rank 0, and the copies are ties. Lengths that are powers of two round nothing."""
    one, some = features(1, 24, 3), features(11, 24, 4)
    lengths = torch.exp2(torch.arange(22.0) % 5 - 2)[:, None]
    collapsed = one.expand(22, 24)
    for rows in (collapsed, torch.cat([some, some]) * lengths):
        for asked in asked_of(backend, rows, rows, rows):
            found = asked.run(backend)
            check(found, asked.negatives, asked.positives, asked.name)
            assert rows is not collapsed or not (found.rank.any() or found.hits[1].any()), asked.name
    found = retrieval(collapsed, collapsed, ks=(21, 22), backend=backend)
    assert not found.hits[21].any() and found.hits[22].all()
    torch.testing.assert_close(found.mrr, torch.tensor(1 / 11.5))


def rows_of_any_length_tie(backend: str) -> None:
    """Rows that differ in length alone, but for the few that rounding drives further apart than the band."""
    rows = features(1, 24, 5) * (torch.rand(22, 1, generator=torch.Generator().manual_seed(0)) * 3 + 0.2)
    for asked in asked_of(backend, rows, rows, rows):
        counted = (asked.negatives != -torch.inf).sum()
        # In kernels norms are rounded more often.
        share = 0.9 if backend in SLOW else 0.99
        assert asked.run(backend).ties.sum() >= share * counted, asked.name


def nearly_equal_rows_keep_their_order(backend: str) -> None:
    """Similarities of 0.99998: a negative further from the positive than the rounding is above or below it, and no tie."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 24, generator=g) + 0.0036 * torch.randn(22, 24, generator=g)
    k = q + 0.0036 * torch.randn(22, 24, generator=g)
    for asked in asked_of(backend, q, k, k.roll(1, 0)):
        found, gap = asked.run(backend), asked.negatives - asked.positives.amax(1, keepdim=True)
        assert (found.rank >= (gap > DECIDED).sum(1)).all(), asked.name
        assert (found.rank + found.ties <= (gap > -DECIDED).sum(1)).all(), asked.name


def lengths_do_not_widen_the_band(backend: str) -> None:
    """normalize=False: equal rows tie, at any size of the logits, and one long key makes no ties of others."""
    q = F.normalize(features(22, 24, 6), dim=1)
    for size in (1e-3, 1.0, 30.0):
        found = retrieval(q * size, (q * size)[:1].expand(22, 24), normalize=False, backend=backend)
        assert found.rank.eq(0).all() and found.ties.eq(21).all()
    k = q + 0.3 * features(22, 24, 7)
    near = k[:1] * (1 + torch.tensor([1e-4, -1e-4]))[:, None]
    k = torch.cat([k, near, 1e4 * q[3:4]])
    s = q.double() @ k.double().T
    found = contrastive_stats(q, k, scale=2.0, offset=0, normalize=False, metrics=True, backend=backend)
    pos = s.diagonal()[:, None]
    negatives = without(s, torch.eye(22, 25, dtype=torch.bool))
    assert torch.equal(found.rank, (negatives > pos).sum(1)) and not found.ties.any()


def rows_without_a_positive_rank_last(backend: str) -> None:
    z = features(9, 24, 8)
    labels = torch.tensor([0, 0, 1, 1, 2, -1, 3, 3, 4])
    found = retrieval(z, query_ids=labels, ks=(1, 9), backend=backend)
    alone = torch.tensor([4, 5, 8])
    assert found.rank[alone].tolist() == [8] * 3 and not found.ties[alone].any() and not found.hits[9][alone].any()
    others = 1 / (1 + found.rank + found.ties / 2).masked_fill(labels[:, None].eq(labels).sum(1) == 1, torch.inf)
    torch.testing.assert_close(found.mrr, others.mean())
    # Nothing is above, nothing ties, and still there was nothing to find.
    found = retrieval(z[:1], query_ids=labels[:1], backend=backend)
    assert found.rank.tolist() == found.ties.tolist() == [0] and found.hits[1].tolist() == [False] and found.mrr == 0


def a_threshold_counts_with_the_bias(backend: str) -> None:
    q, k = features(22, 24, 9), features(30, 24, 10)
    s = 10.0 * similarities(q, k)
    for bias in (None, -10.0, 3.0):
        threshold = s[:, 4] + (bias or 0.0)
        call = {"scale": 10.0, "bias": bias, "metrics": True, "backend": backend, "threshold": threshold.float()}
        found = contrastive_stats(q, k, **call)  # type: ignore[arg-type]
        assert torch.equal(found.rank, (s > s[:, 4:5] + 10 * NEAR).sum(1)) and found.ties.tolist() == [1] * 22
        broken = contrastive_stats(q, k, **call | {"threshold": torch.full((22,), torch.nan)})  # type: ignore[arg-type]
        assert broken.rank.tolist() == [30] * 22 and not broken.ties.any()
    broken = contrastive_stats(q, k, scale=10.0, offset=0, bias=torch.tensor(torch.nan), metrics=True, backend=backend)
    assert broken.rank.tolist() == [29] * 22 and not broken.ties.any()


def the_first_of_equals_is_the_hardest(backend: str) -> None:
    """In every tile and every block of both sides, and where two sets of keys are merged."""
    keys = torch.eye(7).repeat(14, 1)
    own = torch.arange(98) % 7
    found = contrastive_stats(keys, keys, scale=4.0, offset=1, metrics=True, two_sided=True, backend=backend)
    # The positive of row i is column i + 1, at similarity 0; columns i % 7 + 7 n are equal, and none of them is the positive.
    assert torch.equal(found.hardest, own)
    assert found.columns is not None and torch.equal(found.columns.hardest, own)
    alone = contrastive_stats(keys, scale=4.0, offset=50, metrics=True, backend=backend)
    assert torch.equal(alone.hardest, own + 7 * (torch.arange(98) < 7))
    found = retrieval(torch.eye(7)[:5], torch.cat([torch.eye(7).roll(1, 0), *[torch.eye(7)] * 2]), hardest=4, backend=backend)
    assert found.hardest.tolist() == [[i + 1, i + 7, i + 14, 2 * (i == 0)] for i in range(5)]


def the_hardest_are_the_first_of_a_sort(backend: str) -> None:
    """Any number of them, from the hardest on, more than there are too; the same ones by every backend, bit by bit."""
    with pytest.MonkeyPatch.context() as patch:  # several tiles a side
        patch.setattr(tiles, "CPU_TILE", 16)
        q, k, more = (features(22, 24, seed) for seed in range(3))
        k[4, 2] = torch.nan
        for asked in asked_of(backend, q, q + k, more + q.roll(1, 0)):
            for count in () if asked.name.startswith("statistics") else (2, 7) if backend in SLOW else (2, 7, 22, 60):
                found, defined = asked.run(backend, count), asked.run("reference", count)
                assert found.hardest.shape == (len(asked.negatives), count)
                check(found, asked.negatives, asked.positives, f"{asked.name}: {count}")
                assert torch.equal(found.hardest, defined.hardest) and torch.equal(found.hardest_similarity, defined.hardest_similarity)
        # Columns of equal keys, in every tile: of equals the first.
        keys = torch.eye(7).repeat(14, 1)
        found = retrieval(keys, keys, offset=1, two_sided=True, hardest=14, backend=backend)
        assert torch.equal(found.hardest, torch.arange(98)[:, None] % 7 + 7 * torch.arange(14))
        assert found.columns is not None and torch.equal(found.columns.hardest, found.hardest)


def sums_are_right_at_every_temperature(backend: str) -> None:
    """On both sides of the limit up to which exponentials need no running maximum, for the largest and the smallest of them."""
    n, up = 70, F.pad(torch.ones(70, 1), (0, 23))
    for scale in (39.9, 87.5, 120.0) if backend in SLOW else (39.9, 40.1, 86.0, 87.5, 120.0):
        # Both sides: that is where kernels have sums without a maximum.
        call: dict[str, Any] = {"scale": scale, "offset": 0, "two_sided": True}
        # As they are, rows may be long on one side alone.
        for sign, length in ((1.0, 1.0), (-1.0, 1.0), (1.0, 64.0), (1.0, 1 / 64)):
            found = contrastive_stats(length * up, sign / length * up, backend=backend, normalize=length == 1.0, **call)
            assert found.columns is not None
            for side in (found, found.columns):
                wanted = torch.full((n,), sign * scale + math.log(n - 1))
                torch.testing.assert_close(side.lse_neg, wanted, rtol=1e-6, atol=0)
        # Opposite rows, a little apart, and a small gradient from above.
        down = -up + F.pad(torch.linspace(0.0, 0.2, n)[:, None], (1, 22))
        gradients = []
        for q, where in ((up.double().requires_grad_(), "reference"), (up.clone().requires_grad_(), backend)):
            found = contrastive_stats(q, down.to(q.dtype), backend=where, **call)
            assert found.columns is not None
            gradients.append(torch.autograd.grad(1e-3 * (found.lse_neg.sum() + found.columns.lse_neg.sum()), q)[0])
        assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


PROMISES = (
    every_call_counts_as_a_sort_does,
    nan_ranks_last,
    equal_rows_tie,
    rows_of_any_length_tie,
    nearly_equal_rows_keep_their_order,
    lengths_do_not_widen_the_band,
    rows_without_a_positive_rank_last,
    a_threshold_counts_with_the_bias,
    the_first_of_equals_is_the_hardest,
    the_hardest_are_the_first_of_a_sort,
    sums_are_right_at_every_temperature,
)
