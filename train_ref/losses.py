"""The losses in their textbook form: every logit in one dense matrix, plain torch, autograd gradients.

They are what the fused losses are compared with, so they import nothing of them and prefer the formula to the fast way:
memory is O(M N). Results are in nats, computed in float64 for float64 inputs and in float32 for all others. Rows are
divided by their Euclidean norm (a zero row stays zero), and the logit is s_ij = <query_i, key_j> / temperature.

    import torch
    from train_ref.losses import nt_xent
    nt_xent(torch.randn(8, 16), torch.randn(8, 16), temperature=0.5)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clip_loss", "info_nce", "moco_loss", "nt_xent", "sup_con"]


def unit_rows(embedding: Tensor) -> Tensor:
    """Rows of length one, in float64 for float64 input and in float32 otherwise."""
    dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    return F.normalize(embedding.to(dtype), dim=-1)


def diagonal(rows: Tensor) -> Tensor:
    """Boolean (N, N) for N rows: true where an anchor meets itself."""
    return torch.eye(len(rows), dtype=torch.bool, device=rows.device)


def info_nce(query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """InfoNCE: mean over i of  log sum_j exp s_ij - s_ip,  p the positive key of query i, j over its candidate keys.

    query          (M, D)
    positive_key   (M, D)     row i belongs to query i
    negative_keys  None       candidates are all M positive keys (in-batch negatives)
                   (K, D)     candidates are the query's own positive and these K keys, shared by all queries
                   (M, K, D)  candidates are the query's own positive and its own K keys

    Returns a 0-dim tensor.  van den Oord et al. 2018 (arXiv:1807.03748), eq. 4.
    """
    query, positive_key = unit_rows(query), unit_rows(positive_key)
    if negative_keys is None:
        logits = query @ positive_key.T / temperature
        return F.cross_entropy(logits, torch.arange(len(query), device=query.device))
    negative_keys = unit_rows(negative_keys)
    positive = (query * positive_key).sum(1, keepdim=True)
    negative = query @ negative_keys.T if negative_keys.ndim == 2 else torch.einsum("md,mkd->mk", query, negative_keys)
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def moco_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """MoCo: InfoNCE of q (M, D) with its key k (M, D) against a queue (K, D) of keys, negatives of every query.

    Returns a 0-dim tensor.  He et al. 2020 (arXiv:1911.05722), eq. 1.
    """
    return info_nce(q, k, queue, temperature)


def nt_xent(z0: Tensor, z1: Tensor | None = None, temperature: float = 0.5) -> Tensor:
    """NT-Xent: with z = [z0; z1], mean over all 2B rows of  log sum_{j != i} exp s_ij - s_ip,  p the other view of i.

    z0, z1  (B, D) each, row i of both being views of one example; or z0 (2B, D) = [first views; second views] alone

    Returns a 0-dim tensor.  Chen et al. 2020 (arXiv:2002.05709), eq. 1 and algorithm 1.
    """
    z = unit_rows(z0 if z1 is None else torch.cat([z0, z1]))
    if len(z) % 2:
        raise ValueError(f"nt_xent: z0 has {len(z)} rows; without z1 it must hold two views, so an even number of rows")
    logits = (z @ z.T / temperature).masked_fill(diagonal(z), -math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(logits, partner)


def sup_con(
    features: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    variant: Literal["out", "in"] = "out",
    no_positive: Literal["zero", "skip", "error"] = "zero",
) -> Tensor:
    """SupCon: the positives P_i of anchor i are all other rows with its label; A_i is every row but i itself.

        "out"  log sum_{A_i} exp s_ij - mean_{P_i} s_ip
        "in"   log sum_{A_i} exp s_ij - log mean_{P_i} exp s_ip

    features     (B, V, D) V views of B examples, or (N, D)
    labels       (B,) or (N,) integers; a negative label matches nothing
    no_positive  an anchor without positives counts 0 in the mean ("zero"), leaves the mean ("skip") or raises ("error")

    Returns a 0-dim tensor: the mean over anchors, without any factor temperature / base_temperature.
    Khosla et al. 2020 (arXiv:2004.11362), eq. 2 and 3.
    """
    if variant not in ("out", "in"):
        raise ValueError(f"sup_con: variant is {variant!r}; it must be 'out' or 'in'")
    if no_positive not in ("zero", "skip", "error"):
        raise ValueError(f"sup_con: no_positive is {no_positive!r}; it must be 'zero', 'skip' or 'error'")
    if len(labels) != len(features):
        raise ValueError(f"sup_con: labels has {len(labels)} entries, features {len(features)}; they need one each")
    if features.ndim == 3:
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
    z = unit_rows(features)
    itself = diagonal(z)
    positive = (labels[:, None] == labels[None, :]) & (labels[:, None] >= 0) & ~itself
    logits = z @ z.T / temperature

    # Anchors without positives are left out before any log: log 0 there would send nan through the gradient.
    anchors = positive.any(1)
    if no_positive == "error" and not bool(anchors.all()):
        alone = len(z) - int(anchors.sum())
        raise ValueError(f"sup_con: {alone} of {len(z)} anchors have no positive; use no_positive='zero' or 'skip'")
    positive, itself, logits = positive[anchors], itself[anchors], logits[anchors]
    n_pos = positive.sum(1).to(logits.dtype)  # the log of an integer tensor is float32, also beside float64
    log_all = logits.masked_fill(itself, -math.inf).logsumexp(1)
    if variant == "out":
        pos = logits.masked_fill(~positive, 0.0).sum(1) / n_pos
    else:
        pos = logits.masked_fill(~positive, -math.inf).logsumexp(1) - n_pos.log()
    counted = len(z) if no_positive == "zero" else len(logits)
    return (log_all - pos).sum() / max(1, counted)


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """CLIP: mean over i of  (log sum_j exp s_ij + log sum_j exp s_ji) / 2 - s_ii,  s_ij = logit_scale * cos(i, j).

    image, text  (B, D)  rows i belong together
    logit_scale  1 / temperature, already exponentiated; a 0-dim tensor gets its gradient

    Returns a 0-dim tensor.  Radford et al. 2021 (arXiv:2103.00020), figure 3.
    """
    logits = logit_scale * (unit_rows(image) @ unit_rows(text).T)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
