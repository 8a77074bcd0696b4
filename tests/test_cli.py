"""python -m fastnce: its report, and its exit status where the numbers are wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnce
from fastnce import backends, selftest
from fastnce.__main__ import main
from fastnce.backends import torch_tiles
from fastnce.problem import Gradients, Problem, Side

Output = Callable[[], str]


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run kernels in Triton's interpreter, where the self-test would take a minute."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    """The output since the last call."""
    return lambda: capsys.readouterr().out


@pytest.mark.parametrize("built", [False, True], ids=["no library", "library"])
def test_a_sound_installation_exits_0(built: bool, request: pytest.FixtureRequest, output: Output) -> None:
    """Every backend that runs on a CPU solves every loss; without the library "cpu" says how to get it, and "auto" is "torch"."""
    if built:
        request.getfixturevalue("compiled")
    assert main([]) == 0
    printed = output()
    assert f"fastnce {fastnce.__version__}" in printed
    assert f"torch {torch.__version__}" in printed
    assert f"auto uses  {'cpu' if built else 'torch'} for cpu tensors\n" in printed
    assert "auto uses  torch for cuda tensors\n" in printed
    assert built or re.search(r"\n  cpu +on cpu +no +library not built \(python -m fastnce build-cpu\); backend='torch' ", printed)
    assert "FAILED" not in printed
    rows = [line.split() for line in printed.splitlines() if line.endswith(" s")]
    assert [row[0] for row in rows if row[2] == "cpu"] == [*(["cpu"] if built else []), "torch", "reference"]
    assert re.search(r"triton +on cpu +no .*device cpu \(needs CUDA", printed)
    assert re.search(r"cuda +on cpu +no .*device cpu \(needs CUDA", printed)
    assert all(len(row) == 3 + len(selftest.CASES) + 3 for row in rows)


def test_json_says_the_same(output: Output) -> None:
    assert main(["--json"]) == 0
    found = json.loads(output())
    assert found["versions"]["torch"] == torch.__version__
    assert [row["name"] for row in found["backends"] if row["device"] == "cpu"] == list(backends.BACKENDS)
    assert found["auto"] == {"cpu": "torch", "cuda": "torch"}
    for run in found["self_test"]["runs"]:
        assert [loss["loss"] for loss in run["losses"]] == list(selftest.CASES)
        # Exactly 0 would mean that the float64 answer was compared with itself.
        assert all(0 < loss["error"] <= found["self_test"]["limit"] for loss in run["losses"])


def test_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "fastnce"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"fastnce {fastnce.__version__}")


def test_an_unknown_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--jsn"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --jsn" in capsys.readouterr().err


def lower_one_row(found: list[Side]) -> list[Side]:
    found[0].lse_neg[7] -= 1e-2
    return found


def lose_one_row(found: Gradients) -> Gradients:
    assert found.dq is not None
    found.dq[7] = 0.0
    return found


def one_nan(found: Gradients) -> Gradients:
    assert found.dq is not None
    found.dq[0, 0] = torch.nan
    return found


def no_factor(found: Gradients) -> Gradients:
    return found if found.dscale is None else found._replace(dscale=2 * found.dscale)


def crash(found: Any) -> Any:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("function", "fault", "complaint"),
    [
        ("forward", lower_one_row, "limit 1e-05"),
        ("forward", crash, "RuntimeError: no kernel image is available"),
        ("backward", lose_one_row, "limit 1e-05"),
        ("backward", no_factor, "limit 1e-05"),
        ("backward", one_nan, "not finite"),
        ("backward", crash, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_broken_backend_exits_1(
    function: str, fault: Callable[[Any], Any], complaint: str, monkeypatch: pytest.MonkeyPatch, output: Output
) -> None:
    sound = getattr(torch_tiles, function)
    monkeypatch.setattr(torch_tiles, function, lambda *given: fault(sound(*given)))
    assert main([]) == 1
    printed = output()
    assert printed.count(complaint) >= len(selftest.CASES)
    assert main(["--json"]) == 1
    runs = {run["backend"]: run for run in json.loads(output())["self_test"]["runs"] if run["device"] == "cpu"}
    assert not any(loss["ok"] for loss in runs["torch"]["losses"])
    assert runs["reference"]["ok"]


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    """It is listed with its reasons, left out of the self-test, and no failure."""
    unbuilt = ModuleType("unbuilt")

    def unsupported(problem: Problem) -> list[str]:
        return [f"device {problem.q.device.type} (needs CUDA)", "library not built (build it)"]

    vars(unbuilt)["unsupported"] = unsupported
    monkeypatch.setitem(backends.BACKENDS, "unbuilt", unbuilt)
    assert main([]) == 0
    lines = [" ".join(line.split()) for line in output().splitlines()]
    assert "unbuilt on cpu no device cpu (needs CUDA); library not built (build it)" in lines
    assert not any(line.startswith("unbuilt") and line.endswith(" s") for line in lines)


def test_a_gpu_that_no_kernel_runs_on_gets_torch(recwarn: pytest.WarningsRecorder) -> None:
    """Without a warning: the report has the reasons. Fake tensors stand for a GPU's."""
    with FakeTensorMode():
        q, k = torch.ones(2, 8, 4, device="cuda")
        assert fastnce.info_nce(q, k).device.type == "cuda"
    assert not recwarn.list


def test_an_unknown_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTNCE_BACKEND", "tritn")
    assert main([]) == 1
    assert capsys.readouterr().err.startswith("python -m fastnce: report: FASTNCE_BACKEND is 'tritn'; set it to 'auto' or one of")


def test_no_backend_for_auto(monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    monkeypatch.setattr(torch_tiles, "unsupported", lambda problem: ["not today"])
    assert main([]) == 0
    assert "auto uses  nothing for cpu tensors" in output()
