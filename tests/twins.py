"""Every loss module with its function, and the ways to copy a module, for the tests of modules, queue and scale.

The table of losses names the modules. A module with options of its own is written down in TWINS, with a value for each."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastnce
from fastnce import ClipLoss, InfoNCE, LogitScale, MoCoLoss, SupConLoss, clip_loss, info_nce, moco_loss, sup_con
from train_ref.truth import LOSSES, Loss


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def on_disk(module: nn.Module) -> nn.Module:
    """Through torch.save and back, as a checkpoint of the whole module."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": on_disk,
}


class Twin(NamedTuple):
    """A module, its function, the shapes of their inputs, and options that are not the defaults."""

    module: Callable[..., nn.Module]
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]
    learnt: int = 3  # how many of its first inputs get a gradient

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        inputs = [rows(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(self.shapes)]
        return inputs[: self.learnt] + [z.detach() for z in inputs[self.learnt :]]


COMMON = {"reduction": "sum", "normalize": False, "backend": "reference"}
TEMPERATURE = {"temperature": 0.3}


def clip_function(image: Tensor, text: Tensor, **options: Any) -> Any:
    """clip_loss with the scale that a new module owns."""
    return clip_loss(image, text, LogitScale()(), **options)


def moco_module(**options: Any) -> MoCoLoss:
    module = MoCoLoss(7, 5, **options)
    module.queue.enqueue(rows(7, 5, seed=9).detach())
    return module


def moco_function(q: Tensor, k: Tensor, **options: Any) -> Any:
    return moco_loss(q, k, rows(7, 5, seed=9).detach(), **options)


def twin_of(loss: Loss, **options: Any) -> Twin:
    """Of a loss of one tensor (6, 5) for each of its features, with the options that every module has."""
    return Twin(getattr(fastnce, loss.module), getattr(fastnce, loss.name), ((6, 5),) * len(loss.leaves), COMMON | TEMPERATURE | options)


TWINS = {loss.module: twin_of(loss) for loss in LOSSES.values()} | {
    # Modules with inputs or options that others do not have.
    "InfoNCE": twin_of(LOSSES["info_nce"], symmetric=True),
    "InfoNCE unpaired": Twin(InfoNCE, info_nce, ((6, 5), (6, 5), (7, 5)), COMMON | TEMPERATURE | {"in_batch": True}),
    "SupConLoss": Twin(SupConLoss, sup_con, ((6, 3, 5),), COMMON | TEMPERATURE | {"variant": "in", "views": "one", "no_positive": "skip"}),
    "ClipLoss": Twin(ClipLoss, clip_function, ((6, 5), (6, 5)), COMMON),
    "MoCoLoss": Twin(moco_module, moco_function, ((6, 5), (6, 5)), COMMON | TEMPERATURE, learnt=1),
}
# One of each class, and what each of them may be given as its scale.
MODULES = [name for name in TWINS if name != "InfoNCE unpaired"]
HELD: dict[str, Callable[[], Any]] = {
    "float": lambda: 4.0,
    "tensor": lambda: torch.tensor([4.0]),
    "parameter": lambda: nn.Parameter(torch.tensor([4.0])),
    "LogitScale": lambda: LogitScale(4.0),
}


def run(loss_of: Callable[..., Any], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss and the gradients of its inputs."""
    loss = loss_of(*inputs, **options)
    return [loss, *torch.autograd.grad(loss.sum(), [z for z in inputs if z.requires_grad])]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
