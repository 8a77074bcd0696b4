"""Retrieval: how well every query finds its positives among the keys, and which negatives come nearest. Without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce import arguments, autograd, hints, relations, statistics
from fastnce.pairs import Pairs
from fastnce.precision import compute_dtype
from fastnce.problem import Problem
from fastnce.statistics import ContrastiveStats


class RetrievalStats(NamedTuple):
    """How well M queries find their positives among the keys.

    Attributes:
        rank: (M,) int64, how many negatives are above the best positive. All of them, where the query is nan or has no positive.
        ties: (M,) int64, how many negatives cannot be told from the best positive in this precision: cosines within 3 * 2^-24 (float64
            features: 2^-49).
        hits: for each k of `ks`, (M,) bool: the best positive is among the first k in any order of the ties, rank + ties < k. False where
            the query is nan or has no positive.
        mrr: 0-dim, mean reciprocal rank: the mean of 1 / (1 + rank + ties / 2), the middle of the places that the ties allow. A query that
            is nan or has no positive adds 0. nan where there is no query.
        hardest: (M, hardest) int64, indices of the hardest negatives, the hardest first, of equal ones the one with the lower index. -1
            where there are no more. A negative that is nan is left out.
        hardest_similarity: (M, hardest), their similarities (cosines, where normalize); -inf where there are no more.
        columns: the same for every key among the queries, (N,) each. None without two_sided=True.
    """

    rank: Tensor
    ties: Tensor
    hits: dict[int, Tensor]
    mrr: Tensor
    hardest: Tensor
    hardest_similarity: Tensor
    columns: RetrievalStats | None = None


def retrieval(
    query: Tensor,
    key: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    hardest: int = 1,
    offset: int | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_query_ids: Tensor | None = None,
    exclude_key_ids: Tensor | None = None,
    positive_mask: Tensor | None = None,
    exclude_self: bool | None = None,
    two_sided: bool = False,
    normalize: bool = True,
    backend: str = "auto",
) -> RetrievalStats:
    """How well every query finds its positives among the keys: ranks, top-k hits, mean reciprocal rank, and the hardest negatives.

        s_ij = cos(query_i, key_j)      rank_i = number of negatives j with s_ij > max over the positives p of s_ip

    The similarities are never stored: memory is O((M + N) (D + hardest)). Nothing has a gradient.

    Args:
        query: (M, D) in any scale: rows are normalised here unless normalize=False.
        key: (N, D), N >= M: row i is the positive of query i, and all others are its negatives (more rows: a queue, or negatives of one's
            own, torch.cat([key, negatives])). Ids, a mask or an offset may say otherwise. None: the queries search each other.
        ks: for which k `hits` says whether a positive is among the first k. Default: 1, 5, 10.
        hardest: how many of the hardest negatives of each query are found. Default: 1.
        offset: key i + offset is a positive of query i (without key: also query i is one of query i + offset; two views one after the
            other have offset=len(query) // 2). Default: 0, or none where ids or a mask say what is positive.
        query_ids, key_ids: integers (M,), (N,): keys with the query's id are its positives. A negative id matches nothing.
        exclude_query_ids, exclude_key_ids: integers (M,), (N,): keys with the query's id are left out (other copies of the same document),
            unless they are its positive by `offset`. They win over equal query_ids and key_ids, and over the mask.
        positive_mask: bool (M, N): key j is a positive of query i where positive_mask[i, j].
        exclude_self: leave out key i for query i. Default: where key is None.
        two_sided: also how well every key finds its queries, in `columns`, from the same pass.
        normalize: False takes dot products as they are, instead of cosines.
        backend: "auto" or the name of one, as for the losses. More than one hardest negative comes from one routine, whatever the backend.

    Where row i of key belongs to row i of query, ids of one side serve both.

    Returns:
        RetrievalStats.

    Raises:
        ValueError: fewer keys than queries where nothing else says what is positive, no key and nothing that says so, a k below 1.
        TypeError, RuntimeError, NotImplementedError: as docs/numerics.md lists; each message says what to write instead.

    Example:
        >>> query = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> found = fastnce.retrieval(query, query[[0, 2, 1]])
        >>> found.rank, found.hits[1], found.mrr
        (tensor([0, 2, 1]), tensor([ True, False, False]), tensor(0.6111))
    """
    where = "retrieval"
    if key is None:
        arguments.features(where, query=query)
        rows = columns = query.shape[0]
    else:
        arguments.features(where, query=query, key=key)
        query, key = arguments.one_dtype(where, query=query, key=key)
        rows, columns = query.shape[0], key.shape[0]
        arguments.some_keys(where, "key", key, rows)
    arguments.options(where, normalize=normalize, two_sided=two_sided, exclude_self=exclude_self)
    arguments.count(where, "hardest", hardest)
    ks = _ks(where, ks)
    offset = arguments.offset(where, offset)
    mask = relations.mask(where, "positive_mask", positive_mask, query, (rows, columns), "one row per query and one column per key")
    by_place = query_ids is key_ids is mask is None
    exclude_self = key is None if exclude_self is None else exclude_self
    if key is None:
        _alone(where, rows, offset, by_place, two_sided, mask, key_ids is exclude_key_ids is None)
    elif by_place and offset is None:
        _in_place(where, query, key, exclude_self)
        offset = 0
    paired = key is None or (rows == columns and offset in (None, 0))
    names, excluding, of = ("query_ids", "key_ids"), ("exclude_query_ids", "exclude_key_ids"), ("query", "key")
    label = relations.id_pair(where, names, (query_ids, key_ids), of, query, (rows, columns), paired)
    exclude = relations.id_pair(where, excluding, (exclude_query_ids, exclude_key_ids), of, query, (rows, columns), paired)
    hints.negative_ids(where, (*names, *excluding), (query_ids, key_ids, exclude_query_ids, exclude_key_ids))
    arguments.values(where, normalize, **({"query": query} if key is None else {"query": query, "key": key}))
    if key is None:
        label, exclude = (label[0], None), (exclude[0], None)
    elif offset == 0 and label[1] is not None:
        hints.partners(where, names, *(ids if ids is None else ids[: min(rows, columns)] for ids in label))
    pairs = Pairs(exclude_self, offset, *label, *exclude, mask)
    query, key = query.detach(), None if key is None else key.detach()
    one = torch.ones((), dtype=compute_dtype(query.dtype), device=query.device)
    problem = Problem(query, key, one, None, pairs, two_sided, normalize, metrics=True, rounded=True)
    found = statistics.compute(where, problem, backend)
    hints.something_to_compare(where, found.lse_neg, found.n_pos)
    hints.without_positive(where, found.n_pos, "queries", ": they are no hits, and add 0 to mrr")
    more = autograd.hardest(problem, int(hardest)) if hardest > 1 else [None, None]
    return _public(found, ks, more, one.dtype)


def _ks(where: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{where}: ks must be a sequence of positive integers, got {given!r}; one of them is ks=(5,)")
    for k in given:
        arguments.count(where, "every number in ks", k)
    return tuple(int(k) for k in given)


def _alone(where: str, rows: int, offset: int | None, by_place: bool, two_sided: bool, mask: Tensor | None, no_key_ids: bool) -> None:
    """Raise where an argument needs key, or where nothing says which queries are positives of each other."""
    wrong = ""
    if two_sided:
        wrong = "two_sided needs key; where the queries search each other, both directions are the same"
    elif not no_key_ids:
        wrong = "key_ids and exclude_key_ids need key; where the queries search each other, give query_ids, exclude_query_ids"
    elif by_place and offset is None:
        wrong = "without key, give query_ids, positive_mask or offset: two views one after the other have offset=len(query) // 2"
    elif offset is not None and offset < 1 and rows > 0:
        wrong = f"offset is {offset}; where the queries search each other it must be at least 1"
    elif mask is not None and offset is not None:
        wrong = "positive_mask and offset together need key; without, put the partners into the mask"
    if wrong:
        raise ValueError(f"{where}: {wrong}")


def _in_place(where: str, query: Tensor, key: Tensor, exclude_self: bool) -> None:
    """Raise where key i cannot be the positive of query i, which it is where no argument says otherwise."""
    shapes = f"{where}: query is {tuple(query.shape)} and key is {tuple(key.shape)}"
    if exclude_self:
        raise ValueError(f"{shapes}; exclude_self leaves out key i for query i: give query_ids and key_ids, positive_mask or offset")
    if key.shape[0] < query.shape[0]:
        raise ValueError(
            f"{shapes}; row i of key is the positive of query i, so each query needs one: or give query_ids and key_ids, positive_mask or "
            "offset"
        )


def _public(
    found: ContrastiveStats, ks: tuple[int, ...], more: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype
) -> RetrievalStats:
    """`more` are the indices and similarities of several hardest negatives, of this side and then of the columns; None for one."""
    rank, ties, index, similarity, best = found.rank, found.ties, found.hardest, found.hardest_logit, found.pos_max
    assert rank is not None and ties is not None and index is not None and similarity is not None and best is not None
    there = best > -torch.inf
    reciprocal = (1 + rank.to(dtype) + ties.to(dtype) / 2).reciprocal().masked_fill(~there, 0.0)
    indices, similarities = (index[:, None], similarity.to(dtype)[:, None]) if more[0] is None else more[0]
    last = rank + ties  # of the places that the ties allow
    hits = {k: (last < k) & there for k in ks}
    # Made in one call: Dynamo of torch 2.11 cannot return a tuple with a dict in it that _replace has made.
    columns = None if found.columns is None else _public(found.columns, ks, more[1:], dtype)
    return RetrievalStats(rank, ties, hits, reciprocal.mean(), indices, similarities, columns)
