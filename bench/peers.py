"""The contestants: these losses as people compute them today, and fastnce.

A contestant is a function from the leaves of a problem to the 0-dim loss:

    nt_xent   (z,)                        z = [a; b], (N, D); rows i and i + N/2 are two views of one example
    info_nce  (query, key)                both (N, D); row i of key is the positive of row i of query; one direction
    clip      (image, text, logit_scale)  both (N, D) and a learnable 0-dim scale; the mean of both directions
    sup_con   (z, labels)                 (N, D) and integers (N,): rows of equal label are positives, at least two of each
    moco      (q, k, queue)               queue (N, D), q and k (N/16, D): 4,096 queries for the usual queue of 65,536

All contestants of a loss do the same work on the same raw rows: normalise them, and give the gradient of every leaf that
learns: not of moco's k and queue, which come from a network that does not learn. Leaves may be on any device.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

Contestant = Callable[..., Tensor]

TEMPERATURE = 0.1  # of all but clip
LOGIT_SCALE = 1 / 0.07  # where CLIP starts to learn its own
QUERIES = 16  # moco: keys in the queue per query
EXAMPLES = 16  # sup_con: rows of each label


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
    elif loss == "nt_xent":
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


def products(loss: str, n: int, d: int) -> float:
    """Nominal FLOP of forward and backward: a product of the logits, and one for the gradient of each side that has one."""
    return 4.0 * max(n // QUERIES, 1) * n * d if loss == "moco" else 6.0 * n * n * d


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
    """SupContrast's SupConLoss (Khosla et al. 2020, eq. 2) on one view, without its constant factor temperature / 0.07."""
    z = F.normalize(z, dim=1)
    positive = (labels[:, None] == labels[None, :]).to(z.dtype)
    logits = z @ z.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - itself(z).to(z.dtype)
    positive = positive * others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_prob).sum(1) / positive.sum(1)).mean()


def eager_moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """As in MoCo's code: the positive in column 0, in front of the queue."""
    q, k, queue = (F.normalize(x, dim=1) for x in (q, k, queue))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros_like(indices(q)))


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


EAGER: dict[str, Contestant] = {
    "nt_xent": eager_nt_xent,
    "info_nce": eager_info_nce,
    "clip": eager_clip,
    "sup_con": eager_sup_con,
    "moco": eager_moco,
}
CAREFUL: dict[str, Contestant] = {"nt_xent": careful_nt_xent, "info_nce": careful_info_nce, "clip": careful_clip}
LOSSES = tuple(EAGER)


# ---------------------------------------------------------------- other packages


def open_clip_form(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """What open_clip's ClipLoss computes on one device: both logit matrices, image by text and text by image."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    labels = indices(image)
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def _folder(package: str) -> Path:
    """Where an installed package lives, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    return Path(spec.origin).parent


def info_nce_pytorch() -> Contestant:
    """info-nce-pytorch's info_nce."""
    function: Contestant = importlib.import_module("info_nce").info_nce
    return function


def open_clip_loss() -> type[torch.nn.Module]:
    """open_clip's ClipLoss, from its loss.py alone: the package would import every model it has."""
    spec = importlib.util.spec_from_file_location("open_clip_loss", _folder("open_clip") / "loss.py")
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("open_clip has no loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: type[torch.nn.Module] = module.ClipLoss
    return loss


def lightly_nt_xent() -> type[torch.nn.Module]:
    """lightly's NTXentLoss, also where torchvision is missing.

    lightly's packages import its networks, and only those need torchvision. Empty packages over the same folders let
    the loss and its memory bank load alone; the one helper they name gathers over processes, and here there is one.
    """
    shells: dict[str, ModuleType] = {}
    if importlib.util.find_spec("torchvision") is None:
        for name in ("lightly.loss", "lightly.models", "lightly.models.modules", "lightly.models.utils"):
            shells[name] = ModuleType(name)
            shells[name].__path__ = [str(_folder("lightly").joinpath(*name.split(".")[1:]))]
        vars(shells["lightly.models.utils"])["concat_all_gather"] = lambda tensor: tensor
    with mock.patch.dict(sys.modules, shells):
        loss: type[torch.nn.Module] = importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss
    return loss


def _lightly() -> Contestant:
    loss = lightly_nt_xent()(temperature=TEMPERATURE)
    return lambda z: loss(*z.chunk(2))


def _info_nce_pytorch() -> Contestant:
    return partial(info_nce_pytorch(), temperature=TEMPERATURE)


def _pytorch_metric_learning() -> Contestant:
    loss: Contestant = importlib.import_module("pytorch_metric_learning.losses").SupConLoss(TEMPERATURE)
    return loss


PACKAGES = {"info-nce-pytorch", "lightly", "pytorch-metric-learning", "inf-cl", "cut-cross-entropy", "siglip-kernel", "liger-kernel"}


def versions() -> dict[str, str]:
    """Versions of the other packages that are installed."""
    found = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(PACKAGES & found.keys())}


# ---------------------------------------------------------------- fastnce, and the table


def fastnce_loss(loss: str, backend: str = "auto") -> Contestant:
    import fastnce

    functions: dict[str, Callable[..., Any]] = {
        "nt_xent": partial(fastnce.nt_xent, temperature=TEMPERATURE),
        "info_nce": partial(fastnce.info_nce, temperature=TEMPERATURE),
        "clip": fastnce.clip_loss,
        "sup_con": partial(fastnce.sup_con, temperature=TEMPERATURE),
        "moco": partial(fastnce.moco_loss, temperature=TEMPERATURE),
    }
    return partial(functions[loss], backend=backend)


OURS = "fastnce"

Factories = dict[str, dict[str, Callable[[], Contestant]]]

# loss -> name -> factory. A factory imports what it needs, so it raises ImportError where that is not installed.
FACTORIES: Factories = {
    loss: {
        OURS: partial(fastnce_loss, loss),
        "eager": partial(EAGER.__getitem__, loss),
        **({"careful": partial(CAREFUL.__getitem__, loss)} if loss in CAREFUL else {}),
        "compile": partial(torch.compile, EAGER[loss]),
    }
    for loss in LOSSES
}
FACTORIES["nt_xent"]["lightly"] = _lightly
FACTORIES["info_nce"]["info-nce-pytorch"] = _info_nce_pytorch
FACTORIES["clip"]["open_clip form"] = lambda: open_clip_form
FACTORIES["sup_con"]["pytorch-metric-learning"] = _pytorch_metric_learning

# torch.compile needs a C++ compiler and seconds for every new shape: it runs only when it is named.
ON_REQUEST = ("compile", "compile autocast")


def factories(loss: str, device: str) -> dict[str, Callable[[], Contestant]]:
    """Those of a loss; the ones that only run on, or only make sense on, a GPU come after the others."""
    if device == "cpu":
        return FACTORIES[loss]
    from bench import gpu_peers

    return FACTORIES[loss] | gpu_peers.FACTORIES.get(loss, {})


def names(device: str) -> list[str]:
    """Of every contestant of any loss."""
    return list(dict.fromkeys(name for loss in LOSSES for name in factories(loss, device)))


def contestant(loss: str, name: str, backend: str = "auto") -> Contestant:
    """One of any device. Raises ImportError where its package is not installed. `backend` is that of fastnce."""
    if name == OURS:
        return fastnce_loss(loss, backend)
    return (FACTORIES[loss] if name in FACTORIES[loss] else factories(loss, "cuda"))[name]()


def contestants(loss: str, wanted: list[str] | None = None, device: str = "cpu") -> list[str]:
    """Names of the contestants of a loss, fastnce first: the wanted ones, or all whose packages are installed.

    Raises ImportError where fastnce or a wanted one cannot be imported.
    """
    found = []
    for name in factories(loss, device):
        asked_for = name == OURS or (wanted is not None and name in wanted)
        if not asked_for and (wanted is not None or name in ON_REQUEST):
            continue
        try:
            contestant(loss, name)
        except ImportError:
            if asked_for:
                raise
            continue
        found.append(name)
    return found
