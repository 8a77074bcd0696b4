"""The proof of a loss as one operator: a sound one passes, every planted fault is caught, and then statistics make the loss."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_proof import CPU, ROWS, SMALL, NoOperation, broken, cache, device, no_image, problem, recorded  # noqa: F401  fixtures
from torch import Tensor

import fastnce
from fastnce import backends, fused
from fastnce.backends import proof, proof_losses, triton, verdicts
from fastnce.backends._gpu import host
from fastnce.backends.trial import GIVEN, RULES, SHAPES, Variant
from fastnce.backends.triton import tape
from fastnce.pairs import Pairs
from fastnce.problem import LossProblem, LossWanted

LOSS = ROWS._replace(loss="out")
SOUND = [
    LOSS._replace(given="number+partners", aligned=False),  # with keys that get a gradient, and without
    LOSS._replace(shape="symmetric", loss="decoupled", given="second"),
    LOSS._replace(dtype="bfloat16", parts=1, shape="symmetric", rules="labels", aligned=False, loss="in"),
    LOSS._replace(dtype="float16", parts=1, shape="two_sided", rules="labels+ids", bias=True, given="weighted sum"),
    LOSS._replace(shape="symmetric", rules="place", aligned=False, normalize=False, given="number+weight"),
    LOSS._replace(shape="two_sided", bias=True, given="weighted sum+values"),
    LOSS._replace(given="number+partners+values", aligned=False),
]


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("of", SOUND, ids=str)
def test_sound_kernels_pass(of: Variant, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels, several tiles and splits."""
    monkeypatch.setattr(host, "multiprocessors", lambda _: 4)
    assert proof.check(triton, of, 40, CPU, SMALL) == ""


# Faults -----------------------------------------------------------------------------------------------------------------------------------


def by_statistics(ask: LossProblem, upstream: Tensor) -> dict[str, Tensor]:
    """In a thread of its own: inside of an operator this one records no derivatives."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(proof_losses.by_statistics, ask, upstream, torch.float32).result()


def fake_loss_of_tiles(ask: LossProblem) -> tuple[Tensor, Tensor]:
    """The shapes of what loss_of_tiles returns."""
    q = ask.problem.q
    rows = q.shape[:-1].numel() + (0 if ask.second is None else len(ask.second))
    return q.new_ones(rows if ask.by_row else (), dtype=torch.float32), q.new_empty(0)


def loss_of_tiles(ask: LossProblem) -> tuple[Tensor, Tensor]:
    """What a sound pair of functions returns, from torch's tiles in the dtype that GPUs compute in."""
    ones, kept = fake_loss_of_tiles(ask)
    return by_statistics(ask, ones)["loss"].float(), kept


def gradients_of_tiles(ask: LossProblem, kept: Any, upstream: Tensor, wanted: LossWanted) -> list[Tensor | None]:
    found = by_statistics(ask, upstream)
    given = zip(proof_losses.NAMES, proof_losses.tensors(ask), wanted, strict=True)
    return [found[name].to(x.dtype) if want and x is not None else None for name, x, want in given]


def broken_pair(
    loss: Callable[[LossProblem], Any] = loss_of_tiles, gradients: Callable[..., list[Tensor | None]] = gradients_of_tiles
) -> ModuleType:
    module = broken()
    vars(module).update(loss=loss, gradients=gradients)
    return module


def wrong_factor(ask: LossProblem) -> tuple[Tensor, list[Tensor]]:
    """One thousandth of the loss too much: a mean over 1000 rows that divides by 999."""
    found, kept = loss_of_tiles(ask)
    return found * 1.001, kept


def without_upstream(ask: LossProblem, kept: Any, upstream: Tensor, wanted: LossWanted) -> list[Tensor | None]:
    return gradients_of_tiles(ask, kept, torch.ones_like(upstream), wanted)


def only(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor | None]]:
    """One of the gradients is wrong."""
    place = LossWanted._fields.index(name)

    def gradients(*given: Any) -> list[Tensor | None]:
        found = gradients_of_tiles(*given)
        one = found[place]
        found[place] = None if one is None else change(one)
        return found

    return gradients


def scale_for_temperature(ask: LossProblem, *given: Any) -> list[Tensor | None]:
    """The derivative by the scale, where that by its inverse was asked for."""
    found = gradients_of_tiles(ask, *given)
    if ask.inverse and found[4] is not None and ask.scale is not None:
        found[4] = -found[4] * ask.scale**2
    return found


def lost(ask: LossProblem, *given: Any) -> list[Tensor | None]:
    return [None] * 7


def no_image_of_close(ask: LossProblem) -> Any:
    raise RuntimeError("no kernel image is available")


def of_mean_upstream(ask: LossProblem, kept: Any, upstream: Tensor, wanted: LossWanted) -> list[Tensor | None]:
    return gradients_of_tiles(ask, kept, upstream.mean().expand_as(upstream), wanted)


WEIGHTED = LOSS._replace(given="weight")
VALUES = LOSS._replace(given="values")
PARTNERS = LOSS._replace(aligned=False, given="partners")
VIEWS = LOSS._replace(shape="symmetric", given="second")
DECOUPLED = VIEWS._replace(loss="decoupled")
VIEWS_OF_LABELS = LOSS._replace(shape="symmetric", rules="labels", aligned=False, loss="in")
LOSS_FAULTS: dict[str, tuple[Variant, ModuleType, str]] = {
    "value": (LOSS, broken_pair(wrong_factor), "loss at scale"),
    "upstream": (LOSS, broken_pair(gradients=without_upstream), "d(q|k|scale)"),
    "query": (LOSS, broken_pair(gradients=only("q", lambda g: g.flip(1))), "dq( alone)? at scale"),
    "second": (VIEWS, broken_pair(gradients=only("second", lambda g: g.flip(0))), "dsecond( alone)? at scale"),
    "partners": (PARTNERS, broken_pair(gradients=only("partners", lambda g: g * 1.01)), "dpartners( alone)? at scale"),
    "temperature": (LOSS, broken_pair(gradients=scale_for_temperature), "dscale at scale 10"),
    "weight": (WEIGHTED, broken_pair(gradients=only("weight", lambda g: g.flip(0))), "dweight at scale"),
    "value of a row": (VALUES, broken_pair(lambda ask: (loss_of_tiles(ask)[0].roll(1), loss_of_tiles(ask)[1])), "loss at scale"),
    "upstream of a row": (VALUES, broken_pair(gradients=of_mean_upstream), "d(q|k|scale)"),
    "bias": (LOSS._replace(bias=True), broken_pair(gradients=only("bias", lambda g: g + 1.0)), "dbias at scale"),
    "nan": (LOSS, broken_pair(gradients=only("k", lambda g: g * torch.nan)), "dk( alone)? at scale 10: error nan"),
    "nothing": (LOSS, broken_pair(gradients=lost), "RuntimeError: no dq, dk, dscale was returned"),
    "raises": (LOSS, broken_pair(no_image_of_close), "RuntimeError: no kernel image is available"),
}


@pytest.mark.parametrize("fault", LOSS_FAULTS)
def test_a_planted_fault_of_a_loss_is_caught(fault: str) -> None:
    of, backend, why = LOSS_FAULTS[fault]
    assert proof.check(broken_pair(), of, 64, CPU, SMALL) == ""
    assert re.match(why, proof.check(backend, of, 64, CPU, SMALL))


def test_the_variants_ahead_are_sound_problems() -> None:
    """One of every shape, rule, flag and loss, by torch's tiles: none of their problems is outside of the limits by itself."""
    every = [one for one in proof.ahead(losses=True) if one[1] == 64 and (one[0].dtype == "float16" or "weight" in one[0].given)]
    assert {one.shape for one, _ in every} == set(SHAPES) and {one.rules for one, _ in every} >= set(RULES)
    assert {given for one, _ in every for given in one.given.split("+") if given} == set(GIVEN)
    for of, columns in every:
        assert proof.check(broken_pair(), of, columns, CPU, SMALL) == "", of


# A fault in the kernels themselves: the form that shows it, file and line, and what stands there instead.
KERNEL_FAULTS = {
    "coefficient": (LOSS, "kernels_loss", "of_lse, of_mean = zero, -p", "of_lse, of_mean = zero, -0.999 * p"),
    "coefficient in": (VIEWS_OF_LABELS, "kernels_loss", "of_lse, of_mean = -p, zero", "of_lse, of_mean = zero, -p"),
    "coefficient decoupled": (DECOUPLED, "kernels_loss", "return value, one, zero, -one", "return value, one, zero, zero"),
    "lost weight": (WEIGHTED, "kernels_loss", "c = tl.load(weight + i, mask=inside, other=0.0).to(tl.float64)", "c += 0.0"),
    "mean of weights": (WEIGHTED, "kernels_loss", "factor_of_all = 1.0 / ", "factor_of_all = 0.999 / "),
    "factor": (LOSS, "kernels_rows", "tl.load(scalars + OVER).to(tl.float32)", "tl.load(scalars + OVER).to(tl.float32) * 0.999"),
    "upstream": (PARTNERS, "kernels_rows", "outer = tl.load(upstream).to(tl.float32) * ", "outer = "),
    "temperature": (LOSS, "kernels_rows", "-found * exact * exact", "found"),
}


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_a_fault_in_a_kernel_is_caught(fault: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, name, line, wrong = KERNEL_FAULTS[fault]
    assert proof.check(triton, of, 40, CPU, SMALL) == ""
    kernels = importlib.import_module(f"fastnce.backends.triton.{name}")
    source = Path(kernels.__file__ or "").read_text()
    assert source.count(line) == 1
    file = tmp_path / f"wrong_{name}.py"
    file.write_text(source.replace(line, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changed = {"kernels_loss": "close", "kernels_rows": "finish"}[name]
    monkeypatch.setattr(kernels, changed, getattr(module, changed))
    tape.forget()  # with the kernels that it holds
    assert re.match(r"(loss|d\w+)( alone)? at scale \d+.*: error ", proof.check(triton, of, 40, CPU, SMALL))


@pytest.fixture
def pair(device: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """Backend "triton" makes losses too; what it was asked for."""
    ran: list[str] = []
    monkeypatch.setattr(triton, "fake_loss", fake_loss_of_tiles)
    for name, run in (("loss", loss_of_tiles), ("gradients", gradients_of_tiles)):
        monkeypatch.setattr(triton, name, lambda *given, name=name, run=run: (ran.append(name), run(*given))[1], raising=False)
    return ran


def stepped(pair: list[str], backend: str = "auto") -> tuple[list[str], Tensor, list[str]]:
    """What a step asks the pair for once the verdict is known, the gradient, and the warnings before."""
    z0, z1 = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as lines:
        warnings.simplefilter("always")
        fastnce.nt_xent(z0, z1, 0.1, reduction="sum", backend=backend)
    pair.clear()
    loss = fastnce.nt_xent(z0.requires_grad_(), z1, 0.1, reduction="sum", backend=backend)
    return pair, torch.autograd.grad(loss, z0)[0], [str(line.message) for line in lines]


def test_auto_takes_a_loss_after_a_proof_of_its_own(pair: list[str], device: Path) -> None:  # noqa: F811
    ran, _, lines = stepped(pair)
    assert ran == ["loss", "gradients"] and lines == []
    assert recorded(device).keys() == {"triton: float32, D <= 64, symmetric, index, aligned, loss out, number+second"}


def test_a_later_loss_asks_torch_for_nothing(pair: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    z0, z1 = torch.randn(2, 20, 64)
    ask = fused.ask("nt_xent", z0, None, Pairs(True, 20), 0.1, None, True, "out", "mean", second=z1)
    assert backends.pick_loss("nt_xent", "auto", ask) == "triton"
    monkeypatch.setattr(verdicts, "_first_use", lambda *_: pytest.fail("looked again"))
    monkeypatch.setattr(triton, "unsupported", lambda problem: pytest.fail("asked the backend again"))
    with NoOperation():
        assert backends.pick_loss("nt_xent", "auto", ask) == "triton"


def test_no_loss_is_checked_while_a_stream_is_capturing(pair: list[str], device: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with monkeypatch.context() as during:
        during.setattr(verdicts, "capturing", lambda device: True)
        ran, _, lines = stepped(pair)
    assert ran == [] and "takes a loss from statistics for float32, " in lines[0] and "before the capture" in lines[0]
    assert list(device.glob("proof-*.json")) == []
    assert stepped(pair)[0] == ["loss", "gradients"]
    monkeypatch.setattr(verdicts, "capturing", lambda device: True)
    verdicts.forget()
    assert stepped(pair)[0] == ["loss", "gradients"]  # the verdict on record


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_backend_of_a_loss_is_a_constant_of_the_graph(dynamic: bool, pair: list[str], device: Path) -> None:  # noqa: F811
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: fastnce.nt_xent(a, b, 0.1), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    z0, z1 = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    loss = compiled(z0.requires_grad_(), z1)
    assert list(recorded(device)) == ["triton: float32, D <= 64, symmetric, index, aligned, loss out, number+second"]
    pair.clear()
    (found,) = torch.autograd.grad(compiled(z0, z1), z0)
    assert pair == ["loss", "gradients"]
    eager = fastnce.nt_xent(z0, z1, 0.1, backend="torch")
    torch.testing.assert_close(loss, eager, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(eager, z0)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fault", ["value", "upstream", "raises"])
def test_a_loss_that_is_wrong_is_made_from_statistics(fault: str, pair: list[str], device: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Which have a proof of their own; the warning says once what differed."""
    _, backend, _ = LOSS_FAULTS[fault]
    for name in ("loss", "gradients"):
        monkeypatch.setattr(triton, name, getattr(backend, name))
    ran, found, lines = stepped(pair)
    assert ran == [] and len(lines) == 1
    assert re.match(
        r"fastnce: 'triton' is wrong on cpu for .*, loss out, number\+second: .* takes a loss from statistics there\. ", lines[0]
    )
    assert [why == "" for why, *_ in recorded(device).values()] == [False, True]
    torch.testing.assert_close(found, stepped(pair, "torch")[1], rtol=1e-5, atol=1e-7)


def test_a_backend_that_is_wrong_in_everything(pair: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's tiles make the loss at last; each of the two ways is reported once."""
    monkeypatch.setattr(triton, "loss", no_image_of_close)
    monkeypatch.setattr(triton, "forward", no_image)
    ran, found, lines = stepped(pair)
    assert ran == [] and [line.rpartition(" takes ")[2].partition(" there. ")[0] for line in lines] == ["a loss from statistics", "'torch'"]
    torch.testing.assert_close(found, stepped(pair, "torch")[1], rtol=0, atol=0)
    assert backends.pick("nt_xent", "triton", problem()) == "triton"  # by name nothing falls back


def test_every_form_of_a_loss_is_a_variant_of_its_own(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Of the public losses; sums and means without weights run the same kernels."""
    found: list[str] = []
    monkeypatch.setattr(triton, "loss", loss_of_tiles, raising=False)

    def look(able: tuple[str, ...], device: torch.device, asked: proof.Asked) -> str:
        if (of := proof.completed(2, False, *asked)).loss:
            found.append(str(of).removeprefix("float32, D <= 64, "))
        return ""

    monkeypatch.setattr(verdicts, "choose", look)
    a, b, queue, weight = (x.squeeze(0) for x in torch.randn(27, 64).split([6, 6, 9, 6]))
    ids, t, weight = torch.arange(6) % 3, torch.tensor(0.1), weight[:, 0].abs()
    fastnce.nt_xent(a, b, t)
    fastnce.dcl_loss(a, None, 0.1, normalize=False)
    fastnce.info_nce(a, b, weight=weight, temperature=t)
    fastnce.info_nce(a, b, weight=weight, temperature=t, reduction="sum")
    fastnce.info_nce(a, b, weight=weight, temperature=t, reduction="none")
    fastnce.moco_loss(a, b, queue, 0.1, reduction="sum")
    fastnce.moco_loss(a, b, queue, 0.1, reduction="none")
    fastnce.clip_loss(a, b, t, 3.0 * t, image_ids=ids, exclude_text_ids=ids)
    fastnce.sup_con(torch.stack([a, b], 1), ids, temperature=t, variant="in")
    fastnce.sup_con(torch.stack([a, b], 1), temperature=t)
    assert found == [
        "symmetric, index, aligned, loss out, second",
        "symmetric, index, aligned, dot products, loss decoupled, number",
        "rows, index, aligned, loss out, weight",
        "rows, index, aligned, loss out, weighted sum",
        "rows, index, aligned, loss out, weighted sum+values",
        "rows, index, loss out, number+partners",
        "rows, index, loss out, number+partners+values",
        "two_sided, labels+ids, aligned, bias, loss out",
        "symmetric, labels, loss in",
        "symmetric, place, loss out",
    ]
