"""The compiled libraries: where their sources are, where a built library is found, and how it is loaded. build.py compiles them.

A library belongs to exactly its sources. Its name holds a digest of them, so a library that was built from other sources is not found.

A file of that name may still be damaged, or be another user's. So before it is loaded, two things are checked: it is, to the byte, the file
that the record beside it describes, and no user can change it who is not trusted already. A file that fails is left aside: then
backend="auto" is slower, and never raises for it.
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
    """The sources of a library: csrc/<kind>, and the headers beside it, which both kinds include."""
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
    """fastnce-cuda-<digest>-sm_80-sm_90a.so; the library of the CPU has no architectures."""
    return "-".join(["fastnce", kind, digest(kind)[:16], *archs]) + ".so"


def archs(library: Path) -> tuple[str, ...]:
    """The architectures that a library of this name was compiled for."""
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
    """The folder into which FASTNCE_BUILD=... pip install puts libraries."""
    return PACKAGE / "_lib"


def candidates(kind: str) -> Iterator[tuple[Path, str | None]]:
    """(file, what is wrong with it) of all files that have the name of the library of these sources. The package comes before the cache; in
    one folder the library for the most architectures comes first, and of those the last that was built."""
    for folder in (packaged_folder(), cache_folder()):
        try:
            names = os.listdir(folder) if folder else []
            start = f"fastnce-{kind}-{digest(kind)[:16]}" if names else ""
        except OSError:  # no such folder, no folder, or not readable: nothing was built here
            continue
        found = [Path(folder, name) for name in names if name.startswith(start) and name.endswith(".so")] if folder else []
        for path in sorted(found, key=lambda path: (len(archs(path)), _built(path)), reverse=True):
            yield path, fault(path)


def library_path(kind: str) -> Path | None:
    """The first candidate with nothing wrong; None without one."""
    return next((path for path, wrong in candidates(kind) if wrong is None), None)


def left_aside(kind: str) -> str:
    """The candidates that are not loaded, and why; empty without one."""
    return "; ".join(f"{path} {wrong}" for path, wrong in candidates(kind) if wrong is not None)


def not_built(kind: str) -> str:
    return f"not built (python -m fastnce build-{kind})"


# ---------------------------------------------------------------- checks of a file


def fault(library: Path) -> str | None:
    """The fault of a file of a library's name, as the end of a sentence about it.

    None: it is, to the byte, the file that build.py left there, and every user who can change it can also change this module, or the user's
    own files.
    """
    try:
        reached = Path(os.path.realpath(library, strict=True))
        if not reached.is_file():
            return "is not a file"
        # A user who can change a link decides what is loaded, as much as one who can change the file: every step of it is checked.
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
    """How users who are not trusted can change a file, or the content of a folder, as the end of a sentence about it; None: they cannot."""
    found = path.stat()
    if found.st_uid not in _trusted():
        return f"belongs to user {found.st_uid}, who is neither you nor root"
    by_group = found.st_mode & stat.S_IWGRP and not _has_one_member(found.st_gid, found.st_uid)
    if by_group or found.st_mode & stat.S_IWOTH:
        return f"can be written by others: its mode is {stat.S_IMODE(found.st_mode):04o} (chmod go-w {path})"
    return None


def _trusted() -> set[int]:
    """The user, root, and the owner of this module, who decides in any case what is loaded: in a shared environment another user."""
    return {os.geteuid(), 0, Path(__file__).stat().st_uid}


def _has_one_member(group: int, owner: int) -> bool:
    """Whether a group is the private one of its user. Many systems give every user one, of that name, which may write the user's files."""
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
    """The part of the record that describes the file itself."""
    return {"bytes": library.stat().st_size, "sha256": hashlib.sha256(library.read_bytes()).hexdigest()}


def _damage(library: Path, reached: Path) -> str | None:
    """How a file differs from its record. library may be a link to the file `reached`; the record lies beside either."""
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
    # Reading the file takes a few milliseconds, once in a process.
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

LOADED: dict[str, Path] = {}  # kind -> the library that this process has. It costs nothing to ask, where no library was ever wanted
# An operator of each kind tells whether some library has been loaded: a second one would register the same operators and end the process.
OPERATORS = {"cpu": "level", "cuda": "runs_on"}
_LOADING = threading.Lock()


@cache
def objection(kind: str) -> str | None:
    """Load the library. None where it is loaded, otherwise why not, and what to do.

    Where a library is there and does not run, a warning says so, once.
    """
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
        with contextlib.suppress(UserWarning):  # where warnings are errors, no loss fails for this one; `python -m fastnce` says it too
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
        # A file of the same name is a copy of the library that was loaded: its operators are these.
        others = [other for other in torch.ops.loaded_libraries if Path(other).name.startswith("fastnce-")]
        if path.name not in [Path(other).name for other in others]:
            had = " or ".join(others) or "an unknown file"
            return f"not loaded: {path}, because this process already has another one, of {had}: start a new process"
    LOADED[kind] = path
    return None


def level(kind: str) -> str:
    """The level that a loaded library takes on this processor; of the CUDA library all that it holds, because no GPU need be here."""
    import torch

    if held := archs(LOADED[kind]):
        return ", ".join(held)
    found: str = getattr(torch.ops, f"fastnce_{kind}").level()
    return found
