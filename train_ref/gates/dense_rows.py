"""The losses row by row in dense torch, in any dtype: exact in float64, and the error to expect in every other.

train_ref/losses.py has no values of single rows. These do, and the gates' tests hold their means to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from train_ref.gates.cases import Ids


def row_losses(loss: str, sides: Sequence[Tensor], scale: Tensor, ids: Ids | None = None, exclude: Ids | None = None) -> Tensor:
    """One value per anchor: float64 for float64 features, otherwise float32.

    sides    the loss's feature tensors in the order of its arguments: nt_xent z0, z1; info_nce query, positive_key;
             clip_loss image, text (mean of both directions of a pair); sup_con features (N, D); moco_loss q, k, queue
    ids      of queries and keys: rows with equal ones belong together, beside row i and row i; of sup_con the labels, twice
    exclude  of queries and keys of info_nce: rows with equal ones are no negatives
    """
    if loss == "nt_xent":
        z = torch.cat(list(sides))
        partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
        return one_positive(logits(z, z, scale).masked_fill(diagonal(z), -math.inf), partner)
    if loss == "sup_con":
        assert ids is not None
        itself = diagonal(sides[0])
        return all_positives(logits(sides[0], sides[0], scale).masked_fill(itself, -math.inf), equal(ids) & ~itself)
    query, key = sides[:2]
    own = torch.arange(len(query), device=query.device)
    if loss == "moco_loss":
        # The key of every query is compared with that query alone.
        found = torch.cat([logits(query, key, scale).diagonal()[:, None], logits(query, sides[2], scale)], dim=1)
        return one_positive(found, torch.zeros_like(own))
    found = logits(query, key, scale)
    if exclude is not None:
        found = found.masked_fill(equal(exclude) & ~diagonal(query), -math.inf)
    if ids is not None:
        positive = equal(ids) | diagonal(query)
        forth, back = all_positives(found, positive), all_positives(found.T, positive.T)
    else:
        forth, back = one_positive(found, own), one_positive(found.T, own)
    return forth if loss == "info_nce" else (forth + back) / 2


def equal(ids: Ids) -> Tensor:
    """(M, N); an id below 0 equals nothing."""
    return (ids[0][:, None] == ids[1][None]) & (ids[0][:, None] >= 0)


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


def all_positives(found: Tensor, positive: Tensor) -> Tensor:
    """SupCon's L_out; -inf are no candidates; 0 without positives, in value and gradient."""
    some = positive.any(1)
    mean = found[some].masked_fill(~positive[some], 0.0).sum(1) / positive[some].sum(1)
    values = found[some].logsumexp(1) - mean
    return found.new_zeros(len(found)).masked_scatter(some, values)
