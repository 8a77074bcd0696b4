"""Modules of losses as trainings hold them: averages, copies, other devices, several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twins import COPIES, HELD, MODULES, TWINS, assert_same

import fastnce
from fastnce import ClipLoss, LogitScale, MoCoLoss, clip_loss

KEPT: dict[str, Callable[[], nn.Module]] = {name: TWINS[name].module for name in MODULES}
for _kind in ("tensor", "parameter", "LogitScale"):
    KEPT |= {f"{name}, {_kind}": lambda name=name, kind=_kind: TWINS[name].module(scale=HELD[kind]()) for name in MODULES}


class Model(nn.Module):
    """A layer and a loss, as a training holds them."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(5, 5), loss

    def forward(self, *inputs: Tensor, **given: Any) -> Tensor:
        return self.loss(self.layer(inputs[0]), *inputs[1:], **given)


def step(module: nn.Module, name: str, rows_of_batch: int = 6) -> Tensor:
    """One loss and its backward, of a batch that may have a single row."""
    loss = module(*(z[:rows_of_batch] for z in TWINS[name.split(",")[0]].inputs()))
    loss.backward()
    return loss.detach()


def layout(module: nn.Module) -> list[Any]:
    """Names, shapes, dtypes and places of all that a module holds."""
    held = [*module.named_parameters(), *module.named_buffers()]
    return [(n, t.shape, t.dtype, t.data_ptr()) for n, t in held] + [list(module.state_dict())]


@pytest.mark.parametrize("name", KEPT)
def test_what_a_module_holds_never_changes(name: str) -> None:
    """In number, shape, dtype or place, whatever the batch: averages, moving averages, states, copies and other devices go on from that."""
    module = Model(KEPT[name]())
    fresh, before = copy.deepcopy(module), layout(module)
    moving = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
    averages = [AveragedModel(module, use_buffers=buffers, **how) for buffers in (False, True) for how in ({}, moving)]
    shapes = [[t.shape for t in average.state_dict().values()] for average in averages]
    for n in (6, 1, 6, 1):
        step(module, name, n)
        assert layout(module) == before
        for average, shape in zip(averages, shapes, strict=True):
            average.update_parameters(module)
            assert [t.shape for t in average.state_dict().values()] == shape
    for average in averages:
        assert torch.isfinite(average(*TWINS[name.split(",")[0]].inputs()))
    for other in (fresh, *(make(module) for make in COPIES.values()), Model(KEPT[name]())):
        other.load_state_dict(module.state_dict(), strict=True)
        module.load_state_dict(other.state_dict(), strict=True)
        assert_same([step(other, name)], [step(copy.deepcopy(module), name)])


@pytest.mark.parametrize("name", [*MODULES, "LogitScale", "NegativeQueue"])
def test_a_module_made_on_the_meta_device(name: str) -> None:
    """to_empty, then reset_parameters wherever there is one: as if it had been made where it is."""
    make = {
        "LogitScale": lambda: LogitScale(3.0),
        "NegativeQueue": lambda: fastnce.NegativeQueue(50, 8),
        "MoCoLoss": lambda: MoCoLoss(7, 5),
    }
    new = make.get(name) or TWINS[name].module
    torch.manual_seed(0)
    expected = new()
    with torch.device("meta"):
        module = nn.ModuleList([new()])
    assert all(t.is_meta for t in module.state_dict().values())
    module.to_empty(device="cpu")
    for t in (*module.parameters(), *module.buffers()):
        t.data.fill_(77)  # stands for the bytes that lay there
    torch.manual_seed(0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert repr(module[0]) == repr(expected)
    assert_same(list(module.state_dict().values()), list(expected.state_dict().values()))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, found through a file: no port is chosen."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP1": lambda m: FullyShardedDataParallel(m, use_orig_params=True, device_id=torch.device("cpu")),
    "FSDP2": lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (1,))),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching")  # nothing is split between one process
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", KEPT)
def test_a_module_in_a_model_of_several_processes(name: str, wrap: str, one_process: None) -> None:
    """Three steps of training with the losses of the same model alone, whether broadcast, split or both."""
    torch.manual_seed(0)
    alone = Model(KEPT[name]())
    model = WRAPS[wrap](copy.deepcopy(alone))
    losses = []
    for trained in (alone, model):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(step(trained, name))
            optimizer.step()
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.parametrize("wrap", ["alone", *WRAPS])
@pytest.mark.parametrize("kind", ["its own", "parameter", "LogitScale", "float", "tensor"])
def test_clip_called_with_the_scale_of_the_model(kind: str, wrap: str, one_process: None) -> None:
    """A parameter of its own is used, with a gradient of 0: DDP's next step finds nothing missing. The loss is the function's."""
    clip = ClipLoss() if kind == "its own" else ClipLoss(scale=HELD[kind]())
    own, scale = list(clip.parameters()), torch.tensor(9.0)
    assert len(own) == (kind in ("its own", "parameter", "LogitScale"))
    model = WRAPS.get(wrap, lambda m: m)(Model(clip))
    for _ in range(3):
        image, text = TWINS["ClipLoss"].inputs()
        loss = model(image, text, logit_scale=scale)
        loss.backward()
        if wrap == "alone":
            assert torch.equal(loss, clip_loss(model.layer(image), text, scale))
            assert all(torch.equal(parameter.grad, torch.zeros(1)) for parameter in own)
