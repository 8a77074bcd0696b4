"""One picture of a run: the losses by epoch, and R@1 in both directions next to untrained towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train_ref.figure import write_png
from train_ref.two_towers.data import PairData
from train_ref.two_towers.report import Row, spread
from train_ref.two_towers.retrieval import DIRECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#22272e"
MUTED = "#6b7480"
GRID = "#e3e6ea"
BASELINES = ("#d0d5db", "#98a1ac")
COLOURS = {"plain": "#1f6fb4", "exclude": "#c4511a", "multi-positive": "#178a63"}


def save_figure(path: Path, baselines: Sequence[Row], trained: Sequence[Row], data: PairData) -> None:
    """Write a PNG. Raises ImportError where matplotlib is missing."""
    from matplotlib.figure import Figure

    n_bars = len(baselines) + len(trained)
    # White and opaque, so that the text can be read on a dark page too.
    figure = Figure(figsize=(10 + 0.4 * n_bars, 4.8), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    losses, bars = figure.subplots(1, 2, width_ratios=(1, 1 + 0.08 * n_bars))
    draw_losses(losses, trained)
    draw_r1(bars, baselines, trained, data)
    write_png(path, figure)


def is_reference(row: Row) -> bool:
    return bool(row.histories) and row.histories[0].loss == "reference"


def draw_losses(axes: Axes, trained: Sequence[Row]) -> None:
    """Mean loss of every epoch, one line per seed; the dense losses dashed, on top."""
    from matplotlib.ticker import MaxNLocator

    entries: list[str] = []
    for row in sorted(trained, key=is_reference):
        label = "reference" if is_reference(row) else row.label
        for history in row.histories:
            axes.plot(
                [epoch.epoch for epoch in history.epochs],
                [epoch.loss for epoch in history.epochs],
                color=INK if is_reference(row) else COLOURS[history.variant],
                linestyle=(0, (2, 3)) if is_reference(row) else "solid",
                linewidth=1.1 if is_reference(row) else 1.7,
                marker="o" if len(history.epochs) == 1 else None,
                label=None if label in entries else label,
            )
            entries.append(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    n_seeds = len(trained[0].histories)
    finish(axes, "Loss by epoch, nats" + (f" ({n_seeds} seeds)" if n_seeds > 1 else ""))


def draw_r1(axes: Axes, baselines: Sequence[Row], trained: Sequence[Row], data: PairData) -> None:
    """Means over seeds as bars from zero, standard deviations as whiskers, every value written out."""
    bars = [*zip(baselines, BASELINES, strict=True), *((row, COLOURS[row.histories[0].variant]) for row in trained)]
    width = 0.84 / len(bars)
    # From six bars a group on, 35.6 is wider than its bar.
    rotation = 90 if len(bars) > 5 else 0
    highest = 0.0
    for place, (row, colour) in enumerate(bars):
        found = [spread(row.values(direction, "r1")) for direction in DIRECTIONS]
        heights, sds = [100 * (f["mean"] or 0.0) for f in found], [100 * (f["sd"] or 0.0) for f in found]
        centres = [group + (place - (len(bars) - 1) / 2) * width for group in range(len(DIRECTIONS))]
        axes.bar(
            centres,
            heights,
            0.9 * width,
            yerr=sds if any(sds) else None,
            error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2},
            color=colour,
            alpha=0.6 if is_reference(row) else 1.0,
            hatch="///" if is_reference(row) else None,
            edgecolor="white",
            linewidth=0,
            label=row.label,
        )
        highest = max(highest, *(height + sd for height, sd in zip(heights, sds, strict=True)))
        for centre, height, sd in zip(centres, heights, sds, strict=True):
            axes.annotate(
                f"{height:.1f}" if height >= 0.1 else f"{height:.2g}",
                (centre, height + sd),
                (0, 4),
                textcoords="offset points",
                horizontalalignment="center",
                rotation=rotation,
                fontsize=8,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},  # no grid line through a number
            )
    axes.set_xticks(range(2), [f"{data.left_name} → {data.right_name}", f"{data.right_name} → {data.left_name}"])
    axes.set_ylim(0, (1.18 if rotation else 1.1) * highest)
    finish(axes, "R@1 of held-out pairs, %")
    axes.tick_params(axis="x", labelcolor=INK)


def finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=12)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    # Below the axes, where no curve or bar can run into it.
    axes.legend(
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.09),
    )
