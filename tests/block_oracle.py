"""The oracle of statistics in blocks of rows: for problems whose logits are too many to have at once, on any device."""

from __future__ import annotations

import oracle
import test_statistics
import torch
from problems import Call
from torch import Tensor

BLOCK = 512  # rows: 512 x 5,003 float64 logits are 20 MB


def kinds_of(p: Call, i: Tensor, j: Tensor) -> Tensor:
    """oracle.classes of the pairs of rows i and columns j, all at once."""
    rules = {name: value.to(i.device) for name, value in p.rules().items()}

    def same(kind: str) -> Tensor:
        q = rules.get(f"q_{kind}")
        if q is None:
            return torch.zeros(len(i), len(j), dtype=torch.bool, device=i.device)
        k = rules.get(f"k_{kind}", q)
        return (q[i][:, None] == k[j]) & (q[i] >= 0)[:, None]

    positive = same("label")
    if "mask" in rules:
        mask = rules["mask"]
        positive |= mask[i % mask.shape[0]][:, j % mask.shape[1]]
    kinds = positive * oracle.POSITIVE
    kinds[same("exclude")] = oracle.EXCLUDED
    ahead = j - i[:, None]
    if p.offset is not None:
        kinds[ahead == p.offset] = oracle.POSITIVE
        if p.symmetric:
            kinds[ahead == -p.offset] = oracle.POSITIVE
    if p.exclude_self:
        kinds[ahead == 0] = oracle.EXCLUDED
    return kinds


def blocked(p: Call, dtype: torch.dtype, device: str, wide: bool) -> tuple[list[Tensor], list[Tensor | None], float]:
    """As test_statistics._dense, from blocks of rows and then of columns. `wide`: in float64, on inputs stored in dtype."""
    leaves = [None if t is None else (t.double() if wide else t).to(device).requires_grad_() for t in p.tensors(dtype)]
    q, k, scale, bias = leaves
    assert q is not None
    assert scale is not None
    keys = q if k is None else k
    everything = [torch.arange(rows, device=device) for rows in (p.m, p.n)]
    sides = range(2 if p.two_sided else 1)
    upstream = iter(test_statistics.upstream(p, [torch.zeros((p.m, p.n)[side]) for side in sides for _ in range(3)]))
    out: list[Tensor] = []
    largest = 0.0
    for side in sides:
        parts: list[list[Tensor]] = [[], [], [], []]
        grads = [next(upstream).to(device) for _ in range(3)]
        for rows in everything[side].split(BLOCK):
            i, j = (rows, everything[1]) if side == 0 else (everything[0], rows)
            s = oracle.logits(q[i], keys[j], scale, bias, p.normalize)
            kinds = kinds_of(p, i, j)
            found = oracle.statistics(s if side == 0 else s.T, kinds if side == 0 else kinds.T)
            terms = [(v.masked_fill(~torch.isfinite(v), 0.0) * g[rows].to(v.dtype)).sum() for v, g in zip(found[:3], grads, strict=True)]
            torch.stack(terms).sum().backward()
            for part, v in zip(parts, found, strict=True):
                part.append(v.detach())
            largest = max(largest, s.detach().abs().max().item())
        out += [torch.cat(part).cpu() for part in parts]
    return out, [None if t is None else torch.zeros_like(t).cpu() if t.grad is None else t.grad.cpu() for t in leaves], largest
