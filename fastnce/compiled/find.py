"""The compiled libraries: where their sources are, where a built one is found, and loading it. Nothing is compiled here (build.py does).

A library belongs to exactly its sources: its name holds a digest of them, so one that was built from others is not found and never loaded.
What has the name may still be damaged, or somebody else's: before it is loaded, the file is compared with the record that build.py left
beside it, and nobody but the user and those he trusts already may be able to change it. With backend="auto" a library left aside costs
time, never an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

KINDS = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent.parent
SUFFIXES = {".cpp", ".h", ".inc", ".cu", ".cuh"}


def sources(kind: str) -> Path:
    """csrc/<kind>: inside an installed package, or beside it in a checkout."""
    inside = PACKAGE / "_csrc"
    return (inside if inside.is_dir() else PACKAGE.parent / "csrc") / kind


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


def cache_folder() -> Path | None:
    """$FASTNCE_CACHE_DIR, or fastnce in the user's cache. None for a user without a home folder."""
    if given := os.environ.get("FASTNCE_CACHE_DIR"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnce"
    except RuntimeError:
        return None


def packaged_folder() -> Path:
    """Where FASTNCE_BUILD=... pip install puts libraries."""
    return PACKAGE / "_lib"


def candidates(kind: str) -> Iterator[tuple[Path, str | None]]:
    """(file, what is wrong with it) of all that have the name of the library of these very sources. The package comes before the cache; of
    several in one folder the one for the most architectures, and of those the last that was built."""
    for folder in (packaged_folder(), cache_folder()):
        try:
            names = os.listdir(folder) if folder else []
            start = f"fastnce-{kind}-{digest(kind)[:16]}" if names else ""
        except OSError:  # no such folder, not a folder, not for this user to read: nothing was built here
            continue
        found = [Path(folder, name) for name in names if name.startswith(start) and name.endswith(".so")] if folder else []
        for path in sorted(found, key=lambda path: (len(archs(path)), _built(path)), reverse=True):
            yield path, fault(path)


def library_path(kind: str) -> Path | None:
    """The first candidate that nothing is wrong with, None where there is none."""
    return next((path for path, wrong in candidates(kind) if wrong is None), None)


def left_aside(kind: str) -> str:
    """Why candidates are not loaded; empty where there is none of these."""
    return "; ".join(f"{path} {wrong}" for path, wrong in candidates(kind) if wrong is not None)


def not_built(kind: str) -> str:
    return f"not built (python -m fastnce build-{kind})"


# ---------------------------------------------------------------- what may be loaded


def fault(library: Path) -> str | None:
    """What is wrong with a file of a library's name, as the end of a sentence about it. None: it is what build.py left there, to the byte,
    and nobody can change it who could not change this module as well, or the user's own files."""
    try:
        reached = Path(os.path.realpath(library, strict=True))
        if not reached.is_file():
            return "is not a file"
        # Whoever can change a link decides what is loaded, as much as one who can change the file.
        passed = library
        while True:
            if wrong := in_strange_hands(passed.parent):
                return f"lies in {passed.parent}, which {wrong}"
            if not passed.is_symlink():
                break
            if passed.lstat().st_uid not in _trusted():
                return f"is a link of user {passed.lstat().st_uid}, who is neither you nor root"
            passed = passed.parent / os.readlink(passed)
        return in_strange_hands(reached) or _damage(library, reached)
    except OSError as error:
        return "leads nowhere" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"


def in_strange_hands(path: Path) -> str | None:
    """Whether others can change a file, or what is in a folder; the end of a sentence about it."""
    found = path.stat()
    if found.st_uid not in _trusted():
        return f"belongs to user {found.st_uid}, who is neither you nor root"
    by_group = found.st_mode & stat.S_IWGRP and not _has_one_member(found.st_gid, found.st_uid)
    if by_group or found.st_mode & stat.S_IWOTH:
        return f"can be written by others: its mode is {stat.S_IMODE(found.st_mode):04o} (chmod go-w {path})"
    return None


def _trusted() -> set[int]:
    """The user, root, and the owner of this module, who can change what is loaded in any case: that of a shared environment."""
    return {os.geteuid(), 0, Path(__file__).stat().st_uid}


def _has_one_member(group: int, owner: int) -> bool:
    """Many systems give every user a group of his own, of his name, and let it write what he makes."""
    import grp
    import pwd

    try:
        one, of = grp.getgrgid(group), pwd.getpwuid(owner)
    except KeyError:
        return False
    return (one.gr_name, one.gr_gid) == (of.pw_name, of.pw_gid) and set(one.gr_mem) <= {of.pw_name}


def record_of(library: Path) -> Path:
    return library.with_suffix(".json")


def identity(library: Path) -> dict[str, object]:
    """What the record says of the file itself."""
    return {"bytes": library.stat().st_size, "sha256": hashlib.sha256(library.read_bytes()).hexdigest()}


def _damage(library: Path, reached: Path) -> str | None:
    """library: perhaps a link to the file `reached`; the record lies beside either."""
    record = next((path for path in (record_of(library), record_of(reached)) if path.is_file()), None)
    if record is None:
        return f"has no {record_of(library).name} beside it, which says what was built"
    try:
        said = json.loads(record.read_bytes())
        size, sha256 = said["bytes"], said["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"has a {record.name} beside it that does not say what was built"
    found = reached.stat()
    if found.st_size != size:
        return f"is damaged: it has {found.st_size} bytes, and {size} were built"
    # Read once per process: a few milliseconds.
    if _sha256(reached, found.st_ino, found.st_size, found.st_mtime_ns) != sha256:
        return "is damaged: its sha256 is not that of what was built"
    return None


@cache
def _sha256(path: Path, *_: int) -> object:
    return identity(path)["sha256"]


def _built(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# ---------------------------------------------------------------- loading

LOADED: dict[str, Path] = {}  # by kind the library that this process has, so that asking costs nothing where none was ever wanted
# An operator of each: another library with the same operators would end the process by registering them again.
OPERATORS = {"cpu": "level", "cuda": "runs_on"}
_LOADING = threading.Lock()


@cache
def objection(kind: str) -> str | None:
    """Loads the library. None where it is loaded, otherwise why not and what to do. That one is there and does not run is also said aloud,
    once."""
    if os.environ.get("FASTNCE_NATIVE") == "0":
        return "switched off by FASTNCE_NATIVE=0"
    with _LOADING:
        path = library_path(kind)
        if path is None:
            aside = left_aside(kind)
            if not aside:
                return not_built(kind)
            reason: str | None = f"left aside: {aside} (python -m fastnce build-{kind} makes it anew)"
        else:
            reason = _load(kind, path)
    if reason:
        with contextlib.suppress(UserWarning):  # where warnings are errors: no loss fails for it, and `python -m fastnce` says it too
            warnings.warn(f"fastnce: the compiled kernels of {kind} do not run: {reason}", stacklevel=2)
    return reason


def _load(kind: str, path: Path) -> str | None:
    import torch

    if not hasattr(getattr(torch.ops, f"fastnce_{kind}"), OPERATORS[kind]):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            return f"does not load: {path}: {error}"
    elif os.path.realpath(path) not in torch.ops.loaded_libraries:
        # A copy of the same library has the same name, and then its operators are these.
        others = [other for other in torch.ops.loaded_libraries if Path(other).name.startswith("fastnce-")]
        if path.name not in [Path(other).name for other in others]:
            had = " or ".join(others) or "an unknown file"
            return f"not loaded: {path}, because this process already has another one, of {had}: start a new process"
    LOADED[kind] = path
    return None


def level(kind: str) -> str:
    """Which of its levels a loaded library takes on this processor; of the CUDA library all that it holds, as no GPU need be here."""
    import torch

    if held := archs(LOADED[kind]):
        return ", ".join(held)
    found: str = getattr(torch.ops, f"fastnce_{kind}").level()
    return found
