"""The problems that every backend must solve, each with the reason why it is here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of contrastive_stats, and why it is made. n_keys = 0: the keys are the queries."""

    why: str
    m: int
    n_keys: int
    d: int
    offset: int | None = None
    exclude_self: bool = False
    labels: int = 0  # how many label values there are, 0: no labels; one in eight is negative
    excludes: int = 0  # the same of exclude ids
    mask: tuple[int, int] | None = None
    two_sided: bool = False
    normalize: bool = True
    scale: float = 10.0
    bias: float | None = None
    regime: str = "random"
    seed: int = 0

    @property
    def symmetric(self) -> bool:
        return self.n_keys == 0

    @property
    def n(self) -> int:
        return self.n_keys or self.m

    def __str__(self) -> str:
        return self.why.split(":")[0]

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """q, k, scale, bias: the same numbers for every dtype, rounded to it."""
        g = torch.Generator().manual_seed(self.seed)
        q = torch.randn(self.m, self.d, generator=g, dtype=torch.float64)
        k = None if self.symmetric else torch.randn(self.n, self.d, generator=g, dtype=torch.float64)
        if self.regime == "aligned":
            base = q if k is None else q[torch.arange(self.n) % self.m]
            if k is None:
                half = self.m // 2
                q[half : 2 * half] = q[:half] + 0.4 * torch.randn(half, self.d, generator=g, dtype=torch.float64)
            else:
                k = base + 0.4 * k
        if self.regime == "cone":
            q += 10.0
            k = None if k is None else k + 10.0
        if self.normalize:
            # Rows of very different lengths, so that a norm that is forgotten on one side shows. In float16 they differ less: the gradient
            # of a short row is as much longer, and would leave the range.
            reach = 0.3 if dtype == torch.float16 else 3.0
            q *= torch.logspace(-reach, reach, self.m, dtype=torch.float64)[:, None]
            k = None if k is None else k * torch.logspace(reach, -reach, self.n, dtype=torch.float64)[:, None]
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        bias = None if self.bias is None else torch.tensor(self.bias, dtype=kind)
        return q.to(dtype), None if k is None else k.to(dtype), torch.tensor(self.scale, dtype=kind), bias

    def rules(self) -> dict[str, Tensor]:
        """The integer vectors and the mask that are in use, by their names in Pairs."""
        g = torch.Generator().manual_seed(self.seed + 1)
        out = {}
        for kind, count in (("label", self.labels), ("exclude", self.excludes)):
            if count:
                out[f"q_{kind}"] = torch.randint(-count // 8, count, (self.m,), generator=g)
                if not self.symmetric:
                    out[f"k_{kind}"] = torch.randint(-count // 8, count, (self.n,), generator=g)
        if self.mask:
            out["mask"] = torch.rand(self.mask, generator=g) < 0.3
        return out

    def call(self) -> dict[str, Any]:
        """Keyword arguments of contrastive_stats."""
        names = {"q_label": "q_labels", "k_label": "k_labels", "q_exclude": "q_exclude_ids", "k_exclude": "k_exclude_ids"}
        rules = {names.get(name, "positive_mask"): value for name, value in self.rules().items()}
        flags = {"offset": self.offset, "exclude_self": self.exclude_self, "two_sided": self.two_sided, "normalize": self.normalize}
        return rules | flags


PROBLEMS = (
    Call("one pair: no negatives at all", 1, 1, 3, offset=0),
    Call("one column: D = 1, all similarities are +-1", 9, 14, 1, offset=0),
    Call("queue: ragged in all three sizes, N > M, no positive", 33, 70, 24),
    Call("in-batch: positives on the diagonal, more keys than queries", 33, 70, 24, offset=0),
    Call("gathered: positives start at another rank's offset", 20, 70, 24, offset=37),
    Call("offset off the end: some rows have no positive", 40, 50, 8, offset=25),
    Call("negative offset: the first rows have no positive", 40, 50, 8, offset=-7),
    Call("clip: both directions from one tile", 45, 45, 16, offset=0, two_sided=True, bias=-3.0),
    Call("clip offset: columns outside the diagonal have no positive", 20, 53, 16, offset=30, two_sided=True),
    Call("clip captions: several positives per row and per column", 30, 53, 16, labels=12, two_sided=True, bias=1.0),
    Call("clip captions, aligned too: ids and the diagonal agree or add up", 40, 40, 16, offset=0, labels=12, two_sided=True),
    Call("simclr: z z' without self, partner at N/2", 66, 0, 24, offset=33, exclude_self=True),
    Call("simclr solved: positives near 1 at a low temperature", 66, 0, 24, offset=33, exclude_self=True, scale=100.0, regime="aligned"),
    Call("two partners: 2 offset < N, a middle row has one on each side", 50, 0, 12, offset=10, exclude_self=True),
    Call("self kept: symmetric without excluding the diagonal", 35, 0, 12, offset=17),
    Call("supcon: labels, some negative, some alone", 70, 0, 24, labels=9, exclude_self=True),
    Call("supcon one class: no negatives", 20, 0, 8, labels=1, exclude_self=True),
    Call("supcon one view: anchors are the first rows of the keys", 24, 72, 16, labels=9, exclude_self=True),
    Call("mask: not symmetric, one example matrix for three views", 60, 0, 16, mask=(20, 20), exclude_self=True),
    Call("mask and ids: rows against keys", 33, 44, 16, mask=(11, 44), excludes=5, labels=7),
    Call("excluded documents: the own pair stays", 33, 70, 24, offset=0, excludes=6),
    Call("excluded symmetric", 66, 0, 24, offset=33, excludes=6, exclude_self=True),
    Call("everything excluded: one id for all", 20, 30, 8, excludes=1),
    Call("excluded labels: exclusion wins over labels, alignment over both", 40, 40, 8, offset=5, labels=4, excludes=4, two_sided=True),
    Call("not normalized: lengths matter, logits are unbounded", 40, 60, 16, offset=0, normalize=False, scale=0.7),
    Call("not normalized, large: logits far beyond the unshifted range", 40, 60, 16, offset=0, normalize=False, scale=9.0, two_sided=True),
    Call("low temperature: 1/200, running maximum", 66, 0, 24, offset=33, exclude_self=True, scale=200.0),
    # Weights are divided by the sums of their row and of their column. If both rounded t differently, gradients would be too far off.
    Call("low temperature, labels: t from both ends", 100, 130, 24, labels=20, scale=200.0, two_sided=True, bias=-10.0, seed=2),
    Call("just unshifted: scale at the limit of the fast path", 66, 0, 24, offset=33, exclude_self=True, scale=40.0, regime="aligned"),
    Call("just shifted: scale above it", 66, 0, 24, offset=33, exclude_self=True, scale=40.1, regime="aligned"),
    Call("high temperature: all logits nearly equal", 66, 0, 24, offset=33, exclude_self=True, scale=1e-3),
    Call("cone: all similarities near 0.99", 60, 60, 24, offset=0, scale=50.0, regime="cone", two_sided=True),
    Call("solved clip: 1/temperature 100", 60, 60, 24, offset=0, scale=100.0, regime="aligned", two_sided=True),
)


def of(start: str, /, **changes: Any) -> Call:
    """The first problem whose why begins with `start`, with these changes."""
    return next(p for p in PROBLEMS if p.why.startswith(start))._replace(**changes)
