"""Products of matrices, by the fastest routine that torch has for this processor, and of rows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastnce.tiles import rows_of

# oneDNN takes 10 us to look up its kernel. From this many multiplications on, its better rate is worth it.
ONEDNN_FROM = 2**20


def product(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T for x (m, d) and w (n, d), where w is contiguous or the transpose of a contiguous matrix.

    torch.mm calls MKL, whose float32 kernel stays at its AVX2 rate on AMD processors: about 100 GFLOP/s per Zen 5 core. The linear
    layer of oneDNN reaches 220 there. For a w that is dense in neither order it falls back to a loop that is a thousand times slower.
    """
    large = x.shape[0] * x.shape[1] * w.shape[0] >= ONEDNN_FROM
    if large and x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_works():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return x @ w.T


def add_product(out: Tensor, w: Tensor, rows: Tensor) -> None:
    """out += w @ rows for w (m, n), which is contiguous or the transpose of a contiguous matrix, and contiguous rows (n, d)."""
    if out.device.type == "cpu":
        # The copy of a transpose costs 0.1 ms per tile; without it oneDNN transposes inside the product, at up to twice the time.
        out += product(w.contiguous(), rows.T)
    else:
        # One launch, and no matrix of the size of out.
        out.addmm_(w, rows)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> per row, without a copy of a * b of their size."""
    size = rows_of(a)
    found = [(x * y).sum(1) for x, y in zip(a.split(size), b.split(size), strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


@cache
def _onednn_works() -> bool:
    # The operator is private: it is used only where it exists and agrees with torch.mm, in both layouts that product() allows.
    try:
        x, w = torch.arange(6.0, device="cpu").view(2, 3), torch.arange(12.0, device="cpu").view(4, 3)
        found = (torch.ops.mkldnn._linear_pointwise(x, v, None, "none", [], "") for v in (w, w.T.contiguous().T))
        return all(torch.equal(result, x @ w.T) for result in found)
    except (AttributeError, RuntimeError):
        return False
