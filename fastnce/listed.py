"""Logits of pairs that are listed one by one: explicit negatives, each of which belongs to one query, and the positives of MoCo.

There are no more pairs than keys, so nothing here needs tiles. Forward and backward of

    s_t = scale <q^_i, k^_t>       i: the query that key t is listed for;  x^ = r x,  r = 1 / |x|;  without normalize r = 1

    dq^_i = sum_t g_t scale k^_t        dk^_t = g_t scale q^_i        dx = r (dx^ - x^ <x^, dx^>)        dscale = sum_t g_t s_t / scale

Keys are read a piece at a time, so that a float32 copy of half-precision keys, or a copy of keys that are one row of memory expanded to
many, is never larger than a piece. Products take one of three ways:

    CPU                               the pairs of a piece are the entries of a sparse matrix, whose products torch computes in one pass
                                      over the keys, with sums in float32 or more
    GPU, several keys for a query     a batch of matrix products
    GPU, one key for a query, or      elements are multiplied and added up
    torch may round factors (TF32)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import tiles
from fastnce.precision import compute_dtype, inverse, inverse_norms, no_autocast, valid_scale, vector_dtype

SCHEMA = "Tensor q, Tensor keys, Tensor? rows, Tensor scale, Tensor? q_wide, Tensor? keys_wide, bool normalize"

# The gradient by a key has a factor 1 / |k|^2, which may leave float32 where the gradient itself does not. It is multiplied by this number
# first, and divided by it later.
LIFT = 2.0**30


class Listed(NamedTuple):
    """The arguments of the operator fastnce::listed, and the last ones of its backward.

    q (M, D)
    keys (M, K, D)                  query i against keys[i]: logits (M, K)
    keys (T, D) with rows (T,)      query rows[t] against keys[t]: logits (T,). A key of row M belongs to no query: its logit is 0
    """

    q: Tensor
    keys: Tensor
    rows: Tensor | None
    scale: Tensor
    q_wide: Tensor | None
    keys_wide: Tensor | None
    normalize: bool

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that take the gradients: stand-ins (wide.py) where there are any."""
        return self.q if self.q_wide is None else self.q_wide, self.keys if self.keys_wide is None else self.keys_wide, self.scale


def forward(*flat: Any) -> tuple[Tensor, Tensor]:
    """Logits of a Listed, and the inverse norms of the keys (empty without normalize)."""
    problem = Listed(*flat)
    with no_autocast(problem.q):
        return _forward(problem)


def fake(*flat: Any) -> tuple[Tensor, Tensor]:
    """Tensors like those of forward."""
    problem = Listed(*flat)
    s = problem.keys.new_empty(problem.keys.shape[:-1], dtype=compute_dtype(problem.q.dtype))
    return s, s.new_empty(s.shape if problem.normalize else 0)


def backward(g: Tensor, s: Tensor, r: Tensor, wanted: Sequence[bool], *flat: Any) -> tuple[Tensor, ...]:
    """dL/d(q, keys, scale) of a Listed from g = dL/ds and the results of forward; empty where not wanted."""
    problem = Listed(*flat)
    with no_autocast(problem.q):
        found = _backward(g, s, r, wanted, problem)
    return tuple(s.new_empty(0) if d is None else d for d in found)


def fake_backward(g: Tensor, s: Tensor, r: Tensor, wanted: Sequence[bool], *flat: Any) -> tuple[Tensor, ...]:
    """Tensors like those of backward."""
    like = Listed(*flat).differentiable
    return tuple(t.new_empty(t.shape) if want else s.new_empty(0) for t, want in zip(like, wanted, strict=True))


def _forward(problem: Listed) -> tuple[Tensor, Tensor]:
    q, keys, rows, scale, _, _, normalize = problem
    q_hat, _ = _unit(q, normalize)
    scale = valid_scale(scale)
    if _shared(keys):
        k_hat, r = _unit(keys[0], normalize)
        s = (q_hat @ k_hat.T) * scale
        return s, s.new_empty(0) if r is None else r.expand(s.shape).contiguous()
    s = q_hat.new_empty(keys.shape[:-1])
    norms = torch.empty_like(s) if normalize else s.new_empty(0)
    for piece in _pieces(q_hat, keys, rows, False):
        s[piece.at] = piece.dots()
        if normalize:
            norms[piece.at] = torch.linalg.vector_norm(piece.keys, dim=-1)
    r = inverse(norms, norms.dtype) if normalize else norms
    s.mul_(r if normalize else 1.0).mul_(scale)
    # A key of no query may be nan. masked_fill_ and not a product with 0: 0 * nan is nan.
    return s if rows is None else s.masked_fill_(rows == len(q), 0.0), r


def _backward(
    g: Tensor, s: Tensor, r: Tensor, wanted: Sequence[bool], problem: Listed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    q, keys, rows, scale, _, _, normalize = problem
    dtypes = [t.dtype for t in problem.differentiable]
    q_hat, r_q = _unit(q, normalize)
    due, moment = g * valid_scale(scale), g * s
    dscale = (moment.sum(dtype=vector_dtype(q)) / scale).to(scale.dtype) if wanted[2] else None
    # Where keys have `rows`, row M takes the keys of no query, and the sums of a query are in float64: index_put adds its terms one by one.
    dq_hat = q_hat.new_zeros(q.shape) if rows is None else q_hat.new_zeros((len(q) + 1, q.shape[1]), dtype=vector_dtype(q))
    dkeys = keys.new_empty(keys.shape, dtype=dtypes[1]) if wanted[1] else None
    if wanted[0] and dkeys is None and _shared(keys):
        dq_hat = due @ _unit(keys[0], normalize)[0]
    elif wanted[0] or dkeys is not None:
        by_key = due * r if normalize else due
        radial = moment * r * (LIFT * r) if normalize else None
        for piece in _pieces(q_hat, keys, rows, dkeys is not None and dkeys.dtype != q_hat.dtype):
            at = piece.at
            if wanted[0]:
                piece.add_sums(by_key[at], dq_hat)
            if dkeys is not None:
                out = dkeys[at] if dkeys.dtype == q_hat.dtype else piece.place()
                torch.mul(piece.queries, by_key[at][..., None], out=out)
                if radial is not None:
                    out.addcmul_(piece.keys, radial[at][..., None], value=-1 / LIFT)
                if rows is not None:
                    out.masked_fill_((rows[at] == len(q))[:, None], 0.0)
                if dkeys.dtype != q_hat.dtype:
                    dkeys[at] = out
    if not wanted[0]:
        return None, dkeys, dscale
    dq = dq_hat[: len(q)].to(q_hat.dtype)
    if r_q is not None:
        # <q^, dq^> is the sum of g s over the keys of the query.
        if rows is None:
            along = moment.sum(1)
        else:
            along = dq_hat.new_zeros(len(dq_hat)).index_put_((rows,), moment.to(dq_hat.dtype), accumulate=True)[: len(q)].to(dq.dtype)
        dq = dq.addcmul_(q_hat, along[:, None], value=-1).mul_(r_q[:, None])
    return dq.to(dtypes[0]), dkeys, dscale


class _Piece(NamedTuple):
    """Some of the pairs: where their logits are, their keys, and their queries."""

    at: tuple[slice, ...]
    keys: Tensor
    q_hat: Tensor
    rows: Tensor | None
    scratch: Tensor
    runs: _Runs | None  # where pairs are entries of a sparse matrix
    batched: bool  # elsewhere: (B, K, D) keys, for which matrix products serve

    def dots(self) -> Tensor:
        """<key, query>."""
        if self.runs is not None:
            own = self.own(self.q_hat)
            queries = own if self.runs.query is None else own[self.runs.query]
            pairs = self.runs.matrix(self.keys.new_zeros(self.keys.shape[:-1]))
            dots = torch.sparse.sampled_addmm(pairs, queries, self.keys.flatten(0, -2).T, beta=0.0)
            return dots.values().view(self.keys.shape[:-1])
        return torch.bmm(self.keys, self.queries.mT)[..., 0] if self.batched else self.times(self.queries).sum(-1)

    def add_sums(self, weights: Tensor, to: Tensor) -> None:
        """to[query] += sum of weight * key."""
        to = self.own(to)
        if self.runs is not None:
            sums = torch.sparse.mm(self.runs.matrix(weights), self.keys.flatten(0, -2), "sum").to(to.dtype)
            to.add_(sums) if self.runs.query is None else to.index_add_(0, self.runs.query, sums)
        elif self.rows is not None:
            to.index_put_((self.rows,), self.times(weights[..., None]).to(to.dtype), accumulate=True)
        else:
            to += torch.bmm(weights[:, None], self.keys)[:, 0] if self.batched else self.times(weights[..., None]).sum(1)

    def own(self, x: Tensor) -> Tensor:
        """x has a row for every query: the rows of the queries that this piece counts from 0."""
        return x[self.at[0]] if self.rows is None else x

    @property
    def queries(self) -> Tensor:
        """The queries of the pairs, in a shape that multiplies with the keys."""
        return self.own(self.q_hat)[:, None] if self.rows is None else self.q_hat[self.rows]

    def times(self, factor: Tensor) -> Tensor:
        """keys * factor; valid until the next product."""
        return torch.mul(self.keys, factor, out=self.place())

    def place(self) -> Tensor:
        """Memory of the shape of the keys; valid until its next use."""
        return self.scratch[: self.keys.numel()].view(self.keys.shape)


class _Runs(NamedTuple):
    """A sparse matrix (S, keys) whose entries are pairs. A row: up to CPU_SUM keys of one query that follow each other."""

    begin: Tensor  # (S + 1,): first entry of every row, and the end of the last
    columns: Tensor  # of every entry
    query: Tensor | None  # (S,): of every row, counted as the piece does; None: 0, 1, 2, ...

    @staticmethod
    def of_lists(queries: int, listed: int) -> _Runs:
        """`listed` keys for each of `queries` queries."""
        columns, parts = torch.arange(queries * listed, device="cpu"), -(-listed // tiles.CPU_SUM)
        begin = columns.view(queries, listed)[:, :: tiles.CPU_SUM].flatten()
        query = None if parts == 1 else torch.arange(queries, device="cpu").repeat_interleave(parts)
        return _Runs(F.pad(begin, (0, 1), value=len(columns)), columns, query)

    @staticmethod
    def of_rows(rows: Tensor) -> _Runs:
        """Key t for query rows[t]."""
        columns = torch.arange(len(rows), device="cpu")
        first = columns % tiles.CPU_SUM == 0
        first[1:] |= rows[1:] != rows[:-1]
        begin = columns[first]
        return _Runs(F.pad(begin, (0, 1), value=len(columns)), columns, rows[begin])

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix with these values of the pairs."""
        _accept_sparse()
        size = (len(self.begin) - 1, len(self.columns))
        return torch.sparse_csr_tensor(self.begin, self.columns, values.flatten(), size, check_invariants=False)


@cache
def _accept_sparse() -> None:
    """Make one sparse matrix with warnings off: torch warns at the first of a process, and the user wrote none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        none = torch.zeros(1, dtype=torch.int64, device="cpu")
        torch.sparse_csr_tensor(none, none[:0], none[:0].float(), (0, 0), check_invariants=False)


def _pieces(q_hat: Tensor, keys: Tensor, rows: Tensor | None, place: bool) -> Iterator[_Piece]:
    """All pairs, piece by piece. place: the caller will use place() too. Where pieces need no memory, all keys are one piece."""
    sparse = _sparse(keys)
    batched = keys.dim() == 3 and keys.shape[1] > 1 and not _rounds(keys)
    copies, place = keys.dtype != q_hat.dtype or (sparse and not keys.is_contiguous()), place or not (sparse or batched)
    most = (tiles.CPU_LISTED if keys.device.type == "cpu" else tiles.GPU_LISTED) // keys.shape[-1]
    most = min(max(1, most), keys.shape[:-1].numel()) if copies or place else keys.shape[:-1].numel()
    # One allocation serves all pieces: the pages of a new one would cost more than the arithmetic.
    scratch, copy = (q_hat.new_empty(most * keys.shape[-1] if needed else 0) for needed in (place, copies))

    of_lists = cache(_Runs.of_lists)  # all pieces but the last have one shape

    def piece(*at: slice) -> _Piece:
        own, its, runs = keys[at], None if rows is None else rows[at], None
        if copies:
            own = copy[: own.numel()].view(own.shape).copy_(own)
        if sparse:
            runs = of_lists(*own.shape[:2]) if its is None else _Runs.of_rows(its)
        return _Piece(at, own, q_hat, its, scratch, runs, batched)

    if rows is not None:
        # Row M, for keys of no query.
        q_hat = F.pad(q_hat, (0, 0, 0, 1))
        for start in range(0, len(keys), max(most, 1)):
            yield piece(slice(start, start + most))
        return
    queries, listed = keys.shape[:2]
    across = max(1, min(listed, most))
    down = max(1, most // across)
    for i in range(0, queries, down):
        for k in range(0, listed, across):
            yield piece(slice(i, min(i + down, queries)), slice(k, k + across))


def _unit(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows in the inner precision, normalised, and their inverse norms; without normalize the rows as they are, and None."""
    x = x.to(compute_dtype(x.dtype))
    r = inverse_norms(x) if normalize else None
    return x if r is None else x * r[:, None], r


def _sparse(keys: Tensor) -> bool:
    """Whether pairs are entries of a sparse matrix."""
    return keys.device.type == "cpu"


def _shared(keys: Tensor) -> bool:
    """Whether all queries have one list of keys in memory: then one matrix product gives all logits."""
    return keys.dim() == 3 and len(keys) > 1 and keys.stride(0) == 0 and keys.shape[1] > 0 and not _rounds(keys)


def _rounds(keys: Tensor) -> bool:
    """Whether torch may round the factors of a float32 matrix product on this device."""
    backend: Any = torch.backends.cuda if keys.is_cuda else torch.backends.mkldnn
    return keys.dtype != torch.float64 and backend.matmul.fp32_precision in ("tf32", "bf16")
