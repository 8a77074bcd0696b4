"""LogitScale: the value between its limits, a gradient that leads back, and a parameter that only the optimizer writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import COPIES, rows

from fastnce import ClipLoss, LogitScale, clip_loss

LIMITS = [(None, None), (None, 100.0), (2.0, None), (2.0, 100.0), (7.0, 7.0)]


def scale_at(value: float, low: float | None, high: float | None) -> LogitScale:
    """A scale whose parameter holds log(value), inside the limits or not."""
    scale = LogitScale(7.0, high, low)
    with torch.no_grad():
        scale.log_scale.fill_(math.log(value))
    return scale


def test_it_starts_as_clip_does() -> None:
    scale = LogitScale()
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6) and scale().shape == ()
    assert list(scale.state_dict()) == ["log_scale"] and scale.log_scale.shape == (1,)
    assert LogitScale(3.0, None)().item() == pytest.approx(3.0, rel=1e-6)
    assert repr(scale) == "LogitScale(max=100.0)" and repr(LogitScale(min=1.0)) == "LogitScale(min=1.0, max=100.0)"


@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize("value", [1e-3, 1.99, 2.0, 7.0, 99.0, 100.0, 100.1, 1e4])
def test_value_and_gradient(value: float, low: float | None, high: float | None) -> None:
    """y = exp(x) between the limits; dL/dx = y dL/dy, or 0 where descent would lead from a limit, or from beyond it, further out."""
    for push in (-0.3, 0.3):
        scale = scale_at(value, low, high)
        before, version = scale.log_scale.item(), scale.log_scale._version
        y = scale()
        (push * y).backward()
        inside = min(max(value, 0 if low is None else low), math.inf if high is None else high)
        assert y.item() == pytest.approx(inside, rel=1e-6)
        assert (low is None or y >= low) and (high is None or y <= high), "not even by a rounding"
        out = (high is not None and value >= high and push < 0) or (low is not None and value <= low and push > 0)
        assert scale.log_scale.grad.item() == pytest.approx(0.0 if out else push * inside, rel=1e-6)
        assert (scale.log_scale.item(), scale.log_scale._version) == (before, version), "the parameter is left alone"


@pytest.mark.parametrize(("start", "away"), [(100.0, -1.0), (2.0, 1.0)])
def test_descent_stays_at_the_limit_and_comes_back(start: float, away: float) -> None:
    """No drift: after fifty steps outwards, the first step inwards is seen."""
    scale = LogitScale(start, 100.0, 2.0)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1e-3)

    def step(push: float) -> float:
        optimizer.zero_grad()
        (push * scale()).backward()
        optimizer.step()
        return scale().item()

    before, parameter = scale().item(), scale.log_scale.item()
    for _ in range(50):
        assert step(away) == before
    assert scale.log_scale.item() == parameter
    after = step(-away)
    assert after == pytest.approx(before * math.exp(1e-3 * away * before), rel=1e-5) and after != before


def test_from_inside_it_overshoots_by_one_step_at_most() -> None:
    scale = LogitScale(90.0)
    optimizer = torch.optim.SGD(scale.parameters(), lr=3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        (-scale()).backward()
        optimizer.step()
    assert scale().item() == pytest.approx(100.0, rel=1e-6)
    assert math.log(100.0) <= scale.log_scale.item() < math.log(100.0) + 3e-3 * 100.0


def test_whatever_else_saves_the_parameter_goes_backward() -> None:
    """A penalty on it in the same graph, before and after the call."""
    a, b = rows(8, 16), rows(8, 16, seed=1)
    clip = ClipLoss()
    x = clip.logit_scale.log_scale
    ((x - 3.0).square().sum() + clip(a, b) + 0.1 * x.square().sum()).backward()
    y = x.detach().double().requires_grad_()
    expected = (y - 3.0).square().sum() + clip_loss(a.double(), b.double(), y.exp()) + 0.1 * y.square().sum()
    assert x.grad.item() == pytest.approx(torch.autograd.grad(expected, y)[0].item(), rel=1e-5)


def through_func(scale: LogitScale, push: float) -> Tensor:
    parameters = dict(scale.named_parameters())
    return torch.func.grad(lambda p: push * torch.func.functional_call(scale, p, ()))(parameters)["log_scale"]


def through_vmap(scale: LogitScale, push: float) -> Tensor:
    grad = torch.func.grad(lambda x, p: p * torch.func.functional_call(scale, {"log_scale": x}, ()))
    return torch.vmap(grad, (None, 0))(scale.log_scale.detach(), torch.tensor([push, 7.0]))[0]


def through_compile(scale: LogitScale, push: float) -> Tensor:
    torch._dynamo.reset()
    return torch.autograd.grad(push * torch.compile(scale, backend="aot_eager", fullgraph=True)(), scale.log_scale)[0]


@pytest.mark.parametrize("through", [through_func, through_vmap, through_compile])
def test_the_gradient_is_the_same_through(through: Callable[[LogitScale, float], Tensor]) -> None:
    for value in (1.0, 7.0, 200.0):
        for push in (-0.3, 0.3):
            scale = scale_at(value, 2.0, 100.0)
            (expected,) = torch.autograd.grad(push * scale(), scale.log_scale)
            assert torch.equal(through(scale, push), expected)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "double, then half": lambda m: m.double().half(),
    "type": lambda m: m.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_it_trains_in_a_model_of_half_precision(cast: str) -> None:
    """As it does in a model that was not cast, step by step."""

    def twenty_steps(model: nn.Sequential) -> list[float]:
        optimizer, path = torch.optim.AdamW(model[1].parameters(), lr=1e-3), []
        for _ in range(20):
            optimizer.zero_grad()
            (-model[1]()).backward()
            optimizer.step()
            path.append(model[1].log_scale.item())
        return path

    plain, model = (nn.Sequential(nn.Linear(2, 2), LogitScale()) for _ in range(2))
    parameter = model[1].log_scale
    model[1]().backward()  # a gradient is cast beside its parameter
    assert CASTS[cast](model) is model and model[0].weight.dtype != torch.float32
    assert model[1].log_scale is parameter and parameter.dtype == parameter.grad.dtype == torch.float32
    path = twenty_steps(model)
    assert path == twenty_steps(plain) and path == sorted(path) and path[-1] > math.log(1 / 0.07) + 0.015


def test_it_moves_to_float64_and_to_another_device() -> None:
    assert LogitScale().double().log_scale.dtype == torch.float64
    moved = LogitScale().to("meta", torch.bfloat16)
    assert moved.log_scale.device.type == "meta" and moved.log_scale.dtype == torch.float32


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    scale = LogitScale(7.0, 9.0, 3.0)
    other = COPIES[how](scale)
    assert torch.equal(other(), scale()) and (other.min, other.max) == (3.0, 9.0)
    with torch.no_grad():
        other.log_scale.fill_(5.0)
    assert other().item() == pytest.approx(9.0, rel=1e-6) and scale().item() == pytest.approx(7.0, rel=1e-6)
    scale.load_state_dict(other.state_dict())
    assert torch.equal(other(), scale())


@pytest.mark.parametrize("assign", [False, True])
def test_a_0_dim_parameter_of_an_old_state_loads(assign: bool) -> None:
    for module, name in ((LogitScale(), "log_scale"), (nn.Sequential(ClipLoss()), "0.logit_scale.log_scale")):
        state = {name: torch.tensor(1.5)}
        assert not any(module.load_state_dict(state, strict=True, assign=assign))
        (parameter,) = module.parameters()
        assert parameter.shape == (1,) and parameter.item() == 1.5 and state[name].shape == ()


def test_an_old_pickle_loads() -> None:
    """Of a scale with a 0-dim parameter and neither `min` nor `init`."""
    scale, old = LogitScale.__new__(LogitScale), dict(vars(LogitScale(50.0, 60.0)))
    del old["min"], old["init"]
    old["_parameters"] = {"log_scale": nn.Parameter(torch.tensor(math.log(50.0)))}
    scale.__setstate__(old)
    assert scale().item() == pytest.approx(50.0, rel=1e-6) and scale.log_scale.shape == (1,)
    scale.reset_parameters()
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"min": 20.0}, ValueError, r"init must be positive, at least min, .*got init=14\..*min=20\.0"),
        ({"init": 1.0, "min": 0.0}, ValueError, "init must be positive, at least min, which is positive"),
        ({"init": 1.0, "min": math.nan}, ValueError, "init must be positive, at least min"),
        ({"min": "1"}, TypeError, "min must be a float, got str"),
        ({"max": True}, TypeError, "max must be a float, got bool"),
    ],
)
def test_limits_are_checked(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^LogitScale: {words}"):
        LogitScale(**options)
