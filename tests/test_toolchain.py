"""Which GPUs and which tools the kernels ask for: reasons with a remedy, instead of an error at the first launch."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnce.backends import BACKENDS
from fastnce.backends.triton import tiles, toolchain
from fastnce.pairs import Pairs
from fastnce.problem import Problem

UTILS = f"cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}"


# Made before a test pretends that there is a GPU, which would start it.
with FakeTensorMode():
    ROWS, SCALE = torch.empty(2, 4, device="cuda"), torch.empty((), device="cuda")


def objections(backend: str = "triton") -> list[str]:
    """Of a backend to a small problem on the first CUDA device."""
    return BACKENDS[backend].unsupported(Problem(ROWS, None, SCALE, None, Pairs(True, 1), False, True))


@pytest.fixture(autouse=True)
def equipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU of compute capability 9.0, and everything that Triton needs: its folder of programs, headers, libcuda and cache."""
    for name in ("CC", "CPATH", "C_INCLUDE_PATH", "TRITON_HOME", "TRITON_CACHE_MANAGER", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("gcc", "Python.h", "libcuda.so.1"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels" / "cache"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    toolchain._missing.cache_clear()
    yield tmp_path
    toolchain._missing.cache_clear()


def test_nothing_is_missing() -> None:
    assert objections() == []


# The compiler ---------------------------------------------------------------------------------------------------------------------------


def test_an_empty_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert objections() == ["no C compiler: neither gcc nor clang is on PATH (install gcc, or name a compiler by CC)"]


def test_without_a_gpu_no_tools_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert objections() == ["no CUDA device is available"]


def test_clang_serves(equipped: Path) -> None:
    (equipped / "gcc").rename(equipped / "clang")
    assert objections() == []


def test_the_compiler_that_is_named_must_exist(equipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache gcc")
    assert objections() == ["no C compiler: CC=ccache gcc is no program (unset CC, or give the path of one without options)"]
    toolchain._missing.cache_clear()
    monkeypatch.setenv("CC", str(equipped / "gcc"))
    monkeypatch.setenv("PATH", "")
    assert objections() == []


def test_headers(equipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (equipped / "more").mkdir()
    (equipped / "Python.h").rename(equipped / "more" / "Python.h")
    (found,) = objections()
    assert found.startswith(f"no Python.h in {equipped} (install the headers")
    toolchain._missing.cache_clear()
    monkeypatch.setenv("CPATH", f":{equipped / 'more'}")
    assert objections() == []


@pytest.mark.parametrize("how", ["cached", "by the user"])
def test_without_compiler_and_headers_where_nothing_is_compiled(how: str, equipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (equipped / "Python.h").unlink()
    if how == "cached":
        compiled = equipped / "kernels" / "cache" / "ABC" / UTILS
        compiled.parent.mkdir(parents=True)
        compiled.touch()
    else:
        knobs = SimpleNamespace(build=SimpleNamespace(impl=lambda *_: ""))
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=knobs))
    assert objections() == []


# The driver, and the cache --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("listed", "reason"), [
    ("", "/sbin/ldconfig does not list libcuda.so.1 (run ldconfig as root, or name the folder of libcuda.so.1 by TRITON_LIBCUDA_PATH)"),
    ("libcuda.so.1 (libc6,x86-64) => {0}/gone/libcuda.so.1", "/sbin/ldconfig does not list"),
    ("libcuda.so.1 (libc6,x86-64) => {0}/libcuda.so.1", None),
    (None, "/sbin/ldconfig, which Triton asks for libcuda.so.1, does not run: "),
])  # fmt: skip
def test_the_library_of_the_driver(listed: str | None, reason: str | None, equipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ldconfig(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command == ["/sbin/ldconfig", "-p"]
        if listed is None:
            raise FileNotFoundError(2, "No such file or directory", command[0])
        return subprocess.CompletedProcess(command, 0, f"1 libs found\n\t{listed.format(equipped)}\n".encode())

    monkeypatch.setattr(subprocess, "run", ldconfig)
    monkeypatch.delenv("TRITON_LIBCUDA_PATH")
    found = objections()
    assert found == [] if reason is None else found[0].startswith(reason) and len(found) == 1
    if listed == "":
        toolchain._missing.cache_clear()
        monkeypatch.setenv("LD_LIBRARY_PATH", f":{equipped}")
        assert objections() == []


def test_a_cache_that_cannot_be_written(equipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (equipped / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(equipped / "file" / "cache"))
    assert objections() == [f"Triton's cache folder {equipped}/file/cache cannot be written (name another by TRITON_CACHE_DIR)"]
    toolchain._missing.cache_clear()
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(equipped / "file"))
    assert objections() == [f"Triton's cache folder {equipped}/file/.triton/cache cannot be written (name another by TRITON_CACHE_DIR)"]


def test_it_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert objections() == []
    monkeypatch.setenv("PATH", "")
    assert objections() == []


def test_dynamo_takes_the_answer_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """And traces no look at files."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    compiled = torch.compile(lambda x: x + len(toolchain.missing()), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 1


# GPUs -----------------------------------------------------------------------------------------------------------------------------------


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert objections() == ["compute capability below 8.0"] and objections("cuda")[-1] == "compute capability below 8.0"


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ROCm build of torch on an MI300X: torch.cuda is HIP, and the capability that it reports is no NVIDIA GPU's."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-"))
    monkeypatch.delenv("TRITON_LIBCUDA_PATH")


def test_amd_gpus_are_not_refused_by_name(rocm: None) -> None:
    """By Triton they are compiled for; the library is NVIDIA's machine code."""
    assert objections() == []
    assert objections("cuda")[-1] == "an AMD GPU: the library is machine code of NVIDIA's (backend='triton' compiles for AMD's)"


def test_amd_gpus_need_a_compiler_too(rocm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert [reason.partition(":")[0] for reason in objections()] == ["no C compiler"]


def test_the_architecture_of_a_device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    from fastnce.backends.triton import launches

    def architecture(device: str) -> str:
        return launches.architecture.__wrapped__(torch.device(device))

    assert architecture("cpu") == architecture("cuda:0") == "sm_90"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    assert architecture("cuda:0") == "sm_120" and tiles.nearest("sm_120") == "sm_80"
    request.getfixturevalue("rocm")
    assert architecture("cuda:0") == "gfx942" and architecture("cpu") == "sm_90"
    assert {tiles.nearest(name) for name in ("gfx942", "gfx950", "gfx90a", "gfx1100")} == {"gfx942"}
