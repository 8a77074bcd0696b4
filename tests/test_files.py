"""A written file is there whole or not at all, and a disk without room is one line that names the file."""

from __future__ import annotations

import ast
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import accuracy, measure, page, sweep
from bench.gpu import build as gpu_build
from bench.gpu import check, part, sanitize
from bench.gpu import tests as gpu_tests
from fastnce import files
from fastnce.backends import verdicts
from fastnce.compiled import build
from train_ref import evaluate, results, train, validate
from train_ref import files as files_of_training

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def room_for(n: int) -> Iterator[None]:
    """In every file: the system refuses what is beyond, after it has taken what fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The writer ------------------------------------------------------------------------------------------------------------------------------


def test_both_copies_are_one_text() -> None:
    """The reference runs work without fastnce, and an installed fastnce has no reference runs."""
    assert Path(files.__file__).read_bytes() == Path(files_of_training.__file__).read_bytes()


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_file_is_written_or_written_over(before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content, found in (("ä\n", b"\xc3\xa4\n"), (b"\0\xff\r\n", b"\0\xff\r\n")):
        if before is not None:
            path.write_bytes(before)
        files.write(path, content)
        assert path.read_bytes() == found
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.txt", "usual"}


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("what", ["no room", "no room on the disk", "not renamed", "interrupted"])
def test_what_was_there_stays_where_writing_fails(what: str, before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_bytes(before)

    def failing(error: BaseException) -> Callable[..., Any]:
        def fail(*_: Any) -> None:
            raise error

        return fail

    error = KeyboardInterrupt() if what == "interrupted" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if what in ("no room on the disk", "interrupted"):
        monkeypatch.setattr(os, "fsync", failing(error))
    elif what == "not renamed":
        monkeypatch.setattr(os, "replace", failing(error))
    with room_for(1000 if what == "no room" else resource.RLIM_INFINITY), pytest.raises(type(error)) as raised:
        files.write(path, bytes(100_000))
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({} if before is None else {"a.txt": before})


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(os.devnull)
    files.write(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and not (tmp_path / "a.txt").is_symlink()


# Commands --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "a/b: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError("in words"), 1, "in words"),
        (files.Stopped("in a line", 3), 3, "in a line"),
    ],
)
def test_what_ends_a_command_is_one_line(error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    @files.command("a.py")
    def main() -> int:
        raise error

    assert main() == status
    assert capsys.readouterr().err == f"a.py: {said}\n"


def test_other_errors_stay_what_they_are() -> None:
    @files.command("a.py")
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
@pytest.mark.parametrize("command", ["-m bench time --dry-run", "train_ref/train.py --quick --loss reference --epochs 1 --out {out}"])
def test_output_that_finds_no_room_is_one_line(command: str, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, *command.format(out=tmp_path).split()]
        done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(": No space left on device" if "train" not in command else "0 of 1 trainings are finished")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def gpu_part(out: Path) -> int:
    return part.Report("race", ["--dry-run", "--out", str(out)]).finish(())


def benchmark(out: Path) -> int:
    return command.main(["time", "memory", "--quick", "--losses", "nt_xent", "--out", str(out)])


def pages(out: Path) -> int:
    page = out / "page.md"
    return results.main([], page)


TRAIN = ["--loss", "reference", "--quick", "--epochs", "1", "--out"]
# Command -> the file that there is no room for, its folder apart.
COMMANDS: dict[str, tuple[Callable[[Path], int], list[str]]] = {
    "train.py": (lambda out: train.main([*TRAIN, str(out)]), ["unfinished.json", "result.json", "result.png"]),
    "train.py on halves": (
        lambda out: train.main(["--method", "clip", *TRAIN, str(out)]),
        ["unfinished.json", "result.json", "result.png"],
    ),
    "validate.py": (
        lambda out: validate.main(["--gate", "formula", "--backend", "reference", "--dtype", "float32", "--out", str(out)]),
        ["report.md", "report.json", "report.png"],
    ),
    "results.py": (pages, ["page.md"]),
    "python -m bench": (benchmark, [".json", ".md"]),
    "python -m bench accuracy": (
        lambda out: accuracy.main(["--quick", "--losses", "nt_xent", "--dtypes", "float32", "--n", "4", "--out", str(out)]),
        ["-accuracy.json", "-accuracy.md"],
    ),
    "race.py": (lambda out: files.command("race.py")(gpu_part)(out), ["race.json"]),
    "python -m bench page": (lambda out: page.main(["--out", str(out)]), ["report.md"]),
}


@pytest.mark.parametrize(("program", "name"), [(program, name) for program, (_, names) in COMMANDS.items() for name in names])
def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(
    program: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith(".png"):
        pytest.importorskip("matplotlib")
    page = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(sweep, "gemm", lambda *_: [])
    monkeypatch.setattr(sweep, "run", lambda *_: sweep.Sweep([], 0))
    monkeypatch.setattr(command.table, "render", lambda _: "a page")
    monkeypatch.setattr(evaluate, "evaluate_features", lambda *_: evaluate.Accuracies(0.5, 0.5, 0.5))
    monkeypatch.setattr(evaluate, "evaluate_encoder", lambda *_: evaluate.Accuracies(0.5, 0.5, 0.5))
    flush = os.fsync

    def full(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.rpartition(".")[0].endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    threads = torch.get_num_threads()
    try:
        assert COMMANDS[program][0](tmp_path) == 1
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{program.partition(' on ')[0]}: {tmp_path}") and f"{name}: No space left on device" in said
    # Everything that is there is whole, and the page as it was.
    there = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in there if path.name.startswith(".") or (path.name.endswith(name) and path.name != "page.md")]
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page
    for path in there:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    # A training that is finished is not lost.
    if name == "result.json":
        assert said.endswith("--resume") and (tmp_path / "unfinished.json").is_file()


# Other writers ---------------------------------------------------------------------------------------------------------------------------

# The build publishes in its own way; the lock beside the verdicts; the kernel's file of a process; logs of parts that run on rented
# machines, which grow.
OTHERS = (build, verdicts, measure, gpu_tests, gpu_build, check, sanitize)


def writes(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    to_memory = bool(call.args) and isinstance(call.args[0], ast.Name) and call.args[0].id in ("content", "file")
    if name == "savefig":
        return not to_memory
    return name in ("write_text", "write_bytes", "savez", "savez_compressed", "tofile") or (
        name == "open" and bool({"w", "wb", "a", "x"} & {*texts})
    )


def test_nobody_else_writes_files() -> None:
    found = {
        path
        for folder in ("fastnce", "train_ref", "bench")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and writes(node)
    }
    assert found == {Path(module.__file__).resolve() for module in (files, files_of_training, *OTHERS)}
