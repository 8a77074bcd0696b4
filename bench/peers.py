"""The contestants: these losses as people compute them today, and fastnce.

A contestant is a function from the leaves of a problem to the 0-dim loss:

    nt_xent   (z,)                        z = [a; b], (N, D); rows i and i + N/2 are two views of one example
    info_nce  (query, key)                both (N, D); row i of key is the positive of row i of query; one direction
    clip      (image, text, logit_scale)  both (N, D) and a learnable 0-dim scale; the mean of both directions

All contestants of a loss do the same work on the same raw rows: normalise them, and give the gradient of every leaf.
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

TEMPERATURE = 0.1  # of nt_xent and info_nce
LOGIT_SCALE = 1 / 0.07  # where CLIP starts to learn its own


def leaves(loss: str, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """The leaves of a problem: random rows and noisy views of them (cosine about 0.9), all requiring a gradient."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n // 2 if loss == "nt_xent" else n, d, generator=generator)
    second = first + 0.5 * torch.randn(first.shape, generator=generator)
    rows = [torch.cat([first, second])] if loss == "nt_xent" else [first, second]
    tensors = [tensor.to(dtype) for tensor in rows]
    if loss == "clip":
        # A parameter of the model: it stays float32 when the features are half precision.
        tensors.append(torch.tensor(LOGIT_SCALE, dtype=torch.promote_types(dtype, torch.float32)))
    return tuple(tensor.requires_grad_() for tensor in tensors)


def partners(n: int) -> Tensor:
    """For rows [a; b]: the index of the other view of every row."""
    return torch.arange(n).roll(n // 2)


# ---------------------------------------------------------------- eager: as users write it


def eager_nt_xent(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    logits = z @ z.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, partners(len(z)))


def eager_info_nce(query: Tensor, key: Tensor) -> Tensor:
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(query)))


def eager_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T)
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


# ---------------------------------------------------------------- careful: eager less the avoidable N x N copies


def careful_nt_xent(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    logits = ((z / TEMPERATURE) @ z.T).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, partners(len(z)))


def careful_info_nce(query: Tensor, key: Tensor) -> Tensor:
    logits = (F.normalize(query, dim=1) / TEMPERATURE) @ F.normalize(key, dim=1).T
    return F.cross_entropy(logits, torch.arange(len(query)))


def careful_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Scales a factor, not the logits, and keeps no log-softmax: both directions read the one matrix."""
    logits = (logit_scale * F.normalize(image, dim=1)) @ F.normalize(text, dim=1).T
    return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - logits.diagonal()).mean()


EAGER: dict[str, Contestant] = {"nt_xent": eager_nt_xent, "info_nce": eager_info_nce, "clip": eager_clip}
CAREFUL: dict[str, Contestant] = {"nt_xent": careful_nt_xent, "info_nce": careful_info_nce, "clip": careful_clip}
LOSSES = tuple(EAGER)


# ---------------------------------------------------------------- other packages


def open_clip_form(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """What open_clip's ClipLoss computes on one device: both logit matrices, image by text and text by image."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    labels = torch.arange(len(image))
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


def versions() -> dict[str, str]:
    """Versions of the other packages that are installed."""
    wanted = {"info-nce-pytorch", "lightly"}
    found = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(wanted & found.keys())}


# ---------------------------------------------------------------- fastnce, and the table


def _fastnce(loss: str) -> Contestant:
    import fastnce

    functions: dict[str, Callable[..., Any]] = {
        "nt_xent": partial(fastnce.nt_xent, temperature=TEMPERATURE),
        "info_nce": partial(fastnce.info_nce, temperature=TEMPERATURE),
        "clip": fastnce.clip_loss,
    }
    return functions[loss]


OURS = "fastnce"

# loss -> name -> factory. A factory imports what it needs, so it raises ImportError where that is not installed.
FACTORIES: dict[str, dict[str, Callable[[], Contestant]]] = {
    loss: {
        OURS: partial(_fastnce, loss),
        "eager": partial(EAGER.__getitem__, loss),
        "careful": partial(CAREFUL.__getitem__, loss),
        "compile": partial(torch.compile, EAGER[loss]),
    }
    for loss in LOSSES
}
FACTORIES["nt_xent"]["lightly"] = _lightly
FACTORIES["info_nce"]["info-nce-pytorch"] = _info_nce_pytorch
FACTORIES["clip"]["open_clip form"] = lambda: open_clip_form

NAMES = tuple(dict.fromkeys(name for factories in FACTORIES.values() for name in factories))

# torch.compile needs a C++ compiler and seconds for every new shape: it runs only when it is named.
ON_REQUEST = ("compile",)


def contestant(loss: str, name: str) -> Contestant:
    return FACTORIES[loss][name]()


def contestants(loss: str, wanted: list[str] | None = None) -> list[str]:
    """Names of the contestants of a loss, fastnce first: the wanted ones, or all whose packages are installed.

    Raises ImportError where fastnce or a wanted one cannot be imported.
    """
    found = []
    for name in FACTORIES[loss]:
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
