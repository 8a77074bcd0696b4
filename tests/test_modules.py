"""The nn.Module twins: what they hold, and that they hold nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import COPIES, TWINS, assert_same, run

import fastnce
from fastnce import ClipLoss, InfoNCE, LogitScale, MoCoLoss, NTXentLoss, SupConLoss, clip_loss, info_nce, moco_loss, nt_xent, sup_con


def test_all_modules_are_tested_here() -> None:
    public = {n for n in fastnce.__all__ if inspect.isclass(getattr(fastnce, n)) and issubclass(getattr(fastnce, n), nn.Module)}
    assert public == {"LogitScale", "NegativeQueue"} | {name.split()[0] for name in TWINS}


@pytest.mark.parametrize(
    ("module", "function", "own"),
    [
        (InfoNCE, info_nce, set()),
        (NTXentLoss, nt_xent, set()),
        (SupConLoss, sup_con, set()),
        (ClipLoss, clip_loss, {"init_scale", "max_scale"}),
        (MoCoLoss, moco_loss, {"queue_size", "dim"}),
    ],
)
def test_a_twin_has_every_argument_of_its_function(module: Any, function: Any, own: set[str]) -> None:
    """Once, in __init__ or in forward, with the same default; the queue is inside MoCoLoss."""
    given: dict[str, Any] = {}
    for method in (module.__init__, module.forward):
        new = {n: p.default for n, p in inspect.signature(method).parameters.items() if n not in {"self"} | own}
        assert not given.keys() & new.keys()
        given |= new
    wanted = {n: p.default for n, p in inspect.signature(function).parameters.items() if n != "queue"}
    if module is ClipLoss:
        wanted["logit_scale"] = None
    assert given == wanted


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_its_function(name: str) -> None:
    """Bit by bit, with defaults and with every option given another value."""
    twin = TWINS[name]
    expected = run(twin.function, twin.inputs())
    assert_same(run(twin.module(), twin.inputs()), expected)
    for option, value in twin.options.items():
        changed = run(twin.function, twin.inputs(), **{option: value})
        assert_same(run(twin.module(**{option: value}), twin.inputs()), changed)
        assert f"{option}={value!r}" in repr(twin.module(**{option: value}))
        if option not in ("backend", "no_positive"):
            assert not torch.equal(changed[0], expected[0]), "the option must matter here, or nothing was shown"


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_hands_on_what_belongs_to_a_batch(name: str) -> None:
    twin = TWINS[name]
    weight = torch.arange(1.0, 7.0)
    assert_same(run(twin.module(), twin.inputs(), weight=weight), run(twin.function, twin.inputs(), weight=weight))
    loss, metrics = twin.module(return_stats=True)(*twin.inputs())
    expected, wanted = twin.function(*twin.inputs(), return_stats=True)
    assert torch.equal(loss, expected) and torch.equal(metrics.rank, wanted.rank) and torch.equal(metrics.hardest, wanted.hardest)


def test_a_twin_hands_on_ids_labels_masks_and_scales() -> None:
    q, k, n, ids = rows(6, 5), rows(6, 5, seed=1), rows(6, 3, 5, seed=2), torch.arange(6) // 2
    mask, alone = ids[:, None] == ids, torch.tensor([0, 0, 1, 1, 2, 3])
    documents = {"exclude_query_ids": ids, "exclude_key_ids": ids.flip(0)}
    scales = {"logit_scale": 3.0, "logit_bias": torch.tensor(-1.0)}
    for found, expected in (
        (InfoNCE()(q, k, query_ids=ids, key_ids=ids.flip(0)), info_nce(q, k, query_ids=ids, key_ids=ids.flip(0))),
        (InfoNCE()(q, k, **documents), info_nce(q, k, **documents)),
        (InfoNCE(negative_mode="paired")(q, k, n), info_nce(q, k, n, negative_mode="paired")),
        (NTXentLoss()(q), nt_xent(q)),
        (SupConLoss()(q, ids), sup_con(q, ids)),
        (SupConLoss()(q, mask=mask), sup_con(q, mask=mask)),
        (SupConLoss(no_positive="skip")(q, alone), sup_con(q, alone) * 6 / 4),
        (ClipLoss()(q, k, image_ids=ids, text_ids=ids), clip_loss(q, k, LogitScale()(), image_ids=ids, text_ids=ids)),
        (ClipLoss()(q, k, **scales), clip_loss(q, k, **scales)),
        (ClipLoss(init_scale=2.0)(q, k), clip_loss(q, k, LogitScale(2.0)())),
        (ClipLoss(init_scale=2.0, max_scale=2.0)(q, k), clip_loss(q, k, LogitScale(2.0, 2.0)())),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", TWINS)
def test_copies_of_a_twin(name: str, how: str) -> None:
    """Fresh, and after a step: with keys that wait for the queue."""
    twin = TWINS[name]
    module = twin.module(**twin.options)
    for _ in range(2):
        other = COPIES[how](module)
        assert repr(other) == repr(module)
        assert_same(run(other, twin.inputs()), run(module, twin.inputs()))
        mine, its = module.state_dict(), other.state_dict()
        assert list(mine) == list(its)
        assert all(torch.equal(mine[n], its[n]) and mine[n].data_ptr() != its[n].data_ptr() for n in mine)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("name", [n for n, twin in TWINS.items() if "temperature" in twin.options])
def test_temperature_is_a_number_a_buffer_or_a_parameter(name: str, learnt: bool) -> None:
    twin = TWINS[name]

    def new(temperature: float) -> nn.Module:
        value = torch.tensor(temperature)
        return twin.module(temperature=nn.Parameter(value) if learnt else value)

    assert "temperature" not in twin.module(temperature=0.3).state_dict()
    module, other = new(0.3), new(0.7)
    assert [n for n, _ in module.named_parameters()] == ["temperature"] * learnt
    assert torch.equal(module.state_dict()["temperature"], torch.tensor(0.3))
    torch.testing.assert_close(run(module, twin.inputs()), run(twin.function, twin.inputs(), temperature=0.3), rtol=1e-5, atol=1e-6)
    other.load_state_dict(module.state_dict())
    assert_same(run(other, twin.inputs()), run(module, twin.inputs()))


@pytest.mark.parametrize("name", TWINS)
def test_a_learnt_temperature_trains(name: str) -> None:
    """Its gradient is that of the function, and following it lowers the loss."""
    twin = TWINS[name]
    inputs = [z.detach() for z in twin.inputs()]
    module = twin.module() if name == "ClipLoss" else twin.module(temperature=nn.Parameter(torch.tensor(0.5)))
    module.eval()
    (parameter,) = module.parameters()
    optimizer = torch.optim.SGD([parameter], lr=0.02)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = module(*inputs)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    step = 1e-3
    with torch.no_grad():
        start = parameter.clone()
        parameter.copy_(start + step)
        above = module(*inputs)
        parameter.copy_(start - step)
        slope = (above - module(*inputs)) / (2 * step)
        parameter.copy_(start)
    optimizer.zero_grad()
    module(*inputs).backward()
    assert parameter.grad.item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_moves_to_float64(name: str) -> None:
    twin = TWINS[name]
    module = twin.module() if name == "ClipLoss" else twin.module(temperature=nn.Parameter(torch.tensor(0.25)))
    single = module(*twin.inputs())
    if name == "MoCoLoss":
        module = twin.module(temperature=nn.Parameter(torch.tensor(0.25)))
    double = module.to(torch.float64)(*twin.inputs(torch.float64))
    assert double.dtype == torch.float64
    assert all(t.dtype == torch.float64 for t in module.state_dict().values() if t.is_floating_point())
    torch.testing.assert_close(double.float(), single, rtol=1e-5, atol=1e-6)


def test_modules_take_a_scale() -> None:
    q, k = torch.randn(6, 5), torch.randn(6, 5)
    scale = nn.Parameter(torch.tensor(4.0))
    for twin, loss in ((InfoNCE(scale=scale), info_nce), (NTXentLoss(scale=scale), nt_xent)):
        assert list(twin.parameters()) == [scale]
        assert torch.equal(twin(q, k), loss(q, k, scale=scale))
