"""The losses of other packages, loaded without what else those packages import: for make.py, for the tests, and for bench/."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor


def _folder(package: str) -> Path:
    """Where an installed package lives, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    return Path(spec.origin).parent


def info_nce_pytorch() -> Callable[..., Tensor]:
    """info-nce-pytorch's info_nce."""
    function: Callable[..., Tensor] = importlib.import_module("info_nce").info_nce
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
    """lightly's NTXentLoss."""
    return _of_lightly("ntx_ent_loss", "NTXentLoss")


def lightly_dcl() -> type[torch.nn.Module]:
    """lightly's DCLLoss."""
    return _of_lightly("dcl_loss", "DCLLoss")


def _of_lightly(module: str, name: str) -> type[torch.nn.Module]:
    """One of lightly's losses, also where torchvision is missing.

    lightly's packages import its networks, and only those need torchvision. Empty packages over the same folders let
    the loss and its memory bank load alone; the one helper they name gathers over processes, and here there is one.
    """
    shells: dict[str, ModuleType] = {}
    if importlib.util.find_spec("torchvision") is None:
        for shell in ("lightly.loss", "lightly.models", "lightly.models.modules", "lightly.models.utils"):
            shells[shell] = ModuleType(shell)
            shells[shell].__path__ = [str(_folder("lightly").joinpath(*shell.split(".")[1:]))]
        vars(shells["lightly.models.utils"])["concat_all_gather"] = lambda tensor: tensor
    with mock.patch.dict(sys.modules, shells):
        loss: type[torch.nn.Module] = getattr(importlib.import_module(f"lightly.loss.{module}"), name)
    return loss
