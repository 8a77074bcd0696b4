"""What a reference run found: rows of accuracies, fused against reference, as a table and as JSON."""

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
from train_ref.evaluate import Accuracies
from train_ref.loop import Epoch, History

METRICS = {"knn_20": "kNN-20", "linear": "linear", "one_shot": "1-shot"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a kind of features, their accuracies and their training if any; one entry per seed."""

    label: str
    accuracies: Sequence[Accuracies]
    histories: Sequence[History] = ()

    def mean(self, metric: str) -> float:
        return statistics.fmean(getattr(a, metric) for a in self.accuracies)

    def sd(self, metric: str) -> float | None:
        """Sample standard deviation over seeds; none for a single seed."""
        return statistics.stdev(getattr(a, metric) for a in self.accuracies) if len(self.accuracies) > 1 else None


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
    accuracies: dict[str, float]


def compare(fused: Row, reference: Row) -> list[Comparison]:
    """One comparison per seed of two trainings that differ only in their implementation of the loss."""
    found = []
    for f, r, f_accuracies, r_accuracies in zip(fused.histories, reference.histories, fused.accuracies, reference.accuracies, strict=True):
        relative = [abs(a - b) / abs(b) for a, b in zip(f.step_losses, r.step_losses, strict=True)]
        found.append(
            Comparison(
                method=f.method,
                seed=f.seed,
                same_order=f.order_sha256 == r.order_sha256,
                first_step=relative[0],
                first_ten_steps=max(relative[:10]),
                all_steps=max(relative),
                accuracies={m: getattr(f_accuracies, m) - getattr(r_accuracies, m) for m in METRICS},
            )
        )
    return found


def table(rows: Sequence[Row]) -> str:
    """Accuracies on the test images in %, mean ± standard deviation over seeds."""
    no_sd = " " * 6 if any(len(row.accuracies) > 1 for row in rows) else ""
    label_width = max(len(row.label) for row in rows)

    def cell(row: Row, metric: str) -> str:
        sd = row.sd(metric)
        return f"{100 * row.mean(metric):.1f}" + (no_sd if sd is None else f" ± {100 * sd:.1f}")

    lines = [" " * label_width + "".join(f"{title:>14}" for title in METRICS.values())]
    for row in rows:
        lines.append((f"{row.label:<{label_width}}" + "".join(f"{cell(row, m):>14}" for m in METRICS)).rstrip())
    return "\n".join(lines)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Relative loss differences at the first step, within ten and over the run; accuracy differences in points."""
    lines = [
        "fused against reference: relative difference of the loss (largest), difference of accuracy in points",
        f"{'':<14}{'step 1':>10}{'steps 1-10':>12}{'whole run':>11}" + "".join(f"{m:>9}" for m in METRICS.values()),
    ]
    for c in comparisons:
        name = f"{c.method} seed {c.seed}"
        points = "".join(f"{100 * c.accuracies[metric]:+9.1f}" for metric in METRICS)
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


def run_entry(history: History, accuracies: Accuracies) -> dict[str, Any]:
    """A training and what it is worth, for JSON."""
    return asdict(history) | {"accuracies": asdict(accuracies)}


def read_entry(entry: dict[str, Any]) -> tuple[History, Accuracies]:
    """Both again. JSON keeps every bit of a float."""
    history = {name: value for name, value in entry.items() if name != "accuracies"}
    return History(**history | {"epochs": [Epoch(**epoch) for epoch in entry["epochs"]]}), Accuracies(**entry["accuracies"])


def run_entries(row: Row) -> list[dict[str, Any]]:
    return [run_entry(*training) for training in zip(row.histories, row.accuracies, strict=True)]


def summary_entry(row: Row) -> dict[str, Any]:
    return {"row": row.label} | {metric: {"mean": row.mean(metric), "sd": row.sd(metric)} for metric in METRICS}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, but with every list of numbers and every epoch on one line: 200 losses are a line, not a page."""
    text = json.dumps(content, indent=2, allow_nan=False)
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: re.sub(r"\s*\n\s*", " ", match.group()), text)
    files.write(path, text + "\n")
