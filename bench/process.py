"""A cell in a process of its own: whatever happens to it, the sweep goes on and there is a row for every contestant."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from bench.cell import Cell, row_of
from bench.record import ROOT
from bench.table import Row


def run(cell: Cell, timeout: float) -> list[Row]:
    """One row per contestant of a cell: crash or timeout (seconds) for all of them where the process dies.

    SIGKILL ends a process whose memory was granted and is not there: of a single contestant that is oom, and larger N are not tried.
    """
    command = [sys.executable, "-m", "bench.measure", json.dumps(asdict(cell))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    given: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": path}, "timeout": timeout * len(cell.names)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, **given)
    except subprocess.TimeoutExpired:
        return [row_of(cell, name, "timeout", detail=f"took more than {timeout:g} s") for name in cell.names]
    if done.returncode == 0:
        try:
            rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
            return rows
        except (IndexError, ValueError):
            return [row_of(cell, name, "crash", detail="its last line is no result") for name in cell.names]
    if done.returncode == -signal.SIGKILL and len(cell.names) == 1:
        return [row_of(cell, cell.names[0], "oom", detail="SIGKILL, as the kernel does where memory is short")]
    if done.returncode < 0:
        detail = signal.Signals(-done.returncode).name
    else:
        detail = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return [row_of(cell, name, "crash", detail=detail) for name in cell.names]


def isolated(cell: Cell, timeout: float) -> list[Row]:
    """As run; where a shared process dies, every contestant again in one of its own, so that only the culprit is lost.

    Those rows say "alone": true and have no ratio: nothing was measured in turn with them.
    """
    rows = run(cell, timeout)
    if len(cell.names) == 1 or any(row["status"] not in ("crash", "timeout") for row in rows):
        return rows
    alone = [row for name in cell.names for row in run(replace(cell, names=(name,)), timeout)]
    return [{key: value for key, value in row.items() if not key.endswith("_ratio")} | {"alone": True} for row in alone]
