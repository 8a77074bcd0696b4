"""The losses in dense torch: one value per anchor from raw rows, in any dtype, in O(M N) memory.

Everything else is compared with these, so they import torch alone and prefer the formula to the fast way. A row of features is divided by
its Euclidean norm (a zero row stays zero), the logit of query i and key j is

    s_ij = cos(query_i, key_j) / temperature        or scale * cos(query_i, key_j), where scale is given

and the values are in nats: float64 of float64 features, otherwise float32. Half precision is computed as under autocast, norms and
logarithms in float32 and the product in half: its distance from float64 is the error that users of dense torch have today.

    import torch
    from train_ref.truth.losses import nt_xent
    nt_xent(torch.randn(8, 16), torch.randn(8, 16), temperature=0.5).mean()
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Number = float | Tensor
Ids = tuple[Tensor | None, Tensor | None]  # of queries and of keys, those of one side serve both; a negative id equals nothing


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length one, in the dtype of the features."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1).to(features.dtype)


def logits(cosines: Tensor, temperature: Number, scale: Number | None) -> Tensor:
    """In float32, or float64: half-precision cosines are scaled in half."""
    scaled = cosines / temperature if scale is None else cosines * scale
    return scaled.to(torch.promote_types(cosines.dtype, torch.float32))


def diagonal(s: Tensor) -> Tensor:
    """Boolean, of the shape of s: row i meets column i."""
    return torch.eye(*s.shape, dtype=torch.bool, device=s.device)


def same(ids: Ids, s: Tensor) -> Tensor:
    """Boolean, of the shape of s: which pairs have equal ids."""
    of_queries, of_keys = (one if one is not None else other for one, other in (ids, ids[::-1]))
    if of_queries is None or of_keys is None:
        return torch.zeros_like(s, dtype=torch.bool)
    return (of_queries[:, None] == of_keys) & (of_queries[:, None] >= 0)


def one_positive(s: Tensor, positive: Tensor) -> Tensor:
    """log sum_j exp s_ij - s_ip, p = positive[i]. An excluded pair has s = -inf."""
    return F.cross_entropy(s, positive, reduction="none")


def several_positives(s: Tensor, positive: Tensor, variant: str = "out") -> Tensor:
    """With P_i the columns where positive (M, N) is true; 0, also in the gradient, where there is none.

    "out"  log sum_j exp s_ij - mean_{P_i} s_ip
    "in"   log sum_j exp s_ij - log mean_{P_i} exp s_ip
    """
    some = positive.any(1)
    # Rows without positives are left out before any log: log 0 there would send nan through the gradient.
    s, positive = s[some], positive[some]
    count = positive.sum(1).to(s.dtype)  # the log of an integer tensor is float32, also beside float64
    log_all = s.logsumexp(1)
    if variant == "out":
        pos = s.masked_fill(~positive, 0.0).sum(1) / count
    else:
        pos = s.masked_fill(~positive, -torch.inf).logsumexp(1) - count.log()
    return s.new_zeros(len(some)).masked_scatter(some, log_all - pos)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: Number = 0.1,
    *,
    scale: Number | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_query_ids: Tensor | None = None,
    exclude_key_ids: Tensor | None = None,
    in_batch: bool = False,
    symmetric: bool = False,
) -> Tensor:
    """InfoNCE (M,): log sum_j exp s_ij - s_ip,  p the positive key of query i, j over its keys.

    query          (M, D)
    positive_key   (M, D)     row i belongs to query i
    negative_keys  None       keys are all M positive keys (in-batch negatives)
                   (K, D)     keys are the query's own positive and these K keys, shared by all queries
                   (M, K, D)  keys are the query's own positive and its own K keys
    in_batch       keys are all M positive keys and K shared ones
    query_ids, key_ids                   in-batch: keys with the query's id are positives too, and the value is SupCon's L_out
    exclude_query_ids, exclude_key_ids   in-batch: keys with the query's id are excluded, its own positive is not
    symmetric      in-batch: the mean of a pair's two directions

    van den Oord et al. 2018 (arXiv:1807.03748), eq. 4.
    """
    query, positive_key = unit_rows(query), unit_rows(positive_key)
    if negative_keys is not None:
        negative_keys = unit_rows(negative_keys)
    if negative_keys is not None and not in_batch:
        wide = torch.promote_types(query.dtype, torch.float32)
        pos = (query.to(wide) * positive_key.to(wide)).sum(1, keepdim=True).to(query.dtype)
        negative = query @ negative_keys.T if negative_keys.ndim == 2 else torch.einsum("md,mkd->mk", query, negative_keys)
        s = logits(torch.cat([pos, negative], dim=1), temperature, scale)
        return one_positive(s, torch.zeros(len(query), dtype=torch.long, device=query.device))
    keys = positive_key if negative_keys is None else torch.cat([positive_key, negative_keys])
    s = logits(query @ keys.T, temperature, scale)
    own = diagonal(s)
    if exclude_query_ids is not None or exclude_key_ids is not None:
        s = s.masked_fill(same((exclude_query_ids, exclude_key_ids), s) & ~own, -torch.inf)

    def one_way(s: Tensor, positive: Tensor) -> Tensor:
        if query_ids is None and key_ids is None:
            return one_positive(s, torch.arange(len(s), device=s.device))
        return several_positives(s, positive)

    positive = own | same((query_ids, key_ids), s)
    forth = one_way(s, positive)
    return (forth + one_way(s.T, positive.T)) / 2 if symmetric else forth


def moco_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: Number = 0.07, *, scale: Number | None = None) -> Tensor:
    """MoCo (M,): InfoNCE of q (M, D) with its key k (M, D) against a queue (K, D) of keys, negatives of every query.

    He et al. 2020 (arXiv:1911.05722), eq. 1.
    """
    return info_nce(q, k, queue, temperature, scale=scale)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    exclude_image_ids: Tensor | None = None,
    exclude_text_ids: Tensor | None = None,
) -> Tensor:
    """CLIP (B,): (log sum_j exp s_ij + log sum_j exp s_ji) / 2 - s_ii,  s_ij = logit_scale * cos(image_i, text_j).

    image, text  (B, D)  rows i belong together; ids as in info_nce
    logit_scale  1 / temperature, already exponentiated

    Radford et al. 2021 (arXiv:2103.00020), figure 3.
    """
    return info_nce(
        image,
        text,
        scale=logit_scale,
        query_ids=image_ids,
        key_ids=text_ids,
        exclude_query_ids=exclude_image_ids,
        exclude_key_ids=exclude_text_ids,
        symmetric=True,
    )


def _two_views(z0: Tensor, z1: Tensor | None, temperature: Number, scale: Number | None) -> tuple[Tensor, Tensor]:
    """The logits of all rows with all rows, -inf where a row meets itself, and the index of every row's other view."""
    z = unit_rows(z0 if z1 is None else torch.cat([z0, z1]))
    if len(z) % 2:
        raise ValueError(f"z0 has {len(z)} rows; without z1 it must hold two views, so an even number of rows")
    s = logits(z @ z.T, temperature, scale)
    return s.masked_fill(diagonal(s), -torch.inf), torch.arange(len(z), device=z.device).roll(len(z) // 2)


def nt_xent(z0: Tensor, z1: Tensor | None = None, temperature: Number = 0.5, *, scale: Number | None = None) -> Tensor:
    """NT-Xent (2B,): with z = [z0; z1],  log sum_{j != i} exp s_ij - s_ip,  p the other view of i.

    z0, z1  (B, D) each, row i of both being views of one example; or z0 (2B, D) = [first views; second views] alone

    Chen et al. 2020 (arXiv:2002.05709), eq. 1 and algorithm 1.
    """
    return one_positive(*_two_views(z0, z1, temperature, scale))


def dcl_loss(z0: Tensor, z1: Tensor | None = None, temperature: Number = 0.1, *, scale: Number | None = None) -> Tensor:
    """DCL (2B,): NT-Xent without the positive in the sum, log sum_{j != i, p} exp s_ij - s_ip; 0, also in the gradient, where B is 1.

    Yeh et al. 2021 (arXiv:2110.06848), eq. 6, without weights of positives.
    """
    s, partner = _two_views(z0, z1, temperature, scale)
    pos = s.gather(1, partner[:, None])
    if len(s) == 2:
        return 0 * pos[:, 0]
    return s.scatter(1, partner[:, None], -torch.inf).logsumexp(1) - pos[:, 0]


def sup_con(
    features: Tensor,
    labels: Tensor,
    temperature: Number = 0.1,
    variant: Literal["out", "in"] = "out",
    no_positive: Literal["zero", "skip"] = "zero",
    *,
    scale: Number | None = None,
) -> Tensor:
    """SupCon (V B,), view by view: several_positives, those of an anchor being all other rows with its label.

    features     (B, V, D) V views of B examples, or (N, D)
    labels       (B,) or (N,) integers; a negative label matches nothing
    no_positive  an anchor without positives has value 0 ("zero") or none ("skip"): then there are as many values as other anchors

    There is no factor temperature / base_temperature. Khosla et al. 2020 (arXiv:2004.11362), eq. 2 and 3.
    """
    if variant not in ("out", "in"):
        raise ValueError(f"sup_con: variant is {variant!r}; it must be 'out' or 'in'")
    if no_positive not in ("zero", "skip"):
        raise ValueError(f"sup_con: no_positive is {no_positive!r}; it must be 'zero' or 'skip'")
    if len(labels) != len(features):
        raise ValueError(f"sup_con: labels has {len(labels)} entries, features {len(features)}; they need one each")
    views = features.shape[1] if features.ndim == 3 else 1
    z, labels = unit_rows(features).reshape(-1, features.shape[-1]), labels.repeat_interleave(views)
    s = logits(z @ z.T, temperature, scale)
    itself = diagonal(s)
    positive = same((labels, labels), s) & ~itself
    values = several_positives(s.masked_fill(itself, -torch.inf), positive, variant)

    def view_by_view(of_rows: Tensor) -> Tensor:
        return of_rows.view(-1, views).T.flatten()

    return view_by_view(values) if no_positive == "zero" else view_by_view(values)[view_by_view(positive.any(1))]
