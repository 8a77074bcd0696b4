"""Part `check`: `python -m fastnce check`, which puts every variant of the kernels to the proof of its first use, on this very device.

The rows are the variants that it found wrong, and one of all. The dry run asks the command for its help, since a check needs a GPU.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from bench.gpu import part
from bench.gpu.sanitize import execute

COLUMNS = ("what", "passed", "variants", "wrong", "seconds", "status")
COMMAND = [sys.executable, "-m", "fastnce", "check"]


def rows_of(status: str, log: str) -> list[dict[str, Any]]:
    """The rows of what the command printed: a line beginning with WRONG for each such variant, and its reason on the next; then the sum."""
    found = [
        {"what": what, "passed": False, "status": why.strip()} for what, why in re.findall(r"^WRONG +\S+ +(.*)\n(.*)", log, re.MULTILINE)
    ]
    total = re.search(r"^(\d+) variants checked, (\d+) wrong$", log, re.MULTILINE)
    if total is None:
        last = (log.strip().splitlines() or [""])[-1]
        return [*found, {"what": "all variants", "passed": False, "status": f"{status}: {last}"}]
    variants, wrong = map(int, total.groups())
    return [
        *found,
        {"what": "all variants", "passed": not wrong and status == "ok", "variants": variants, "wrong": wrong, "status": status},
    ]


def main() -> int:
    report = part.Report("check")
    begun = report.left()
    status, log = execute([*COMMAND, *(["--help"] if report.dry else [])], dict(os.environ), max(report.left(), 1.0))
    with report.log.open("a") as file:
        file.write(f"=== {' '.join(COMMAND[1:])}: {status}\n{log}\n")
    if report.dry:
        report.add({"what": "the command's help", "status": status})
        if status != "ok":
            report.fail(f"fastnce check --help: {status}")
        return report.finish(COLUMNS)
    for row in rows_of(status, log):
        report.add(row)
        if not row["passed"]:
            report.fail(f"{row['what']}: {row['status']}")
    report.rows[-1]["seconds"] = begun - report.left()
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
