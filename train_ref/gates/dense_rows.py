"""The losses row by row in dense torch, in any dtype: exact in float64, and the error to expect in every other.

train_ref/losses.py has no values of single rows. These do, and the gates' tests hold their means to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def row_losses(loss: str, sides: Sequence[Tensor], labels: Tensor | None, scale: Tensor) -> Tensor:
    """One value per anchor: float64 for float64 features, otherwise float32.

    sides are the loss's feature tensors in the order of its arguments: nt_xent z0, z1; info_nce query, positive_key;
    clip_loss image, text (mean of both directions of a pair); sup_con features (N, D); moco_loss q, k, queue.
    """
    if loss == "nt_xent":
        z = torch.cat(list(sides))
        partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
        return one_positive(logits(z, z, scale).masked_fill(diagonal(z), -math.inf), partner)
    if loss == "sup_con":
        assert labels is not None
        return all_positives(logits(sides[0], sides[0], scale), labels, diagonal(sides[0]))
    query, key = sides[:2]
    own = torch.arange(len(query), device=query.device)
    if loss == "moco_loss":
        # The key of every query is compared with that query alone.
        found = torch.cat([logits(query, key, scale).diagonal()[:, None], logits(query, sides[2], scale)], dim=1)
        return one_positive(found, torch.zeros_like(own))
    found = logits(query, key, scale)
    return one_positive(found, own) if loss == "info_nce" else (one_positive(found, own) + one_positive(found.T, own)) / 2


def logits(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
    """scale * cosine; of half-precision features as under autocast: lengths in float32, product and scaling in half."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = [F.normalize(side.to(wide), dim=1).to(side.dtype) for side in (query, key)]
    return ((rows[0] @ rows[1].T) * scale.to(query.dtype)).to(wide)


def diagonal(rows: Tensor) -> Tensor:
    return torch.eye(len(rows), dtype=torch.bool, device=rows.device)


def one_positive(found: Tensor, positive: Tensor) -> Tensor:
    """log sum exp of all logits of a row, less that of its positive; -inf are no candidates."""
    return F.cross_entropy(found, positive, reduction="none")


def all_positives(found: Tensor, labels: Tensor, itself: Tensor) -> Tensor:
    """SupCon's L_out; 0 without positives, in value and gradient."""
    positive = (labels[:, None] == labels[None]) & (labels[:, None] >= 0) & ~itself
    some = positive.any(1)
    mean = found[some].masked_fill(~positive[some], 0.0).sum(1) / positive[some].sum(1)
    values = found[some].masked_fill(itself[some], -math.inf).logsumexp(1) - mean
    return found.new_zeros(len(found)).masked_scatter(some, values)
