"""The definition of the statistics, written again: Python loops for the classes of pairs, dense torch with autograd for the numbers.

It uses neither the package's pairs nor its norms nor its backends.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from problems import Call
from torch import Tensor

NEGATIVE, POSITIVE, EXCLUDED = 0, 1, 2


class Dense(NamedTuple):
    """The statistics of every row, by the definition."""

    lse_neg: Tensor
    lse_pos: Tensor
    pos: Tensor
    n_pos: Tensor


@cache
def classes(p: Call) -> Tensor:
    """(M, N), the class of every pair, by the rules, one pair after the other."""
    rules, out = p.rules(), torch.zeros(p.m, p.n, dtype=torch.int64)
    for i in range(p.m):
        for j in range(p.n):
            out[i, j] = _class_of(p, rules, i, j)
    return out


def _class_of(p: Call, rules: dict[str, Tensor], i: int, j: int) -> int:
    if p.exclude_self and i == j:
        return EXCLUDED
    if p.offset is not None and (j - i == p.offset or (p.symmetric and i - j == p.offset)):
        return POSITIVE
    same = {}
    for kind in ("label", "exclude"):
        q = rules.get(f"q_{kind}")
        k = rules.get(f"k_{kind}", q if p.symmetric else None)
        same[kind] = q is not None and int(q[i]) >= 0 and int(q[i]) == int(k[j])
    if same["exclude"]:
        return EXCLUDED
    mask = rules.get("mask")
    if same["label"] or (mask is not None and bool(mask[i % mask.shape[0], j % mask.shape[1]])):
        return POSITIVE
    return NEGATIVE


def logits(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """Dense logits in the dtype of q. Half precision is as under autocast: norms in float32, product and scaling in half."""
    if q.dtype in (torch.float16, torch.bfloat16):
        if normalize:
            q_hat, k_hat = F.normalize(q.float(), dim=1).to(q.dtype), F.normalize(k.float(), dim=1).to(q.dtype)
        else:
            q_hat, k_hat = q, k
        s = ((q_hat @ k_hat.T) * scale.to(q.dtype)).float()
    else:
        s = (F.normalize(q, dim=1) @ F.normalize(k, dim=1).T if normalize else q @ k.T) * scale
    return s if bias is None else s + bias


def statistics(s: Tensor, kinds: Tensor) -> Dense:
    """The definition, row by row of a dense matrix."""

    def lse(kind: int) -> Tensor:
        kept = kinds == kind
        # A row without such a pair has -inf, and takes no part in logsumexp, whose gradient would be nan.
        some = kept.any(1)
        value = s.masked_fill(~kept, -torch.inf).masked_fill(~some[:, None], 0.0).logsumexp(1)
        return value.masked_fill(~some, -torch.inf)

    n_pos = (kinds == POSITIVE).sum(1)
    pos = s.masked_fill(kinds != POSITIVE, 0.0).sum(1) / n_pos.clamp(min=1)
    return Dense(lse(NEGATIVE), lse(POSITIVE), pos, n_pos)
