"""Ranks, ties, top-1 and hardest negatives on the CPU, by each of its backends; test_triton.py and test_cuda.py run the same promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rank_promises
import torch
import torch.nn.functional as F
from named import IN_FLOAT64, ON_CPU, widest
from rank_promises import PROMISES, U, similarities

import fastnce
from fastnce import arguments, contrastive_stats, info_nce, merge, retrieval, tiles

CPU_TILE = tiles.CPU_TILE
each_backend = pytest.mark.parametrize("backend", ON_CPU)


@pytest.fixture(autouse=True)
def smaller(small_tiles: int) -> None:
    """Those of torch operations: the compiled ones have blocks of 64 x 64."""


@each_backend
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promise(promise: Callable[[str], None], backend: str) -> None:
    promise(backend)


@each_backend
@pytest.mark.parametrize("n", [64, 520])
def test_equal_rows_tie_in_every_tile(n: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles at the edges are smaller, and a product of another shape may be summed in another order."""
    monkeypatch.setattr(tiles, "CPU_TILE", CPU_TILE)
    for columns in (128, 512):
        z = torch.randn(1, columns, generator=torch.Generator().manual_seed(n)).expand(n, columns)
        queue = {"exclude_query_ids": torch.zeros(n, dtype=torch.int64), "exclude_key_ids": -(torch.arange(2 * n) // n)}
        found = {
            n - 1: retrieval(z, z, backend=backend),
            n: retrieval(z, torch.cat([z, z]), **queue, backend=backend),
            2 * n - 1: retrieval(z, torch.cat([z, z]), backend=backend),
        }
        for ties, side in found.items():
            assert side.rank.eq(0).all() and side.ties.eq(ties).all() and not side.hits[1].any()


@each_backend
def test_top1_of_nearly_equal_rows(backend: str) -> None:
    """A mean similarity of 0.99998: top-1 and MRR are those of float64, and never better, but for rows that float32 cannot decide."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 128, generator=g) + 0.0036 * torch.randn(600, 128, generator=g)
    k = q + 0.0036 * 1.6 * torch.randn(600, 128, generator=g)
    s = similarities(q, k)
    assert 0.99995 < s.mean() < 0.99999
    gap = (s - s.diagonal()[:, None]).masked_fill(torch.eye(600, dtype=torch.bool), -torch.inf)
    top1, mrr = gap.amax(1) < 0, (1 / (1 + (gap > 0).sum(1))).mean()
    undecided = (gap.amax(1).abs() <= 6 * U).double().mean()
    assert 0.6 < top1.double().mean() < 0.95 and undecided < 0.1
    found = retrieval(q, k, backend=backend)
    assert -undecided <= found.hits[1].double().mean() - top1.double().mean() <= 0.005
    assert (found.mrr - mrr).abs() <= 0.02
    if widest(backend) == torch.float64:
        found = retrieval(q.double(), k.double(), backend=backend)
        assert torch.equal(found.hits[1], top1) and not found.ties.any()


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_float64_tells_1e_12_apart(backend: str) -> None:
    """At 45 degrees, where a small angle moves the cosine by as much."""
    angles = torch.pi / 4 + torch.tensor([0.0, 1e-12, -1e-12, 1e-9, -1e-9, 0.0], dtype=torch.float64)
    q, k = torch.eye(1, 2, dtype=torch.float64), torch.stack([angles.cos(), angles.sin()], 1)
    found = retrieval(q, k, backend=backend)
    assert (found.rank.item(), found.ties.item(), found.hits[1].item()) == (2, 1, False)


@each_backend
def test_merged_metrics(backend: str) -> None:
    """Ties add up, and of equally hard negatives the first set's is the hardest, whichever row it is in."""
    q = F.normalize(torch.randn(6, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = contrastive_stats(q, torch.cat([q, q, q]), scale=5.0, offset=0, metrics=True, backend=backend)
    rest = contrastive_stats(q, torch.cat([q, q]), scale=5.0, metrics=True, threshold=whole.pos_max, backend=backend)
    own = contrastive_stats(q, q, scale=5.0, offset=0, metrics=True, backend=backend)
    merged = merge(own, rest, 6)
    assert whole.ties.tolist() == merged.ties.tolist() == [2] * 6
    assert torch.equal(merged.rank, whole.rank) and torch.equal(merged.hardest, whole.hardest)
    assert torch.equal(merge(rest, rest, 12).hardest, rest.hardest)


@each_backend
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("views", ["all", "one"])
def test_anchors_without_a_positive_are_skipped_in_a_weighted_mean(variant: str, views: str, backend: str) -> None:
    """A skipped anchor has no part in the sum of the weights either."""
    labels = torch.tensor([0, 0, 1, -1, 2, 2, -1])
    x = torch.randn(7, 2, 24, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.2, 3.0, 14 if views == "all" else 7)
    call = {"labels": labels, "variant": variant, "views": views, "backend": backend}
    values = fastnce.sup_con(x, reduction="none", **call)  # type: ignore[arg-type]
    some = (labels >= 0).repeat(2 if views == "all" else 1)
    for given in (weight, None):
        kept = (torch.ones_like(weight) if given is None else weight)[some]
        found = fastnce.sup_con(x, weight=given, no_positive="skip", **call)  # type: ignore[arg-type]
        torch.testing.assert_close(found, (values[some] * kept).sum() / kept.sum())
        summed = fastnce.sup_con(x, weight=given, no_positive="skip", reduction="sum", **call)  # type: ignore[arg-type]
        torch.testing.assert_close(summed, (values[some] * kept).sum())


@each_backend
@pytest.mark.parametrize("bad", [1.0, torch.nan])
@pytest.mark.parametrize("in_batch", [False, True])
def test_ragged_values_of_no_query(in_batch: bool, bad: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first offset and after the last: no part in the loss or in a gradient, nan or not. Where reading offsets
    is free they are refused; on a GPU they are not read."""
    monkeypatch.setattr(arguments, "free_to_read", lambda x: False)
    g = torch.Generator().manual_seed(0)
    q, k, values = (torch.randn(n, 24, generator=g) for n in (4, 4, 12))
    # The hardest there could be, of the first query and of the last.
    values[:3], values[9:] = bad * q[0], bad * q[3]
    offsets = torch.tensor([3, 5, 5, 8, 9])

    def solve(values: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        leaves = [t.clone().requires_grad_() for t in (q, k, values, torch.tensor(0.2))]
        call = {"temperature": leaves[3], "in_batch": in_batch, "reduction": "none", "backend": backend}
        loss = info_nce(*leaves[:2], (leaves[2], offsets), **call)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaves)

    loss, gradients = solve(values, offsets)
    wanted, exact = solve(values[3:9], offsets - 3)
    torch.testing.assert_close(loss, wanted)
    for found, right in zip(gradients, (*exact[:2], F.pad(exact[2], (0, 0, 3, 3)), exact[3]), strict=True):
        torch.testing.assert_close(found, right)


@each_backend
@pytest.mark.parametrize("columns", [8, 768])
def test_a_collapsed_model_has_no_hit_by_ids(columns: int, backend: str) -> None:
    """Ids make every key of the batch a positive, and two more keys tie with them."""
    for seed in range(5):
        z = torch.randn(1, columns, generator=torch.Generator().manual_seed(seed)).expand(16, columns)
        ids = torch.zeros(18, dtype=torch.int64)
        found = retrieval(
            z, z[:1].expand(18, -1), query_ids=ids[:16], key_ids=ids.index_fill(0, torch.tensor([16, 17]), -1), backend=backend
        )
        assert not found.rank.any() and (found.ties == 2).all() and not found.hits[1].any() and found.hits[5].all()


def test_the_promises_are_all_run() -> None:
    written = {name for name, value in vars(rank_promises).items() if getattr(value, "__annotations__", {}).keys() == {"backend", "return"}}
    assert written == {promise.__name__ for promise in PROMISES}
