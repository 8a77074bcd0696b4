"""Building the compiled libraries: once, whole, for the architectures that were asked for; and the messages about missing tools."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import emulated
import pytest
from pretended import PRETENDED, SERIALISED, SOUND, calls

import fastnce
from fastnce.__main__ import main
from fastnce.compiled import build, find


def put(library: Path, place: Path) -> Path:
    """A copy of a library with its record."""
    shutil.copy(find.record_of(library), find.record_of(place))
    return Path(shutil.copy(library, place))


def start(kind: str, pretended: Path) -> subprocess.Popen[str]:
    """A process that builds a library and prints its content. It does without torch, whose import takes seconds."""
    code = f"""
import sys, types
from pathlib import Path
sys.modules["fastnce"] = package = types.ModuleType("fastnce")
package.__path__ = {fastnce.__path__!r}
from fastnce.compiled import build, find
sources = find.sources
find.sources = lambda kind: Path({str(pretended / "csrc")!r}) / kind if kind == "cuda" else sources(kind)
print(build.build({kind!r}).read_text(), "torch" in sys.modules)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)


# ---------------------------------------------------------------- once and whole


@pytest.mark.parametrize("kind", find.KINDS)
def test_several_processes_build_it_once(kind: str, pretended: Path) -> None:
    running = [start(kind, pretended) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["whole False\n"] * 3
    units = {f"{path.name}.o" for path in find.sources(kind).iterdir() if path.suffix in (".cpp", ".cu")}
    assert calls(pretended).keys() == {*units, "library.so"}
    assert not [path for path in (pretended / "cache").iterdir() if path.is_dir()]


def test_a_killed_build_is_taken_up_by_the_next(pretended: Path) -> None:
    (pretended / "bin" / "pause").write_text("1")
    first = start("cuda", pretended)
    while "library.so" not in (pretended / "bin" / "calls").read_text():
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert find.library_path("cuda") is None
    (pretended / "bin" / "calls").write_text("")
    assert start("cuda", pretended).communicate(timeout=60)[0] == "whole False\n"
    assert calls(pretended).keys() == {"library.so"}
    # The output of ptxas in the killed build is not lost.
    library = find.library_path("cuda")
    assert library is not None and "rows.cu" in json.loads(library.with_suffix(".json").read_text())["ptxas"]


def test_a_killed_build_holds_its_lock_until_its_compilers_have_ended(pretended: Path) -> None:
    """The builder alone is killed: compilers that ninja has started go on, and the next build waits for them."""
    (pretended / "bin" / "pause").write_text("2")
    first = start("cuda", pretended)
    while not list((pretended / "cache").glob("*/*.o")):
        time.sleep(0.02)
    time.sleep(0.1)
    (pretended / "bin" / "pause").write_text("0.1")
    first.kill()
    first.wait()
    killed, second = time.monotonic(), start("cuda", pretended)
    assert second.communicate(timeout=60)[0] == "whole False\n"
    taken = time.monotonic()
    spans: dict[int, list[tuple[float, float]]] = {first.pid: [], second.pid: []}
    for line in (pretended / "bin" / "spans").read_text().splitlines():
        session, begin, end = line.split()
        spans[int(session)].append((float(begin), float(end)))
    last = max(end for _, end in spans[first.pid])
    assert killed < last < taken
    # Ninja may have finished alone, or have left the rest to the next build.
    assert all(last < begin for begin, _ in spans[second.pid])
    assert "library.so" in calls(pretended)


def test_a_server_that_a_compiler_has_started_holds_no_lock(pretended: Path) -> None:
    """It inherits the lock as every child does, and goes on for ever."""
    script = pretended / "bin" / "nvcc"
    server = "import subprocess\nserver = subprocess.Popen(['sleep', '60'], close_fds=False, start_new_session=True).pid\n"
    written = 'with open(here / "servers", "a") as servers: print(server, file=servers)\nsys.exit("a fault in the source")'
    script.write_text(PRETENDED.replace('out.write_text("half")', server + written))
    try:
        for _ in range(2):
            with start("cuda", pretended) as process:
                assert process.wait(timeout=20) == 1
    finally:
        for pid in (pretended / "bin" / "servers").read_text().split():
            os.kill(int(pid), signal.SIGKILL)


def test_nothing_is_built_twice_and_other_sources_are_another_library(pretended: Path) -> None:
    path = build.build("cuda")
    assert build.build("cuda") == path == find.library_path("cuda")
    assert "library.so" in calls(pretended)
    for unit in ("rows.cu", "problem.h", "device.cuh"):
        (find.sources("cuda") / unit).write_text(f"// {unit}")
        find.digest.cache_clear()
        assert find.library_path("cuda") is None
        path = put(path, path.with_name(find.name("cuda", list(build.ARCHS))))
        assert find.library_path("cuda") == path


def test_a_library_is_of_its_shared_header_too() -> None:
    for kind in find.KINDS:
        assert find.sources(kind).parent / "tensors.h" in find.files(kind)


# ---------------------------------------------------------------- architectures


def test_every_architecture_by_default_and_sm_90_units_for_that_alone(pretended: Path) -> None:
    library = build.build("cuda")
    assert find.archs(library) == ("sm_80", "sm_90a", "sm_100", "compute_100")
    made = calls(pretended)
    codes = {unit: [word for word in words if "code=" in word] for unit, words in made.items()}
    assert codes == {
        "rows.cu.o": [
            "arch=compute_80,code=sm_80",
            "arch=compute_90a,code=sm_90a",
            "arch=compute_100,code=sm_100",
            "arch=compute_100,code=compute_100",
        ],
        "rows_sm90.cu.o": ["arch=compute_90a,code=sm_90a"],
        "bind.cpp.o": [],
        "library.so": [],
    }
    assert all("-DFASTNCE_SM90" in words for unit, words in made.items() if unit != "library.so")
    record = json.loads(library.with_suffix(".json").read_text())
    assert record["archs"] == list(build.ARCHS) and record["nvcc"].endswith("release 13.0") and "pretended" in record["compiler"]
    assert record["ptxas"]["rows.cu"] == [
        "sm_80 k: 16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads; Used 30 registers, used 1 barriers, 364 bytes cmem[0]",
        "sm_90a k: 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads; Used 28 registers, used 1 barriers",
    ]


def test_other_architectures_are_another_library(pretended: Path) -> None:
    few = build.build("cuda", archs=["sm_80"])
    made = calls(pretended)
    assert made.keys() == {"rows.cu.o", "bind.cpp.o", "library.so"} and "-DFASTNCE_SM90" not in made["bind.cpp.o"]
    assert find.archs(few) == ("sm_80",) and find.library_path("cuda") == few
    (pretended / "bin" / "calls").write_text("")
    two = build.build("cuda", archs=["sm_90a", "sm_80", "sm_80"])
    assert build.build("cuda", archs=["sm_80", "sm_90a"]) == two != few
    os.utime(two, (1, 1))
    assert find.library_path("cuda") == two, "the most architectures"
    last = put(two, two.with_name(find.name("cuda", ["sm_80", "sm_100"])))
    os.utime(last, (2, 2))
    assert find.library_path("cuda") == last, "of equally many the last"
    (pretended / "packaged").mkdir()
    assert find.library_path("cuda") == last
    packaged = put(few, pretended / "packaged" / few.name)
    assert find.library_path("cuda") == packaged, "the package first"


@pytest.mark.parametrize("arch", ["sm_70", "", "sm_80,sm_90", "90a"])
def test_an_unknown_architecture_is_refused(arch: str, pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-cuda", f"--arch={arch}"]) == 1
    said = capsys.readouterr().err
    assert f"unknown architecture {arch.split(',')[-1]!r}; known are sm_80, sm_90a, sm_100, compute_100" in said
    assert not calls(pretended)


def test_an_old_nvcc_says_what_it_can(pretended: Path) -> None:
    (pretended / "bin" / "release").write_text("12.6")
    with pytest.raises(build.BuildError, match=r"CUDA 12\.6, too old for sm_100, compute_100\. With this one: --arch sm_80,sm_90a$"):
        build.build("cuda")
    assert build.build("cuda", archs=["sm_80", "sm_90a"]).is_file()


def test_serialised_products_fail_the_build(pretended: Path) -> None:
    """Again and again: an unchanged unit is not compiled anew, and the output about it is remembered."""
    (pretended / "bin" / "says").write_text(SERIALISED + SOUND)
    for _ in range(2):
        with pytest.raises(build.BuildError, match=r"wait for each other:\nrows\.cu: .*C7511.*\nrows_sm90\.cu: .*C7511"):
            build.build("cuda")
    assert calls(pretended) and find.library_path("cuda") is None


# ---------------------------------------------------------------- missing tools


def test_what_is_missing_is_named(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for kind in find.KINDS:
        with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(CXX is 'no-such-compiler'\)"):
            build.build(kind)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="false failed on csrc/cpu"):
        build.build("cpu")
    monkeypatch.setenv("CXX", "false with arguments")
    with pytest.raises(build.BuildError, match="CXX is 'false with arguments'"):
        build.build("cuda")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)
    for kind in find.KINDS:
        with pytest.raises(build.BuildError, match="--no-build-isolation"):
            build.build(kind)
    shutil.rmtree(find.sources("cuda"))
    with pytest.raises(FileNotFoundError, match="no sources of the cuda library"):
        build.build("cuda")


@pytest.mark.parametrize("command", [" ", "\t", "''", "'", '"g++', "g++ \\"])
def test_a_cxx_that_is_no_command_is_named(
    command: str, pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", command)
    for kind in find.KINDS:
        assert main([f"build-{kind}"]) == 1
        said = capsys.readouterr().err
        assert f"CXX is {command!r}" in said and said.count("\n") == 1
    assert build.tool("cpu") == "no C++ compiler found" and not calls(pretended)


def test_where_nvcc_was_looked_for(pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.nvcc() == str(pretended / "bin" / "nvcc")
    # A toolkit that is named is that one or none.
    monkeypatch.setenv("PATH", str(pretended / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_HOME", "nowhere")
    assert main(["build-cuda"]) == 1
    said = capsys.readouterr().err
    assert "no nvcc: looked for nowhere/bin/nvcc (CUDA_HOME=nowhere, CUDA_PATH=(not set))" in said
    assert "Triton backend needs no nvcc" in said
    monkeypatch.delenv("CUDA_HOME")
    assert build.nvcc() == str(pretended / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_PATH", str(pretended))
    monkeypatch.setenv("PATH", "nowhere")
    assert build.nvcc() == str(pretended / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_PATH")
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(build.BuildError, match="nvcc and /usr/local/cuda/bin/nvcc .*PATH"):
        build.nvcc()


def test_an_nvcc_of_no_release(pretended: Path) -> None:
    (pretended / "bin" / "release").write_text("none")
    with pytest.raises(build.BuildError, match="names no release, but: 'pretended 1.0, release none"):
        build.build("cuda")
    assert build.tool("cuda") == "no nvcc found"


# ---------------------------------------------------------------- a full disk


def left(pretended: Path) -> list[str]:
    """The files that a build has left in its cache, without the lock, which stays."""
    return [path.name for path in (pretended / "cache").rglob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_compiling_is_one_line_and_leaves_nothing(number: int, pretended: Path) -> None:
    script = pretended / "bin" / "nvcc"
    full = f'sys.exit(f"{{out}}: fatal error: error writing to {{out}}.s: {os.strerror(number)}\\ncompilation terminated.")'
    script.write_text(PRETENDED.replace('out.write_text("whole")', full))
    with pytest.raises(build.BuildError) as raised:
        build.build("cuda")
    assert str(raised.value) == f"cannot write in {pretended / 'cache'}: {os.strerror(number)}"
    assert left(pretended) == [] and calls(pretended)


@pytest.mark.parametrize("file", ["build.ninja", ".json.partial", ".so.partial"])
def test_a_full_disk_at_every_file_is_one_line_and_leaves_nothing(
    file: str, pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the file is there when the disk is full. Under the library's name the old file stays."""
    before = find.cache_folder() / find.name("cuda", list(build.ARCHS))  # type: ignore[operator]
    before.parent.mkdir()
    before.write_text("damaged")
    write = Path.write_bytes, Path.write_text

    def full(kind: int) -> Any:
        def half(path: Path, content: Any) -> int:
            if not path.name.endswith(file):
                return write[kind](path, content)
            write[kind](path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return half

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full(0))
        patch.setattr(Path, "write_text", full(1))
        assert main(["build-cuda"]) == 1
    said = capsys.readouterr().err
    assert said == f"fastnce build-cuda: cannot write in {before.parent}: No space left on device\n"
    assert left(pretended) == [before.name] and before.read_text() == "damaged"
    assert build.build("cuda") == before and find.fault(before) is None


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("kind", find.KINDS)
def test_the_report_says_what_building_would_bring(kind: str, libraries: None, pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnce.__main__ import _compiled

    found = {"cpu": f"{pretended}/bin/nvcc", "cuda": "nvcc 13.0"}[kind]
    assert _compiled(kind) == f"not built (python -m fastnce build-{kind}): {build.BRINGS[kind]}; {found} found"
    build.build(kind)
    # As in a process that has loaded none of the kind.
    monkeypatch.setitem(find.OPERATORS, kind, "none")
    find.objection.cache_clear()
    assert "does not load" in _compiled(kind)


# ---------------------------------------------------------------- compilers that do not pretend


def test_the_emulated_kernels_are_the_same_sources_for_the_cpu(pretended: Path) -> None:
    library = emulated.emulate(pretended / "emulated")
    made = calls(pretended)
    assert emulated.emulate(pretended / "emulated") == library and calls(pretended) == made
    assert made.keys() == {"rows.cu.o", "rows_sm90.cu.o", "bind.cpp.o", "library.so"} | {f"{unit.name}.o" for unit in emulated.UNITS}
    assert "-x c++" in " ".join(made["rows.cu.o"]) and "-DFASTNCE_EMULATED" in made["rows.cu.o"]
    assert emulated.emulate(pretended / "sanitized", sanitize=True).name.endswith("-sanitized.so")


def nvcc_is_here() -> bool:
    try:
        return bool(build.nvcc())
    except build.BuildError:
        return False


# A product whose accumulators are changed before it has been waited for.
SERIAL = """
__global__ void serial(float* x, unsigned long long a) {
  float d[4] = {x[0], x[1], x[2], x[3]};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int step = 0; step < 2; ++step) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0;"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %4, p, 1, 1, 0, 0;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a));
    d[0] += 1.0f;
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; ++i) x[i] = d[i];
}
void launch(float* x) { serial<<<1, 128>>>(x, 1); }
"""


@pytest.mark.skipif(not nvcc_is_here(), reason="no nvcc")
def test_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for each GPU, PTX for later ones, CUDA's runtime inside and private; ptxas prints the words that are looked for."""
    monkeypatch.setenv("FASTNCE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(find, "sources", lambda _: tmp_path / "csrc")
    monkeypatch.setattr(find, "digest", lambda _: "0" * 64)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "sound.cu").write_text(
        "__global__ void sound(float* x) { x[threadIdx.x] += 1; }\nvoid launch_sound(float* x) { sound<<<1, 32>>>(x); }\n"
    )
    serial = tmp_path / "csrc" / "serial_sm90.cu"
    serial.write_text(SERIAL)
    with pytest.raises(build.BuildError, match=r"wait for each other:\nserial_sm90\.cu: .*wgmma"):
        build.build("cuda")
    serial.unlink()
    (tmp_path / "cache").rename(tmp_path / "old")
    library = build.build("cuda")
    kernels = json.loads(library.with_suffix(".json").read_text())["ptxas"]["sound.cu"]
    assert [line.split()[0] for line in kernels] == ["sm_80", "sm_90a", "sm_100"] and all("Used" in line for line in kernels)
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run([cuobjdump, "--list-elf", "--list-ptx", library], capture_output=True, text=True, check=True).stdout
    assert sorted(line.rsplit(".", 2)[1:] for line in listed.splitlines()) == [
        ["sm_100", "cubin"],
        ["sm_100", "ptx"],
        ["sm_80", "cubin"],
        ["sm_90a", "cubin"],
    ]
    names = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in names
