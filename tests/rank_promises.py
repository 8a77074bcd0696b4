"""What every backend promises of ranks, ties and hardest negatives: test_metrics.py on the CPU, test_triton.py and test_cuda.py on theirs.

The right values are those of a float64 matrix of similarities, counted as docs/numerics.md says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnce
from fastnce import contrastive_stats, info_nce
from fastnce.formulas import RetrievalStats

U = 2.0**-24
# Random similarities are further apart, equal ones nearer together.
NEAR = 1e-6
# What float32 must get right at 24 columns: the band is 3 u, and two logits are rounded, together by less than as much again.
DECIDED = 8 * U


class Asked(NamedTuple):
    """One loss, and the float64 similarities that its metrics are of; -inf where there is no such pair."""

    name: str
    run: Callable[[str], RetrievalStats]
    negatives: Tensor
    positives: Tensor
    first: Tensor | int = 0  # index of the negatives' first column, per row


def similarities(q: Tensor, k: Tensor) -> Tensor:
    return F.normalize(q.double(), dim=-1) @ F.normalize(k.double(), dim=-1).mT


def without(s: Tensor, mask: Tensor) -> Tensor:
    return s.masked_fill(mask, -torch.inf)


SLOW = ("triton", "cuda")  # interpreted, or emulated: a hundred times as long
# Of all losses those whose tiles differ: both sides, several sets of keys, keys that are the queries, positives by content, a queue.
ON_KERNELS = ("clip_loss columns", "shared too", "nt_xent", "ids", "moco_loss")


def asked_of(backend: str, q: Tensor, k: Tensor, more: Tensor) -> list[Asked]:
    """Every loss; where kernels are slow, those that differ in the tiles."""
    return [asked for asked in all_losses(q, k, more) if backend not in SLOW or asked.name in ON_KERNELS]


def all_losses(q: Tensor, k: Tensor, more: Tensor) -> list[Asked]:
    """Every loss and every kind of negatives over q, k (M, D) and negatives of one's own, more (M, D)."""
    m, scale = len(q), 10.0
    eye, s, own = torch.eye(m, dtype=torch.bool), similarities(q, k), similarities(q, more)
    batch, pos = without(s, eye), s.diagonal()[:, None]
    paired = torch.stack([more, more.roll(1, 0), more.roll(2, 0)], 1)
    of_pairs = similarities(q[:, None], paired)[:, 0]
    values, counts = paired.flatten(0, 1), torch.arange(m) % 3 + 1
    # Query i has 1, 2 or 3 of its values; the others belong to queries behind it.
    ends = F.pad(counts.cumsum(0), (1, 0))
    everyone = similarities(q, values)
    position = torch.arange(len(values))
    ragged = without(everyone, (position < ends[:-1, None]) | (position >= ends[1:, None]))
    z, labels = torch.cat([q, k]), torch.arange(m) // 3
    zz, views, same = similarities(z, z), torch.eye(2 * m, dtype=torch.bool), (labels[:, None] == labels).repeat(2, 2)
    partner = torch.eye(m, dtype=torch.bool).repeat(2, 2) & ~views
    chosen = labels[:, None] == labels

    def by(call: Callable[..., object], *args: object, columns: bool = False, **kwargs: object) -> Callable[[str], RetrievalStats]:
        def run(backend: str) -> RetrievalStats:
            found = call(*args, return_stats=True, backend=backend, **kwargs)[1]  # type: ignore[index]
            return found.columns if columns else found

        return run

    part = {"negative_keys": values[: int(ends[-1])], "scale": scale} | {"negative_keys": (values[: int(ends[-1])], ends)}
    ragged = ragged[:, : int(ends[-1])]
    pairs = {"negative_keys": paired, "negative_mode": "paired", "scale": scale}
    return [
        Asked("info_nce", by(info_nce, q, k, scale=scale), batch, pos),
        Asked("symmetric", by(info_nce, q, k, scale=scale, symmetric=True), batch, pos),
        Asked("columns", by(info_nce, q, k, scale=scale, symmetric=True, columns=True), batch.T, pos),
        Asked("ids", by(info_nce, q, k, scale=scale, query_ids=labels), without(s, chosen), without(s, ~chosen)),
        Asked("shared", by(info_nce, q, k, more, scale=scale), own, pos),
        Asked("shared too", by(info_nce, q, k, more, scale=scale, in_batch=True), torch.cat([batch, own], 1), pos),
        Asked("paired", by(info_nce, q, k, **pairs), of_pairs, pos),
        Asked("paired too", by(info_nce, q, k, **pairs, in_batch=True), torch.cat([batch, of_pairs], 1), pos),
        Asked("ragged", by(info_nce, q, k, **part), ragged, pos),
        Asked("ragged too", by(info_nce, q, k, **part, in_batch=True), torch.cat([batch, ragged], 1), pos),
        Asked("nt_xent", by(fastnce.nt_xent, q, k, scale=scale), without(zz, views | partner), without(zz, ~partner)),
        Asked("sup_con", by(fastnce.sup_con, z, torch.cat([labels] * 2), scale=scale), without(zz, same), without(zz, ~same | views)),
        Asked("clip_loss", by(fastnce.clip_loss, q, k, scale, -3.0), batch, pos),
        Asked("clip_loss columns", by(fastnce.clip_loss, q, k, scale, -3.0, columns=True), batch.T, pos),
        Asked("moco_loss", by(fastnce.moco_loss, q, k, more, scale=scale), own, pos),
    ]


def check(found: RetrievalStats, negatives: Tensor, positives: Tensor, name: str) -> None:
    """What the rules say of these similarities. nan is above everything, and below nothing; never the hardest."""
    best = positives.amax(1, keepdim=True)
    counted = negatives != -torch.inf
    rank = (counted & ~(negatives <= best + NEAR)).sum(1)
    ties = (counted & ((negatives - best).abs() <= NEAR)).sum(1)
    assert torch.equal(found.rank, rank), name
    assert torch.equal(found.ties, ties), name
    assert torch.equal(found.top1, (rank + ties == 0) & (best > -torch.inf)[:, 0]), name
    real = negatives.masked_fill(negatives.isnan(), -torch.inf)
    most = real.amax(1)
    assert torch.equal(found.hardest == -1, most == -torch.inf), name
    torch.testing.assert_close(found.hardest_similarity.double(), most, rtol=0, atol=NEAR, msg=name)
    there = real.gather(1, found.hardest.clamp(min=0)[:, None])[:, 0]
    assert ((there >= most - NEAR) | (most == -torch.inf)).all(), name


def features(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def every_loss_counts_as_a_sort_does(backend: str) -> None:
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
                assert torch.equal(found.rank, (asked.negatives != -torch.inf).sum(1)) and not found.top1.any()


def equal_rows_tie(backend: str) -> None:
    """A collapsed model, and rows that are there twice: rank 0, and the copies are ties. Lengths that are powers of two round nothing."""
    one, some = features(1, 24, 3), features(11, 24, 4)
    lengths = torch.exp2(torch.arange(22.0) % 5 - 2)[:, None]
    collapsed = one.expand(22, 24)
    for rows in (collapsed, torch.cat([some, some]) * lengths):
        for asked in asked_of(backend, rows, rows, rows):
            found = asked.run(backend)
            check(found, asked.negatives, asked.positives, asked.name)
            assert rows is not collapsed or not (found.rank.any() or found.top1.any()), asked.name
    _, found = info_nce(collapsed, collapsed, return_stats=True, backend=backend)
    assert (1 + found.rank + found.ties / 2).tolist() == [11.5] * 22


def rows_of_any_length_tie(backend: str) -> None:
    """Rows that differ in length alone, but for the few that rounding drives further apart than the band."""
    rows = features(1, 24, 5) * (torch.rand(22, 1, generator=torch.Generator().manual_seed(0)) * 3 + 0.2)
    for asked in asked_of(backend, rows, rows, rows):
        counted = (asked.negatives != -torch.inf).sum()
        # Of listed negatives and in kernels norms are rounded more often.
        share = 0.9 if backend in SLOW or asked.name.startswith(("paired", "ragged")) else 0.99
        assert asked.run(backend).ties.sum() >= share * counted, asked.name


def nearly_equal_rows_keep_their_order(backend: str) -> None:
    """Similarities of 0.99998: what is further from the positive than its rounding is above or below it, and no tie."""
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
        _, found = info_nce(q * size, (q * size)[:1].expand(22, 24), return_stats=True, normalize=False, backend=backend)
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
    _, found = fastnce.sup_con(z, labels, return_stats=True, backend=backend)
    alone = torch.tensor([4, 5, 8])
    assert found.rank[alone].tolist() == [8] * 3 and not found.ties[alone].any() and not found.top1[alone].any()
    # Nothing is above, nothing ties, and still there was nothing to find.
    _, found = fastnce.sup_con(z[:1], labels[:1], return_stats=True, backend=backend)
    assert found.rank.tolist() == found.ties.tolist() == [0] and found.top1.tolist() == [False]


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
    q, more = torch.eye(7)[:5], torch.eye(7).repeat(2, 1)
    for given, mode in ((more, "unpaired"), (more.expand(5, 14, 7), "paired"), ((more.repeat(5, 1), torch.arange(0, 71, 14)), "unpaired")):
        _, found = info_nce(q, torch.eye(7).roll(1, 0), given, negative_mode=mode, in_batch=True, return_stats=True, backend=backend)  # type: ignore
        assert found.hardest.tolist() == [1, 2, 3, 4, 5]
        _, found = info_nce(q, torch.eye(7).roll(1, 0)[:5], given, negative_mode=mode, return_stats=True, backend=backend)  # type: ignore
        assert (found.hardest % 14).tolist() == [0, 1, 2, 3, 4]


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
    every_loss_counts_as_a_sort_does,
    nan_ranks_last,
    equal_rows_tie,
    rows_of_any_length_tie,
    nearly_equal_rows_keep_their_order,
    lengths_do_not_widen_the_band,
    rows_without_a_positive_rank_last,
    a_threshold_counts_with_the_bias,
    the_first_of_equals_is_the_hardest,
    sums_are_right_at_every_temperature,
)
