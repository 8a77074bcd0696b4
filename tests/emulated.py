"""The CUDA kernels on a CPU: csrc/cuda compiled by the C++ compiler, with tests/native/emulator.h in the place of a GPU's instructions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from fastnce.compiled import build, find

EMULATOR = Path(__file__).resolve().parent / "native"
UNITS = sorted(EMULATOR.glob("emulator*.cpp"))
# The kernels' #pragma unroll is unknown to a C++ compiler.
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas -DFASTNCE_EMULATED -DFASTNCE_SM90"
OPTIMISED = "-O2"
SANITIZED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def unsupported() -> str | None:
    """Why the emulated kernels cannot run in this process; None where they can."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "kernels are compiled for a GPU in this process (TRITON_INTERPRET is not 1)"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator switches between fibers in x86-64 assembly, and this is {platform.machine()}"
    if find.library_path("cuda") is not None:
        return "a process holds one CUDA library, and that for GPUs is built here: FASTNCE_CACHE_DIR=<an empty folder> pytest"
    try:
        build.compiler()
    except build.BuildError as error:
        return str(error)
    return None


def emulate(into: Path, sanitize: bool = False) -> Path:
    """The library of csrc/cuda for this CPU, in `into`. It registers the same operators as that for GPUs, and runs the same sources.

    It is compiled once for exactly these sources and this emulator, by the first process that asks.

    `sanitize`: an access out of bounds ends the process. To load such a library the sanitizer's own has to be loaded first (LD_PRELOAD).

    Raises BuildError as build.build does.
    """
    sources = [*find.files("cuda"), *sorted(EMULATOR.glob("emulator*"))]
    digest = find.digest_of([*sources, Path(__file__), Path(build.__file__)])
    library = into / f"fastnce-emulated-{digest[:16]}{'-sanitized' if sanitize else ''}.so"
    return build.make(library, into, lambda: _plan(sources, SANITIZED if sanitize else OPTIMISED))


def _plan(sources: list[Path], how: str) -> build.Plan:
    compiler, (flags, link) = build.compiler(), build.torch_flags()
    units = {path: "-x c++" for path in sources if path.suffix in (".cu", ".cpp")}
    ninja = build.ninja_file(compiler, f"{how} {FLAGS} -I{build.quoted(EMULATOR)} {flags}", units, f"{how} {link}")
    return build.Plan("csrc/cuda and tests/native", compiler, ninja, {})
