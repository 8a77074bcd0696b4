"""The primitive of every loss: differentiable statistics of the rows of a matrix of similarities that is never stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastnce import arguments, autograd, backends, hints, relations
from fastnce.pairs import Pairs
from fastnce.precision import compute_dtype, logaddexp
from fastnce.problem import Problem, Side
from fastnce.wide import shared


class ContrastiveStats(NamedTuple):
    """Statistics of the logits of every row, (M,) each; floats in nats, float32 (float64 for float64 features).

    Attributes:
        lse_neg: log sum exp over the negatives of the row; -inf without any. Differentiable.
        lse_pos: the same over its positives; equal to pos where there is exactly one. Differentiable.
        pos: mean logit of its positives; 0 without any. Differentiable.
        n_pos: how many positives it has, int64.
        rank: how many negatives are above the threshold (by default, the row's best positive), int64. A logit of nan is above, and so is
            every negative where the threshold is nan or there is no positive.
        ties: how many negatives cannot be told from the threshold in this precision, int64. The place of the positive, counted from 0, is
            between rank and rank + ties; both are 0 for a top-1 hit.
        hardest: index of the largest negative that is not nan, int64; -1 without any.
        hardest_logit: its logit; -inf without any.
        pos_max: logit of the best positive; -inf without any.
        columns: the same statistics of every column, (N,) each. None without two_sided=True.

    The five from rank to pos_max are None without metrics=True, and have no gradient.
    """

    lse_neg: Tensor
    lse_pos: Tensor
    pos: Tensor
    n_pos: Tensor
    rank: Tensor | None = None
    ties: Tensor | None = None
    hardest: Tensor | None = None
    hardest_logit: Tensor | None = None
    pos_max: Tensor | None = None
    columns: ContrastiveStats | None = None


def contrastive_stats(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    normalize: bool = True,
    exclude_self: bool | None = None,
    offset: int | None = None,
    q_labels: Tensor | None = None,
    k_labels: Tensor | None = None,
    q_exclude_ids: Tensor | None = None,
    k_exclude_ids: Tensor | None = None,
    positive_mask: Tensor | None = None,
    two_sided: bool = False,
    metrics: bool = False,
    threshold: Tensor | None = None,
    backend: str = "auto",
) -> ContrastiveStats:
    """The statistics that every loss here is a formula over: sums over the negatives and positives of every row of similarities.

        s_ij = scale * cos(q_i, k_j) + bias     lse_neg_i = log sum_{negatives j} exp s_ij     pos_i = mean_{positives j} s_ij

    The similarities are never stored: memory is O((M + N) D). InfoNCE is softplus(lse_neg - pos); docs/math.md derives the others.

    Args:
        q: (M, D) queries. Rows may have any length: they are normalised here unless normalize=False.
        k: (N, D) keys. Default: the keys are the queries, and each logit is computed once for both of its rows.
        scale: 1 / temperature, a positive float or a one-element tensor, which gets its gradient.
        bias: a float or a one-element tensor, added to every logit, with its gradient. Default: none.
        normalize: False takes dot products of the rows as they are, instead of cosines.
        exclude_self: leave out the pairs with j == i. Default: where k is None.
        offset: key i + offset is a positive of query i. Without k, query i is one of query i + offset as well; offset is then at least 1.
            From -(2^31 - 1) to 2^31 - 1. Default: no positives by place.
        q_labels, k_labels: integers (M,), (N,). Equal labels make a positive.
        q_exclude_ids, k_exclude_ids: integers (M,), (N,). Equal ids leave a pair out.
        positive_mask: bool (B, C): pair (i, j) is a positive where positive_mask[i % B, j % C].
        two_sided: also the statistics of every key over the queries, in `columns`, from the same pass.
        metrics: also rank, ties, the hardest negative and the best positive of every row.
        threshold: (M,) logits from which rank and ties count, with metrics=True. Default: the row's best positive.
        backend: "auto", or by name "torch" (any device), "cpu" (the C++ library), "triton", "cuda" (NVIDIA GPUs), "reference" (dense).

    The first rule that applies to a pair decides: exclude_self leaves it out; offset makes it a positive; equal exclude ids leave it out;
    equal labels or the mask make it a positive; otherwise it is a negative. So exclusion wins over equal labels. A negative label or id
    matches nothing.

    Returns:
        ContrastiveStats. Statistics over several disjoint sets of keys are added up by `merge`.

    Raises:
        ValueError: shapes or options that do not fit together, a scale that is not positive, positive_mask and offset without k.
        TypeError, RuntimeError, NotImplementedError: as docs/numerics.md lists; each message says what to write instead.

    Example:
        >>> z = torch.eye(4)
        >>> found = fastnce.contrastive_stats(z, scale=1.0, offset=2)  # two negatives each, at similarity 0: log 2
        >>> found.lse_neg, found.pos
        (tensor([0.6931, 0.6931, 0.6931, 0.6931]), tensor([0., 0., 0., 0.]))
    """
    where = "contrastive_stats"
    if k is None:
        arguments.features(where, q=q)
        rows = columns = q.shape[0]
    else:
        arguments.features(where, q=q, k=k)
        q, k = arguments.one_dtype(where, q=q, k=k)
        rows, columns = q.shape[0], k.shape[0]
        arguments.some_keys(where, "k", k, rows)
    symmetric = k is None
    offset = arguments.offset(where, offset)
    if symmetric and two_sided:
        raise ValueError(f"{where}: two_sided needs k; where the keys are the queries, rows and columns are the same")
    if symmetric and offset is not None and offset < 1 and rows > 0:
        raise ValueError(f"{where}: offset is {offset}; where the keys are the queries it must be at least 1")
    if symmetric and (k_labels is not None or k_exclude_ids is not None):
        raise ValueError(f"{where}: k_labels and k_exclude_ids need k; where the keys are the queries, give q_labels, q_exclude_ids")
    q_label = arguments.ids(where, "q_labels", q_labels, rows, q, "q")
    k_label = arguments.ids(where, "k_labels", k_labels, columns, q, "k")
    q_exclude = arguments.ids(where, "q_exclude_ids", q_exclude_ids, rows, q, "q")
    k_exclude = arguments.ids(where, "k_exclude_ids", k_exclude_ids, columns, q, "k")
    for one, other in (("labels", (q_label, k_label)), ("exclude_ids", (q_exclude, k_exclude))):
        if not symmetric and (other[0] is None) != (other[1] is None):
            missing = f"q_{one}" if other[0] is None else f"k_{one}"
            raise ValueError(f"{where}: q_{one} and k_{one} go together: give both; {missing} is missing")
    mask = relations.mask(where, "positive_mask", positive_mask, q)
    if symmetric and mask is not None and offset is not None:
        raise ValueError(f"{where}: positive_mask and offset together need k; without, put the partners into the mask")
    threshold = arguments.threshold(where, threshold, rows, q)
    if threshold is not None and (symmetric or two_sided or not metrics):
        raise ValueError(f"{where}: threshold counts ranks of rows against other keys: it needs metrics=True, k, and two_sided=False")
    arguments.values(where, normalize, **({"q": q} if k is None else {"q": q, "k": k}))
    pairs = Pairs(symmetric if exclude_self is None else exclude_self, offset, q_label, k_label, q_exclude, k_exclude, mask)
    hints.temperature(where, None, scale, normalize)
    names = ("q_labels", "k_labels", "q_exclude_ids", "k_exclude_ids")
    hints.negative_ids(where, names, (q_label, k_label, q_exclude, k_exclude))
    scale = arguments.scalar(where, "scale", scale, q)
    bias = None if bias is None else arguments.scalar(where, "bias", bias, q, positive=False)
    q_wide, k_wide = (None, None) if k is None else shared(q, k)
    problem = Problem(q, k, scale, bias, pairs, two_sided, normalize, metrics, threshold, q_wide=q_wide, k_wide=k_wide, rounded=True)
    found = compute(where, problem, backend)
    hints.something_to_compare(where, found.lse_neg, found.n_pos)
    remedy = "; offset, labels or positive_mask say which pairs are positive" if offset is q_label is mask is None else ""
    hints.without_positive(where, found.n_pos, "rows", f": pos is 0 there and lse_pos -inf{remedy}")
    return _rounded(found, compute_dtype(q.dtype))


def check_backend(where: str, name: str) -> None:
    """Raise for an unknown backend, also in a loss that dense_small answers before any backend is asked."""
    arguments.backend(where, name, backends.BACKENDS)


def compute(where: str, problem: Problem, backend: str) -> ContrastiveStats:
    """Statistics of a checked problem, in vector_dtype, or where it says `rounded` in the compute dtype. Messages begin with `where`."""
    pairs = problem.pairs
    if pairs.mask is not None and 0 in pairs.mask.shape:  # the check of the mask has seen that there is no pair either
        pairs = pairs._replace(mask=None)
        problem = problem._replace(pairs=pairs)
    if problem.symmetric and pairs.mask is not None:
        # The mask need not be symmetric, so the whole matrix is computed: the keys become a tensor of their own.
        pairs = pairs._replace(k_label=pairs.q_label, k_exclude=pairs.q_exclude)
        q_wide, k_wide = shared(problem.q, problem.q)
        problem = problem._replace(k=problem.q.clone(), pairs=pairs, q_wide=q_wide, k_wide=k_wide)
    found = [_public(side) for side in autograd.statistics(problem, backends.pick(where, backend, problem))]
    return found[0]._replace(columns=found[1]) if problem.two_sided else found[0]


def _public(side: Side) -> ContrastiveStats:
    metrics = (side.rank, side.ties, side.hardest, side.hardest_logit, side.pos_max)
    return ContrastiveStats(side.lse_neg, side.lse_pos, side.pos, side.n_pos, *metrics)


def _rounded(found: ContrastiveStats, dtype: torch.dtype) -> ContrastiveStats:
    def rounded(v: Tensor | None) -> Tensor | None:
        return v if v is None or not v.is_floating_point() else v.to(dtype)

    columns = None if found.columns is None else _rounded(found.columns, dtype)
    return ContrastiveStats(*(rounded(v) for v in found[:-1]), columns)  # type: ignore


def merge(a: ContrastiveStats, b: ContrastiveStats, shift: int = 0) -> ContrastiveStats:
    """Statistics of the same rows over two disjoint sets of keys, as if the sets were one: for a ring, a queue, or keys in chunks.

        lse = log(exp lse_a + exp lse_b)        pos = (n_a pos_a + n_b pos_b) / (n_a + n_b)        n_pos, rank, ties: sums

    Args:
        a, b: ContrastiveStats of the same M rows, (M,) each.
        shift: added to the hardest index of b: the number of keys that come before those of b. Default: 0.

    Returns:
        ContrastiveStats. Rank and ties are right where both counted from the same threshold. `columns` is None: the columns of the two are
        different keys.

    Raises:
        RuntimeError: a and b have different numbers of rows.

    Example:
        >>> q, k = torch.eye(4), torch.eye(4)
        >>> a = fastnce.contrastive_stats(q, k[:3], scale=1.0)
        >>> b = fastnce.contrastive_stats(q, k[3:], scale=1.0)
        >>> fastnce.merge(a, b).lse_neg  # log(e + 3), as over all four keys
        tensor([1.7437, 1.7437, 1.7437, 1.7437])
    """
    n_pos = a.n_pos + b.n_pos
    total = n_pos.clamp(min=1)
    merged = ContrastiveStats(
        logaddexp(a.lse_neg, b.lse_neg),
        logaddexp(a.lse_pos, b.lse_pos),
        (a.pos * a.n_pos + b.pos * b.n_pos) / total,
        n_pos,
    )
    if a.rank is None or b.rank is None:
        return merged
    assert a.ties is not None and b.ties is not None
    assert a.hardest is not None and a.hardest_logit is not None and a.pos_max is not None
    assert b.hardest is not None and b.hardest_logit is not None and b.pos_max is not None
    harder = b.hardest_logit > a.hardest_logit
    return merged._replace(
        rank=a.rank + b.rank,
        ties=a.ties + b.ties,
        hardest=torch.where(harder, b.hardest + shift, a.hardest),
        hardest_logit=torch.maximum(a.hardest_logit, b.hardest_logit),
        pos_max=torch.maximum(a.pos_max, b.pos_max),
    )
