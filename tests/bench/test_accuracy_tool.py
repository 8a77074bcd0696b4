"""accuracy.py finds what is wrong, and judges float64 by more digits than float64 has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import accuracy, inputs
from train_ref.truth import LOSSES, Loss
from train_ref.truth import exact as truth


@pytest.mark.parametrize("regime", inputs.REGIMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_exact_answer_is_that_of_dense_float64(loss: str, regime: str) -> None:
    """Where the dense form is well conditioned, autograd through it confirms the answer from extended logits."""
    tensors, parameter = accuracy.inputs(accuracy.Point(loss, torch.float64, regime, 24, 0.5), 34)
    true, sizes = accuracy.Exact(LOSSES[loss], tensors).at(parameter)
    dense = accuracy.answer(accuracy.dense(LOSSES[loss]), LOSSES[loss], tensors, parameter, 1.0)
    for name, error in accuracy.errors(dense, true, sizes).items():
        assert error.max() < 1e-12 * (sizes.by_scale / abs(true.by_scale) if name == "scale" else 1), name


@pytest.mark.parametrize("loss", LOSSES)
def test_extended_logits_do_not_depend_on_blocks(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some rows, the last of them ragged, and all at once."""
    tensors, parameter = accuracy.inputs(accuracy.Point(loss, torch.float64, "aligned", 5, 0.1), 34)
    whole, _ = accuracy.Exact(LOSSES[loss], tensors).at(parameter)
    for module in (truth, inputs):
        monkeypatch.setattr(module, "BLOCK", 7 * 34)
    found, _ = accuracy.Exact(LOSSES[loss], tensors).at(parameter)
    torch.testing.assert_close(found.rows, whole.rows, rtol=1e-15, atol=0)


def test_extended_logits_hold_what_float64_rounds() -> None:
    """A cosine of 2^-60 less one of 1: float64 rounds the difference to -1, and three times that to -3."""
    z = torch.eye(2, 3, dtype=torch.float64)
    z[:, 2] = 2.0**-30
    rows, both = torch.eye(2, dtype=torch.bool), slice(0, 2)
    extended = inputs.Extended(LOSSES["info_nce"], {"query": z, "positive_key": z})
    t, beyond = extended.logits(np.longdouble(3), 0, both, rows)
    cosines = extended.cosines(0, both)
    np.testing.assert_array_equal(t.numpy() + beyond.numpy().astype(np.longdouble), 3 * (cosines - np.diag(cosines)[:, None]))
    assert t[0, 1] == -3 and t[0, 0] == 0
    if np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant + 9:
        assert beyond[0, 1] == pytest.approx(3 * 2.0**-60, rel=0.2)


def test_losses_have_two_spellings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Short, as in the tables of time and memory, and public, as in those of accuracy: the commands take both and record their own."""
    short, public = (f"--losses={names}" for names in ("nt_xent,clip,dcl,moco", "nt_xent,clip_loss,dcl_loss,moco_loss"))
    assert command.parse(["time", short]).losses == command.parse(["time", public]).losses == ["nt_xent", "clip", "dcl", "moco"]
    monkeypatch.setattr(accuracy.Grid, "run", lambda grid: iter(ran.append(grid.losses) or ()))
    monkeypatch.setattr(accuracy.torch, "set_num_threads", lambda _: None)
    ran: list[list[str]] = []
    for given in (short, public):
        assert accuracy.main([given, f"--out={tmp_path}"]) == 0
        assert f" {public} " in capsys.readouterr().out
    assert ran == [["nt_xent", "clip_loss", "dcl_loss", "moco_loss"]] * 2
    for refuse in (partial(command.parse, ["time", "--losses=nt_xent_loss"]), partial(accuracy.main, ["--losses=nt_xent_loss"])):
        with pytest.raises(SystemExit) as stopped:
            refuse()
        assert stopped.value.code == 2
    assert "--losses: unknown 'nt_xent_loss'; choose from nt_xent," in (said := capsys.readouterr().err)
    assert "--losses are of nt_xent," in said


def planted(entry: Loss, wrong: str | None) -> Callable[[dict[str, Tensor], str], Tensor]:
    """The dense loss in float64: as it is, with a "loss" 1e-4 too large, with 2 % less "gradient"."""

    def call(tensors: dict[str, Tensor], reduction: str) -> Tensor:
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        if wrong == "gradient":
            wide[entry.leaves[0]] = 0.98 * wide[entry.leaves[0]] + 0.02 * wide[entry.leaves[0]].detach()
        value = accuracy.dense(entry)(wide, reduction)
        return value + 1e-4 if wrong == "loss" else value

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [None, "loss", "gradient"])
@pytest.mark.parametrize("loss", LOSSES)
def test_accuracy_finds_a_planted_error(loss: str, wrong: str | None, dtype: torch.dtype) -> None:
    """In place of fastnce the dense loss in float64: as it is, with a loss 1e-4 too large, with 2 % less gradient."""
    entry = LOSSES[loss]
    tensors, parameter = accuracy.inputs(accuracy.Point(loss, dtype, "random", 24, 0.1), 66)
    _, verdicts = accuracy.judge(accuracy.Exact(entry, tensors), parameter, {"planted": (planted(entry, wrong), nullcontext)})
    outside = {name for name, verdict in verdicts["planted"].items() if not verdict.used <= 1}
    assert outside == ({wrong} if wrong != "loss" else {"loss", "row"}) - {None}
