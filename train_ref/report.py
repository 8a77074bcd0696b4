"""The findings of a reference run: rows of accuracies, fused against reference, as tables and as JSON."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train_ref import files
from train_ref.evaluate import Evaluation, Values
from train_ref.loop import Epoch, History
from train_ref.methods import METHODS


@dataclass(frozen=True)
class Row:
    """One line of a table: its values, and its trainings if there are any; one entry per seed."""

    label: str
    values: Sequence[Values]
    histories: Sequence[History] = ()

    def mean(self, metric: str) -> float:
        return statistics.fmean(values[metric] for values in self.values)

    def sd(self, metric: str) -> float | None:
        """Sample standard deviation over seeds; none for a single seed."""
        return statistics.stdev(values[metric] for values in self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """Fused against reference on one seed: relative differences of the loss, and accuracies fused minus reference.

    Only first_step compares the implementations on equal inputs. Later ones also hold what training makes of rounding:
    the reference drifts just as far from itself when its batch is in another order.
    """

    method: str
    seed: int
    same_order: bool
    first_step: float
    first_ten_steps: float
    all_steps: float
    accuracies: Values


def compare(fused: Row, reference: Row) -> list[Comparison]:
    """One comparison per seed of two trainings that differ only in their implementation of the loss."""
    found = []
    for f, r, f_values, r_values in zip(fused.histories, reference.histories, fused.values, reference.values, strict=True):
        relative = [abs(a - b) / abs(b) for a, b in zip(f.step_losses, r.step_losses, strict=True)]
        found.append(
            Comparison(
                method=f.method,
                seed=f.seed,
                same_order=f.order_sha256 == r.order_sha256,
                first_step=relative[0],
                first_ten_steps=max(relative[:10]),
                all_steps=max(relative),
                accuracies={metric: f_values[metric] - r_values[metric] for metric in f_values},
            )
        )
    return found


@dataclass(frozen=True)
class Section:
    """All that is judged alike, and so belongs into one table; with --loss both, trained has every reference behind its fused twin."""

    evaluation: Evaluation[Any]
    baselines: Sequence[Row]
    trained: Sequence[Row]
    both: bool

    @property
    def rows(self) -> list[Row]:
        return [*self.baselines, *self.trained]

    @property
    def comparisons(self) -> list[Comparison]:
        pairs = zip(self.trained[::2], self.trained[1::2], strict=True) if self.both else ()
        return [comparison for fused, reference in pairs for comparison in compare(fused, reference)]

    def text(self, tested_on: str, seeds: int) -> str:
        """The table under its title, and the comparisons if there are any."""
        over = f"mean ± sd over {seeds} seeds" if seeds > 1 else "one seed"
        metrics = self.evaluation.metrics
        parts = [f"{self.evaluation.title} on the {tested_on}, % ({over})", table(self.rows, metrics)]
        if self.both:
            parts.append(comparison_table(self.comparisons, metrics))
        return "\n\n".join(parts)


def table(rows: Sequence[Row], metrics: dict[str, str]) -> str:
    """Accuracies in %, mean ± standard deviation over seeds."""
    no_sd = " " * 6 if any(len(row.values) > 1 for row in rows) else ""
    label_width = max(len(row.label) for row in rows)

    def cell(row: Row, metric: str) -> str:
        sd = row.sd(metric)
        return f"{100 * row.mean(metric):.1f}" + (no_sd if sd is None else f" ± {100 * sd:.1f}")

    lines = [" " * label_width + "".join(f"{title:>14}" for title in metrics.values())]
    for row in rows:
        lines.append((f"{row.label:<{label_width}}" + "".join(f"{cell(row, m):>14}" for m in metrics)).rstrip())
    return "\n".join(lines)


def comparison_table(comparisons: Sequence[Comparison], metrics: dict[str, str]) -> str:
    """Relative loss differences at the first step, within ten and over the run; accuracy differences in points."""
    lines = [
        "fused against reference: relative difference of the loss (largest), difference of accuracy in points",
        f"{'':<14}{'step 1':>10}{'steps 1-10':>12}{'whole run':>11}" + "".join(f"{title:>14}" for title in metrics.values()),
    ]
    for c in comparisons:
        name = f"{c.method} seed {c.seed}"
        points = "".join(f"{100 * c.accuracies[metric]:+14.1f}" for metric in metrics)
        lines.append(f"{name:<14}{c.first_step:>10.1e}{c.first_ten_steps:>12.1e}{c.all_steps:>11.1e}{points}")
    return "\n".join(lines)


def versions(fused: bool) -> dict[str, str]:
    found = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    if fused:
        import fastnce

        found["fastnce"] = fastnce.__version__
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def run_entry(history: History, accuracies: Values) -> dict[str, Any]:
    """A training and what it is worth, for JSON."""
    return asdict(history) | {"accuracies": accuracies}


def read_entry(entry: dict[str, Any]) -> tuple[History, Values]:
    """Both again. JSON keeps every bit of a float."""
    history = {name: value for name, value in entry.items() if name != "accuracies"}
    accuracies = {metric: float(entry["accuracies"][metric]) for metric in METHODS[entry["method"]].evaluation.metrics}
    return History(**history | {"epochs": [Epoch(**epoch) for epoch in entry["epochs"]]}), accuracies


def summary_entry(row: Row) -> dict[str, Any]:
    return {"row": row.label} | {metric: {"mean": row.mean(metric), "sd": row.sd(metric)} for metric in row.values[0]}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, but with every list of numbers and every epoch on one line: 200 losses are a line, not a page."""
    text = json.dumps(content, indent=2, allow_nan=False)
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: re.sub(r"\s*\n\s*", " ", match.group()), text)
    files.write(path, text + "\n")
