"""From the recorded results: the ones that exist, and the rows of them that a page shows first.

A headline is one loss at D = 128, forward and backward, over N, from the result of a machine that has its times and its memory up to the
largest N:
float32 on a CPU, bfloat16 on a GPU. Shown are fastnce, torch's own ways, and the best of the other packages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import table
from bench.figures import Chart, Line, Measured
from bench.table import OURS, Row, rows_of

LOSSES = {"nt_xent": "NT-Xent", "clip": "CLIP"}
WIDTH = 128
SETTINGS = ("sources", "torch", "threads", "mem_limit_mib", "allocator")  # of env: equal where two runs are one
# What a page calls them, and which contestants they are: the first that was measured. Under autocast GPUs are trained.
TORCH = {"eager": ("eager autocast", "eager"), "torch.compile": ("compile autocast", "compile"), "chunked": ("chunked",)}
# Torch in other words; packages that compute another loss.
NO_LIBRARY = {OURS, "careful", "open_clip autocast", "siglip-kernel", *(name for names in TORCH.values() for name in names)}


@dataclass(frozen=True)
class Recorded:
    """A file of bench/results."""

    machine: str
    name: str
    content: dict[str, Any]

    @property
    def env(self) -> dict[str, Any]:
        env: dict[str, Any] = self.content["env"]
        return env

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.content["rows"]
        return rows


@dataclass(frozen=True)
class Results:
    """Of time and memory, and of accuracy, the newest first; `left_out` are files of the former in another schema."""

    measured: list[Recorded]
    judged: list[Recorded]
    left_out: list[Recorded]


def load(folder: Path) -> Results:
    """Every result of a folder, but for the parts of gpu/. Raises ValueError for a file that is none."""
    found = [Recorded(path.parent.name, path.name, content(path)) for path in sorted(folder.glob("*/*.json"))]
    found = sorted((result for result in found if "part" not in result.content), key=lambda result: (result.env["time"], result.name))
    judged = [result for result in reversed(found) if re.search(r"-accuracy(-\d+)?\.json$", result.name)]
    measured = [result for result in reversed(found) if result not in judged]
    readable = [result for result in measured if result.content["schema"] == table.SCHEMA]
    return Results(readable, judged, [result for result in measured if result not in readable])


def content(path: Path) -> dict[str, Any]:
    """Of a file that holds at least what every result has."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = not isinstance(found["schema"], int) or not isinstance(found["rows"], list) or not isinstance(found["env"]["time"], str)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no result: {type(error).__name__}") from error
    if wrong:
        raise ValueError(f"{path} is no result: its schema, rows and env are not what python -m bench writes")
    return dict(found)


@dataclass(frozen=True)
class Headline:
    """Rows of one loss; `shown` names the contestants: label -> contestant, fastnce last."""

    result: Recorded
    loss: str
    rows: list[Row]
    shown: dict[str, str]
    completed_by: tuple[Recorded, ...] = ()

    @property
    def name(self) -> str:
        """Of the files of its figure."""
        width = self.rows[0]["d"]
        return f"{self.result.machine}-{self.loss}" + (f"-d{width}" if width != WIDTH else "")

    @property
    def limit(self) -> float:
        """MiB: what allocations were limited to, on a GPU what it has; 0 where there was no limit."""
        env = self.result.env
        return float(env["gpu"]["memory_gib"] * 1024 if "gpu" in env else env["mem_limit_mib"])

    @property
    def sizes(self) -> list[int]:
        return sorted({row["n"] for row in self.rows})

    def row(self, measure: str, label: str, n: int) -> Row | None:
        found = rows_of(self.rows, measure=measure, contestant=self.shown[label], n=n)
        return found[0] if found else None

    def measured(self, measure: str, label: str) -> Measured:
        found = rows_of(self.rows, measure=measure, contestant=self.shown[label])
        return Measured(
            {row["n"]: value(row) for row in found if row["status"] == "ok"},
            tuple(row["n"] for row in found if refused(row)),
        )

    def fits(self, label: str) -> list[int]:
        """The N whose step ran within the memory there was."""
        return sorted(self.measured("memory", label).values)

    def chart(self) -> Chart:
        timed = rows_of(self.rows, measure="time")
        labels = [OURS, *(label for label in self.shown if label != OURS)]
        lines = (Line(label, label == OURS, self.measured("memory", label), self.measured("time", label)) for label in labels)
        return Chart(self.limit, table.clock(timed[0])[1], tuple(lines))


def value(row: Row) -> float:
    """MiB or ms of an ok row."""
    return float(row["peak_mib"]) if row["measure"] == "memory" else table.milliseconds(row)


def refused(row: Row) -> bool:
    return row["status"] in ("oom", "oom-skipped")


def headlines(results: Results, losses: Iterable[str] = LOSSES, width: int = WIDTH) -> list[Headline]:
    """At most one for every machine and loss: the one that reaches the largest N, of those the newest."""
    found: dict[tuple[str, str], Headline] = {}
    for result in results.measured:
        for loss in losses:
            headline, key = headline_of(result, loss, results.measured, width), (result.machine, loss)
            if headline is not None and (key not in found or headline.sizes[-1] > found[key].sizes[-1]):
                found[key] = headline
    return list(found.values())


def every_headline(results: Results) -> list[Headline]:
    """Of all losses and widths that were measured."""
    rows = [row for result in results.measured for row in result.rows if row["measure"] in ("time", "memory")]
    losses, widths = dict.fromkeys(row["loss"] for row in rows), sorted({row["d"] for row in rows})
    return [found for width in widths for found in headlines(results, losses, width)]


def headline_of(result: Recorded, loss: str, others: Sequence[Recorded] = (), width: int = WIDTH) -> Headline | None:
    """None where fastnce or eager has not both its times and its memory at two N or more.

    What ran into the time limit is taken from `others` where they measured it: same machine, same sources, same settings.
    """
    dtype = "bfloat16" if "gpu" in result.env else "float32"
    rows = shown_rows(result, loss, dtype, width)
    completed_by: list[Recorded] = []
    for other in others:
        if other is not result and other.machine == result.machine and all(other.env[name] == result.env[name] for name in SETTINGS):
            ran = {key_of(row): row for row in shown_rows(other, loss, dtype, width) if row["status"] == "ok"}
            missing = [row for row in rows if row["status"] == "timeout" and key_of(row) in ran]
            rows = [ran[key_of(row)] if row in missing else row for row in rows]
            completed_by += [other] if missing else []
    present = list(dict.fromkeys(row["contestant"] for row in rows))
    shown = {label: name for label, names in TORCH.items() for name in reversed(names) if name in present}
    library = best(rows, [name for name in present if name not in NO_LIBRARY])
    shown |= ({library: library} if library else {}) | {OURS: OURS}
    found = Headline(result, loss, rows, shown, tuple(completed_by))
    enough = "eager" in shown and all(
        len(found.measured(measure, label).values) > 1 for measure in ("time", "memory") for label in ("eager", OURS)
    )
    return found if enough else None


def shown_rows(result: Recorded, loss: str, dtype: str, width: int) -> list[Row]:
    measured = [row for row in result.rows if row["measure"] in ("time", "memory")]
    return rows_of(measured, loss=loss, d=width, dtype=dtype, mode="full")


def key_of(row: Row) -> tuple[str, str, int]:
    return row["measure"], row["contestant"], row["n"]


def best(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """The one that runs at the largest N, and of those the fastest there."""
    times = {(row["contestant"], row["n"]): table.milliseconds(row) for row in rows if row["measure"] == "time" and row["status"] == "ok"}
    reached = {name: max(n for other, n in times if other == name) for name in names if any(other == name for other, _ in times)}
    return min(reached, key=lambda name: (-reached[name], times[name, reached[name]]), default=None)
