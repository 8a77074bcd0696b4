"""The compiled libraries: where their sources are, where a built one is found, and loading it. Nothing is compiled here (build.py does).

A library belongs to exactly its sources: its name holds a digest of them, so one that was built from others is not found and never loaded.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

KINDS = ("cpu",)
SUFFIXES = {".cpp", ".h", ".inc"}


def sources(kind: str) -> Path:
    """csrc/<kind>: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "_csrc"
    return (inside if inside.is_dir() else Path(__file__).parent.parent / "csrc") / kind


@cache
def digest(kind: str) -> str:
    """sha256 of the sources, and of build.py, which holds the flags."""
    found = hashlib.sha256()
    for path in (*sorted(p for p in sources(kind).glob("*") if p.suffix in SUFFIXES), Path(__file__).with_name("build.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def name(kind: str) -> str:
    return f"fastnce-{kind}-{digest(kind)[:16]}.so"


def cache_folder() -> Path:
    """$FASTNCE_CACHE_DIR, or fastnce in the user's cache."""
    given = os.environ.get("FASTNCE_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnce"


def packaged_folder() -> Path:
    """Where FASTNCE_BUILD=... pip install puts libraries."""
    return Path(__file__).parent / "_lib"


def library_path(kind: str) -> Path | None:
    """The library of these very sources, None where it has not been built."""
    found = (folder / name(kind) for folder in (packaged_folder(), cache_folder()))
    return next((path for path in found if path.is_file()), None)


@cache
def objection(kind: str) -> str | None:
    """Loads the library. None where it is loaded, otherwise why not and what to do."""
    if os.environ.get("FASTNCE_NATIVE") == "0":
        return "switched off by FASTNCE_NATIVE=0"
    path = library_path(kind)
    if path is None:
        return f"not built (python -m fastnce build-{kind})"
    import torch

    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


def level(kind: str) -> str:
    """Which of its levels a loaded library takes on this processor."""
    import torch

    found: str = getattr(torch.ops, f"fastnce_{kind}").level()
    return found
