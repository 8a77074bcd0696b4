"""fastnce.retrieval: arguments and results. test_retrieval_errors.py has what it refuses, rank_promises.py its counts on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entries import BACKENDS, MODES, kind, x
from named import ON_CPU, each, widest
from test_memory import Largest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnce import RetrievalStats, autograd, hardest, retrieval
from fastnce.backends import torch_tiles
from fastnce.pairs import Pairs
from fastnce.problem import Problem

A, B = x(16, 5).double(), x(16, 5, seed=3).double()
LABELS = torch.arange(16) % 5
IDS = ("query_ids", "key_ids", "exclude_query_ids", "exclude_key_ids")


def vectors(found: RetrievalStats) -> list[Tensor]:
    """Everything that was found, of both directions."""
    own = [found.rank, found.ties, *found.hits.values(), found.mrr, found.hardest, found.hardest_similarity]
    return own + ([] if found.columns is None else vectors(found.columns))


def same(found: RetrievalStats, expected: RetrievalStats) -> None:
    for one, other in zip(vectors(found), vectors(expected), strict=True):
        assert torch.equal(one, other)


# Results -------------------------------------------------------------------------------------------------------------------------------


def test_by_loops() -> None:
    """Ranks, hits, reciprocal ranks and hardest negatives of one query after the other."""
    found = retrieval(A, B, ks=(1, 3, 20), hardest=3, query_ids=LABELS, key_ids=LABELS.roll(1), two_sided=True)
    s = F.normalize(A, dim=1) @ F.normalize(B, dim=1).T
    positive = LABELS[:, None] == LABELS.roll(1)
    assert found.columns is not None
    for side, similarity, own in ((found, s, positive), (found.columns, s.T, positive.T)):
        places = []
        for i in range(16):
            best = max(similarity[i, j].item() for j in range(16) if own[i, j])
            negatives = sorted(((similarity[i, j].item(), j) for j in range(16) if not own[i, j]), reverse=True)
            places.append(1 + sum(value > best for value, _ in negatives))
            assert side.hardest[i].tolist() == [j for _, j in negatives[:3]]
            assert side.hardest_similarity[i].tolist() == pytest.approx([value for value, _ in negatives[:3]], rel=1e-12)
        assert (side.rank + 1).tolist() == places and not side.ties.any()
        assert {k: hits.tolist() for k, hits in side.hits.items()} == {k: [place <= k for place in places] for k in (1, 3, 20)}
        assert side.mrr.item() == pytest.approx(sum(1 / place for place in places) / 16, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    """The same without values; nothing asks for a gradient."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    for mode in MODES:
        with kind(mode):
            q, k = x(6, 5).to(dtype).requires_grad_(), x(9, 5, seed=1).to(dtype)
            for count in (1, 4):
                found = retrieval(q, k, ks=[2], hardest=count, two_sided=True)
                assert found.columns is not None and found.columns.columns is None
                for side, rows in ((found, 6), (found.columns, 9)):
                    integers = (side.rank, side.ties, side.hardest)
                    assert [v.shape for v in integers] == [(rows,), (rows,), (rows, count)] and {v.dtype for v in integers} == {torch.int64}
                    assert side.hits.keys() == {2} and side.hits[2].shape == (rows,) and side.hits[2].dtype == torch.bool
                    assert side.hardest_similarity.shape == (rows, count) and side.mrr.shape == ()
                    assert side.hardest_similarity.dtype == side.mrr.dtype == precise
                    assert not any(v.requires_grad or v.is_meta != (mode == "meta") for v in vectors(side))


def test_what_is_positive_without_a_word() -> None:
    """Row i of key for query i; beside ids or a mask no place, unless an offset says so."""
    same(retrieval(A, B), retrieval(A, B, offset=0))
    more = torch.cat([B, A.roll(1, 0)])
    same(retrieval(A, more), retrieval(A, more, offset=0))
    alone, fives = torch.arange(16), torch.full((16,), -1)
    same(retrieval(A, B), retrieval(A, B, query_ids=alone, key_ids=alone))
    same(retrieval(A, B), retrieval(A, B, positive_mask=torch.eye(16, dtype=torch.bool)))
    assert not any(hits.any() for hits in retrieval(A, B, query_ids=fives, key_ids=fives).hits.values())
    same(retrieval(A, B), retrieval(A, B, query_ids=fives, key_ids=fives, offset=0))
    same(retrieval(torch.cat([A, B]), offset=16), retrieval(torch.cat([A, B]), query_ids=alone.repeat(2)))


def test_ids_of_one_side_serve_both() -> None:
    for names in (IDS[:2], IDS[2:]):
        expected = retrieval(A, B, **dict.fromkeys(names, LABELS))
        for name in names:
            same(retrieval(A, B, **{name: LABELS}), expected)


def test_one_set_against_itself() -> None:
    """Each query leaves out itself, unless it is told not to."""
    same(retrieval(A, query_ids=LABELS), retrieval(A, A, query_ids=LABELS, exclude_self=True))
    same(retrieval(A, query_ids=LABELS, exclude_self=False), retrieval(A, A, query_ids=LABELS))
    mask = LABELS[:, None] == LABELS
    same(retrieval(A, positive_mask=mask), retrieval(A, query_ids=LABELS))
    documents = torch.arange(16) // 4
    call = {"query_ids": LABELS, "exclude_query_ids": documents}
    same(retrieval(A, **call, hardest=3), retrieval(A, A, **call, exclude_self=True, hardest=3))


def test_dot_products() -> None:
    """normalize=False ranks by length too."""
    lengths = torch.linspace(0.1, 3.0, 16)[:, None].double()
    found = retrieval(A, lengths * B, normalize=False, hardest=2)
    s = (A @ (lengths * B).T).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(found.hardest_similarity, s.topk(2).values, rtol=1e-12, atol=0)
    assert torch.equal(found.hardest, s.topk(2).indices)
    assert not torch.equal(found.hardest, retrieval(A, lengths * B, hardest=2).hardest)


def test_a_queue_is_more_keys() -> None:
    """As moco_loss counts: the query's own key and the queue, not the other keys of the batch."""
    queue = x(7, 5, seed=9).double()
    found = retrieval(
        A,
        torch.cat([B, queue]),
        exclude_query_ids=torch.zeros(16, dtype=torch.int64),
        exclude_key_ids=torch.tensor([0] * 16 + [-1] * 7),
        hardest=2,
    )
    s, pos = F.normalize(A, dim=1) @ F.normalize(queue, dim=1).T, (F.normalize(A, dim=1) * F.normalize(B, dim=1)).sum(1)
    assert torch.equal(found.rank, (s > pos[:, None]).sum(1))
    assert torch.equal(found.hardest, 16 + s.topk(2).indices)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("batch", [(5, 9), (-1, -1)])
def test_rank_from_the_best_positive_of_all_keys(batch: tuple[int, int], backend: str) -> None:
    """A further key may be a positive by its id, and a better one than the query's own."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    k = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [0.7, 0.7]])
    found = retrieval(q, k, query_ids=torch.tensor([5, 9]), key_ids=torch.tensor([*batch, 5, 6]), offset=0, backend=backend)
    assert found.rank[0] == 0
    assert found.hits[1][0]


def test_autocast_lowers_nothing() -> None:
    for count in (1, 3):
        expected = retrieval(A.float(), B.float(), hardest=count)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(retrieval(A.float(), B.float(), hardest=count), expected)
            mixed = retrieval(A.float(), B.bfloat16(), hardest=count)
        same(mixed, retrieval(A.bfloat16(), B.bfloat16(), hardest=count))


@pytest.mark.parametrize("count", [1, 3])
def test_compiled_and_batched(count: int) -> None:
    """torch.compile in one graph, func.vmap, and the modes without gradients."""
    call: dict[str, Any] = {"hardest": count, "two_sided": True, "query_ids": LABELS}
    expected = retrieval(A, B, **call)
    torch._dynamo.reset()
    same(torch.compile(lambda q, k: retrieval(q, k, **call), fullgraph=True, backend="aot_eager")(A, B), expected)
    batched = torch.func.vmap(lambda q: vectors(retrieval(q, B, **call)))(torch.stack([A, B]))
    for one, other in zip(batched, vectors(expected), strict=True):
        assert torch.equal(one[0], other)
    with torch.inference_mode():
        same(retrieval(A.clone(), B.clone(), **call), expected)


def test_the_operator_has_no_gradient() -> None:
    """The operator, called by hand, returns tensors without a gradient."""
    problem = Problem(A.clone().requires_grad_(), B, torch.ones((), dtype=torch.float64), None, Pairs(False, 0), True, True, metrics=True)
    flat = (3, *autograd.Arguments.of(problem, torch_tiles.NAME))
    torch.library.opcheck(torch.ops.fastnce.hardest.default, flat)
    assert not any(v.requires_grad for v in torch.ops.fastnce.hardest(*flat))


# Memory ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("options", [{}, {"two_sided": True}, {"query_ids": torch.arange(150) // 2}], ids=["rows", "both sides", "ids"])
def test_nothing_is_as_large_as_the_matrix(options: dict[str, Any], count: int, small_tiles: int) -> None:
    q, k = x(150, 8), x(150, 8, seed=1)
    problem_of = lambda: retrieval(q, k, hardest=count, backend=torch_tiles.NAME, **options)  # noqa: E731
    expected = problem_of()
    with Largest() as seen:
        same(problem_of(), expected)
    assert seen.elements < 150 * 150 / 4


def test_a_million_rows_need_no_matrix() -> None:
    with FakeTensorMode(), Largest() as seen:
        q, k = torch.empty(2, 2**20, 128, dtype=torch.bfloat16)
        found = retrieval(q, k, hardest=9, two_sided=True)
    assert found.hardest.shape == (2**20, 9)
    assert seen.elements <= 2 * 2**20 * 128


@pytest.mark.parametrize("count", [1, 5])
def test_no_value_is_read_back(count: int) -> None:
    """Meta tensors have no values: whatever reads one back raises. Inside the operators, too."""
    q, k = torch.empty(2, 600, 8, device="meta")
    ids = torch.empty(600, dtype=torch.int64, device="meta")
    found = retrieval(q, k, hardest=count, query_ids=ids, two_sided=True)
    assert found.hardest.shape == (600, count)
    problem = Problem(q, k, q.new_empty(()), None, Pairs(False, 0, ids, ids), True, True, metrics=True)
    assert [v.shape for v in hardest.forward(problem, count)] == [v.shape for v in hardest.fake(problem, count)]


# Values of bad input -------------------------------------------------------------------------------------------------------------------


def rows_of(backend: str) -> tuple[Tensor, Tensor]:
    return A.to(widest(backend), copy=True), B.to(widest(backend), copy=True)


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("count", [1, 20])
def test_zero_rows_and_nan_rows(count: int, backend: str) -> None:
    """Zero rows have similarity 0 with everything; nan rows rank last, and are in no hits."""
    q, k = rows_of(backend)
    q[2], q[5], k[7] = 0.0, math.nan, math.nan
    found = retrieval(q, k, ks=(1, 99), hardest=count, two_sided=True, backend=backend)
    left = [j for j in range(16) if j not in (2, 7)]
    assert found.rank[5] == 15 and found.rank[7] == 15 and found.hits[99].tolist() == [i not in (5, 7) for i in range(16)]
    assert found.hardest[5].tolist() == [-1] * count and found.hardest_similarity[5].tolist() == [-math.inf] * count
    assert found.hardest[2].tolist() == (left + [-1] * 6)[:count]
    assert found.hardest_similarity[2].tolist() == ([0.0] * 14 + [-math.inf] * 6)[:count]
    assert found.ties[2] == 14 and found.rank[2] == 1  # the nan is above
    columns = found.columns
    assert columns is not None
    assert columns.rank[7] == 15 and columns.rank[5] == 15 and columns.hardest[7].tolist() == [-1] * count
    assert columns.hits[99].tolist() == [i not in (5, 7) for i in range(16)]


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("wrong", [math.inf, -math.inf, 2e18])
def test_infinite_and_too_long_rows_are_nan(wrong: float, backend: str) -> None:
    q, k = (side.float() for side in rows_of(backend))
    q[5, 1] = k[7, 2] = wrong
    found = retrieval(q, k, ks=(1, 99), two_sided=True, backend=backend)
    q[5], k[7] = math.nan, math.nan
    same(found, retrieval(q, k, ks=(1, 99), two_sided=True, backend=backend))


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("count", [1, 3])
def test_no_queries(count: int, backend: str) -> None:
    q, k = rows_of(backend)
    found = retrieval(q[:0], k, hardest=count, two_sided=True, backend=backend)
    assert found.rank.shape == found.hits[1].shape == (0,) and found.hardest.shape == (0, count) and found.mrr.isnan()
    assert found.columns is not None and found.columns.hardest.tolist() == [[-1] * count] * 16 and found.columns.mrr == 0
    assert retrieval(q[:0], query_ids=LABELS[:0], hardest=count, backend=backend).hardest.shape == (0, count)


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("count", [1, 3])
def test_neither_queries_nor_keys(count: int, backend: str) -> None:
    q, k = rows_of(backend)
    found = retrieval(q[:0], k[:0], hardest=count, two_sided=True, backend=backend)
    for side in (found, found.columns):
        assert side is not None and side.rank.shape == side.ties.shape == (0,) and side.hardest.shape == (0, count) and side.mrr.isnan()


@pytest.mark.parametrize("backend", each(BACKENDS))
def test_no_positive(backend: str) -> None:
    """All negatives are above, no hit, and 0 in the mean."""
    q, k = rows_of(backend)
    some = torch.where(LABELS < 2, LABELS, -1)
    found = retrieval(q, k, ks=(1, 99), query_ids=some, key_ids=LABELS, backend=backend)
    alone = some < 0
    assert found.rank[alone].tolist() == [16] * int(alone.sum()) and not found.ties[alone].any()
    assert torch.equal(found.hits[99], ~alone)
    reciprocal = (1 + found.rank + found.ties / 2).reciprocal().where(~alone, 0.0)
    assert found.mrr.item() == pytest.approx(reciprocal.mean().item(), rel=1e-6)
    none = retrieval(q, k, ks=(1, 99), query_ids=torch.full((16,), -1), key_ids=LABELS, backend=backend)
    assert none.mrr == 0 and not any(hits.any() for hits in none.hits.values()) and none.rank.tolist() == [16] * 16


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("count", [1, 4])
def test_fewer_negatives_than_hardest(count: int, backend: str) -> None:
    """-1 and -inf for the rest: with two negatives of each query, and with none."""
    q, k = rows_of(backend)
    found = retrieval(q[:3], k[:3], hardest=count, backend=backend)
    for i in range(3):
        assert sorted(found.hardest[i].tolist()[:2]) == [j for j in range(3) if j != i] or count == 1
        assert found.hardest[i].tolist()[2:] == [-1] * max(count - 2, 0)
        assert found.hardest_similarity[i].tolist()[2:] == [-math.inf] * max(count - 2, 0)
    ids = torch.zeros(3, dtype=torch.int64)
    for names in ({"query_ids": ids}, {"exclude_query_ids": ids, "exclude_key_ids": ids, "offset": 0}):
        found = retrieval(q[:3], k[:3], hardest=count, backend=backend, **names)
        assert found.hardest.tolist() == [[-1] * count] * 3 and found.hardest_similarity.tolist() == [[-math.inf] * count] * 3
        assert found.rank.tolist() == [0] * 3 and found.hits[1].all() and found.mrr == 1


@pytest.mark.parametrize("backend", each(BACKENDS))
def test_rows_that_are_all_equal(backend: str) -> None:
    """Every negative is a tie: no hit at 1, and half of the ties count in mrr."""
    q = torch.ones(6, 5, dtype=widest(backend))
    found = retrieval(q, q, ks=(1, 6), backend=backend)
    assert found.rank.tolist() == [0] * 6 and found.ties.tolist() == [5] * 6
    assert not found.hits[1].any() and found.hits[6].all() and found.mrr.item() == pytest.approx(1 / 3.5, rel=1e-6)
