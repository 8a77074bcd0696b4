"""The proof of the GPU backends: a sound one passes, every planted fault is caught, reported and survived, and "auto" acts on the verdict.

Triton's interpreter and the emulated CUDA library are the device: a fixture says that tensors of the CPU count as a GPU's.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnce
from fastnce import backends
from fastnce.__main__ import main
from fastnce.backends import cuda, proof, torch_tiles, triton, verdicts
from fastnce.backends._gpu import host
from fastnce.backends.trial import Variant
from fastnce.pairs import Pairs
from fastnce.problem import Gradients, Problem, Side

CPU = torch.device("cpu")
IN_A_PROCESS = verdicts._in_a_process
ROWS = Variant("float32", 2, 64, "rows", "index", True)
SMALL = 40  # rows of a problem where their number proves nothing: three of the tiles that tests interpret


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No verdict in memory, and none in the cache."""
    monkeypatch.setenv("FASTNCE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FASTNCE_BACKEND", raising=False)
    verdicts.forget()
    yield tmp_path
    verdicts.forget()


@pytest.fixture
def device(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tensors of the CPU count as a GPU's. Backend "triton" is torch's tiles there, in this process: the kernels are not what is tested."""
    monkeypatch.setattr(verdicts, "DEVICES", ("cpu",))
    monkeypatch.setattr(verdicts, "_in_a_process", verdicts._here)
    monkeypatch.setattr(proof, "ROWS", SMALL)
    monkeypatch.setattr(triton, "unsupported", lambda problem: [])
    monkeypatch.setattr(cuda, "unsupported", lambda problem: ["not built"])
    for name in ("forward", "backward"):
        monkeypatch.setattr(triton, name, getattr(torch_tiles, name))
    monkeypatch.setattr(triton, "keeps_output", lambda problem: False)
    monkeypatch.delattr(triton, "loss")
    return cache


def problem(dtype: torch.dtype = torch.float32) -> Problem:
    q, k = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Problem(q, k, torch.tensor(5.0), None, Pairs(offset=0), two_sided=False, normalize=True)


def said(of: Problem | None = None) -> tuple[str, list[str]]:
    """The backend that "auto" takes, and its warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        name = backends.pick("info_nce", "auto", of or problem())
    return name, [str(one.message) for one in found]


def recorded(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("proof-*.json")
    found: dict[str, Any] = json.loads(path.read_text())["verdicts"]
    return found


# The judgement --------------------------------------------------------------------------------------------------------------------------

SOUND = [
    ROWS,
    ROWS._replace(dtype="float16", parts=1),
    ROWS._replace(dtype="float16", parts=1, aligned=False),
    ROWS._replace(dtype="bfloat16", parts=1, shape="symmetric", rules="labels+ids"),
    ROWS._replace(shape="two_sided", rules="mask", aligned=False, bias=True),
    ROWS._replace(shape="two_sided", metrics=True),
    ROWS._replace(shape="symmetric", rules="partners", normalize=False),
    ROWS._replace(parts=1, deterministic=True),
]


@pytest.mark.parametrize(("of", "backend"), [*((of, "cuda") for of in SOUND), *((of, "triton") for of in SOUND[2:4])], ids=str)
def test_sound_kernels_pass(of: Variant, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted and emulated kernels, several tiles and splits; the settings of the process are as before."""
    monkeypatch.setattr(host, "multiprocessors", lambda device: 4)
    state, before = torch.get_rng_state(), torch.backends.cuda.matmul.fp32_precision
    # The interpreter's tiles of the tests hold up to 64 columns.
    assert proof.check(backends.BACKENDS[backend], of, 40, CPU, SMALL) == ""
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.cuda.matmul.fp32_precision == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_variant_comes_twice() -> None:
    every = [one for one, _ in proof.ahead(losses=True)]
    assert [one for one in every if not one.loss] == [one for one, _ in proof.ahead(losses=False)]
    assert len(every) == len(set(every)) and len({str(one) for one in every}) == len(every)


def broken(forward: Callable[[Problem], Any] = torch_tiles.forward, backward: Callable[..., Any] = torch_tiles.backward) -> ModuleType:
    module = ModuleType("broken")
    vars(module).update(forward=forward, backward=backward)
    return module


def wrong_mask(problem: Problem) -> list[Side]:
    """One more pair is a positive."""
    return torch_tiles.forward(problem._replace(pairs=problem.pairs._replace(offset=problem.pairs.offset + 1)))  # type: ignore[operator]


def wrong_mask_on_the_last_row(problem: Problem) -> list[Side]:
    found = torch_tiles.forward(problem)
    found[0].lse_neg[-1] = torch_tiles.forward(problem._replace(pairs=problem.pairs._replace(offset=None)))[0].lse_neg[-1]
    return found


def wrong_layout(problem: Problem, *rest: Any) -> Gradients:
    """Two neighbouring columns of eight rows are exchanged."""
    found = torch_tiles.backward(problem, *rest)
    assert found.dq is not None
    found.dq[:8, :2] = found.dq[:8, :2].flip(1)
    return found


def lost_precision(problem: Problem) -> list[Side]:
    """Operands of ten bits, as in TF32."""
    return torch_tiles.forward(problem._replace(q=problem.q.half().float() if problem.q.dtype == torch.float32 else problem.q))


def long_row(problem: Problem, *rest: Any) -> Gradients:
    """The gradient of the longest row, a millionth of that of the shortest, is lost."""
    found = torch_tiles.backward(problem, *rest)
    assert found.dq is not None
    found.dq[-1] = 0.0
    return found


def unwritten(problem: Problem) -> list[Side]:
    found = torch_tiles.forward(problem)
    return [side._replace(pos=torch.empty_like(side.pos)) for side in found]


def beside(problem: Problem) -> list[Side]:
    """One element behind the end of a result is written."""
    found = torch_tiles.forward(problem)
    lse = torch.empty_like(found[0].lse_neg).copy_(found[0].lse_neg)
    lse.as_strided((1,), (1,), lse.storage_offset() + len(lse)).fill_(0.0)
    return [found[0]._replace(lse_neg=lse)]


def no_image(problem: Problem) -> list[Side]:
    raise RuntimeError("no kernel image is available")


def nan_scale(problem: Problem, *rest: Any) -> Gradients:
    found = torch_tiles.backward(problem, *rest)
    return found._replace(dscale=torch.full_like(problem.scale, torch.nan))


FAULTS = [
    (broken(wrong_mask), "of the rows at scale"),
    (broken(wrong_mask_on_the_last_row), "lse_neg of the rows at scale"),
    (broken(backward=wrong_layout), r"dq at scale \d+: error .*e-0[1-4], limit .*e-0[67]"),
    (broken(lost_precision), r"dq at scale \d+: error .*e-0[34], limit .*e-0[67]"),
    (broken(backward=long_row), "dq at scale"),
    (broken(unwritten), "pos of the rows at scale 10: error nan|pos of the rows at scale 10: error inf"),
    (broken(beside), r"bytes written beside a tensor at scale \d+: error 8"),
    (broken(no_image), "RuntimeError: no kernel image is available"),
    (broken(backward=nan_scale), "dscale at scale 10: error nan"),
]


NAMES = ["mask", "last row", "layout", "precision", "long row", "unwritten", "beside", "raises", "nan"]


@pytest.mark.parametrize(("backend", "why"), FAULTS, ids=NAMES)
def test_a_planted_fault_is_caught(backend: ModuleType, why: str) -> None:
    assert proof.check(broken(), ROWS, 64, CPU, SMALL) == ""
    assert re.search(why, proof.check(backend, ROWS, 64, CPU, SMALL))


def test_wrong_ranks_are_caught() -> None:
    of = ROWS._replace(metrics=True)

    def one_more(problem: Problem) -> list[Side]:
        (found,) = torch_tiles.forward(problem)
        assert found.rank is not None
        found.rank[3] += 1
        return [found]

    assert proof.check(broken(), of, 64, CPU, SMALL) == ""
    assert proof.check(broken(one_more), of, 64, CPU, SMALL).startswith("ranks of the rows at scale")


def test_torchs_own_failure_is_no_verdict(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full memory, or an error of the operations that are the measure, lets "auto" fall back, and leaves the next process to look again."""

    def full(problem: Problem) -> list[Side]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton, "forward", full)
    name, lines = said()
    assert name == "torch" and "OutOfMemoryError: CUDA out of memory" in lines[0]
    assert list(device.glob("proof-*.json")) == []


# "auto" ---------------------------------------------------------------------------------------------------------------------------------


def test_auto_takes_what_is_right_and_looks_once(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    monkeypatch.setattr(proof, "check", lambda backend, of, *rest: checks.append(str(of)) or "")
    assert [said() for _ in range(3)] == [("triton", [])] * 3
    assert checks == ["float32, D <= 64, rows, index, aligned"]
    assert said(problem(torch.bfloat16)) == ("triton", []) and len(checks) == 2
    verdicts.forget()  # another process
    assert said() == ("triton", []) and len(checks) == 2
    assert set(recorded(device)) == {"triton: float32, D <= 64, rows, index, aligned", "triton: bfloat16, D <= 64, rows, index, aligned"}


def test_auto_says_once_what_differs_and_falls_back(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "forward", lost_precision)
    name, (line,) = said()
    assert name == "torch"
    assert re.match(
        r"fastnce: 'triton' is wrong on cpu for float32, D <= 64, rows, index, aligned: dq at scale \d+: error \S+, "
        r"limit \S+, and \d+ more\. backend='auto' takes 'torch' there\. `python -m fastnce check` looks again; FASTNCE_BACKEND or "
        r"backend=\.\.\. names another$",
        line,
    )
    assert said() == ("torch", [])
    verdicts.forget()  # another process says it again, and does not look again
    monkeypatch.setattr(triton, "forward", torch_tiles.forward)
    assert said() == ("torch", [line])
    assert backends.pick("info_nce", "triton", problem()) == "triton"  # by name nothing falls back


def test_auto_takes_the_next_backend_that_is_right(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unsupported", lambda problem: [])
    for name in ("forward", "backward"):
        monkeypatch.setattr(cuda, name, getattr(torch_tiles, name))
    monkeypatch.setattr(triton, "forward", no_image)
    name, (line,) = said()
    assert name == "cuda" and "no kernel image" in line and "takes 'cuda' there" in line


def test_no_proof_is_asked_for_on_a_cpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unsupported", lambda problem: [])
    monkeypatch.setattr(verdicts, "choose", lambda *_: pytest.fail("a proof on a CPU"))
    assert backends.pick("info_nce", "auto", problem(torch.float64)) == "torch"


def test_settings_of_the_caller_do_not_reach_the_check(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def look(backend: ModuleType, of: Variant, *rest: Any) -> str:
        found.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), of.deterministic))
        return ""

    monkeypatch.setattr(proof, "check", look)
    with torch.inference_mode(), torch.autocast("cpu"):
        said()
    assert found == [(True, False, False, False)]
    torch.use_deterministic_algorithms(True)
    try:
        said()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[1:] == [(True, False, False, True)]


def test_forward_and_backward_are_of_one_backend(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss by "auto", in eager mode and under func.grad: both passes are the chosen backend's, also where the verdict changes between."""
    ran = []
    for name in ("forward", "backward"):
        run = getattr(torch_tiles, name)
        monkeypatch.setattr(triton, name, lambda *given, name=name, run=run: (ran.append(name), run(*given))[1])
    q, k = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0))
    fastnce.info_nce(q, k, reduction="sum")
    ran.clear()
    loss = fastnce.info_nce(q.requires_grad_(), k, reduction="sum")
    monkeypatch.setattr(verdicts, "choose", lambda *_: "")
    loss.backward()
    assert ran == ["forward", "backward"]
    monkeypatch.setattr(verdicts, "choose", lambda *_: "triton")
    torch.func.grad(lambda x: fastnce.info_nce(x, k, reduction="sum"))(q.detach())
    assert ran == ["forward", "backward"] * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_chooses_while_it_is_traced(dynamic: bool, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, the proof inside of it: real tensors among fake ones."""
    ran = []
    monkeypatch.setattr(triton, "backward", lambda *given: (ran.append("backward"), torch_tiles.backward(*given))[1])
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: fastnce.info_nce(q, k, reduction="sum"), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    q, k = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    loss = compiled(q.requires_grad_(), k)
    assert list(recorded(device)) == ["triton: float32, D <= 64, rows, index, aligned"]
    ran.clear()
    loss.backward()
    assert ran == ["backward"]
    torch.testing.assert_close(loss, fastnce.info_nce(q, k, reduction="sum", backend="torch"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("surroundings", ["fake", "grad", "vmap"])
def test_a_first_use_inside_of_a_mode(surroundings: str, device: Path) -> None:
    """The check computes with tensors of its own, whatever the caller's are."""

    def loss(q: Tensor) -> Tensor:
        return fastnce.info_nce(q, q.flip(0), reduction="sum")

    q = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    if surroundings == "fake":
        with FakeTensorMode():
            assert isinstance(loss(torch.ones(40, 64)), FakeTensor)
    elif surroundings == "grad":
        assert torch.func.grad(loss)(q[0]).isfinite().all()
    else:
        assert torch.func.vmap(loss)(q).isfinite().all()
    assert recorded(device)["triton: float32, D <= 64, rows, index, aligned"][0] == ""


class NoOperation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pytest.fail(f"{func} was called")


def test_a_later_use_asks_torch_for_nothing(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation, so neither memory nor a synchronisation; no lock, no file."""
    of = problem()
    assert said(of) == ("triton", [])
    monkeypatch.setattr(verdicts, "_first_use", lambda *_: pytest.fail("looked again"))
    with NoOperation():
        assert said(of) == ("triton", [])


def test_nothing_is_checked_while_a_stream_is_capturing(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as during:
        during.setattr(verdicts, "capturing", lambda device: True)
        name, (line,) = said()
        assert name == "torch" and "Call the loss once, forward and backward, before the capture" in line
        assert said() == ("torch", [])
    assert said() == ("triton", [])
    monkeypatch.setattr(verdicts, "capturing", lambda device: True)
    verdicts.forget()
    assert said() == ("triton", [])  # the verdict on record


# FASTNCE_BACKEND ------------------------------------------------------------------------------------------------------------------------


def test_the_environment_names_a_backend(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNCE_BACKEND", "reference")
    assert said() == ("reference", [])
    assert backends.pick("info_nce", "torch", problem()) == "torch"
    monkeypatch.setenv("FASTNCE_BACKEND", "auto")
    assert said()[0] in ("cpu", "torch")
    monkeypatch.setenv("FASTNCE_BACKEND", "tritn")
    q, k = torch.randn(2, 8, 4)
    with pytest.raises(ValueError, match=r"^info_nce: FASTNCE_BACKEND is 'tritn'; set it to 'auto' or one of 'triton', .*, or unset it$"):
        fastnce.info_nce(q, k)
    assert fastnce.info_nce(q, k, backend="torch").isfinite()
    monkeypatch.setenv("FASTNCE_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="float32 cpu, and FASTNCE_BACKEND names it:\n  cuda: "):
        fastnce.info_nce(q, k)


# A process of its own -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.abort()", "the process that checked it was ended by signal 6"),
        ("import sys; sys.exit('no driver')", "the process that checked it ended with status 1: no driver"),
        ("print('nonsense')", "the process that checked it ended with status 0"),
        ("import time; time.sleep(60)", "the process that checked it did not end within 1 s"),
    ],
    ids=["crash", "status", "nonsense", "hang"],
)
def test_the_end_of_the_process_is_the_verdict(code: str, why: str, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_in_a_process", IN_A_PROCESS)
    monkeypatch.setattr(verdicts, "CHILD", code)
    if "sleep" in code:
        monkeypatch.setattr(verdicts, "LIMIT", 1.0)
    name, (line,) = said()
    assert name == "torch" and why in line
    assert list(recorded(device).values())[0][0] == why


def test_a_hang_is_believed_for_an_hour(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process, and the other ones of a job, do not wait for it again; a process of tomorrow looks again. This one does not."""
    with monkeypatch.context() as hanging:
        hanging.setattr(verdicts, "_in_a_process", IN_A_PROCESS)
        hanging.setattr(verdicts, "CHILD", "import time; time.sleep(60)")
        hanging.setattr(verdicts, "LIMIT", 0.2)
        assert said()[0] == "torch"
    verdicts.forget()
    name, (line,) = said()
    assert name == "torch" and "did not end within 0.2 s" in line
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3601.0)
    assert said() == ("torch", [])
    verdicts.forget()
    assert said() == ("triton", [])
    assert [why for why, *_ in recorded(device).values()] == [""]


@pytest.mark.parametrize("text", ["all CUDA-capable devices are busy or unavailable", "CUDA-capable device(s) is/are busy or unavailable"])
@pytest.mark.parametrize("code", ["print(json.dumps([{!r}, 0.0]))", "sys.exit({!r})"], ids=["answer", "status"])
def test_a_gpu_that_no_other_process_may_have(code: str, text: str, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In exclusive mode: the backend is checked in this process."""
    checks = []
    monkeypatch.setattr(verdicts, "_in_a_process", IN_A_PROCESS)
    monkeypatch.setattr(verdicts, "CHILD", "import json, sys; " + code.format(f"RuntimeError: CUDA error: {text}\n"))
    check = proof.check
    monkeypatch.setattr(proof, "check", lambda *given: (checks.append(given), check(*given))[1])
    assert said() == ("triton", []) and len(checks) == 1
    assert [why for why, *_ in recorded(device).values()] == [""]


def test_the_first_check_of_a_device_is_a_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped kernels by Triton's own interpreter, from the choice of "auto" on; the second variant is checked here."""
    pytest.importorskip("interpreter")
    monkeypatch.setattr(verdicts, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda, "unsupported", lambda problem: ["not built"])
    monkeypatch.setattr(proof, "ROWS", SMALL)
    monkeypatch.setattr(verdicts, "_here", lambda *_: pytest.fail("checked in this process"))
    assert said() == ("triton", [])
    monkeypatch.setattr(verdicts, "_in_a_process", lambda *_: pytest.fail("checked in another process"))
    monkeypatch.setattr(verdicts, "_here", lambda *_: ("", verdicts.FOR_GOOD))
    assert said(problem(torch.float16)) == ("triton", [])


# The file -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"of": 1}', '{"verdicts": {"x": 3}}', "good", "\xff"])
def test_a_damaged_file_is_written_anew(content: str, device: Path) -> None:
    assert said() == ("triton", [])
    (path,) = device.glob("proof-*.json")
    whole = json.loads(path.read_text())
    if content == "good":  # the right device, and no text where the fault belongs
        content = json.dumps(whole | {"verdicts": dict.fromkeys(whole["verdicts"], [None, 1.0, 1e12])})
    path.write_bytes(content.encode("latin-1"))
    verdicts.forget()
    assert said() == ("triton", [])
    assert json.loads(path.read_text())["verdicts"].keys() == whole["verdicts"].keys()


@pytest.mark.parametrize("how", ["a file", "no home"])
def test_without_a_folder_verdicts_stay_in_memory(how: str, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    monkeypatch.setattr(proof, "check", lambda *given: checks.append(given) or "")
    if how == "a file":
        (device / "taken").write_text("")
        monkeypatch.setenv("FASTNCE_CACHE_DIR", str(device / "taken" / "below"))
    else:
        monkeypatch.setattr(verdicts.find, "cache_folder", lambda: None)
    assert said() == ("triton", []) == said() and len(checks) == 1
    assert list(device.glob("proof-*")) == []


def test_a_folder_that_cannot_be_written(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither lock nor file can be made there, as root cannot be kept from it."""

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    verdicts.identity(CPU)  # has read the sources
    monkeypatch.setattr(verdicts.files, "write", refused)
    monkeypatch.setattr(Path, "open", refused)
    assert said() == ("triton", []) == said()
    assert list(device.glob("proof-*")) == []


def test_another_device_has_another_file(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said()
    verdicts.forget()
    monkeypatch.setattr(verdicts, "describe", lambda device: "another GPU")
    said()
    assert len(list(device.glob("proof-*.json"))) == 2


@contextmanager
def another_process(work: Callable[[], object]) -> Iterator[multiprocessing.process.BaseProcess]:
    """A copy of this one."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    yield process
    process.kill()
    process.join()


def slow_check(log: Path, seconds: float) -> Callable[..., str]:
    def check(*given: Any) -> str:
        with log.open("a") as file:
            file.write("checked\n")
        time.sleep(seconds)
        return ""

    return check


def test_two_processes_check_once(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setattr(proof, "check", slow_check(log, 0.5))
    with another_process(said) as other:
        assert said() == ("triton", [])
        other.join(60)
        assert other.exitcode == 0
    assert log.read_text() == "checked\n"


def test_the_lock_of_a_dead_process_is_taken_over(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(proof, "check", slow_check(log, 600.0))
    with another_process(said):
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
    monkeypatch.setattr(proof, "check", slow_check(log, 0.0))
    assert said() == ("triton", [])
    assert log.read_text() == "checked\n" * 2


def test_a_lock_that_is_held_too_long_is_not_waited_for(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(verdicts, "LIMIT", 0.1)
    path = verdicts.Record.of(CPU).path
    assert path is not None
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert said() == ("triton", [])


def test_threads_check_once(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []

    def check(*given: Any) -> str:
        checks.append(given)
        time.sleep(0.2)
        return ""

    monkeypatch.setattr(proof, "check", check)
    threads = [threading.Thread(target=said) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1


# python -m fastnce check ----------------------------------------------------------------------------------------------------------------


def test_the_command_checks_ahead(device: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verdicts, "devices", lambda: [CPU])
    monkeypatch.setattr(proof, "ahead", lambda losses: iter([(ROWS, 64), (ROWS._replace(shape="symmetric"), 64)]))
    assert main(["check"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(words[2:]) for words in lines if words[0] == "right"] == [
        "triton: float32, D <= 64, rows, index, aligned",
        "triton: float32, D <= 64, symmetric, index, aligned",
    ]
    assert ["no", "cuda:", "not", "built"] in lines and lines[-1] == ["2", "variants", "checked,", "0", "wrong"]
    assert said() == ("triton", [])
    monkeypatch.setattr(triton, "forward", lost_precision)
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "dq at scale" in printed and printed.endswith("2 variants checked, 2 wrong\n")
    verdicts.forget()
    assert said()[0] == "torch"


def test_the_command_without_a_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verdicts, "devices", list)
    assert main(["check"]) == 1
    assert "nothing was checked" in capsys.readouterr().err
