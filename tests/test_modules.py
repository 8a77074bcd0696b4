"""The nn.Module twins of the losses: they hold their options, and nothing else."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import COPIES, HELD, MODULES, TWINS, Twin, assert_same, clip_function, rows, run

import fastnce
from fastnce import ClipLoss, InfoNCE, LogitScale, MoCoLoss, NTXentLoss, SupConLoss, clip_loss, info_nce, nt_xent, sup_con
from train_ref.truth import LOSSES, Loss


def test_all_modules_are_tested_here() -> None:
    public = {n for n in fastnce.__all__ if inspect.isclass(getattr(fastnce, n)) and issubclass(getattr(fastnce, n), nn.Module)}
    assert public == {"LogitScale", "NegativeQueue"} | {name.split()[0] for name in TWINS}


OF_THE_MODULE = {"clip_loss": {"init_scale", "max_scale", "scale"}, "moco_loss": {"queue_size", "dim"}}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_twin_has_every_argument_of_its_function(loss: Loss) -> None:
    """Once, in __init__ or in forward, with the same default; the queue is inside MoCoLoss."""
    module, function, own = getattr(fastnce, loss.module), getattr(fastnce, loss.name), OF_THE_MODULE.get(loss.name, set())
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


def test_a_twin_hands_on_ids_labels_masks_and_scales() -> None:
    q, k, n, ids = rows(6, 5), rows(6, 5, seed=1), rows(6, 3, 5, seed=2), torch.arange(6) // 2
    mask, alone = ids[:, None] == ids, torch.tensor([0, 0, 1, 1, 2, 3])
    documents = {"exclude_query_ids": ids, "exclude_key_ids": ids.flip(0)}
    clip_documents = {"exclude_image_ids": ids, "exclude_text_ids": ids.flip(0)}
    shuffled = {"image_ids": ids, "text_ids": ids.flip(0), "aligned": False}
    scales = {"logit_scale": 3.0, "logit_bias": torch.tensor(-1.0)}
    for found, expected in (
        (InfoNCE()(q, k, query_ids=ids, key_ids=ids.flip(0)), info_nce(q, k, query_ids=ids, key_ids=ids.flip(0))),
        (InfoNCE()(q, k, **documents), info_nce(q, k, **documents)),
        (InfoNCE(negative_mode="paired")(q, k, n), info_nce(q, k, n, negative_mode="paired")),
        (NTXentLoss()(q), nt_xent(q)),
        (SupConLoss()(q, ids), sup_con(q, ids)),
        (SupConLoss()(q, mask=mask), sup_con(q, mask=mask)),
        (SupConLoss(no_positive="skip")(q, alone), sup_con(q, alone) * 6 / 4),
        (SupConLoss(unlabelled="own_views")(n, ids - 1), sup_con(n, ids - 1, unlabelled="own_views")),
        (ClipLoss()(q, k, image_ids=ids, text_ids=ids), clip_loss(q, k, LogitScale()(), image_ids=ids, text_ids=ids)),
        (ClipLoss()(q, k, **clip_documents), clip_loss(q, k, LogitScale()(), **clip_documents)),
        (ClipLoss()(q, k, **shuffled), clip_loss(q, k, LogitScale()(), **shuffled)),
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


# What a module holds --------------------------------------------------------------------------------------------------------------------


def as_function(twin: Twin, **scale: float) -> list[Tensor]:
    """The function with that temperature or scale."""
    if twin.function is clip_function:
        return run(clip_loss, twin.inputs(), logit_scale=scale.get("scale", 1 / scale.get("temperature", 1.0)))
    return run(twin.function, twin.inputs(), **scale)


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("name", MODULES)
def test_temperature_and_scale_are_read_and_set(name: str, kind: str) -> None:
    """In the constructor or later, whatever was held before; each is 1 over the other, and the loss is that of the function."""
    twin = TWINS[name]
    modules = [twin.module(scale=HELD[kind]())]
    for before in HELD.values():
        modules.append(twin.module(scale=before()))
        modules[-1].scale = HELD[kind]()
    modules.append(twin.module(scale=HELD[kind]()))
    modules[-1].temperature = 0.7
    assert not list(modules[-1].parameters()) and modules[-1].temperature == 0.7 and modules[-1].scale == pytest.approx(1 / 0.7)
    modules[-1].scale = HELD[kind]()
    if kind == "LogitScale":
        modules.append(twin.module(scale=2.0))
        modules[-1].logit_scale = HELD[kind]()
        assert "scale" not in modules[-1].options
    elif name != "ClipLoss":
        modules.append(twin.module(temperature=1 / HELD[kind]() if kind == "float" else type(HELD[kind]())(torch.tensor([0.25]))))
    for module in modules:
        for read, value in ((module.scale, 4.0), (module.temperature, 0.25)):
            assert torch.as_tensor(read).detach().item() == pytest.approx(value, rel=1e-6)
        assert len(list(module.parameters())) == (kind in ("parameter", "LogitScale"))
        assert len([n for n, _ in module.named_buffers() if not n.startswith("queue.")]) == (kind == "tensor")
        torch.testing.assert_close(run(module, twin.inputs()), as_function(twin, scale=4.0), rtol=1e-5, atol=1e-6)
        for parameter in module.parameters():
            (read,) = torch.autograd.grad(module.scale, parameter)
            assert read.item() == pytest.approx({"scale": 1.0, "temperature": -16.0}.get(module_key(module), 4.0), rel=1e-5)


def module_key(module: nn.Module) -> str:
    (key,) = (n for n, _ in module.named_parameters())
    return key


@pytest.mark.parametrize("name", MODULES)
def test_what_is_not_given_is_the_default_of_the_function(name: str) -> None:
    twin = TWINS[name]
    default = {"InfoNCE": 0.1, "NTXentLoss": 0.5, "DCLLoss": 0.1, "SupConLoss": 0.1, "MoCoLoss": 0.07, "ClipLoss": 0.07}[name]
    assert torch.as_tensor(twin.module().temperature).detach().item() == pytest.approx(default)
    torch.testing.assert_close(run(twin.module(), twin.inputs()), as_function(twin, temperature=default))


@pytest.mark.parametrize("name", [n for n in MODULES if n != "ClipLoss"])
def test_temperature_and_scale_are_not_both_given(name: str) -> None:
    """Neither the default nor a tensor passes for not given."""
    twin = TWINS[name]
    where = f"^{type(twin.module())._function.__name__}: give temperature or scale, not both"
    for temperature in (0.1, 0.5, 0.07, 0.3, torch.tensor(0.1), nn.Parameter(torch.tensor(0.5))):
        for scale in (3.0, torch.tensor(3.0)):
            for call in (twin.module, lambda **given: twin.function(*twin.inputs(), **given)):
                with pytest.raises(ValueError, match=where):
                    call(temperature=temperature, scale=scale)
    expected = run(twin.function, twin.inputs(), temperature=twin.module().temperature)
    assert_same(run(twin.function, twin.inputs(), temperature=None, scale=None), expected)
    assert_same(run(twin.module(temperature=None, scale=None), twin.inputs()), expected)


def test_clip_takes_one_kind_of_scale() -> None:
    for given in ({"init_scale": 3.0}, {"max_scale": 50.0}, {"max_scale": None}):
        with pytest.raises(ValueError, match="^ClipLoss: give scale, or init_scale and max_scale, not both"):
            ClipLoss(scale=3.0, **given)


WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("reduction", "negative_mode", "variant", "views", "no_positive", "unlabelled"), ("foo", None, 1)),
    **dict.fromkeys(("normalize", "symmetric"), ("yes", None, 1)),
    "in_batch": ("yes", 1),
    "backend": ("tritn", None),
    **dict.fromkeys(
        ("temperature", "scale"), (0.0, -1.0, math.nan, math.inf, True, "0.1", [0.1], torch.ones(2), torch.ones(1, dtype=torch.int64))
    ),
}
OWN: dict[str, tuple[Any, ...]] = {
    "queue_size": (0, -1, 2.5, True, "7"),
    "dim": (0, 2.0, None),
    "init_scale": (0.0, math.nan, True, "1", 200.0),
    "max_scale": ("1", math.nan, 1.0),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_option_is_checked_when_the_module_is_made(name: str) -> None:
    """With the words of the function; and when a temperature or a scale is set."""
    twin = TWINS[name]
    constructor = type(twin.module())
    for option in set(inspect.signature(constructor).parameters) - OWN.keys():
        for value in WRONG[option]:
            of_function = "logit_scale" if constructor is ClipLoss and option == "scale" else option
            function = clip_loss if constructor is ClipLoss else twin.function
            given = {"logit_scale": 3.0} if constructor is ClipLoss else {}
            with pytest.raises((ValueError, TypeError)) as expected:
                function(*twin.inputs(), **given | {of_function: value})
            words = re.escape(str(expected.value).replace("logit_scale", "scale"))
            with pytest.raises(type(expected.value), match=f"^{words}$"):
                twin.module(**{option: value})
            if option in ("temperature", "scale"):
                module = twin.module(scale=2.0)
                with pytest.raises(type(expected.value), match=f"^{words}$"):
                    setattr(module, option, value)
                assert module.scale == 2.0, "what was held stays"
    with pytest.raises(TypeError, match="a LogitScale is no temperature; give it as scale"):
        twin.module().temperature = LogitScale()


def test_the_options_of_one_module_are_checked_when_it_is_made() -> None:
    for option, values in OWN.items():
        for value in values:
            with pytest.raises((ValueError, TypeError), match=f"^(MoCoLoss: {option}|LogitScale: )"):
                MoCoLoss(**({"queue_size": 7, "dim": 5} | {option: value})) if "scale" not in option else ClipLoss(**{option: value})


@pytest.mark.parametrize("name", MODULES)
def test_a_learnt_scale_trains_in_a_model_of_half_precision(name: str) -> None:
    """The parameters of the module itself stay float32; its queue is cast."""
    for kind in ("tensor", "parameter", "LogitScale"):
        module = nn.ModuleList([TWINS[name].module(scale=HELD[kind]())]).bfloat16()[0]
        assert torch.as_tensor(module.scale).dtype == torch.float32
        assert name != "MoCoLoss" or module.queue.keys.dtype == torch.bfloat16
    twin, module = TWINS[name], TWINS[name].module(scale=nn.Parameter(torch.tensor([2.0]))).bfloat16()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    module(*twin.inputs(torch.bfloat16)).backward()
    optimizer.step()
    assert 0 < abs(module.scale.item() - 2.0) < 2.0**-7, "less than a step of bfloat16"


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_an_unused_scale_never_reaches_the_loss(options: dict[str, Any]) -> None:
    """Not even where it is nan, or of another dtype."""
    clip, (image, text) = ClipLoss(**options).double(), TWINS["ClipLoss"].inputs()
    with torch.no_grad():
        clip.logit_scale.log_scale.fill_(math.nan)
    found, expected = clip(image, text, 9.0), clip_loss(image, text, 9.0, **options)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    assert_same(list(torch.autograd.grad(found.sum(), (image, text))), list(torch.autograd.grad(expected.sum(), (image, text))))


def test_pickles_from_when_a_default_was_held_beside_a_scale() -> None:
    """Options then held a temperature always, and scale=None where none was given."""
    for scale, held in ((None, {"temperature": 0.3}), (4.0, {"scale": 4.0})):
        loss = NTXentLoss.__new__(NTXentLoss)
        loss.__setstate__(dict(vars(NTXentLoss(0.3))) | {"options": NTXentLoss().options | {"temperature": 0.3, "scale": scale}})
        assert loss._held() == held


@pytest.mark.parametrize("name", TWINS)
def test_metrics_are_asked_for_elsewhere(name: str) -> None:
    """A loss is a Tensor, and says which function has the ranks; a pickle from when it was an option is read."""
    twin = TWINS[name]
    words = "return_stats is no option, .* fastnce.retrieval\\(query, key\\), or from contrastive_stats\\(metrics=True\\)$"
    for value in (True, False):
        with pytest.raises(TypeError, match=f"^{twin.module()._where}: {words}"):
            twin.function(*twin.inputs(), return_stats=value)
        with pytest.raises(TypeError, match=f"^{type(twin.module()).__name__}: {words}"):
            twin.module(return_stats=value)
    assert "return_stats" not in inspect.signature(type(twin.module())).parameters
    old, module = twin.module(), twin.module()
    old.options["return_stats"] = False
    module.__setstate__(vars(old))
    assert_same(run(module, twin.inputs()), run(twin.function, twin.inputs()))


def test_a_parametrised_temperature_is_the_one_that_counts() -> None:
    """torch.nn.utils.parametrize takes the parameter away and computes it anew at every use; where nothing is held, no default steps in."""
    a, b = rows(6, 5), rows(6, 5, seed=1)
    for name in ("temperature", "scale"):
        module = fastnce.NTXentLoss(**{name: nn.Parameter(torch.tensor(0.2))})
        nn.utils.parametrize.register_parametrization(module, name, nn.Softplus())
        value = nn.functional.softplus(torch.tensor(0.2))
        assert torch.equal(module(a, b), fastnce.nt_xent(a, b, **{name: value}))
        torch.testing.assert_close(module.scale, value if name == "scale" else 1 / value)
    bare = fastnce.NTXentLoss(nn.Parameter(torch.tensor(0.2)))
    del bare._parameters["temperature"]
    with pytest.raises(AttributeError, match="holds neither temperature nor scale any more: set one of them"):
        bare(a, b)


def test_a_scale_is_not_set_as_logit_scale() -> None:
    for value in (nn.Parameter(torch.tensor(2.0)), 14.0, None):
        with pytest.raises(TypeError, match="logit_scale must be a LogitScale, got .*; a scale .* is set as scale"):
            fastnce.ClipLoss().logit_scale = value
