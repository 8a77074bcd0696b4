"""What the trainings found: a table of retrieval, what the variants change, and how far fused and reference drift apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from train_ref.two_towers.data import PairData
from train_ref.two_towers.loop import Epoch, History
from train_ref.two_towers.retrieval import DIRECTIONS, Retrieval

METRICS = {"r1": "R@1", "r5": "R@5", "mrr": "MRR"}


@dataclass(frozen=True)
class Row:
    """One line of the table: retrieval by direction, and the training if any; one entry per seed."""

    label: str
    found: Sequence[dict[str, Retrieval]]
    histories: Sequence[History] = ()

    def values(self, direction: str, metric: str) -> list[float]:
        return [getattr(found[direction], metric) for found in self.found]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; none of the latter for a single value."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def cell(values: Sequence[float], sign: str = "") -> str:
    """In %, or in points where a sign is asked for."""
    sd = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{sign}.2f}{sd}"


def table(rows: Sequence[Row], data: PairData, directions: Sequence[str] = DIRECTIONS) -> str:
    """R@1, R@5 and MRR of both directions in %, mean ± standard deviation over seeds."""
    label_width = max(len(row.label) for row in rows)
    titles = (f"{data.left_name} -> {data.right_name}", f"{data.right_name} -> {data.left_name}")
    lines = [" " * label_width + "".join(f"{title:>{15 * len(METRICS)}}" for title in titles)]
    lines.append(" " * label_width + "".join(f"{title:>15}" for title in METRICS.values()) * len(titles))
    for row in rows:
        cells = [cell(row.values(direction, metric)) for direction in directions for metric in METRICS]
        lines.append(f"{row.label:<{label_width}}" + "".join(f"{text:>15}" for text in cells))
    return "\n".join(lines)


def mined_table(rows: Sequence[Row]) -> str:
    """How many hard negatives have a row's id, mean over rows, batches and seeds."""
    lines = []
    for row in rows:
        own, met = (statistics.fmean(getattr(h, name) for h in row.histories) for name in ("mined_false_negatives", "met_false_negatives"))
        lines.append(f"{row.label}: {own:.3f} of the hard negatives mined for a row have its id, {met:.3f} of all that it meets")
    return "\n".join(lines)


def summary_entry(row: Row) -> dict[str, Any]:
    return {"row": row.label} | {
        f"{direction}_{metric}": spread(row.values(direction, metric)) for direction in row.found[0] for metric in METRICS
    }


@dataclass(frozen=True)
class Difference:
    """Paired over seeds: the metrics of one variant minus those of another, which had the same weights, batches and left-out n-grams."""

    variant: str
    minus: str
    loss: str
    per_seed: dict[str, list[float]]

    def entry(self) -> dict[str, Any]:
        return asdict(self) | {"summary": {name: spread(values) for name, values in self.per_seed.items()}}


def differences(rows: Sequence[Row]) -> list[Difference]:
    """Every later variant minus the first, each implementation by itself."""
    found = []
    for row in rows:
        history = row.histories[0]
        first = next(other for other in rows if other.histories[0].loss == history.loss)
        if first is not row:
            paired = {}
            for direction, metric in product(row.found[0], METRICS):
                pairs = zip(row.values(direction, metric), first.values(direction, metric), strict=True)
                paired[f"{direction}_{metric}"] = [a - b for a, b in pairs]
            found.append(Difference(history.variant, first.histories[0].variant, history.loss, paired))
    return found


def difference_table(found: Sequence[Difference], directions: Sequence[str] = DIRECTIONS) -> str:
    lines = ["what the variant changes, in points, same seed, weights and batches (mean ± sd of the paired differences)"]
    width = max(len(f"{d.variant} - {d.minus}, {d.loss}") for d in found)
    for d in found:
        shown = (d.per_seed[f"{direction}_{metric}"] for direction in directions for metric in METRICS)
        cells = "".join(f"{cell(values, '+'):>15}" for values in shown)
        lines.append(f"{f'{d.variant} - {d.minus}, {d.loss}':<{width}}{cells}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """Fused against reference on one seed: relative differences of the loss, and R@1 fused minus reference.

    Only first_step compares the implementations on equal inputs. Later ones also hold what training makes of rounding.
    """

    variant: str
    seed: int
    same_order: bool
    first_step: float
    first_ten_steps: float
    all_steps: float
    r1: dict[str, float]


def compare(fused: Row, reference: Row) -> list[Comparison]:
    """One comparison per seed of two trainings that differ only in their implementation of the loss."""
    found = []
    for f, r, f_found, r_found in zip(fused.histories, reference.histories, fused.found, reference.found, strict=True):
        relative = [abs(a - b) / abs(b) for a, b in zip(f.step_losses, r.step_losses, strict=True)]
        r1 = {direction: f_found[direction].r1 - r_found[direction].r1 for direction in DIRECTIONS}
        same_order = f.order_sha256 == r.order_sha256
        found.append(Comparison(f.variant, f.seed, same_order, relative[0], max(relative[:10]), max(relative), r1))
    return found


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Relative loss differences at the first step, within ten and over the run; differences of R@1 in points."""
    lines = ["fused against reference: relative difference of the loss (largest), difference of R@1 in points"]
    lines.append(f"{'':<24}{'step 1':>10}{'steps 1-10':>12}{'whole run':>11}{'->':>8}{'<-':>8}")
    for c in comparisons:
        points = "".join(f"{100 * c.r1[direction]:+8.2f}" for direction in DIRECTIONS)
        name = f"{c.variant} seed {c.seed}"
        lines.append(f"{name:<24}{c.first_step:>10.1e}{c.first_ten_steps:>12.1e}{c.all_steps:>11.1e}{points}")
    return "\n".join(lines)


def run_entry(history: History, found: dict[str, Retrieval]) -> dict[str, Any]:
    """A training and what it finds, for JSON."""
    return asdict(history) | {"retrieval": {direction: asdict(retrieval) for direction, retrieval in found.items()}}


def read_entry(entry: dict[str, Any]) -> tuple[History, dict[str, Retrieval]]:
    """Both again. JSON keeps every bit of a float."""
    history = {name: value for name, value in entry.items() if name != "retrieval"}
    found = {direction: Retrieval(**retrieval) for direction, retrieval in entry["retrieval"].items()}
    return History(**history | {"epochs": [Epoch(**epoch) for epoch in entry["epochs"]]}), found


def run_entries(row: Row) -> list[dict[str, Any]]:
    return [run_entry(*training) for training in zip(row.histories, row.found, strict=True)]
