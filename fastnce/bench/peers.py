"""The contestants of every loss by name: fastnce, plain torch, and the packages that are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fastnce
from fastnce.bench import forms, packages, places
from fastnce.bench.chunked import CHUNKED
from fastnce.bench.forms import CAREFUL, EAGER, LOSSES, Contestant
from fastnce.bench.table import OURS


def fastnce_loss(loss: str, backend: str = "auto") -> Contestant:
    functions: dict[str, Callable[..., Any]] = {
        "nt_xent": partial(fastnce.nt_xent, temperature=forms.TEMPERATURE),
        "info_nce": partial(fastnce.info_nce, temperature=forms.TEMPERATURE),
        "clip": fastnce.clip_loss,
        "sup_con": partial(fastnce.sup_con, temperature=forms.TEMPERATURE),
        "moco": partial(fastnce.moco_loss, temperature=forms.TEMPERATURE),
    }
    return partial(functions[loss], backend=backend)


Factories = dict[str, dict[str, Callable[[], Contestant]]]

# loss -> name -> factory. A factory imports what it needs, so it raises ImportError where that is not installed.
FACTORIES: Factories = {
    loss: {
        OURS: partial(fastnce_loss, loss),
        "eager": partial(EAGER.__getitem__, loss),
        **({"careful": partial(CAREFUL.__getitem__, loss)} if loss in CAREFUL else {}),
        "compile": partial(torch.compile, EAGER[loss]),
        "chunked": partial(CHUNKED.__getitem__, loss),
    }
    for loss in LOSSES
}
FACTORIES["nt_xent"]["lightly"] = packages.of_lightly
FACTORIES["nt_xent"]["pytorch-metric-learning"] = packages.pytorch_metric_learning_nt_xent
FACTORIES["info_nce"]["info-nce-pytorch"] = packages.of_info_nce_pytorch
FACTORIES["clip"]["open_clip"] = packages.of_open_clip
FACTORIES["sup_con"]["SupContrast"] = lambda: forms.supcontrast_form
FACTORIES["sup_con"]["pytorch-metric-learning"] = packages.pytorch_metric_learning_sup_con
FACTORIES["moco"]["info-nce-pytorch"] = packages.of_info_nce_pytorch

# torch.compile needs a C++ compiler and seconds for every new shape: it runs only when it is named.
COMPILED = ("compile", "compile autocast")
# It keeps all negative pairs for every positive pair, N^3 numbers, 4 GiB at N = 1,024: only when it is named, too.
CUBIC = ("nt_xent", "pytorch-metric-learning")


def on_request(loss: str, name: str) -> bool:
    """Whether a contestant runs only when it is named."""
    return name in COMPILED or (loss, name) == CUBIC


def factories(loss: str, device: str) -> dict[str, Callable[[], Contestant]]:
    """Those of a loss; the ones that only run on, or only make sense on, a GPU come after the others."""
    if device == "cpu":
        return FACTORIES[loss]
    on_gpu: Factories = places.of_checkout("gpu_peers").FACTORIES
    return FACTORIES[loss] | on_gpu.get(loss, {})


def names(device: str) -> list[str]:
    """Of every contestant of any loss."""
    return list(dict.fromkeys(name for loss in LOSSES for name in factories(loss, device)))


def contestant(loss: str, name: str, backend: str = "auto") -> Contestant:
    """One of any device. Raises ImportError where its package is not installed. `backend` is that of fastnce."""
    if name == OURS:
        return fastnce_loss(loss, backend)
    return (FACTORIES[loss] if name in FACTORIES[loss] else factories(loss, "cuda"))[name]()


def contestants(loss: str, wanted: list[str] | None = None, device: str = "cpu") -> list[str]:
    """Names of the contestants of a loss, fastnce first: the wanted ones, or all whose packages are installed, less on_request's.

    Raises ImportError where a wanted one cannot be imported.
    """
    found = []
    for name in factories(loss, device):
        asked_for = name == OURS or (wanted is not None and name in wanted)
        if not asked_for and (wanted is not None or on_request(loss, name)):
            continue
        try:
            contestant(loss, name)
        except ImportError:
            if asked_for:
                raise
            continue
        found.append(name)
    return found
