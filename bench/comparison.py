"""The rows of the recorded results that a page shows first: comparisons of fastnce with others over N.

A comparison is one loss at D = 128, forward and backward, on one machine: float32 on a CPU, bfloat16 on a GPU. It comes from the result
with times and memory up to the largest N. It shows fastnce, torch's own ways, and the best of the other packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.figure import Chart, Line, Measured
from bench.peers import OURS
from bench.record import Recorded, Results, Row, clock, milliseconds, rows_of

LOSSES = {"nt_xent": "NT-Xent", "clip": "CLIP"}
WIDTH = 128
SETTINGS = ("sources", "torch", "threads", "mem_limit_mib", "allocator")  # of env: equal where two runs are one
# The label on a page, and its contestants: the first that was measured. On GPUs that is the one under autocast, as people train.
TORCH = {"eager": ("eager autocast", "eager"), "torch.compile": ("compile autocast", "compile"), "chunked": ("chunked",)}
# Contestants that are no other package's: torch's own, and those that compute another loss.
NO_LIBRARY = {OURS, "careful", "open_clip autocast", "siglip-kernel", *(name for names in TORCH.values() for name in names)}


@dataclass(frozen=True)
class Comparison:
    """Rows of one loss; `shown` names the contestants: label -> contestant, fastnce last."""

    result: Recorded
    loss: str
    rows: list[Row]
    shown: dict[str, str]
    completed_by: tuple[Recorded, ...] = ()

    @property
    def name(self) -> str:
        """The name of its figure's file."""
        width = self.rows[0]["d"]
        return f"{self.result.machine}-{self.loss}" + (f"-d{width}" if width != WIDTH else "")

    @property
    def limit(self) -> float:
        """MiB: the limit of allocations, on a GPU its memory; 0 where there was no limit."""
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
        """Every N whose step ran within the memory."""
        return sorted(self.measured("memory", label).values)

    def chart(self) -> Chart:
        timed = rows_of(self.rows, measure="time")
        labels = [OURS, *(label for label in self.shown if label != OURS)]
        lines = (Line(label, label == OURS, self.measured("memory", label), self.measured("time", label)) for label in labels)
        return Chart(self.limit, clock(timed[0])[1], tuple(lines))


def value(row: Row) -> float:
    """MiB or ms of an ok row."""
    return float(row["peak_mib"]) if row["measure"] == "memory" else milliseconds(row)


def refused(row: Row) -> bool:
    return row["status"] in ("oom", "oom-skipped")


def comparisons(results: Results, losses: Iterable[str] = LOSSES, width: int = WIDTH) -> list[Comparison]:
    """At most one for each machine and loss: the one that reaches the largest N, and the newest of several."""
    found: dict[tuple[str, str], Comparison] = {}
    for result in results.measured:
        for loss in losses:
            compared, key = comparison_of(result, loss, results.measured, width), (result.machine, loss)
            if compared is not None and (key not in found or compared.sizes[-1] > found[key].sizes[-1]):
                found[key] = compared
    return list(found.values())


def every_comparison(results: Results) -> list[Comparison]:
    """The comparisons of all losses and widths that were measured."""
    rows = [row for result in results.measured for row in result.rows if row["measure"] in ("time", "memory")]
    losses, widths = dict.fromkeys(row["loss"] for row in rows), sorted({row["d"] for row in rows})
    return [found for width in widths for found in comparisons(results, losses, width)]


def comparison_of(result: Recorded, loss: str, others: Sequence[Recorded] = (), width: int = WIDTH) -> Comparison | None:
    """None where fastnce or eager has not both its times and its memory at two N or more.

    A row that ran into the time limit is replaced by a row of `others`, of the same machine, sources and settings, that measured it.
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
    found = Comparison(result, loss, rows, shown, tuple(completed_by))
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
    """The contestant that runs at the largest N, and of several the fastest there."""
    times = {(row["contestant"], row["n"]): milliseconds(row) for row in rows if row["measure"] == "time" and row["status"] == "ok"}
    reached = {name: max(n for other, n in times if other == name) for name in names if any(other == name for other, _ in times)}
    return min(reached, key=lambda name: (-reached[name], times[name, reached[name]]), default=None)
