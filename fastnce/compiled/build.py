"""Compiles csrc/ by a direct call of ninja, and only when asked: `python -m fastnce build-cpu`, build-cuda, FASTNCE_BUILD while installing.
It needs torch's headers, and imports no torch.

Every library has a lock, so that there is one build of it at a time; the system releases the lock when its holder dies. A build that was
killed is taken up by ninja. The finished library gets its name in one step, so that no process loads part of one. Beside it lies a .json:
its size and digest, the compilers, and the remarks of ptxas about every kernel. A file of that name that is not what was built is built
again.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastnce.compiled import find

# The library runs with every torch from this version on.
TORCH_TARGET = "0x020b000000000000"
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror"
# Flags by unit: each is compiled for one level of the processor. dispatch.cpp chooses among them when it runs.
LEVELS = {
    "level_avx512": "-mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -mprefer-vector-width=512",
    "level_avx2": "-mavx2 -mfma",
    "level_baseline": "-Wno-psabi",
}
X86_ONLY = ("level_avx512", "level_avx2")

# Flags of nvcc, and after -Xcompiler those of the C++ compiler that it calls.
NVCC_FLAGS = (
    "-O3 -std=c++17 --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"
)
# CUDA's runtime is linked into the library, and private. torch loads a libcudart of its own into the global scope, in some other version:
# calls that the linker left open would go there. No unit needs the device linker, which would add an empty part for another GPU.
NVCC_LINK = "--no-device-link -cudart static -Xlinker --exclude-libs,ALL -Xlinker --no-undefined"
# Architectures for --arch, each with the first nvcc that knows it. compute_100 is PTX: the driver compiles it for every GPU from Blackwell
# on.
ARCHS = {"sm_80": (11, 0), "sm_90a": (12, 5), "sm_100": (12, 8), "compute_100": (12, 8)}
# Units with wgmma and TMA are compiled for sm_90a alone. FASTNCE_SM90 tells the others that they are there.
SM90_UNIT, SM90 = "_sm90", "sm_90a"
# ptxas says this where products wait for each other, which costs most of the tensor cores' speed. It is no warning that -Werror would stop.
SERIALISED = "Potential Performance Loss"

# For `python -m fastnce`: the gain of a library that is not built.
BRINGS = {
    "cpu": "backend='cpu', the tiles of backend='torch' in C++, for float32 and half-precision features",
    "cuda": "one launch instead of about 40 small ones around the tiles, and kernels that need no Triton",
}


class BuildError(RuntimeError):
    """A build failed: the message says what is missing, or what the compiler said, and what to do."""


class Plan(NamedTuple):
    """How a library is made: a ninja file that leaves library.so, and the record for the .json beside it."""

    where: str  # "nvcc failed on <where>"
    tool: str
    ninja: str
    record: dict[str, Any]


def build(kind: str, into: Path | None = None, archs: Sequence[str] = ()) -> Path:
    """The library of csrc/<kind>; it is compiled unless it is there and sound.

    into    its folder; the user's cache by default
    archs   for "cuda": of ARCHS, all of them by default. Other architectures are another library

    Raises BuildError for an unknown architecture, without a compiler, nvcc, ninja or torch, where a source does not compile, where ptxas
    says that it serialised products, and without a folder that the user alone can write; FileNotFoundError without sources.
    """
    if not find.sources(kind).is_dir():
        raise FileNotFoundError(f"{find.sources(kind)} is missing: this installation has no sources of the {kind} library")
    chosen = _chosen(archs) if kind == "cuda" else ()
    library = (into or folder()) / find.name(kind, chosen)
    return make(library, folder(), lambda: _cuda(chosen) if kind == "cuda" else _cpu())


def folder() -> Path:
    """The user's cache, made if it is not there. BuildError where there is none, or others can write: nothing is loaded from there."""
    found = find.cache_folder()
    if found is None:
        raise BuildError("no home folder to build in: name a folder in FASTNCE_CACHE_DIR")
    with _written(found):
        found.mkdir(mode=0o755, parents=True, exist_ok=True)
        if wrong := find.in_strange_hands(found):
            raise BuildError(f"{found} {wrong}: nothing that lies there is loaded. FASTNCE_CACHE_DIR names another folder")
    return found


def make(library: Path, cache: Path, plan: Callable[[], Plan]) -> Path:
    """`library`, made by `plan` in a folder of `cache` unless it is there and sound. The plan is asked for only when it is needed."""
    if find.fault(library) is None:
        return library
    work = cache / f"build-{library.stem}"
    with _written(cache):
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The lock lies beside the folder and is never removed: a process that waits for it and one that comes later have the same file.
        lock = work.with_suffix(".lock").open("w")
    with lock, _held(lock.fileno()):
        if find.fault(library) is None:  # the process that held the lock has made it
            return library
        where, tool, text, record = plan()
        with _written(cache, lambda: shutil.rmtree(work, ignore_errors=True)):
            work.mkdir(mode=0o700, exist_ok=True)
            (work / "build.ninja").write_text(text)
            _run_ninja(work, lock.fileno(), f"{tool} failed on {where}")
        logs = {path.name.removesuffix(".o.log"): path.read_text() for path in sorted(work.glob("*.o.log"))}
        if lines := [f"{unit}: {line}" for unit, log in logs.items() for line in log.splitlines() if SERIALISED in line]:
            raise BuildError(f"{tool} compiled {where}, with matrix products that wait for each other:\n" + "\n".join(lines))
        record = record | find.identity(work / "library.so") | _resources(logs)
        _publish(work / "library.so", json.dumps(record, indent=1) + "\n", library)
        shutil.rmtree(work, ignore_errors=True)
    return library


@contextmanager
def _held(lock: int) -> Iterator[None]:
    """The lock, for as long as a process may still write into the folder.

    Ninja and its compilers inherit it, because they go on when this process is killed. When they have ended, the lock is released, and not
    only closed: a compiler's server, which never ends, may have inherited it too.
    """
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    except Exception:
        fcntl.flock(lock, fcntl.LOCK_UN)
        raise
    fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def _written(folder: Path, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Where a folder cannot be written: undo, then a BuildError of one line."""
    try:
        yield
    except OSError as error:
        undo()
        raise BuildError(f"cannot write in {error.filename or folder}: {error.strerror}") from error


def _run_ninja(work: Path, lock: int, failed: str) -> None:
    # A compiler's temporary files lie in the folder too, and are removed with it. Messages are in English, so that they are recognised.
    environment = os.environ | {"TMPDIR": str(work.absolute()), "LC_ALL": "C"}
    # restore_signals=False: Python ignores SIGXFSZ, and so does the compiler then. It says that its file may not grow, and is not killed.
    done = subprocess.run(
        [_ninja(), "-C", str(work)], capture_output=True, text=True, env=environment, pass_fds=[lock], restore_signals=False
    )
    if done.returncode:
        said = f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in said:
                raise OSError(number, os.strerror(number), str(work.parent))
        raise BuildError(f"{failed}:\n{said}")


def _publish(made: Path, record: str, library: Path) -> None:
    """Give record and library their names, each in one step, so that neither is there in part. The record comes first: no library is
    there without it."""
    files = ((find.record_of(library), record.encode(), 0o644), (library, made.read_bytes(), 0o755))
    partial = {name: name.with_name(f"{name.name}.partial") for name, _, _ in files}

    def undo() -> None:
        for path in partial.values():
            path.unlink(missing_ok=True)
        shutil.rmtree(made.parent, ignore_errors=True)

    with _written(library.parent, undo):
        library.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        for name, content, most in files:
            partial[name].write_bytes(content)
            # Others may read it where the user's files are readable. They may never write.
            partial[name].chmod(made.stat().st_mode & most)
        for name, path in partial.items():
            os.replace(path, name)


def ninja_file(tool: str, flags: str, units: dict[Path, str], link: str) -> str:
    """A ninja file that makes library.so from units, each with its own flags.

    Headers are no inputs: with other headers it is another library, in another folder. The output of a compiler stays in <unit>.o.log, also
    for units that an earlier, killed build has finished.
    """
    lines = [
        "rule compile",
        f"  command = {tool} {flags} $own -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "rule link",
        f"  command = {tool} -shared $in -o $out {link}",
    ]
    for source, own in units.items():
        escaped = re.sub("[$ :]", r"$\g<0>", str(source))
        lines += [f"build {source.name}.o: compile {escaped}", f"  own = {own}"]
    return "\n".join([*lines, f"build library.so: link {' '.join(f'{source.name}.o' for source in units)}", "default library.so", ""])


def torch_flags() -> tuple[str, str]:
    """Flags to compile against torch's stable interface, and to link."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise BuildError(
            "building needs the torch that will load the library, and this environment has none. While installing: "
            "FASTNCE_BUILD=cpu,cuda pip install --no-build-isolation ."
        )
    folder = Path(found.submodule_search_locations[0])
    include, lib = quoted(folder / "include"), quoted(folder / "lib")
    return f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {include}", f"-L{lib} -ltorch_cpu"


def quoted(path: Path | str) -> str:
    """A path as a command of a ninja file has it."""
    return shlex.quote(str(path)).replace("$", "$$")


def compiler() -> str:
    """The command of the C++ compiler: $CXX, or the first of the usual names."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        try:
            program = shlex.split(candidate)[:1]
        except ValueError as error:
            raise BuildError(f"CXX is {wanted!r}, which is no command: {error}") from None
        if program and shutil.which(program[0]):
            return candidate
    looked = f"CXX is {wanted!r}" if wanted else "c++, g++ or clang++"
    raise BuildError(f"no C++ compiler ({looked}); install one, or name it in CXX")


def nvcc() -> str:
    """The path of nvcc: in the toolkit that CUDA_HOME or CUDA_PATH names, else on PATH, else in /usr/local/cuda."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{named}/bin/nvcc"] if named else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    looked = [f"{name}={os.environ.get(name) or '(not set)'}" for name in ("CUDA_HOME", "CUDA_PATH")]
    raise BuildError(
        f"no nvcc: looked for {' and '.join(candidates)} ({', '.join(looked)}{'' if named else ', PATH'}). Install the CUDA toolkit, or "
        "name its folder in CUDA_HOME. The Triton backend needs no nvcc"
    )


def tool(kind: str) -> str:
    """Whether there is something to build with: "nvcc 13.0 found". The error of a build says where it was looked for."""
    try:
        return f"nvcc {'{}.{}'.format(*_release(nvcc()))} found" if kind == "cuda" else f"{compiler()} found"
    except BuildError:
        return "no nvcc found" if kind == "cuda" else "no C++ compiler found"


def _cpu() -> Plan:
    command, (flags, link) = compiler(), torch_flags()
    units = {
        source: LEVELS.get(source.stem, "")
        for source in sorted(find.sources("cpu").glob("*.cpp"))
        if source.stem not in X86_ONLY or platform.machine() in ("x86_64", "AMD64")
    }
    record = {"compiler": _version(command), "torch_target": TORCH_TARGET}
    return Plan("csrc/cpu", command, ninja_file(command, f"{CXX_FLAGS} {flags}", units, link), record)


def _cuda(archs: tuple[str, ...]) -> Plan:
    path, host, (flags, link) = nvcc(), compiler(), torch_flags()
    release = _release(path)
    if late := [arch for arch in archs if release < ARCHS[arch]]:
        known = ",".join(arch for arch in ARCHS if release >= ARCHS[arch])
        raise BuildError(f"{path} is of CUDA {release[0]}.{release[1]}, too old for {', '.join(late)}. With this one: --arch {known}")
    if len(shlex.split(host)) > 1:
        raise BuildError(f"CXX is {host!r}; nvcc takes a program without arguments as its C++ compiler. Set CXX to that alone")
    units = {}
    for source in sorted((*find.sources("cuda").glob("*.cu"), *find.sources("cuda").glob("*.cpp"))):
        if source.suffix == ".cpp":
            units[source] = ""
        elif not source.stem.endswith(SM90_UNIT):
            units[source] = _code(archs)
        elif SM90 in archs:
            units[source] = _code([SM90])
    command = f"{quoted(path)} -ccbin {quoted(host)}"
    flags = f"{NVCC_FLAGS} {'-DFASTNCE_SM90 ' if SM90 in archs else ''}{flags}"
    record = {"compiler": _version(host), "nvcc": f"{path}, {_version(path)}", "archs": archs, "torch_target": TORCH_TARGET}
    return Plan("csrc/cuda", path, ninja_file(command, flags, units, f"{NVCC_LINK} {link}"), record)


def _chosen(archs: Sequence[str]) -> tuple[str, ...]:
    """The architectures in the order of ARCHS, so that the same ones are the same library in whatever order they were given."""
    if unknown := [arch for arch in archs if arch not in ARCHS]:
        raise BuildError(f"unknown architecture {', '.join(map(repr, unknown))}; known are {', '.join(ARCHS)}")
    return tuple(arch for arch in ARCHS if arch in archs or not archs)


def _code(archs: Iterable[str]) -> str:
    return " ".join(f"-gencode arch=compute_{arch.split('_')[1]},code={arch}" for arch in archs)


def _resources(logs: dict[str, str]) -> dict[str, dict[str, list[str]]]:
    """Lines of ptxas by unit: for each kernel "sm_80 name: 0 bytes stack frame, ...; Used 32 registers, ...", and its numbered remarks."""
    entry = r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+ bytes stack frame[^\n]*)\n.*?: (Used [^\n]*)"
    found = {}
    for unit, log in logs.items():
        kernels = [f"{arch} {name}: {frame}; {used}" for name, arch, frame, used in re.findall(entry, log, re.DOTALL)]
        if lines := kernels + re.findall(r"\(C\d+\)[^\n]*", log):
            found[unit] = lines
    return {"ptxas": found} if found else {}


def _release(path: str) -> tuple[int, int]:
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    if found := re.search(r"release (\d+)\.(\d+)", said):
        return int(found[1]), int(found[2])
    raise BuildError(f"{path} --version names no release, but: {said[-200:]!r}. Name a CUDA toolkit's folder in CUDA_HOME")


def _version(command: str) -> str:
    """The line of --version with the version in it; nvcc has it after three others."""
    said = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line for line in said if re.search(r"release \d", line)), said[0] if said else "")


def _ninja() -> str:
    if found := shutil.which("ninja"):
        return found
    try:
        import ninja
    except ImportError:
        raise BuildError("ninja is not installed: pip install ninja") from None
    return str(Path(ninja.BIN_DIR) / "ninja")
