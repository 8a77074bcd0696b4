"""Compiling csrc/: a compiler, ninja and torch's headers, called directly. Only when asked: `python -m fastnce build-cpu`, or FASTNCE_BUILD
while installing. Imports no torch.

One build at a time per library, by a lock that the system releases when its holder dies; ninja repeats what a killed build left half
done; the finished library appears under its name in one step, so nobody ever loads part of one.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from fastnce import native

# Registers its operators with whatever torch it is loaded by, from this version on.
TORCH_TARGET = "0x020b000000000000"
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror"
# One level of the processor per unit; dispatch.cpp chooses among them when it runs.
LEVELS = {
    "level_avx512": "-mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -mprefer-vector-width=512",
    "level_avx2": "-mavx2 -mfma",
    "level_baseline": "-Wno-psabi",
}
X86_ONLY = ("level_avx512", "level_avx2")


class BuildError(RuntimeError):
    """What is missing, or what the compiler said, and what to do."""


def build(kind: str, into: Path | None = None) -> Path:
    """The library of csrc/<kind>, compiled unless it is there already. `into`: its folder, the user's cache by default.

    Raises BuildError without a compiler, ninja or torch, and where a source does not compile; FileNotFoundError without sources.
    """
    if not native.sources(kind).is_dir():
        raise FileNotFoundError(f"{native.sources(kind)} is missing: this installation has no sources of the {kind} library")
    folder = into or native.cache_folder()
    library = folder / native.name(kind)
    if library.is_file():
        return library
    work = native.cache_folder() / f"build-{kind}-{native.digest(kind)[:16]}"
    work.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file():  # by whoever held the lock
            return library
        compiler = _compiler()
        (work / "build.ninja").write_text(_ninja_file(kind, compiler))
        done = subprocess.run([_ninja(), "-C", str(work)], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{compiler} failed on csrc/{kind}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
        partial = library.with_suffix(f".{os.getpid()}")
        shutil.copy(work / "library.so", partial)
        os.replace(partial, library)
        library.with_suffix(".json").write_text(json.dumps({"compiler": _version(compiler), "torch_target": TORCH_TARGET}) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    return library


def _ninja_file(kind: str, compiler: str) -> str:
    torch = _torch()
    lines = [
        f"flags = {CXX_FLAGS} -DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {torch / 'include'}",
        "rule compile",
        f"  command = {compiler} $flags $level -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -L{torch / 'lib'} -ltorch_cpu",
    ]
    objects = []
    for source in sorted(native.sources(kind).glob("*.cpp")):
        if source.stem in X86_ONLY and platform.machine() not in ("x86_64", "AMD64"):
            continue
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {source}", f"  level = {LEVELS.get(source.stem, '')}"]
    return "\n".join([*lines, f"build library.so: link {' '.join(objects)}", "default library.so", ""])


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise BuildError(
            "building needs the torch that will load the library, and this environment has none. While installing: "
            "FASTNCE_BUILD=cpu pip install --no-build-isolation ."
        )
    return Path(found.submodule_search_locations[0])


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    raise BuildError(f"no C++ compiler ({wanted or 'c++, g++ or clang++'}); install one, or name it in CXX")


def _version(compiler: str) -> str:
    return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def _ninja() -> str:
    if found := shutil.which("ninja"):
        return found
    try:
        import ninja
    except ImportError:
        raise BuildError("ninja is not installed: pip install ninja") from None
    return str(Path(ninja.BIN_DIR) / "ninja")
