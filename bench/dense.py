"""The problems, and the losses in plain torch as people write them.

A contestant is a function from the leaves of a problem to the 0-dim loss:

    nt_xent   (z,)                        z = [a; b], (N, D); rows i and i + N/2 are two views of one example
    info_nce  (query, key)                both (N, D); row i of key is the positive of row i of query; one direction
    clip      (image, text, logit_scale)  both (N, D) and a learnable 0-dim scale; the mean of both directions
    sup_con   (z, labels)                 (N, D) and integers (N,): rows of equal label are positives, at least two of each
    moco      (q, k, queue)               queue (N, D), q and k (N/16, D): 4,096 queries for the usual queue of 65,536
    dcl       (z,)                        as nt_xent

The losses are those of train_ref.truth.LOSSES, by their names without "_loss". Where no eager form stands here, eager is the definition
there.
All contestants of a loss do the same work on the same raw rows: normalise them, and give the gradient of every leaf that
learns: not of moco's k and queue, which come from a network that does not learn. Leaves may be on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from train_ref import truth

Contestant = Callable[..., Tensor]

TEMPERATURE = 0.1  # of all but clip
LOGIT_SCALE = 1 / 0.07  # where CLIP starts to learn its own
TABLE = {name.removesuffix("_loss"): loss for name, loss in truth.LOSSES.items()}
LOSSES = tuple(TABLE)
QUERIES = 16  # moco: keys in the queue per query
EXAMPLES = 16  # sup_con: rows of each label
CHUNK = 512  # rows of the chunked forms: at N = 131,072 their logits are 256 MiB in float32


def spelled_as(known: Collection[str], losses: Iterable[str]) -> list[str]:
    """Losses by their names in `known`: clip for clip_loss, or the other way round. Unknown names stay as they are."""
    names = {spelling: short if short in known else loss.name for short, loss in TABLE.items() for spelling in (short, loss.name)}
    return list(dict.fromkeys(names.get(loss, loss) for loss in losses))


def leaves(
    loss: str, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu", noise: float = 0.5
) -> tuple[Tensor, ...]:
    """The leaves of a problem: random rows and noisy views of them, at cosine 1 / sqrt(1 + noise^2): about 0.9."""
    # The device's own generator: on a GPU a million rows are there at once, and the CPU's results stay what they were.
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if loss == "sup_con":
        labels = torch.arange(n, device=device) % max(n // EXAMPLES, 1)
        rows = [normal(max(n // EXAMPLES, 1), d)[labels] + noise * normal(n, d)]
    elif TABLE[loss].symmetric:  # two views
        first = normal(n // 2, d)
        rows = [torch.cat([first, first + noise * normal(*first.shape)])]
    else:
        first = normal(max(n // QUERIES, 1) if loss == "moco" else n, d)
        rows = [first, first + noise * normal(*first.shape)]
    learning = [row.to(dtype).requires_grad_() for row in rows]
    if loss == "clip":
        # A parameter of the model: it stays float32 when the features are half precision.
        wide = torch.promote_types(dtype, torch.float32)
        learning.append(torch.tensor(LOGIT_SCALE, dtype=wide, device=device).requires_grad_())
    if loss == "sup_con":
        return (*learning, labels)
    if loss == "moco":
        return (learning[0], learning[1].detach(), normal(n, d).to(dtype))
    return tuple(learning)


def products(loss: str, n: int, d: int, mode: str = "full") -> float:
    """Nominal FLOP: a product of the logits (fwd), one for the gradient of each side that has one (bwd), or all of these (full).

    What dense code executes. A float32 loss that computes half of a symmetric matrix executes less, one that recomputes executes more.
    """
    rows, sides = (max(n // QUERIES, 1), 1) if loss == "moco" else (n, 2)
    return 2.0 * rows * n * d * {"fwd": 1, "bwd": sides, "full": 1 + sides}[mode]


def partners(z: Tensor) -> Tensor:
    """For rows z = [a; b]: the index of the other view of every row."""
    return indices(z).roll(len(z) // 2)


def indices(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def itself(z: Tensor) -> Tensor:
    """Mask (N, N) of the diagonal."""
    return torch.eye(len(z), dtype=torch.bool, device=z.device)


# ---------------------------------------------------------------- eager: as users write it


def eager_nt_xent(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    logits = z @ z.T / TEMPERATURE
    logits = logits.masked_fill(itself(z), float("-inf"))
    return F.cross_entropy(logits, partners(z))


def eager_info_nce(query: Tensor, key: Tensor) -> Tensor:
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE
    return F.cross_entropy(logits, indices(query))


def eager_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T)
    labels = indices(image)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def eager_sup_con(z: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    positive = (labels[:, None] == labels) & ~itself(z)
    log_prob = (z @ z.T / TEMPERATURE).masked_fill(itself(z), float("-inf")).log_softmax(1)
    return -(log_prob.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)).mean()


def eager_moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """As in MoCo's code: the positive in column 0, in front of the queue."""
    q, k, queue = (F.normalize(x, dim=1) for x in (q, k, queue))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros_like(indices(q)))


# ---------------------------------------------------------------- as other projects write it


def supcontrast_form(z: Tensor, labels: Tensor) -> Tensor:
    """SupContrast's SupConLoss (Khosla et al. 2020, eq. 2) on one view, without its constant factor temperature / 0.07."""
    z = F.normalize(z, dim=1)
    positive = (labels[:, None] == labels[None, :]).to(z.dtype)
    logits = z @ z.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - itself(z).to(z.dtype)
    positive = positive * others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_prob).sum(1) / positive.sum(1)).mean()


def open_clip_form(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The same as open_clip's ClipLoss on one device: both logit matrices, image by text and text by image."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    labels = indices(image)
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


# ---------------------------------------------------------------- careful: eager less the avoidable N x N copies


def careful_nt_xent(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    logits = ((z / TEMPERATURE) @ z.T).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, partners(z))


def careful_info_nce(query: Tensor, key: Tensor) -> Tensor:
    logits = (F.normalize(query, dim=1) / TEMPERATURE) @ F.normalize(key, dim=1).T
    return F.cross_entropy(logits, indices(query))


def careful_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Scales a factor, not the logits, and keeps no log-softmax: both directions read the one matrix."""
    logits = (logit_scale * F.normalize(image, dim=1)) @ F.normalize(text, dim=1).T
    return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - logits.diagonal()).mean()


# ---------------------------------------------------------------- chunked: without the N x N matrix
#
# Chunks of rows under torch.utils.checkpoint, as anybody can write it who runs out of memory. A chunk's logits are made in the forward,
# dropped, and made again in the backward: four products in all where eager does three, and memory of one chunk's logits and gradients.


def _mean(block: Callable[..., Tensor], rows: tuple[Tensor, ...], *shared: Tensor) -> Tensor:
    """Mean over all rows of block(chunk of every tensor of rows, *shared), which sums over its chunk."""
    total = torch.zeros((), dtype=torch.promote_types(rows[0].dtype, torch.float32), device=rows[0].device)
    for chunk in zip(*(tensor.split(CHUNK) for tensor in rows), strict=True):
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
    return torch.tensor(1 / TEMPERATURE, dtype=x.dtype, device=x.device)


def chunked_nt_xent(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    return _mean(_views, (z, partners(z), indices(z)), z, _scale(z))


def chunked_info_nce(query: Tensor, key: Tensor) -> Tensor:
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return _mean(_pairs, (query, indices(query)), key, _scale(query))


def chunked_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    by_image, by_text = (_mean(_pairs, (a, indices(a)), b, logit_scale) for a, b in ((image, text), (text, image)))
    return (by_image + by_text) / 2


def chunked_sup_con(z: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    return _mean(_labelled, (z, labels, indices(z)), z, labels, _scale(z))


def chunked_moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    q, k, queue = (F.normalize(x, dim=1) for x in (q, k, queue))
    return _mean(_queued, (q, k), queue, _scale(q))


def _defined(loss: truth.Loss) -> Contestant:
    """The mean of the definition, at TEMPERATURE. Rows of one side come joined."""

    def call(*sides: Tensor) -> Tensor:
        parts = (part for names, side in zip(loss.sides, sides, strict=True) for part in side.chunk(len(names)))
        return loss.function(**dict(zip(loss.leaves, parts, strict=True)), **{loss.number: 1 / TEMPERATURE}).mean()

    return call


EAGER: dict[str, Contestant] = {name: _defined(loss) for name, loss in TABLE.items()} | {
    "nt_xent": eager_nt_xent,
    "info_nce": eager_info_nce,
    "clip": eager_clip,
    "sup_con": eager_sup_con,
    "moco": eager_moco,
}
CAREFUL: dict[str, Contestant] = {"nt_xent": careful_nt_xent, "info_nce": careful_info_nce, "clip": careful_clip}
CHUNKED: dict[str, Contestant] = {
    "nt_xent": chunked_nt_xent,
    "info_nce": chunked_info_nce,
    "clip": chunked_clip,
    "sup_con": chunked_sup_con,
    "moco": chunked_moco,
}
