"""Part `tests`: pytest -m gpu tests/test_gpu.py. Tests are counted from the log, so that a run that is cut off counts too.

The dry run executes the bodies of tests/test_gpu.py at tiny sizes on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from typing import Any, NamedTuple

from bench.gpu import kernels, part
from bench.record import ROOT
from fastnce.compiled import build

TESTS = "tests/test_gpu.py"  # the only file with the marker; to collect all files takes seconds
WORKERS = 6  # processes, where pytest-xdist is installed: the tests of Triton spend most of their time on compiling


class Group(NamedTuple):
    """Tests that run together: their words for pytest -k, their share of the time that is left, and the backend of their kernels."""

    words: str
    share: float
    of: str = ""
    workers: int = WORKERS


# Tests that need the device for themselves: they take most of its memory, or measure whether the host waits for it.
ALONE = "elements or no_other"
# First the tests whose kernels are compiled already, a second each; last those that take minutes.
GROUPS = (
    Group(f"cuda and not problems and not ({ALONE})", 0.5, "cuda"),
    Group(f"cuda and problems and not ({ALONE})", 0.5, "cuda"),
    Group(ALONE, 0.5, workers=1),
    Group(f"not cuda and not problems and not ({ALONE})", 0.5, "triton"),
    Group(f"not cuda and problems and not ({ALONE})", 1.0, "triton"),
)
TEST_SECONDS = 120  # of one test, where pytest-timeout is installed: a kernel that does not end costs its own process, and no other
COLUMNS = ("group", "passed", "outcomes", "seconds", "failed", "status")


def outcomes(log: str) -> dict[str, int]:
    """The number of tests of each outcome, from the lines that -v prints."""
    alone = r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b.*%\]$"
    parallel = r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) "
    words = re.findall(alone, log, re.MULTILINE) + re.findall(parallel, log, re.MULTILINE)
    return {word.lower(): words.count(word) for word in dict.fromkeys(words)}


def failures(log: str) -> list[str]:
    lines = re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", log, re.MULTILINE)
    return [line[:200] for line in dict.fromkeys(lines)]


def command(group: Group, report: part.Report) -> list[str]:
    installed = importlib.util.find_spec
    more = [] if report.dry or group.workers == 1 or installed("xdist") is None else ["-n", str(group.workers)]
    more += [] if installed("pytest_timeout") is None else ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    # The dry run's tests carry no marker. The counts come from the lines of -v and -rfE.
    more += [] if report.dry else ["-m", "gpu"]
    return [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--color=no", *more, TESTS, "-k", group.words]


def run(group: Group, seconds: float, report: part.Report) -> dict[str, Any]:
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    # Tests leave the user's cache alone by themselves. Here they are to test the library in it.
    environment |= kernels.environment(report.where, report.names()) | {"FASTNCE_CACHE_DIR": str(build.folder())}
    begun = report.left()
    with report.log.open("a") as out:
        out.write(f"=== -k '{group.words}'\n")
        out.flush()
        start = out.tell()
        # In a session of its own, so that all its processes can be ended, above all one whose kernel does not end.
        process = subprocess.Popen(
            command(group, report), cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = {0: "ok", 1: "failures", 5: "no tests"}.get(process.wait(seconds), f"exit status {process.returncode}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"cut off after {seconds:.0f} s"
    text = report.log.read_bytes()[start:].decode(errors="replace")
    found = outcomes(text)
    shown = ", ".join(f"{count} {name}" for name, count in found.items()) or "none"
    if status == "ok" and not found.get("passed"):
        status = "skipped"
    row = {"group": group.words, "outcomes": shown, "seconds": begun - report.left(), "failed": failures(text), "status": status}
    return row | {"passed": status == "ok" and found.get("passed", 0) > 0}


def main() -> int:
    report = part.Report("tests")
    backends = {"", *(name.partition("-")[0] for name in report.names())}
    for group in [Group("test_gpu", 1.0)] if report.dry else [group for group in GROUPS if group.of in backends]:
        row = run(group, max(report.left() * group.share, 1.0), report)
        report.add(row)
        # The tests of a library that is not built are all skipped, and say why.
        if not row["passed"] and row["status"] != "skipped":
            report.fail(f"pytest -k '{group.words}': {row['status']}, {row['outcomes']}; see {report.log.name}")
    report.rows = [row | {"failed": "; ".join(row["failed"][:5])} for row in report.rows]
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
