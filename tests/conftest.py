"""Shared by all tests: the number of threads, whether kernels are interpreted or compiled, and fixtures.

There is one thread, so that many small products do not wait for each other on a busy machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# A process has either compiled or interpreted kernels. Triton reads this variable when it is imported, and again at each kernel's
# definition, so it is set before any test is collected. Where there is a GPU, kernels are compiled for it, tests marked gpu run, and tests
# that import interpreter.py skip. Elsewhere it is the other way round. CUDA_VISIBLE_DEVICES= pytest runs the interpreter on a GPU machine.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import emulated
from named import widest
from pretended import pretended  # noqa: F401, a fixture

import fastnce
from fastnce import tiles
from fastnce.backends._gpu import tiles as gpu_tiles
from fastnce.backends.triton import tiles as triton_tiles
from fastnce.compiled import build, find

torch.set_num_threads(1)


def in_a_dtype_of_its_backend(item: pytest.Item) -> bool:
    """Whether the backend of a test takes the test's dtype. Some do not take float64; test_native.py tests that "cpu" says so."""
    given = getattr(item, "callspec", None)
    chosen = given.params if given else {}
    in_float64 = chosen.get("dtype") == torch.float64 or item.get_closest_marker("float64") is not None
    return not in_float64 or widest(chosen.get("backend", "auto")) == torch.float64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out tests in a dtype that their backend does not take, and skip tests marked gpu where no kernel can run on a GPU."""
    items[:] = filter(in_a_dtype_of_its_backend, items)
    if not torch.cuda.is_available():
        reason = "needs a CUDA device: torch.cuda.is_available() is False"
    elif os.environ["TRITON_INTERPRET"] == "1":
        reason = "needs compiled kernels: TRITON_INTERPRET=1 is set"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Keep the name of the machine out of pytest-benchmark's files."""
    machine_info.pop("node", None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of commands that set the number of threads: the next test finds it as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def debug_mode_off() -> Iterator[None]:
    """With any FASTNCE_DEBUG."""
    with fastnce.debug(False):
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of 16 x 16 of torch operations, so that a problem of a hundred rows has interior, diagonal, ragged and corner tiles.

    The tiles of compiled kernels have one size."""
    monkeypatch.setattr(tiles, "CPU_TILE", 16)
    monkeypatch.setattr(tiles, "GPU_TILE", 16)
    monkeypatch.setattr(tiles, "CPU_ROWS", 7)
    return 16


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated without a value holds nan, or a number far beyond any count, so that reading it before writing shows.
    Bytes are all ones, which are nan as a float and -1 as an integer. Recorded allocations are not looked at."""

    def fill(empty: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            new = empty(*args, **kwargs)
            if torch._C._len_torch_dispatch_stack():
                return new
            return new.fill_(torch.nan if new.is_floating_point() else 255 if new.dtype == torch.uint8 else 2**30)

        return filled

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", fill(torch.empty_strided))
    monkeypatch.setattr(Tensor, "new_empty", fill(Tensor.new_empty))


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    """The CUDA kernels compiled for this CPU, kept for the next run."""
    if reason := emulated.unsupported():
        pytest.skip(reason)
    return emulated.emulate(build.folder())


@pytest.fixture
def emulated_cuda(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """backend="cuda" takes tensors of the CPU, for one test."""
    others = find.library_path
    monkeypatch.delenv("FASTNCE_NATIVE", raising=False)
    monkeypatch.setattr(find, "library_path", lambda kind: emulated_library if kind == "cuda" else others(kind))
    find.objection.cache_clear()
    assert find.objection("cuda") is None and torch.ops.fastnce_cuda.runs_on(-1)
    yield
    find.objection.cache_clear()


@pytest.fixture
def interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="triton" takes tensors of the CPU, for one test, in small tiles."""
    pytest.importorskip("interpreter")
    monkeypatch.setattr(triton_tiles, "tile", lambda kernel, rules, architecture, parts, depth: triton_tiles.TileShape(16, 16, depth, 1, 1))
    monkeypatch.setattr(gpu_tiles, "DEPTHS", (16, 32, 64))
    monkeypatch.setattr(gpu_tiles, "PADDED", 16)
    monkeypatch.setattr(triton_tiles, "ROWS", (16, 16))
    monkeypatch.setattr(triton_tiles, "FINISH", dict.fromkeys((False, True), (16, 16)))


# The fixture that a backend needs where a test names it.
NEEDS = {"cpu": "compiled", "cuda": "emulated_cuda", "triton": "interpreted_triton"}


@pytest.fixture(autouse=True)
def no_tapes() -> Iterator[None]:
    """A test may change what a launch follows from. The tapes of one test are not played in the next one."""
    yield
    if tape := sys.modules.get("fastnce.backends.triton.tape"):
        tape.forget()


@pytest.fixture(autouse=True)
def named(request: pytest.FixtureRequest) -> None:
    """A test that names a backend finds it: the library, or a GPU's kernels, interpreted or emulated."""
    given = getattr(request.node, "callspec", None)
    if given is not None and (need := NEEDS.get(given.params.get("backend"))):
        request.getfixturevalue(need)
