"""Explicit negatives of info_nce: shared by all queries, or listed for each of them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastnce import arguments
from fastnce.autograd import listed_logits
from fastnce.listed import Listed
from fastnce.statistics import ContrastiveStats

Ragged: TypeAlias = tuple[Tensor, Tensor]

# How a caller writes the two entries of a ragged tuple.
VALUES, OFFSETS = "negative_keys[0]", "negative_keys[1]"
NONE_OF_THEM = "; with in_batch=True there may be none"


class Negatives(NamedTuple):
    """Negatives of one of three kinds.

    "unpaired"   keys (K, D), the same ones for all queries
    "paired"     keys (M, K, D), K for each query
    "ragged"     keys (T, D), and rows (T,): the query that each belongs to, or M where it belongs to none
    """

    kind: str
    keys: Tensor
    rows: Tensor | None = None

    @property
    def name(self) -> str:
        """The caller's name for the keys, for messages."""
        return VALUES if self.kind == "ragged" else "negative_keys"

    @staticmethod
    def of(where: str, given: Tensor | Ragged | None, mode: str, query: Tensor, may_be_none: bool) -> Negatives | None:
        """The caller's negative_keys, checked; None stays None. may_be_none: there are in-batch keys, so zero keys are no mistake."""
        if given is None:
            return None
        if isinstance(given, tuple | list):
            return _ragged(where, given, query, may_be_none)
        _no_temperature(where, given)
        arguments.features(where, (2, 3), query=query, negative_keys=given)
        if given.dim() != (2 if mode == "unpaired" else 3) or (mode == "paired" and given.shape[0] != query.shape[0]):
            wanted = "(K, D), shared by all queries" if mode == "unpaired" else "(M, K, D), K for each query"
            raise ValueError(
                f"{where}: negative_keys is {tuple(given.shape)} and query is {tuple(query.shape)}; {mode} negatives are {wanted}"
            )
        if 0 in given.shape and query.shape[0] > 0 and not may_be_none:
            raise ValueError(f"{where}: negative_keys is {tuple(given.shape)}; at least one key is needed{NONE_OF_THEM}")
        return Negatives(mode, given)

    def statistics(self, query: Tensor, wide: Sequence[Tensor | None], scale: Tensor, normalize: bool) -> ContrastiveStats:
        """Row statistics of paired or ragged negatives. `wide` are the stand-ins for query and keys, see wide.py."""
        s = listed_logits(Listed(query, self.keys, self.rows, scale, wide[0], wide[1], normalize))
        lse = self._by_segment(s, query.shape[0]) if self.rows is not None else s.logsumexp(1) if s.shape[1] else s.sum(1)
        none = torch.full_like(lse, -torch.inf)
        return ContrastiveStats(lse, none, torch.zeros_like(lse), torch.zeros_like(lse, dtype=torch.int64))

    def _by_segment(self, s: Tensor, n: int) -> Tensor:
        """Log-sum-exp over the values of each of n queries; -inf for a query without any."""
        assert self.rows is not None
        of_none, rows = self.rows >= n, self.rows.clamp(max=n - 1)
        s = s.masked_fill(of_none, -torch.inf)
        most = s.new_full((n,), -torch.inf).scatter_reduce(0, rows, s.detach(), "amax")
        base = most.masked_fill(most == -torch.inf, 0.0)
        total = s.new_zeros(n).index_add(0, rows, (s - base[rows]).exp())
        # A query without values takes no logarithm: log(0) has an infinite gradient.
        return torch.where(total == 0, -torch.inf, total.masked_fill(total == 0, 1.0).log() + base)


def one_positive(query: Tensor, key: Tensor, wide: Sequence[Tensor | None], scale: Tensor, normalize: bool) -> ContrastiveStats:
    """Statistics of rows whose only pair is their positive, key i for query i: the positive half of MoCo. `wide`: stand-ins of both."""
    query_wide, key_wide = wide
    listed = Listed(query, key[:, None], None, scale, query_wide, None if key_wide is None else key_wide[:, None], normalize)
    pos = listed_logits(listed).squeeze(1)
    return ContrastiveStats(torch.full_like(pos, -torch.inf), pos, pos, torch.ones_like(pos, dtype=torch.int64))


def _no_temperature(where: str, given: object) -> None:
    """Raise where negative_keys is one number: a temperature, which is the third argument of other losses."""
    is_number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    if not (is_number or (isinstance(given, Tensor) and given.dim() < 2 and given.numel() == 1)):
        return
    hint = "negative_keys is the third argument; give a temperature by its name, temperature="
    if is_number:
        raise TypeError(f"{where}: argument 'negative_keys' must be Tensor, not {type(given).__name__}: {hint}{given}")
    raise ValueError(f"{where}: expected negative_keys to be 2-D or 3-D, got one number: {hint}...")


def _ragged(where: str, given: Ragged, query: Tensor, may_be_none: bool) -> Negatives:
    if len(given) != 2:
        raise ValueError(f"{where}: ragged negative_keys is (values, offsets), got {len(given)} entries")
    values, offsets = given
    arguments.features(where, (2,), **{"query": query, VALUES: values})
    queries = query.shape[0]
    if values.shape[0] == 0 and queries > 0 and not may_be_none:
        raise ValueError(f"{where}: {VALUES} is {tuple(values.shape)}; at least one key is needed{NONE_OF_THEM}")
    if isinstance(offsets, Tensor) and offsets.dim() == 1 and offsets.shape[0] == queries:
        raise ValueError(
            f"{where}: {OFFSETS} has {queries} entries, one per query; offsets have one more, where the values of each query begin and "
            "the last ones end: from counts, torch.nn.functional.pad(counts.cumsum(0), (1, 0))"
        )
    # There is one more offset than queries.
    ends = arguments.ids(where, OFFSETS, offsets, queries + 1, query, "query rows + 1", "one where each query begins, and the end")
    assert ends is not None
    if arguments.free_to_read(ends) and (ends[0] != 0 or ends[-1] != values.shape[0] or bool((ends.diff() < 0).any())):
        raise ValueError(f"{where}: {OFFSETS} must rise from 0 to {values.shape[0]}, the number of values; got {ends.tolist()}")
    positions = torch.arange(values.shape[0], device=values.device)
    # The host reads no offset to find the query of each value. Positions below the first offset or above the last belong to no query.
    rows = torch.searchsorted(ends, positions, right=True) - 1
    return Negatives("ragged", values, rows.where(rows >= 0, query.shape[0]))
