"""The compiled kernels of backend="cpu". That their answers are everybody else's is tested wherever a backend is tested by name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import fuzz
import pytest
import torch

import fastnce
from fastnce import backends
from fastnce.backends import BACKENDS
from fastnce.compiled import build, find
from fastnce.pairs import Pairs
from fastnce.problem import Problem
from fastnce.schemas import Arguments

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "c++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None and "CXX" not in os.environ, reason="no C++ compiler")


# ---------------------------------------------------------------- numbers


@needs_compiler
@pytest.mark.parametrize("temperature", [0.5, 0.005])
@pytest.mark.parametrize("n", [386, 1540])
def test_agrees_with_the_tiles_of_torch(n: int, temperature: float, compiled: None) -> None:
    """Across the edges of blocks of 64 and 192 rows, whole losses with their formulas."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 50, generator=g)
    z[n // 2 :] = z[: n // 2] + 0.7 * torch.randn(n // 2, 50, generator=g)
    labels = torch.arange(n) % 37

    def solve(backend: str) -> list[torch.Tensor]:
        leaf = z.clone().requires_grad_()
        loss = fastnce.nt_xent(leaf, temperature=temperature, backend=backend)
        loss = loss + fastnce.sup_con(leaf, labels, temperature=temperature, backend=backend)
        loss = loss + fastnce.clip_loss(
            leaf[: n // 3], leaf[-(n // 2) :], 1 / temperature, backend=backend, image_ids=labels[: n // 3], text_ids=labels[-(n // 2) :]
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        return [loss.detach(), gradient]

    for found, expected in zip(solve("cpu"), solve("torch"), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def bits(loss: str) -> list[torch.Tensor]:
    """A loss, and its gradients by features and scale, over several blocks: symmetric, of two sides, with ids, of few rows or few keys."""
    g = torch.Generator().manual_seed(0)
    z, few, many = (torch.randn(rows, 33, generator=g).requires_grad_() for rows in (1600, 70, 1700))
    scale = torch.tensor(5.0, requires_grad=True)
    named = {"scale": scale, "backend": "cpu"}
    losses = {
        "nt_xent": lambda: fastnce.nt_xent(z, **named),
        "clip": lambda: fastnce.clip_loss(z, many[:1600], scale, backend="cpu"),
        "captions, few images": lambda: fastnce.clip_loss(
            few, many, scale, backend="cpu", image_ids=torch.arange(70), text_ids=torch.arange(1700) % 70
        ),
        "captions, few texts": lambda: fastnce.clip_loss(
            many, few, scale, backend="cpu", image_ids=torch.arange(1700) % 70, text_ids=torch.arange(70)
        ),
        "moco": lambda: fastnce.moco_loss(few, many[:70], many[70:], **named),
        "moco, low temperature": lambda: fastnce.moco_loss(few, many[:70], many[70:], scale=scale * 20, backend="cpu"),
        "sup_con": lambda: fastnce.sup_con(z, torch.arange(1600) % 9, **named),
    }
    value = losses[loss]()
    found = torch.autograd.grad(value, (z, few, many, scale), allow_unused=True)
    return [value.detach(), *(gradient for gradient in found if gradient is not None)]


@needs_compiler
@pytest.mark.parametrize(
    "loss", ["nt_xent", "clip", "captions, few images", "captions, few texts", "moco", "moco, low temperature", "sup_con"]
)
def test_same_bits_for_any_number_of_threads(loss: str, compiled: None) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(bits(loss))
        finally:
            torch.set_num_threads(1)
    assert len(found[0]) > 2
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_it_is_the_compiled_kernels_that_ran(compiled: None) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        fastnce.nt_xent(torch.randn(600, 8, requires_grad=True), backend="cpu").backward()
    assert {"fastnce_cpu::forward", "fastnce_cpu::backward"} <= {event.name for event in seen.events()}


@needs_compiler
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", torch.ones(4, 12), "cannot hold"),
        ("x", torch.ones(4, 16, dtype=torch.float64), "x must be float32, got float64"),
        ("x", torch.ones(16, 4).T, "contiguous"),
        ("q_label", torch.ones(3, dtype=torch.int64), "q_label must have 4 elements, got 3"),
        ("mask", torch.ones(2, 2, dtype=torch.bool), "mirror image"),
        ("sums", [torch.ones(4)] * 3, "sums has 3 tensors"),
        ("offset", 2**31, "offset is 2147483648"),
        ("offset", -(2**63), "offset is -9223372036854775808"),
    ],
)
def test_arguments_are_checked(argument: str, value: object, message: str, compiled: None) -> None:
    """Before a pointer is read: this operator is the border between Python and raw memory."""
    call = {
        "x": torch.ones(4, 16),
        "y": None,
        "depth": 16,
        "bias": 0.0,
        "flags": [0, 1, 0, 0],
        "offset": None,
        "q_label": None,
        "k_label": None,
    }
    call |= {"q_exclude": None, "k_exclude": None, "mask": None, "sums": [torch.ones(4)] * 12, argument: value}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastnce_cpu.forward(**call)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Object files of all units but bind.cpp, for a program and for a library."""
    into = tmp_path_factory.mktemp("sanitized")
    sources = [path for path in find.sources("cpu").glob("*.cpp") if path.stem != "bind"]
    return [compiled_unit(source, into, *build.LEVELS.get(source.stem, "").split()) for source in sources]


def compiled_unit(source: Path, into: Path, *more: str) -> Path:
    unit = into / f"{source.stem}.o"
    flags = ["-O1", "-g", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", *SANITIZERS, f"-I{find.sources('cpu')}"]
    subprocess.run([COMPILER, *flags, *more, "-c", str(source), "-o", str(unit)], check=True)
    return unit


@pytest.mark.slow
@needs_compiler
def test_calls_that_do_not_fit(sanitized: list[Path], tmp_path: Path) -> None:
    """Lengths, dtypes, devices, depths, flags, one side without the other, memory twice: every call raises or runs."""
    headers, link = (shlex.split(words.replace("$$", "$")) for words in build.torch_flags())
    bind = compiled_unit(find.sources("cpu") / "bind.cpp", tmp_path, "-O0", "-g0", *headers)
    library = tmp_path / "library.so"
    subprocess.run([COMPILER, *SANITIZERS, "-shared", *map(str, sanitized), str(bind), *link, "-o", str(library)], check=True)
    found = fuzz.run(library, seed=0, calls=3000)
    assert all(found[how][name] > 200 for how in ("ran", "raised") for name in ("best_positives", "forward", "backward")), found


@pytest.mark.slow
@needs_compiler
def test_every_level_under_sanitizers(sanitized: list[Path], tmp_path: Path) -> None:
    """480 problems of random shapes and rules on every level this processor has: no access out of bounds, and the definition's numbers."""
    driver, program = compiled_unit(ROOT / "tests" / "native" / "driver.cpp", tmp_path), str(tmp_path / "driver")
    subprocess.run([COMPILER, *SANITIZERS, *map(str, sanitized), str(driver), "-o", program, "-lpthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " cases, 0 wrong" in done.stdout


@needs_compiler
def test_ids_may_lie_anywhere(compiled: None) -> None:
    """In the middle of what was read from a file, say: between the addresses at which int64 are read."""
    z, labels = torch.randn(30, 8), torch.arange(30) % 4
    shifted = torch.frombuffer(bytearray(b"." + labels.numpy().tobytes()), dtype=torch.int64, offset=1)
    assert shifted.data_ptr() % 8 and torch.equal(shifted, labels)
    assert fastnce.sup_con(z, shifted, backend="cpu") == fastnce.sup_con(z, labels, backend="cpu")


@needs_compiler
def test_only_symbols_of_the_stable_interface(compiled_library: Path) -> None:
    """So that one library serves every torch from 2.11 on."""
    command = ["nm", "-D", "--undefined-only", "-C", str(compiled_library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split(maxsplit=1)[1] for line in listed.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if "::" in name and any(space in name for space in ("torch::", "at::", "c10::"))]


# ---------------------------------------------------------------- asked for by name, and without it


def problem(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    q, k = torch.ones(2, 3, 4, dtype=dtype, device=device)
    return Problem(q, k, torch.ones((), device=device), None, Pairs(offset=0), False, True)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_auto_takes_it_where_it_computes(dtype: torch.dtype, compiled: None) -> None:
    """The backend has no other objections than these: float64, another device, and no library."""
    picked = "torch" if dtype == torch.float64 else "cpu"
    assert backends.pick("nt_xent", "auto", problem(dtype)) == picked
    assert (BACKENDS["cpu"].unsupported(problem(dtype)) == []) == (picked == "cpu")
    assert backends.pick("nt_xent", "auto", problem(dtype, "meta")) == "torch"


@needs_compiler
def test_auto_takes_it_in_one_traced_graph(compiled: None) -> None:
    """Whether it is there is asked while tracing."""
    torch._dynamo.reset()
    z, labels = torch.randn(30, 8, requires_grad=True), torch.arange(30) % 4
    traced = torch.compile(fastnce.sup_con, fullgraph=True, backend="aot_eager")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        (found,) = torch.autograd.grad(traced(z, labels), z)
    assert {"fastnce_cpu::forward", "fastnce_cpu::backward"} <= {event.name for event in seen.events()}
    torch.testing.assert_close(found, torch.autograd.grad(fastnce.sup_con(z, labels, backend="torch"), z)[0])


def test_what_it_does_not_compute_is_refused() -> None:
    """By name, with what to do about it; whether there is a library is not asked then."""
    z = torch.randn(6, 4)
    with pytest.raises(NotImplementedError, match=r"cpu: dtype float64 \(supports float32.*; backend='torch' computes in float64\)$"):
        fastnce.nt_xent(z.double(), backend="cpu")
    with pytest.raises(NotImplementedError, match=r"cpu: device meta \(needs a CPU; backend='torch' runs on any device\)$"):
        fastnce.nt_xent(z.to("meta"), backend="cpu")


def test_without_it_torch_is_named_and_taken(libraries: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTNCE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(find, "packaged_folder", lambda: tmp_path)
    z = torch.randn(6, 4)
    advice = "cpu: library not built (python -m fastnce build-cpu); backend='torch' computes the same without it"
    with pytest.raises(NotImplementedError, match=re.escape(advice)):
        fastnce.nt_xent(z, backend="cpu")
    assert backends.pick("nt_xent", "auto", problem()) == "torch"
    assert torch.equal(fastnce.sup_con(z, torch.arange(6) % 2), fastnce.sup_con(z, torch.arange(6) % 2, backend="torch"))
    # A graph that was traced where the library is.
    arguments = Arguments.of(problem(), "cpu")
    with pytest.raises(NotImplementedError, match="backend 'cpu' was chosen where this was traced, and here its library is not built"):
        torch.ops.fastnce.forward(*arguments)
    monkeypatch.setenv("FASTNCE_NATIVE", "0")
    find.objection.cache_clear()
    with pytest.raises(NotImplementedError, match="cpu: library switched off by FASTNCE_NATIVE=0; backend='torch' "):
        fastnce.nt_xent(z, backend="cpu")
