"""The CUDA kernels on a CPU and without torch: their index arithmetic gone through, every form of every kernel under sanitizers against the
definition, and faults that these programs must show."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import fuzz
import pytest
from emulated import EMULATOR, FLAGS, UNITS

from fastnce.compiled import build, find

COMPILER = os.environ.get("CXX", "c++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Of the kernels, which are many and run briefly, and of the programs that drive them.
KERNELS, DRIVER = ["-Og", "-g1", *SANITIZERS], ["-O2", "-g1", *SANITIZERS]
WITH_TILES = ("forward_rows", "forward_both", "retrieval", "backward_rows", "weights_block")

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the emulator switches between fibers in x86-64 assembly"),
]


def compiled(source: Path, into: Path, how: list[str], headers: Path | None = None, warnings: bool = True) -> str:
    """An object file; headers: another folder than csrc/cuda."""
    flags = [flag for flag in FLAGS.split() if warnings or flag != "-Werror"]
    folders = [f"-I{EMULATOR}", f"-I{headers or find.sources('cuda')}"]
    unit = str(into / f"{source.stem}.o")
    subprocess.run([COMPILER, *how, *flags, *folders, "-x", "c++", "-c", str(source), "-o", unit], check=True)
    return unit


def linked(units: list[str], into: Path, how: list[str]) -> str:
    program = str(into / "program")
    subprocess.run([COMPILER, *how, *units, "-o", program], check=True)
    return program


def said(*command: str) -> tuple[int, str]:
    # It finds nothing here, and takes a stack of its own per fiber: four times as long.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    return done.returncode, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    into = tmp_path_factory.mktemp("emulator")
    return [compiled(unit, into, DRIVER) for unit in UNITS]


@pytest.mark.slow
def test_index_arithmetic(tmp_path: Path, emulator: list[str]) -> None:
    """Millions of checks: each is one swizzled unit, one element of a fragment, one tile in an order."""
    status, output = said(linked([compiled(EMULATOR / "index.cpp", tmp_path, DRIVER), *emulator], tmp_path, SANITIZERS))
    assert status == 0 and " checks, 0 wrong" in output, output


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Object files of the kernels over tiles, for a program and for a library."""
    into = tmp_path_factory.mktemp("kernels")
    units = sorted(path for path in find.sources("cuda").glob("*.cu") if path.stem not in ("rows", "vectors"))
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda unit: compiled(unit, into, KERNELS), units))


@pytest.mark.slow
def test_calls_that_do_not_fit(tmp_path: Path, emulator: list[str], kernels: list[str]) -> None:
    """Lengths, dtypes, devices, depths, sizes, one side without the other, memory twice: every call of every operator raises or runs."""
    headers, link = (shlex.split(words.replace("$$", "$")) for words in build.torch_flags())
    todo = [("bind.cpp", ["-O0", *SANITIZERS, *headers]), ("rows.cu", KERNELS), ("vectors.cu", KERNELS)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda unit: compiled(find.sources("cuda") / unit[0], tmp_path, unit[1]), todo))
    library = tmp_path / "library.so"
    subprocess.run([COMPILER, *SANITIZERS, "-shared", *objects, *kernels, *emulator, *link, "-o", str(library)], check=True)
    found = fuzz.run(library, seed=0, calls=600)
    assert all(found[how][name] for how in ("ran", "raised") for name in set(fuzz.CUDA) - fuzz.RARE), found


@pytest.mark.slow
def test_every_form_under_sanitizers(tmp_path: Path, emulator: list[str], kernels: list[str]) -> None:
    """Hundreds of problems of random shapes and rules: no access out of bounds, and the definition's numbers."""
    with ThreadPoolExecutor(2) as pool:
        objects = [compiled(EMULATOR / "kernels.cpp", tmp_path, DRIVER), *kernels]
        program = linked([*objects, *emulator], tmp_path, SANITIZERS)
        for kernel, (status, output) in zip(WITH_TILES, pool.map(lambda kernel: said(program, kernel), WITH_TILES), strict=True):
            assert status == 0 and " cases, 0 wrong" in output and not output.startswith("0 cases"), f"{kernel}: {output}"


# ---------------------------------------------------------------- the current device

# CUDA's runtime with four devices, and a program that says which one is current: before, inside, after, after an exception, and after a
# device that does not exist.
RUNTIME = """
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
inline int current = 2;
inline cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device < 4 ? current = device, cudaSuccess : cudaErrorInvalidDevice; }
"""
PROGRAM = """
#include <cstdio>
#include "current.h"
int main() {
  std::printf("%d", current);
  { const OnDevice there(1); std::printf(" %d", current); }
  std::printf(" %d", current);
  try { const OnDevice there(3); throw 0; } catch (int) { std::printf(" %d", current); }
  { const OnDevice there(2); std::printf(" %d", current); }
  { const OnDevice there(4); std::printf(" %d%s", current, there.status() == cudaSuccess ? "" : "!"); }
  std::printf(" %d", current);
}
"""


def test_the_current_device_is_restored(tmp_path: Path) -> None:
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    folders = [f"-I{tmp_path}", f"-I{find.sources('cuda')}"]
    subprocess.run([COMPILER, "-std=c++17", *folders, str(tmp_path / "program.cpp"), "-o", str(tmp_path / "program")], check=True)
    assert said(str(tmp_path / "program")) == (0, "2 1 2 2 2 2! 2")


def test_the_current_device_is_set_in_one_place_alone() -> None:
    """C++ sets it in current.h, whose destructor restores it; Python by torch's context manager, which does the same."""
    setting = re.compile(r"\bcu(da)?(SetDevice|SetValidDevices|InitDevice|CtxSetCurrent|CtxPushCurrent\w*)\b|\bset_device\(")
    files = [*find.files("cuda"), *Path(find.__file__).parents[1].rglob("*.py")]
    assert {path.name for path in files if setting.search(path.read_text())} == {"current.h"}


# ---------------------------------------------------------------- faults


class Fault(NamedTuple):
    """Lines of a file of csrc/cuda and what stands in their place; the program that must show it, index or kernels with its arguments."""

    says: str
    file: str
    lines: str
    instead: str
    program: str
    unit: str = ""

    def __str__(self) -> str:
        return self.says


FORWARD, FORWARD_90 = ("kernels forward_rows mma", "forward_rows"), ("kernels forward_rows wgmma", "forward_sm90")
BOTH, BOTH_90 = ("kernels forward_both mma", "forward_both"), ("kernels forward_both wgmma", "forward_sm90")
BACKWARD, BACKWARD_90 = ("kernels backward_rows mma", "backward_rows"), ("kernels backward_rows wgmma", "backward_sm90")
WAIT, RELEASE = "    wgmma_wait<0>();\n    settle<W::NB>(c);\n", "    walk.tiles().release(n);\n"
OPERAND, RELEASE_COLUMNS = "      to_operand<W>(g, s, walk.columns(n + 1));\n", "      walk.vectors().release(n + 1);\n"
WAIT_GRADIENT = "      wgmma_wait<0>();\n      settle<W::DEPTH / 8>(dx);\n      walk.tiles().release(n);\n"
FAULTS = (
    Fault("rows not permuted", "index.h", " ^ (row % SWIZZLE_ROWS)", "", "index"),
    Fault("quadrants of A turned", "index.h", " a_unit(int lane) { return lane / 16", " a_unit(int lane) { return lane / 8 % 2", "index"),
    Fault("columns summed twice", "index.h", "return lane / 4 * (columns / 8)", "return lane / 8 * (columns / 8)", "index"),
    Fault("splits in 32 bits", "index.h", "static_cast<int64_t>(split) * per_split", "static_cast<int>(1u * split * per_split)", "index"),
    Fault("no room for masked tiles", "index.h", "MOST_MASKED = 16", "MOST_MASKED = 10", "index"),
    Fault("half way round met twice", "index.h", "block >= blocks / 2 ?", "block > blocks / 2 ?", *BOTH),
    Fault("columns of fragments", "index.h", "lane % 4 * 2 + e % 2;", "lane % 4 * 2 + e / 2;", *FORWARD),
    Fault("copies not waited for", "mma.cuh", "copy_wait<1>();", "copy_wait<2>();", *FORWARD),
    Fault("copies of others not waited for", "mma.cuh", "    }\n    sync_block();", "    }", *FORWARD),
    Fault("stage overwritten while it is read", "mma.cuh", "reads its memory.\n    sync_block();", "reads its memory.", *FORWARD),
    Fault("columns of others not waited for", "backward.cuh", "  }\n  sync_block();", "  }", *BACKWARD),
    Fault("diagonal forgotten", "tile.cuh", "meets(i0, j0, rows, columns, r.up) ||", "", *FORWARD),
    Fault("last tile taken to be plain", "index.h", "  if (columns % width) insert(across - 1);\n", "", *FORWARD_90),
    Fault("stride of a descriptor", "hopper.cuh", "N * GROUP_BYTES, 16, ATOM_BYTES", "N * GROUP_BYTES, 16, 2 * ATOM_BYTES", *FORWARD_90),
    Fault("registers not handed over", "forward_wgmma.cuh", "    wgmma_fence();\n", "", *FORWARD_90),
    Fault("tile not waited for", "forward_wgmma.cuh", "    walk.tiles().wait_full(n);\n", "", *FORWARD_90),
    Fault("products not waited for", "forward_wgmma.cuh", "    wgmma_wait<0>();\n", "", *FORWARD_90),
    Fault("tile released under its products", "forward_wgmma.cuh", WAIT + RELEASE, RELEASE + WAIT, *FORWARD_90),
    Fault("sums overwritten while they are added", "forward_wgmma.cuh", "        walk.sums().wait_empty(n);\n", "", *BOTH_90),
    Fault("columns not waited for", "backward_wgmma.cuh", "      walk.vectors().wait_full(n + 1);\n", "", *BACKWARD_90),
    Fault(
        "columns released before they are read", "backward_wgmma.cuh", OPERAND + RELEASE_COLUMNS, RELEASE_COLUMNS + OPERAND, *BACKWARD_90
    ),
    Fault("operand overwritten under its products", "backward_wgmma.cuh", WAIT_GRADIENT + OPERAND, OPERAND + WAIT_GRADIENT, *BACKWARD_90),
)  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The parts that are the same for all faults: emulator, tile sizes, and the problems."""
    into = tmp_path_factory.mktemp("driver")
    sources = [*UNITS, find.sources("cuda") / "tiles.cu", EMULATOR / "kernels.cpp"]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: compiled(source, into, ["-O1"]), sources))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faults_are_shown(fault: Fault, tmp_path: Path, driver: list[str]) -> None:
    folder = tmp_path / "cuda"
    shutil.copytree(find.sources("cuda"), folder)
    text = (folder / fault.file).read_text()
    assert text.count(fault.lines) == 1, f"{fault.file} has changed"
    (folder / fault.file).write_text(text.replace(fault.lines, fault.instead))
    source = folder / f"{fault.unit}.cu" if fault.unit else EMULATOR / "index.cpp"
    # Faults may leave a name without a use.
    unit = compiled(source, tmp_path, ["-O0"], folder, warnings=False)
    status, output = said(linked([unit, *(driver if fault.unit else driver[: len(UNITS)])], tmp_path, []), *fault.program.split()[1:])
    assert status != 0, output
    assert "no part of this program" not in output
