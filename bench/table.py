"""A result as Markdown: its conditions, then tables for every loss, dtype and mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.peers import OURS
from bench.record import MODES, SCHEMA, Result, Row, clock, milliseconds, ratio, rows_of

Against = Callable[[Row, Row | None], float | None]

SHOWN = {"oom": "OOM", "oom-skipped": "(OOM)"}  # statuses that a table spells otherwise
SKIPPED = "(OOM): not run, a smaller N was out of memory."
RESOLUTION = 1 / 256  # MiB: a page; below it a ratio of two peaks means nothing


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def status(row: Row) -> str:
    """The status as a table shows it: in brackets where the contestant was not run because it was foreseen."""
    found: str = row["status"]
    return f"({found})" if found == "timeout" and row.get("detail", "").startswith("not run") else SHOWN.get(found, found)


def table(rows: list[Row], figure: Callable[[Row], float], against: Against) -> list[str]:
    """One line per N and D, one column per contestant. `against` gives the number in brackets, from a row and that of fastnce."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    lines = ["| N | D | " + " | ".join(names) + " |", "|" + "--:|" * (2 + len(names))]
    for n, d in dict.fromkeys((row["n"], row["d"]) for row in rows):
        here = {row["contestant"]: row for row in rows_of(rows, n=n, d=d)}
        ours = here.get(OURS)
        ours = ours if ours is not None and ours["status"] == "ok" else None
        lines.append(f"| {n:,} | {d} | " + " | ".join(_cell(here.get(name), ours, figure, against) for name in names) + " |")
    if any(row["status"] == "oom-skipped" for row in rows):
        lines += ["", SKIPPED]
    return lines


def _cell(row: Row | None, ours: Row | None, figure: Callable[[Row], float], against: Against) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return status(row)
    found = None if row["contestant"] == OURS else against(row, ours)
    return number(figure(row)) + ("" if found is None else f" ({found:.{1 if found >= 1 else 2}f}×)")


def gemm_rates(rows: list[Row]) -> dict[str, float]:
    """dtype -> GFLOP/s of the fastest matrix product that was measured beside the losses."""
    found = rows_of(rows, measure="gemm", status="ok")
    return {row["dtype"]: max(1e3 * other["tflops"] for other in rows_of(found, dtype=row["dtype"])) for row in found}


def time_tables(rows: list[Row], gemm: float | None) -> list[str]:
    """Tables of rows of one loss, dtype and mode: milliseconds, and percent of the rate of a matrix product."""
    lines = [f"{clock(rows[0])[1]}, median ms (× = the same round's {OURS})", "", *table(rows, milliseconds, lambda row, _: ratio(row)), ""]
    if gemm is None or not any("gemm_share" in row for row in rows):
        return lines
    words = f"nominal rate, percent of a matrix product's {number(gemm)} GFLOP/s in {rows[0]['dtype']}"
    return [*lines, words, "", *table(rows, lambda row: float(row["gemm_share"]), lambda row, ours: None), ""]


def memory_tables(rows: list[Row]) -> list[str]:
    """The table of rows of one loss, dtype and mode: the peak above the inputs."""

    def against(row: Row, ours: Row | None) -> float | None:
        return None if ours is None else float(row["peak_mib"]) / max(float(ours["peak_mib"]), RESOLUTION)

    kind = "allocated device" if rows[0]["device"] == "cuda" else "resident"
    words = f"peak {kind} memory above the inputs, MiB (× = {OURS})"
    return [words, "", *table(rows, lambda row: float(row["peak_mib"]), against), ""]


def place(env: dict[str, Any]) -> str:
    """The hardware in words."""
    if "gpu" in env:
        return f"{env['gpu']['name']}, CUDA {env['gpu']['cuda']}, triton {env['gpu']['triton'] or 'none'}"
    return f"{env['cpu']} ({env['vector']}), {env['threads']} thread{'s' * (env['threads'] > 1)}"


def conditions(env: dict[str, Any]) -> list[str]:
    """The lines below the title: time, versions, settings, load, command, and the number of cells that were left out."""
    versions = ", ".join(f"{name} {version}" for name, version in env["peers"].items())
    limit = f"{env['mem_limit_mib']:,} MiB above the inputs" if env["mem_limit_mib"] else "none"
    lines = [
        f"{env['time']}, fastnce {env['fastnce']} (sources {env['sources'][:8]}), torch {env['torch']}, "
        f"python {env['python']}{', ' * bool(versions)}{versions}.",
        f"Load before the run {env['load'][0]}; memory limit {limit}; allocator settings {env['allocator'] or 'default'}.",
        f"`{env['command']}`",
    ]
    if env["cells_left"]:
        lines.append(f"{env['cells_left']} of the planned cells were not started.")
    return lines


def render(result: Result) -> str:
    """The Markdown of a result.

    Raises ValueError for a result of another schema.
    """
    if result["schema"] != SCHEMA:
        raise ValueError(f"a result of schema {result['schema']}, and this renders schema {SCHEMA}: measure again")
    env, rows = result["env"], result["rows"]
    lines = [f"# Contrastive losses on {place(env)}", "", *conditions(env), ""]
    gemm = gemm_rates(rows)
    losses = [row for row in rows if row["measure"] in ("time", "memory")]
    for loss, dtype, mode in dict.fromkeys((row["loss"], row["dtype"], row["mode"]) for row in losses):
        timed, sized = (rows_of(losses, measure=measure, loss=loss, dtype=dtype, mode=mode) for measure in ("time", "memory"))
        lines += [f"## {loss}, {dtype}, {MODES[mode]}", ""]
        lines += time_tables(timed, gemm.get(dtype)) if timed else []
        lines += memory_tables(sized) if sized else []
    return "\n".join(lines).rstrip() + "\n"
