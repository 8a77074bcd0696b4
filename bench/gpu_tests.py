"""Part `tests`: pytest -m gpu, counted from its log, so that a run that is cut off has shown what it came to.

The dry run executes the bodies of tests/test_gpu.py at tiny sizes on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import gpu
from fastnce.bench import places

# First what takes a second, last what takes minutes: words for pytest -k, and the part of what is left that they may take.
GROUPS = (
    ("not problems and not thousand and not elements and not graph", 0.5),
    ("graph or thousand or elements", 0.5),
    ("problems", 1.0),
)
WORKERS = 6  # processes, where pytest-xdist is installed: most of the time goes into compiling kernels
COLUMNS = ("group", "passed", "outcomes", "seconds", "failed", "status")


def outcomes(log: str) -> dict[str, int]:
    """How many tests ended how, from the lines that -v prints for each."""
    alone = r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b.*%\]$"
    parallel = r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) "
    words = re.findall(alone, log, re.MULTILINE) + re.findall(parallel, log, re.MULTILINE)
    return {word.lower(): words.count(word) for word in dict.fromkeys(words)}


def failures(log: str) -> list[str]:
    lines = re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", log, re.MULTILINE)
    return [line[:200] for line in dict.fromkeys(lines)]


def command(words: str, report: gpu.Report) -> list[str]:
    parallel = [] if report.dry or importlib.util.find_spec("xdist") is None else ["-n", str(WORKERS)]
    # The dry run's tests carry no marker; -v and -rfE are what the log is counted from.
    where = ["tests/test_gpu.py"] if report.dry else ["-m", "gpu", "tests"]
    return [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--color=no", *parallel, *where, "-k", words]


def run(words: str, seconds: float, report: gpu.Report, log: Path) -> dict[str, Any]:
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    if report.dry:
        environment |= {"FASTNCE_GPU_DRY_RUN": "1"}
    begun = report.left()
    with log.open("a") as out:
        out.write(f"=== -k '{words}'\n")
        out.flush()
        start = out.tell()
        try:
            done = subprocess.run(
                command(words, report), cwd=places.ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=seconds
            )
            status = {0: "ok", 1: "failures", 5: "no tests"}.get(done.returncode, f"exit status {done.returncode}")
        except subprocess.TimeoutExpired:
            status = f"cut off after {seconds:.0f} s"
    text = log.read_bytes()[start:].decode(errors="replace")
    found = outcomes(text)
    shown = ", ".join(f"{count} {name}" for name, count in found.items()) or "none"
    row = {"group": words, "outcomes": shown, "seconds": begun - report.left(), "failed": failures(text), "status": status}
    return row | {"passed": status == "ok" and found.get("passed", 0) > 0}


def main() -> int:
    report = gpu.Report("tests")
    report.out.mkdir(parents=True, exist_ok=True)
    log = report.out / "tests.log"
    log.unlink(missing_ok=True)
    for words, share in (("test_gpu", 1.0),) if report.dry else GROUPS:
        row = run(words, max(report.left() * share, 1.0), report, log)
        report.add(row)
        if not row["passed"]:
            report.fail(f"pytest -k '{words}': {row['status']}, {row['outcomes']}; see tests.log")
    report.rows = [row | {"failed": "; ".join(row["failed"][:5])} for row in report.rows]
    return report.finish(COLUMNS)


if __name__ == "__main__":
    gpu.run(main)
