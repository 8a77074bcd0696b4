"""The losses in plain torch without the N x N matrix: chunks of rows under torch.utils.checkpoint.

What anybody can write who runs out of memory. A chunk's logits are made in the forward, dropped, and made again in the backward: four
products in all where eager does three, and memory of one chunk's logits and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import dense
from bench.dense import Contestant, indices, partners

ROWS = 512  # of a chunk: at N = 131,072 its logits are 256 MiB in float32


def _mean(block: Callable[..., Tensor], rows: tuple[Tensor, ...], *shared: Tensor) -> Tensor:
    """Mean over all rows of block(chunk of every tensor of rows, *shared), which sums over its chunk."""
    total = torch.zeros((), dtype=torch.promote_types(rows[0].dtype, torch.float32), device=rows[0].device)
    for chunk in zip(*(tensor.split(ROWS) for tensor in rows), strict=True):
        part: Tensor = checkpoint(block, *chunk, *shared, use_reentrant=False, preserve_rng_state=False)
        total = total + part
    return total / len(rows[0])


def _pairs(q: Tensor, positive: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * (q @ k.T), positive, reduction="sum")


def _views(z: Tensor, positive: Tensor, own: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    logits = (scale * (z @ k.T)).scatter(1, own[:, None], float("-inf"))
    return F.cross_entropy(logits, positive, reduction="sum")


def _labelled(z: Tensor, label: Tensor, own: Tensor, k: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    logits = (scale * (z @ k.T)).scatter(1, own[:, None], float("-inf"))
    positive = (label[:, None] == labels).scatter(1, own[:, None], False)
    return -(logits.log_softmax(1).masked_fill(~positive, 0.0).sum(1) / positive.sum(1)).sum()


def _queued(q: Tensor, k: Tensor, queue: Tensor, scale: Tensor) -> Tensor:
    logits = scale * torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(indices(q)), reduction="sum")


def _scale(x: Tensor) -> Tensor:
    return torch.tensor(1 / dense.TEMPERATURE, dtype=x.dtype, device=x.device)


def nt_xent(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    return _mean(_views, (z, partners(z), indices(z)), z, _scale(z))


def info_nce(query: Tensor, key: Tensor) -> Tensor:
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return _mean(_pairs, (query, indices(query)), key, _scale(query))


def clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    by_image, by_text = (_mean(_pairs, (a, indices(a)), b, logit_scale) for a, b in ((image, text), (text, image)))
    return (by_image + by_text) / 2


def sup_con(z: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    return _mean(_labelled, (z, labels, indices(z)), z, labels, _scale(z))


def moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    q, k, queue = (F.normalize(x, dim=1) for x in (q, k, queue))
    return _mean(_queued, (q, k), queue, _scale(q))


CHUNKED: dict[str, Contestant] = {"nt_xent": nt_xent, "info_nce": info_nce, "clip": clip, "sup_con": sup_con, "moco": moco}
