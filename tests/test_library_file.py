"""The file under a library's name: only a library that was built is loaded. Any other file costs time and no loss, and is built again."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from named import ON_CPU

import fastnce
from fastnce.__main__ import _compiled
from fastnce.compiled import build, find

ROOT = Path(__file__).resolve().parent.parent
SOMEBODY = 54321  # a user, and a group, that does not exist


@pytest.fixture
def folder(tmp_path: Path, libraries: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, with a library of these sources in it; none comes with the package."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    monkeypatch.setenv("FASTNCE_CACHE_DIR", str(cache))
    monkeypatch.setattr(find, "packaged_folder", lambda: tmp_path / "packaged")
    return cache


@pytest.fixture
def library(folder: Path, compiled_library: Path) -> Path:
    shutil.copy(find.record_of(compiled_library), folder)
    return Path(shutil.copy(compiled_library, folder))


def losses() -> list[float]:
    """Two losses by the backend that "auto" takes."""
    z, labels = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4
    return [fastnce.sup_con(z, labels, backend="auto").item(), fastnce.nt_xent(z.bfloat16(), backend="auto").item()]


def said_of_it(library: Path) -> str:
    """The warning where the library is left aside. Two losses give it once; the report, and backend="cpu" where it raises, say the same.

    The values of the losses are those of torch's tiles."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = [losses(), losses()]
    assert find.library_path("cpu") is None and "cpu" not in find.LOADED
    (warning,) = [str(one.message) for one in seen if one.category is UserWarning]
    assert f"left aside: {library} " in warning and _compiled("cpu") in warning
    with pytest.raises(NotImplementedError, match=re.escape(f"cpu: library {_compiled('cpu')}; backend='torch' ")):
        fastnce.nt_xent(torch.eye(8), backend="cpu")
    find.objection.cache_clear()
    with pytest.MonkeyPatch.context() as off:
        off.setenv("FASTNCE_NATIVE", "0")
        assert found == [losses()] * 2
    find.objection.cache_clear()
    return warning


@pytest.fixture(autouse=True)
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "LOADED", {})


# ---------------------------------------------------------------- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit, and the time of the last change as it was."""
    content, was = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def record(content: str) -> Callable[[Path], object]:
    return lambda path: find.record_of(path).write_text(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "is damaged: it has"),
    "junk": (lambda path: path.write_text("junk"), "is damaged: it has 4 bytes, and"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged: it has 0 bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is damaged: it has"),
    "one bit": (flip, "is damaged: its sha256 is not that of what was built"),
    "dangling": (instead(lambda path: path.symlink_to("nowhere")), "leads nowhere"),
    "loop": (instead(lambda path: path.symlink_to(path.name)), "cannot be read: Too many levels"),
    "pipe": (instead(os.mkfifo), "is not a file"),
    "link to a folder": (instead(lambda path: path.symlink_to("..")), "is not a file"),
    "link to junk": (instead(lambda path: path.symlink_to(__file__)), "is damaged: it has"),
    "no record": (lambda path: find.record_of(path).unlink(), "has no fastnce-cpu"),
    "record cut off": (record('{\n "bytes": 12'), "that does not say what was built"),
    "record of before": (record('{"compiler": "c++"}'), "that does not say what was built"),
    "record of nothing": (record("[]"), "that does not say what was built"),
    "record of words": (record('{"bytes": "12", "sha256": 12}'), "is damaged"),
    "record not a file": (lambda path: (find.record_of(path).unlink(), os.mkfifo(find.record_of(path))), "has no fastnce-cpu"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_is_left_aside_and_built_again(case: str, library: Path, compiled_library: Path) -> None:
    damage, words = DAMAGE[case]
    damage(library)
    assert words in said_of_it(library)
    if find.record_of(library).is_fifo():
        find.record_of(library).unlink()

    # A build puts the new library in its place.
    def plan() -> build.Plan:
        copied = build.quoted(compiled_library)
        return build.Plan("csrc/cpu", "cp", f"rule copy\n  command = cp {copied} $out\nbuild library.so: copy\n", {})

    built = build.make(library, library.parent, plan)
    assert built == library and not library.is_symlink() and find.fault(library) is None
    assert library.read_bytes() == compiled_library.read_bytes() and find.library_path("cpu") == library
    assert find.objection("cpu") is None and find.LOADED.get("cpu") == library
    assert Path(__file__).read_text().startswith(f'"""{__doc__}"""'), "the target of a link is not written"


def test_a_folder_under_its_name_is_said(library: Path, folder: Path) -> None:
    library.unlink()
    library.mkdir()
    assert "is not a file" in said_of_it(library)
    with pytest.raises(build.BuildError, match=f"cannot write in .*{folder.name}"):
        build.make(library, folder, lambda: build.Plan("", "", "rule t\n  command = touch $out\nbuild library.so: t\n", {}))
    assert [path.suffix for path in folder.iterdir() if path != library and path.suffix != ".lock"] == [".json"]


def test_what_was_built_is_loaded(library: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses()
    assert find.LOADED.get("cpu") == library and _compiled("cpu") == torch.ops.fastnce_cpu.level()
    assert json.loads(find.record_of(library).read_text()).keys() >= {"bytes", "sha256", "compiler"}


def test_a_link_to_what_was_built_is_loaded(library: Path, compiled_library: Path) -> None:
    """The record beside the link, or beside the file; and a folder that is a link."""
    library.unlink()
    library.symlink_to(compiled_library)
    assert find.fault(library) is None
    find.record_of(library).unlink()
    assert find.fault(library) is None
    losses()
    assert find.LOADED.get("cpu") == library
    (library.parent.parent / "link").symlink_to(library.parent)
    assert find.fault(library.parent.parent / "link" / library.name) is None


def test_a_sound_one_is_found_behind_a_damaged_one(library: Path, tmp_path: Path) -> None:
    (tmp_path / "packaged").mkdir()
    (tmp_path / "packaged" / library.name).write_text("junk")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses()
    assert find.LOADED.get("cpu") == library
    assert f"(left aside: {tmp_path / 'packaged' / library.name} has no" in _compiled("cpu")


# ---------------------------------------------------------------- of another user


def given_away(path: Path, monkeypatch: pytest.MonkeyPatch, link: bool = False) -> None:
    """To another user; where that is not allowed, the user becomes another one."""
    if os.getuid() == 0:
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=not link)
    else:
        monkeypatch.setattr(find, "_trusted", lambda: {SOMEBODY})


def group_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group with other members."""
    if os.getuid() == 0:
        os.chown(path, -1, SOMEBODY)
    else:
        monkeypatch.setattr(find, "_has_one_member", lambda *_: False)


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("mode", [0o666, 0o777, 0o757, 0o664, 0o1777])
def test_what_others_can_write_is_left_aside(what: str, mode: int, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library if what == "file" else library.parent
    group_of(path, monkeypatch)
    path.chmod(mode | (0o100 if what == "folder" else 0))
    said = said_of_it(library)
    assert f"(chmod go-w {path})" in said and ("lies in" in said) == (what == "folder")
    if what == "folder":
        with pytest.raises(build.BuildError, match="can be written by others.*FASTNCE_CACHE_DIR"):
            build.build("cpu")
    path.chmod(0o755)
    assert find.fault(library) is None


@pytest.mark.parametrize("what", ["file", "folder", "link", "folder of a link", "link of a link"])
def test_what_somebody_else_owns_is_left_aside(
    what: str, library: Path, compiled_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = library if what == "file" else library.parent
    if "link" in what:
        library.unlink()
        (tmp_path / "between").mkdir(mode=0o755)
        path = tmp_path / "between" if "folder" in what else library if what == "link" else tmp_path / "between" / "link.so"
        (tmp_path / "between" / "link.so").symlink_to(compiled_library)
        library.symlink_to(tmp_path / "between" / "link.so")
        assert find.fault(library) is None
    given_away(path, monkeypatch, link=path.is_symlink())
    assert "who is neither you nor root" in said_of_it(library)
    if what == "folder":
        with pytest.raises(build.BuildError, match="who is neither you nor root"):
            build.build("cpu")


def test_a_group_of_ones_own_has_no_other_member(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    """As systems give one to every user, with a umask that lets it write."""
    import grp

    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("eve", "x", 7, 9, "", "/", "/")))
    library.chmod(0o664)
    for name, number, members, sound in (
        ("eve", 9, [], True),
        ("eve", 9, ["eve"], True),
        ("eve", 9, ["eve", "mallory"], False),
        ("users", 9, [], False),
        ("eve", 10, [], False),
    ):
        group = grp.struct_group((name, "x", number, members))
        with pytest.MonkeyPatch.context() as one:
            one.setattr(grp, "getgrgid", lambda _, group=group: group)
            assert (find.fault(library) is None) == sound


def test_an_open_umask_does_not_open_what_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNCE_CACHE_DIR", str(tmp_path / "cache"))
    old = os.umask(0)
    try:
        library = build.folder() / "library.so"
        build.make(library, build.folder(), lambda: build.Plan("", "", "rule t\n  command = touch $out\nbuild library.so: t\n", {}))
    finally:
        os.umask(old)
    assert find.fault(library) is None and library.parent.stat().st_mode & 0o022 == 0


# ---------------------------------------------------------------- places


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> pwd.struct_passwd:
        raise KeyError("uid not found")

    for name in ("FASTNCE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def cache_at(path: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setenv("FASTNCE_CACHE_DIR", path)


PLACES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "no home folder": (no_home, "no home folder to build in: name a folder in FASTNCE_CACHE_DIR"),
    "a file": (cache_at(__file__), f"cannot write in {__file__}: File exists"),
    "below a file": (cache_at(f"{__file__}/below"), "Not a directory"),
    "too long a name": (cache_at("x" * 300), "File name too long"),
    "nowhere to make one": (cache_at("/proc/fastnce"), "cannot write in /proc/fastnce: No such file"),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_no_library_can_be_nothing_fails(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, words = PLACES[place]
    prepare(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses()
    assert find.objection("cpu") == find.not_built("cpu")
    with pytest.raises(build.BuildError, match=words) as raised:
        build.build("cpu")
    assert "\n" not in str(raised.value)


def test_what_may_not_be_read(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read all: the system's refusal is made here."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as one:
        one.setattr(find, "identity", denied)
        find._sha256.cache_clear()
        assert "cannot be read: Permission denied" in said_of_it(library)
    monkeypatch.setattr(find.os, "listdir", denied)
    losses()
    assert find.objection("cpu") == find.not_built("cpu")


def test_sources_that_cannot_be_read(folder: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a package inside a zip file."""

    def gone(_: str) -> str:
        raise NotADirectoryError(20, "Not a directory")

    monkeypatch.setattr(find, "digest", gone)
    losses()
    assert find.objection("cpu") == find.not_built("cpu")


# ---------------------------------------------------------------- the tests themselves

AS_ANY_TEST = """
import os, conftest
from fastnce.compiled import find
print(find.library_path("cpu"), find.objection("cpu"))
print(*(os.environ[name] for name in ("FASTNCE_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR")), sep="\\n")
"""


def test_no_test_meets_what_the_user_has_built(compiled_library: Path, tmp_path: Path) -> None:
    """A library that could be loaded, in the user's cache: it is neither found nor touched, and all that tests keep lies elsewhere."""
    cache = tmp_path / "home" / ".cache" / "fastnce"
    cache.mkdir(parents=True, mode=0o755)
    (tmp_path / "temporary").mkdir()
    for file in (compiled_library, find.record_of(compiled_library)):
        shutil.copy(file, cache)
    assert find.fault(cache / compiled_library.name) is None
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "home").rglob("*"))
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    given = ("FASTNCE_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in given} | places
    said = subprocess.run([sys.executable, "-c", AS_ANY_TEST], env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, *folders = said.splitlines()
    assert first == f"None {find.not_built('cpu')}"
    assert {Path(folder).parent.parent for folder in folders} == {tmp_path / "temporary"}
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "home").rglob("*")) == before


@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
def test_a_test_has_the_library_where_it_names_its_backend(backend: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        fastnce.sup_con(torch.randn(30, 8), torch.arange(30) % 4, backend=backend)
    assert ("fastnce_cpu::forward" in {event.name for event in seen.events()}) == (backend == "cpu")


# ---------------------------------------------------------------- two in one process

TWO = """
import os, shutil, sys
from pathlib import Path
import torch, fastnce
from fastnce.compiled import find

library = Path(sys.argv[1])
torch.ops.load_library(library)
assert find.objection("cpu") is None, "the same one"
copy = find.cache_folder() / "copy"
copy.mkdir()
os.environ["FASTNCE_CACHE_DIR"] = str(copy)
for of in (library, find.record_of(library)):
    shutil.copy(of, copy)
find.objection.cache_clear()
assert find.objection("cpu") is None, "a copy of it"
digest = "0" * 64
find.digest = lambda kind: digest
for of in (library, find.record_of(library)):
    shutil.copy(of, copy / (find.name("cpu")[:-3] + of.suffix))
find.objection.cache_clear()
print(find.objection("cpu"))
print(fastnce.sup_con(torch.eye(8), torch.zeros(8, dtype=torch.int64)).item() > 0)
"""


def test_another_library_of_its_kind_is_refused(library: Path, tmp_path: Path) -> None:
    """Its operators have the same names: registering them a second time would end the process."""
    done = subprocess.run([sys.executable, "-c", TWO, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, value = done.stdout.splitlines()
    assert said.startswith(f"not loaded: {library.parent}/copy/fastnce-cpu-{'0' * 16}.so, because this process already has another one")
    assert str(library) in said and said.endswith("start a new process") and value == "True"
    assert done.stderr.count("UserWarning: fastnce: the compiled kernels of cpu do not run: not loaded") == 1


def test_the_emulated_cuda_library_keeps_another_out(emulated_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / find.name("cuda", ["sm_80"])
    shutil.copy(find.library_path("cuda") or "", other)
    find.record_of(other).write_text(json.dumps(find.identity(other)))
    monkeypatch.setattr(find, "library_path", lambda kind: other if kind == "cuda" else None)
    find.objection.cache_clear()
    with pytest.warns(UserWarning, match=f"not loaded: {other}, because this process already has another one, of .*fastnce-emulated-"):
        assert find.objection("cuda")
    q, k = torch.ones(2, 3, 4)
    with pytest.raises(NotImplementedError, match="cuda: library not loaded"):
        fastnce.info_nce(q, k, backend="cuda")
