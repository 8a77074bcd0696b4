"""The contestants of every loss by name: fastnce, plain torch, and the packages that are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnce
from bench import dense
from bench.dense import CAREFUL, CHUNKED, EAGER, LOSSES, Contestant
from train_ref.truth.golden import packages

OURS = "fastnce"


def fastnce_loss(loss: str, backend: str = "auto") -> Contestant:
    given = {} if loss == "clip" else {"temperature": dense.TEMPERATURE}  # clip's scale is one of its leaves
    return partial(getattr(fastnce, dense.TABLE[loss].name), **given, backend=backend)


# ---------------------------------------------------------------- torch's own fused loss


def of_torch() -> Contestant:
    """F.linear_cross_entropy for info_nce, in chunks of rows, the keys as its weights. Raises ImportError where torch has none.

    There is none for clip: that takes two calls, whose gradients are further from float64 than the tests allow a contestant.
    """
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()  # without any it is dense

    def call(query: Tensor, key: Tensor) -> Tensor:
        q, k = F.normalize(query, dim=1) / dense.TEMPERATURE, F.normalize(key, dim=1)
        found: Tensor = function(q, k, dense.indices(q), options=options)
        return found

    return call


# ---------------------------------------------------------------- of other packages


def of_lightly() -> Contestant:
    """lightly's NTXentLoss for nt_xent."""
    loss = packages.lightly_nt_xent()(temperature=dense.TEMPERATURE)
    return lambda z: loss(*z.chunk(2))


def of_info_nce_pytorch() -> Contestant:
    """info-nce-pytorch's info_nce for info_nce, and with the queue as its negatives for moco."""
    return partial(packages.info_nce_pytorch(), temperature=dense.TEMPERATURE)


def of_open_clip() -> Contestant:
    """open_clip's ClipLoss for clip, of rows normalised as its models do; where it is not installed, the same formula."""
    try:
        loss = packages.open_clip_loss()()
    except ModuleNotFoundError:
        return dense.open_clip_form

    def call(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        found: Tensor = loss(F.normalize(image, dim=1), F.normalize(text, dim=1), logit_scale)
        return found

    return call


def pytorch_metric_learning_nt_xent() -> Contestant:
    """pytorch-metric-learning's SelfSupervisedLoss(NTXentLoss) for nt_xent."""
    losses = importlib.import_module("pytorch_metric_learning.losses")
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(dense.TEMPERATURE))
    return lambda z: loss(*z.chunk(2))


def pytorch_metric_learning_sup_con() -> Contestant:
    """pytorch-metric-learning's SupConLoss for sup_con."""
    loss: Contestant = importlib.import_module("pytorch_metric_learning.losses").SupConLoss(dense.TEMPERATURE)
    return loss


PACKAGES = {
    "cut-cross-entropy",
    "inf-cl",
    "info-nce-pytorch",
    "liger-kernel",
    "lightly",
    "memeff",
    "open-clip-torch",
    "pytorch-metric-learning",
    "siglip-kernel",
}


def versions() -> dict[str, str]:
    """Versions of the other packages that are installed."""
    found = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(PACKAGES & found.keys())}


# ---------------------------------------------------------------- all of them

Factories = dict[str, dict[str, Callable[[], Contestant]]]

# loss -> name -> factory. A factory imports what it needs, so it raises ImportError where that is not installed.
FACTORIES: Factories = {
    loss: {
        OURS: partial(fastnce_loss, loss),
        "eager": partial(EAGER.__getitem__, loss),
        **({"careful": partial(CAREFUL.__getitem__, loss)} if loss in CAREFUL else {}),
        "compile": partial(torch.compile, EAGER[loss]),
        **({"chunked": partial(CHUNKED.__getitem__, loss)} if loss in CHUNKED else {}),
    }
    for loss in LOSSES
}
FACTORIES["info_nce"]["F.linear_cross_entropy"] = of_torch
FACTORIES["nt_xent"]["lightly"] = of_lightly
FACTORIES["nt_xent"]["pytorch-metric-learning"] = pytorch_metric_learning_nt_xent
FACTORIES["info_nce"]["info-nce-pytorch"] = of_info_nce_pytorch
FACTORIES["clip"]["open_clip"] = of_open_clip
FACTORIES["sup_con"]["SupContrast"] = lambda: dense.supcontrast_form
FACTORIES["sup_con"]["pytorch-metric-learning"] = pytorch_metric_learning_sup_con
FACTORIES["moco"]["info-nce-pytorch"] = of_info_nce_pytorch

# torch.compile needs a C++ compiler and seconds for every new shape: it runs only when it is named.
COMPILED = ("compile", "compile autocast")
# It keeps all negative pairs for every positive pair, N^3 numbers, 4 GiB at N = 1,024: it too runs only when it is named.
CUBIC = ("nt_xent", "pytorch-metric-learning")


def on_request(loss: str, name: str) -> bool:
    """Whether a contestant runs only when it is named."""
    return name in COMPILED or (loss, name) == CUBIC


def factories(loss: str, device: str) -> dict[str, Callable[[], Contestant]]:
    """The factories of a loss; those that only run on a GPU, or only make sense there, come after the others."""
    if device == "cpu":
        return FACTORIES[loss]
    from bench.gpu import peers as of_gpu

    return FACTORIES[loss] | of_gpu.FACTORIES.get(loss, {})


def names(device: str) -> list[str]:
    """The names of all contestants of all losses."""
    return list(dict.fromkeys(name for loss in LOSSES for name in factories(loss, device)))


def contestant(loss: str, name: str, backend: str = "auto") -> Contestant:
    """A contestant for any device. Raises ImportError where its package is not installed. `backend` is that of fastnce."""
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
