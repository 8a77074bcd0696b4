"""Render a result of run.py as Markdown.

python bench/report.py bench/results/<machine>/<date>-<digest>.json [more.json ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS = "fastnce"


def _cell(row: Row | None, ours: Row | None, figure: Callable[[Row], float], ratio: Callable[[Row, Row], float]) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"].upper() if row["status"] == "oom" else str(row["status"])
    value = figure(row)
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if row is ours or ours is None or ours["status"] != "ok":
        return text
    return f"{text} ({ratio(row, ours):.1f}×)"


def _table(rows: list[Row], figure: Callable[[Row], float], ratio: Callable[[Row, Row], float]) -> list[str]:
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    lines = ["| N | D | " + " | ".join(names) + " |", "|" + "--:|" * (2 + len(names))]
    for n, d in dict.fromkeys((row["n"], row["d"]) for row in rows):
        here = {row["contestant"]: row for row in rows if (row["n"], row["d"]) == (n, d)}
        line = [_cell(here.get(name), here.get(OURS), figure, ratio) for name in names]
        lines.append(f"| {n:,} | {d} | " + " | ".join(line) + " |")
    return lines


def _time_tables(rows: list[Row], threads: int) -> list[str]:
    # One thread's CPU time leaves out what other processes did meanwhile; with more threads only the wall clock counts.
    clock, words = ("cpu", "process CPU time") if threads == 1 else ("wall", "wall time")
    if on_gpu(rows):
        clock, words = "gpu", "CUDA events"
    return [
        f"{words}, median ms (× = the same round's fastnce)",
        "",
        *_table(rows, lambda row: float(row[f"{clock}_ms"]["median"]), lambda row, _: float(row[f"{clock}_ratio"])),
        "",
    ]


def on_gpu(rows: list[Row]) -> bool:
    """Results from before there was a choice do not say where they ran: on the CPU."""
    return rows[0].get("device", "cpu") == "cuda"


def _rate_tables(rows: list[Row], gemm: float | None) -> list[str]:
    """Nominal TFLOP/s: 6 N^2 D (4 M N D for moco) over the time, whatever was executed; next to a plain matrix product's."""

    def share(row: Row, ours: Row) -> float:
        return float(row["tflops"]) / float(ours["tflops"])

    beside = "" if gemm is None else f"; a bfloat16 product of 8192 x 8192 matrices runs at {gemm:.0f}"
    return [f"nominal TFLOP/s (× = fastnce){beside}", "", *_table(rows, lambda row: float(row["tflops"]), share), ""]


def _memory_tables(rows: list[Row]) -> list[str]:
    # Below a page or two of difference a ratio means nothing.
    return [
        f"peak {'allocated device' if on_gpu(rows) else 'resident'} memory above the inputs, MiB (× = fastnce)",
        "",
        *_table(rows, lambda row: float(row["peak_mib"]), lambda row, ours: row["peak_mib"] / max(ours["peak_mib"], 1 / 256)),
        "",
    ]


def render(result: dict[str, Any]) -> str:
    """The Markdown of a result: one section per loss, its conditions on top."""
    env = result["env"]
    place = f"{env['cpu']} ({env['vector']}), {env['threads']} thread{'s' * (env['threads'] > 1)}"
    if "gpu" in env:
        place = f"{env['gpu']['name']}, CUDA {env['gpu']['cuda']}, triton {env['gpu']['triton'] or 'none'}"
    gemm = next((row["tflops"] for row in result["rows"] if row["mode"] == "gemm" and row["status"] == "ok"), None)
    versions = ", ".join(f"{name} {version}" for name, version in env["peers"].items())
    lines = [
        f"# Forward + backward on {place}",
        "",
        f"{env['time']}, fastnce {env['fastnce']} (sources {env['sources'][:8]}), torch {env['torch']}, "
        f"python {env['python']}{', ' * bool(versions)}{versions}.",
        f"Load before the run {env['load'][0]}; allocator settings {env['allocator'] or 'default'}. `{env['command']}`",
        "",
    ]
    for loss, dtype in dict.fromkeys((row["loss"], row["dtype"]) for row in result["rows"] if row["mode"] != "gemm"):
        rows = [row for row in result["rows"] if (row["loss"], row["dtype"]) == (loss, dtype)]
        lines += [f"## {loss}, {dtype}", ""]
        timed, sized = ([row for row in rows if row["mode"] == mode] for mode in ("time", "memory"))
        lines += _time_tables(timed, env["threads"]) if timed else []
        lines += _rate_tables(timed, gemm) if timed and on_gpu(timed) else []
        lines += _memory_tables(sized) if sized else []
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for name in sys.argv[1:]:
        path = Path(name)
        path.with_suffix(".md").write_text(render(json.loads(path.read_text())))
        print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
