"""Which GPU backend "auto" may take: each is put to the proof at its first use on a device, and the verdict is remembered.

A verdict belongs to a variant of the kernels, and to all that the machine code follows from: GPU, driver, torch, Triton, sources. It is
held in a dict, and in a file of the folder that holds compiled libraries, where other processes find it. A folder that cannot be written
only means that every process looks for itself.

A check runs in a thread of its own, because torch keeps gradient mode, autocast, transforms and streams for each thread. Until one check
of a backend has gone well on a device, checks run in a process of their own: a crash, or a hang, then ends that process and is the verdict.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastnce import files
from fastnce.backends import proof
from fastnce.backends.proof import Asked
from fastnce.backends.trial import Variant
from fastnce.compiled import find

DEVICES: tuple[str, ...] = ("cuda",)  # types of device on which "auto" wants a proof; torch has AMD's GPUs under this name too
# A process that has not ended after this time hangs: it imports torch, which may come from a slow disk, and compiles some ten kernels.
LIMIT = 300.0  # seconds
# For how many seconds later processes believe a verdict. A hang may be the machine's: in the hour after it the other processes of a job do
# not wait for it once more, and tomorrow's look again.
FOR_GOOD, AN_HOUR, NOT_AT_ALL = math.inf, 3600.0, 0.0
# A second process on a GPU in exclusive mode is told this by every version of CUDA.
BUSY = "busy or unavailable"
CHILD = "import os, sys; sys.path[:] = sys.argv[2].split(os.pathsep); from fastnce.backends import verdicts; verdicts.child(sys.argv[1])"


class Verdict(NamedTuple):
    """why: the fault of the backend, "" where it is right. until: when later processes look again, on the clock of time.time()."""

    why: str
    seconds: float
    until: float = FOR_GOOD


_LOCK = threading.Lock()
_KNOWN: dict[tuple[str, str], Verdict] = {}  # (digest of the device, "backend: variant")
_CHOSEN: dict[tuple[object, ...], str] = {}
_SAID: set[str] = set()


def known(device: torch.device, asked: Asked) -> str | None:
    """The answer of `choose` to an earlier call that asked the same."""
    return _CHOSEN.get((device, asked, proof.settings(asked[0])))


def choose(able: tuple[str, ...], device: torch.device, asked: Asked) -> str:
    """The first backend that is right for all calls that ask the same on this device, "" without one.

    able: backends without objection, in the order of preference.
    """
    settings = proof.settings(asked[0])
    return _first_use((device, asked, settings), able, device, asked[1], proof.completed(*settings, *asked))


# Dynamo calls both while it traces, and keeps their answers. torch.compiler.assume_constant_result does the same, but importing it takes a
# second.
known._dynamo_marked_constant = True  # type: ignore[attr-defined]
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def devices() -> list[torch.device]:
    """The GPUs of this machine, one of each kind."""
    found = {json.dumps(identity(device)): device for device in (torch.device("cuda", n) for n in range(torch.cuda.device_count()))}
    return list(found.values())


def _first_use(key: tuple[object, ...], able: tuple[str, ...], device: torch.device, columns: int, of: Variant) -> str:
    refused, chosen, unknown = [], "", False
    for name in able:
        verdict = _verdict(name, device, columns, of)
        if verdict is None:
            unknown = True
        elif verdict.why:
            refused.append(f"{name!r} is wrong on {device} for {of}: {verdict.why}")
        else:
            chosen = name
            break
    # A loss is then made from statistics, whose kernels have a proof of their own.
    taken = repr(chosen) if chosen else "a loss from statistics" if of.loss else "'torch'"
    if refused:
        _say(
            f"fastnce: {'; '.join(refused)}. backend='auto' takes {taken} there. `python -m fastnce check` looks again; FASTNCE_BACKEND or "
            "backend=... names another"
        )
    if unknown:
        _say(
            f"fastnce: no backend can be checked while a stream is capturing: backend='auto' takes {taken} for {of}. Call the loss once, "
            "forward and backward, before the capture"
        )
    else:
        _CHOSEN[key] = chosen
    return chosen


def _say(line: str) -> None:
    """Once. Where warnings are errors no loss fails for it."""
    if line not in _SAID:
        _SAID.add(line)
        with contextlib.suppress(UserWarning):
            warnings.warn(line, stacklevel=2)


def forget() -> None:
    """Forget all verdicts of this process; the files stay."""
    _KNOWN.clear()
    _CHOSEN.clear()
    _SAID.clear()
    identity.cache_clear()


# One verdict ----------------------------------------------------------------------------------------------------------------------------


def _verdict(name: str, device: torch.device, columns: int, of: Variant) -> Verdict | None:
    """The verdict on record; without one the backend is checked. None while a stream is capturing, where nothing can be."""
    with _LOCK:
        record = Record.of(device)
        if found := record.get(name, of):
            return found
        if capturing(device):
            return None
        with record.alone():
            # The process that held the lock may have checked the same.
            return record.get(name, of) or record.add(name, of, checked(record, name, device, columns, of))


def check(name: str, device: torch.device, columns: int, of: Variant) -> Verdict:
    """Check a backend whatever is on record, and record how it went."""
    with _LOCK:
        record = Record.of(device)
        with record.alone():
            return record.add(name, of, checked(record, name, device, columns, of))


def checked(record: Record, name: str, device: torch.device, columns: int, of: Variant) -> Verdict:
    """The verdict of a check: by another process, unless the record has a sound variant of this backend or the GPU admits no second one."""
    start, given = time.monotonic(), (name, device, columns, of, proof.ROWS)
    why, lasting = (_here if record.trusts(name) else _in_a_process)(*given)
    if BUSY in why:
        why, lasting = _here(*given)
    return Verdict(why, time.monotonic() - start, time.time() + lasting)


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _here(name: str, device: torch.device, columns: int, of: Variant, rows: int) -> tuple[str, float]:
    """(The fault, for how long it is believed): full memory, or an error of torch's operations, may be gone at the next start."""
    backend = importlib.import_module(f"fastnce.backends.{name}")
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(proof.check, backend, of, columns, device, rows).result(), FOR_GOOD
        except Exception as error:
            return f"{type(error).__name__}: {error}", NOT_AT_ALL


def _in_a_process(name: str, device: torch.device, columns: int, of: Variant, rows: int) -> tuple[str, float]:
    """The same by a process of its own. Its end, whatever it is, is the verdict."""
    request = json.dumps([name, str(device), columns, of, rows])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        try:
            command = [sys.executable, "-c", CHILD, request, os.pathsep.join(path for path in sys.path if isinstance(path, str))]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        except OSError as error:
            return f"no process could be started to check it: {error}", NOT_AT_ALL
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return f"the process that checked it did not end within {LIMIT:g} s", AN_HOUR
        finally:
            _end(process)
        out.seek(0)
        err.seek(0)
        answer, said = out.read().splitlines()[-1:], err.read().strip().splitlines()[-1:]
    if status == 0 and answer:
        with contextlib.suppress(ValueError):
            why, lasting = json.loads(answer[0])
            return str(why), float(lasting)
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"the process that checked it {how}" + "".join(f": {line}" for line in said), FOR_GOOD


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and the compilers that it has started. One that a driver holds is left behind after 5 s."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def child(request: str) -> None:
    """The process of _in_a_process."""
    name, device, columns, of, rows = json.loads(request)
    print("\n" + json.dumps(_here(name, torch.device(device), columns, Variant(*of), rows)))


# The record -----------------------------------------------------------------------------------------------------------------------------


@cache
def identity(device: torch.device) -> dict[str, str]:
    """All that a verdict depends on beside the variant, as text for people."""
    sources = sorted(find.PACKAGE.rglob("*.py"))
    find.objection("cuda")  # its library, where one is loaded, serves the other backend too
    library = find.LOADED.get("cuda")
    return {
        "device": describe(device),
        "torch": f"{torch.__version__} {torch.version.git_version or ''}".strip(),
        "triton": str(getattr(importlib.import_module("fastnce.backends.triton.limits"), "INSTALLED", None)),
        "sources": find.digest_of(sources),
        "library": library.name if library else "",
    }


def describe(device: torch.device) -> str:
    """Model, compute capability and driver of a GPU."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    driver = str(getattr(torch._C, "_cuda_getDriverVersion", int)())  # the version of CUDA, or HIP, that it serves
    parts = [found.name, f"{found.major}.{found.minor}", getattr(found, "gcnArchName", ""), driver]
    for module in ("nvidia", "amdgpu"):
        with contextlib.suppress(OSError):
            parts.append(Path("/sys/module", module, "version").read_text().strip())
    return " ".join(part for part in parts if part)


class Record(NamedTuple):
    """The verdicts of a device: those of this process, and the file of the others."""

    digest: str
    about: dict[str, str]
    path: Path | None

    @staticmethod
    def of(device: torch.device) -> Record:
        about = identity(device)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        folder = _folder()
        return Record(digest, about, folder and folder / f"proof-{digest}.json")

    def get(self, name: str, of: Variant) -> Verdict | None:
        key = self.digest, f"{name}: {of}"
        if key not in _KNOWN:
            for line, verdict in self.read().items():
                _KNOWN.setdefault((self.digest, line), verdict)
        return _KNOWN.get(key)

    def add(self, name: str, of: Variant, verdict: Verdict) -> Verdict:
        """Into memory, and where it can be into the file. The caller holds the lock."""
        line = f"{name}: {of}"
        _KNOWN[self.digest, line] = verdict
        if verdict.until > time.time() and self.path is not None:
            lines = self.read() | {line: verdict}
            with contextlib.suppress(OSError):
                files.write(self.path, json.dumps({"of": self.about, "verdicts": lines}, indent=1) + "\n")
        return verdict

    def trusts(self, name: str) -> bool:
        """Whether some variant of this backend has been right on this device."""
        return any(digest == self.digest and line.startswith(f"{name}: ") and not verdict.why for (digest, line), verdict in _KNOWN.items())

    def read(self) -> dict[str, Verdict]:
        """The verdicts of the file that still hold. A file that is not there, not ours, or damaged has none, and is written anew."""
        try:
            found = json.loads(self.path.read_text()) if self.path else {}
            if found["of"] != self.about:
                return {}
            every = {line: Verdict(_text(why), float(seconds), float(until)) for line, (why, seconds, until) in found["verdicts"].items()}
            return {line: one for line, one in every.items() if one.until > time.time()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Alone among the processes that share the file. The system takes the lock from a process that dies. A lock that is held for longer
        than any check takes is not waited for, nor is one that the file system does not know."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, ImportError):
                import fcntl

                if self.path is not None:
                    lock = stack.enter_context(self.path.with_suffix(".lock").open("a"))
                    end = time.monotonic() + 1.2 * LIMIT
                    while time.monotonic() < end:
                        try:
                            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            break
                        except BlockingIOError:
                            time.sleep(0.02)
            yield


def _text(why: object) -> str:
    if not isinstance(why, str):
        raise TypeError
    return why


def _folder() -> Path | None:
    """The folder of compiled libraries, made if it is not there. None where others can write into it, or this process cannot make it."""
    folder = find.cache_folder()
    with contextlib.suppress(OSError):
        if folder is not None:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            return None if find.in_strange_hands(folder) else folder
    return None
