"""The compiled libraries: where their sources are, where a built one is found, and loading it. Nothing is compiled here (build.py does).

A library belongs to exactly its sources: its name holds a digest of them, so one that was built from others is not found and never loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

KINDS = ("cpu", "cuda")
SUFFIXES = {".cpp", ".h", ".inc", ".cu", ".cuh"}


def sources(kind: str) -> Path:
    """csrc/<kind>: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "_csrc"
    return (inside if inside.is_dir() else Path(__file__).parent.parent / "csrc") / kind


def files(kind: str) -> list[Path]:
    """All that a library is compiled from: csrc/<kind>, and the headers beside it, which both kinds include."""
    folder = sources(kind)
    return sorted(path for path in (*folder.glob("*"), *folder.parent.glob("*.h")) if path.suffix in SUFFIXES)


@cache
def digest(kind: str) -> str:
    """sha256 of the sources, and of build.py, which holds the flags."""
    return digest_of((*files(kind), Path(__file__).with_name("build.py")))


def digest_of(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def name(kind: str, archs: Sequence[str] = ()) -> str:
    """fastnce-cuda-<digest>-sm_80-sm_90a.so; the CPU's has no architectures."""
    return "-".join(["fastnce", kind, digest(kind)[:16], *archs]) + ".so"


def archs(library: Path) -> tuple[str, ...]:
    """Those that a library of this name was compiled for."""
    return tuple(library.stem.split("-")[3:])


def cache_folder() -> Path:
    """$FASTNCE_CACHE_DIR, or fastnce in the user's cache."""
    given = os.environ.get("FASTNCE_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnce"


def packaged_folder() -> Path:
    """Where FASTNCE_BUILD=... pip install puts libraries."""
    return Path(__file__).parent / "_lib"


def library_path(kind: str) -> Path | None:
    """The library of these very sources, None where it has not been built. The package comes before the cache; of several in one folder
    the one for the most architectures, and of those the last that was built."""
    for folder in (packaged_folder(), cache_folder()):
        if found := list(folder.glob(f"fastnce-{kind}-{digest(kind)[:16]}*.so")):
            return max(found, key=lambda path: (len(archs(path)), path.stat().st_mtime))
    return None


def not_built(kind: str) -> str:
    return f"not built (python -m fastnce build-{kind})"


LOADED: set[str] = set()  # kinds whose library this process has, so that asking costs nothing where none was ever wanted


@cache
def objection(kind: str) -> str | None:
    """Loads the library. None where it is loaded, otherwise why not and what to do."""
    if os.environ.get("FASTNCE_NATIVE") == "0":
        return "switched off by FASTNCE_NATIVE=0"
    path = library_path(kind)
    if path is None:
        return not_built(kind)
    import torch

    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    LOADED.add(kind)
    return None


def level(kind: str) -> str:
    """Which of its levels a loaded library takes on this processor; of the CUDA library all that it holds, as no GPU need be here."""
    import torch

    path = library_path(kind)
    if path is not None and archs(path):
        return ", ".join(archs(path))
    found: str = getattr(torch.ops, f"fastnce_{kind}").level()
    return found
