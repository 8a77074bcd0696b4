"""Results that nobody measured, and whose pages and figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = [1024, 2048, 4096, 8192, 16_384]
LIMIT = 512
# MiB and ms of N rows: dense ones grow by N^2, and are the faster ones at the smallest N.
COSTS = {
    "fastnce": (lambda n: 1 + n / 1024, lambda n: 9 * (n / 1024) ** 1.7),
    "eager": (lambda n: 12 * (n / 1024) ** 2, lambda n: 7 * (n / 1024) ** 2.1),
    "careful": (lambda n: 11 * (n / 1024) ** 2, lambda n: 6 * (n / 1024) ** 2.1),
    "compile": (lambda n: 9 * (n / 1024) ** 2, lambda n: 10 * (n / 1024) ** 2),
    "chunked": (lambda n: 40 * (n / 1024), lambda n: 11 * (n / 1024) ** 2),
    "slow library": (lambda n: 16 * (n / 1024) ** 2, lambda n: 30 * (n / 1024) ** 2.1),
    "library": (lambda n: 16 * (n / 1024) ** 2, lambda n: 20 * (n / 1024) ** 2.1),
}


def measured(loss: str, limit: float = LIMIT, factor: float = 1.0, device: str = "cpu", dtype: str = "float32") -> list[dict[str, Any]]:
    """Rows of a loss: a contestant that needs more than the limit is oom at that N, and skipped at the larger ones."""
    rows = []
    for measure in ("time", "memory"):
        for n in SIZES:
            for name, (mebibytes, milliseconds) in COSTS.items():
                row: dict[str, Any] = {"measure": measure, "mode": "full", "loss": loss, "n": n, "d": 128, "dtype": dtype, "threads": 1}
                row |= {"device": device, "contestant": name, "status": "ok"}
                ms, mib = factor * milliseconds(n), mebibytes(n)
                ours = factor * COSTS["fastnce"][1](n)
                if limit and mib > limit:
                    row["status"] = "oom-skipped" if mebibytes(n / 2) > limit else "oom"
                elif measure == "memory":
                    row |= {"peak_mib": mib, "loss_value": 2.0 + 1e-7 * (name == "fastnce"), "gradient_norm": 1.0}
                else:
                    row |= {"cpu_ms": {"median": ms, "min": ms}, "cpu_ratio": ms / ours, "wall_ms": {"median": ms, "min": ms}}
                    row |= {"gpu_ms": {"median": ms, "min": ms}, "gpu_ratio": ms / ours, "loss_value": 2.0, "gradient_norm": 1.0}
                rows.append(row)
    return rows


def environment(**more: Any) -> dict[str, Any]:
    env: dict[str, Any] = {"cpu": "CPU", "vector": "AVX2", "threads": 1, "torch": "2.13.0", "python": "3.11", "fastnce": "0.1.0"}
    env |= {"peers": {}, "load": [0.0], "allocator": {}, "sources": "d" * 64, "time": "2026-01-02T03:04:05Z", "command": "python a.py"}
    return env | {"mem_limit_mib": LIMIT, "cells_left": 0} | more


def record(folder: Path, name: str, rows: list[dict[str, Any]], env: dict[str, Any], **more: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 2, "env": env, "rows": rows, **more}))
    return path


def recorded(folder: Path) -> Path:
    """nt_xent as a comparison, clip at too few N for one, and an accuracy result."""
    few = [row for row in measured("clip") if row["n"] == 1024]
    record(folder, "a-cpu/2026-01-02-d.json", measured("nt_xent") + few, environment())
    summary = [
        {"dtype": "float32", "loss": "clip", "quantity": name, "cells": 50, "outside": 2 * (name == "scale"), "most_of_limit": 0.5}
        for name in ("loss", "row", "gradient", "scale")
    ]
    record(folder, "a-cpu/2026-01-02-d-accuracy-2.json", summary, environment(), schema=1)
    return folder
