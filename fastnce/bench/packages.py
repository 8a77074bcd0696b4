"""The losses of other packages, loaded without what else those packages import."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.bench import forms
from fastnce.bench.forms import Contestant


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


def of_lightly() -> Contestant:
    """lightly's NTXentLoss for nt_xent."""
    loss = lightly_nt_xent()(temperature=forms.TEMPERATURE)
    return lambda z: loss(*z.chunk(2))


def of_info_nce_pytorch() -> Contestant:
    """info-nce-pytorch's info_nce for info_nce, and with the queue as its negatives for moco."""
    return partial(info_nce_pytorch(), temperature=forms.TEMPERATURE)


def of_open_clip() -> Contestant:
    """open_clip's ClipLoss for clip, of rows normalised as its models do; where it is not installed, what it computes."""
    try:
        loss = open_clip_loss()()
    except ModuleNotFoundError:
        return forms.open_clip_form

    def call(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        found: Tensor = loss(F.normalize(image, dim=1), F.normalize(text, dim=1), logit_scale)
        return found

    return call


def pytorch_metric_learning_nt_xent() -> Contestant:
    """pytorch-metric-learning's SelfSupervisedLoss(NTXentLoss) for nt_xent."""
    losses = importlib.import_module("pytorch_metric_learning.losses")
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(forms.TEMPERATURE))
    return lambda z: loss(*z.chunk(2))


def pytorch_metric_learning_sup_con() -> Contestant:
    """pytorch-metric-learning's SupConLoss for sup_con."""
    loss: Contestant = importlib.import_module("pytorch_metric_learning.losses").SupConLoss(forms.TEMPERATURE)
    return loss


PACKAGES = {
    "cut-cross-entropy",
    "inf-cl",
    "info-nce-pytorch",
    "liger-kernel",
    "lightly",
    "open-clip-torch",
    "pytorch-metric-learning",
    "siglip-kernel",
}


def versions() -> dict[str, str]:
    """Versions of the other packages that are installed."""
    found = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(PACKAGES & found.keys())}
