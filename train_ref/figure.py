"""One picture of a reference run: the losses, and for each way to judge networks the trained ones beside their baselines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train_ref import files
from train_ref.methods import METHODS
from train_ref.report import Row, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#22272e"
MUTED = "#6b7480"
GRID = "#e3e6ea"
BASELINES = ("#d0d5db", "#98a1ac")


def save_figure(path: Path, sections: Sequence[Section], tested_on: str) -> None:
    """Write a PNG; tested_on says which images the accuracies are of. Raises ImportError where matplotlib is missing."""
    from matplotlib.figure import Figure

    widths = [1, *(1 + 0.12 * len(section.rows) for section in sections)]
    # White and opaque, so that the text can be read on a dark page too.
    figure = Figure(figsize=(4.4 * sum(widths), 4.6), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    losses, *accuracies = figure.subplots(1, len(widths), width_ratios=widths)
    draw_losses(losses, [row for section in sections for row in section.trained])
    for axes, section in zip(accuracies, sections, strict=True):
        draw_accuracies(axes, section, tested_on)
    write_png(path, figure)


def write_png(path: Path, figure: Figure) -> None:
    """Whole or not at all."""
    content = io.BytesIO()
    # Without it the file names the version of matplotlib that wrote it.
    figure.savefig(content, format="png", metadata={"Software": None})
    files.write(path, content.getvalue())


def is_twin(row: Row, trained: Sequence[Row]) -> bool:
    """A reference training that is drawn beside its fused one, and so needs another look than its colour."""
    return row.histories[0].loss == "reference" and any(other.histories[0].loss == "fused" for other in trained)


def draw_losses(axes: Axes, trained: Sequence[Row]) -> None:
    """Mean loss of every epoch, one line per seed; a dashed twin on top of its fused line."""
    from matplotlib.ticker import MaxNLocator

    entries: list[str] = []
    for row in sorted(trained, key=lambda row: is_twin(row, trained)):
        twin = is_twin(row, trained)
        label = "reference, on top" if twin else row.label
        for history in row.histories:
            axes.plot(
                [epoch.epoch for epoch in history.epochs],
                [epoch.loss for epoch in history.epochs],
                color=INK if twin else METHODS[history.method].colour,
                linestyle=(0, (2, 3)) if twin else "solid",
                linewidth=1.1 if twin else 1.7,
                marker="o" if len(history.epochs) == 1 else None,
                label=None if label in entries else label,
            )
            entries.append(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    n_seeds = len(trained[0].histories)
    finish(axes, "Loss by epoch, nats" + (f" ({n_seeds} seeds)" if n_seeds > 1 else ""), len(set(entries)))


def draw_accuracies(axes: Axes, section: Section, tested_on: str) -> None:
    """Means over seeds as bars from zero, standard deviations as whiskers, every value written out."""
    drawn = section.evaluation.drawn
    bars = [(row, colour, False) for row, colour in zip(section.baselines, BASELINES, strict=True)]
    bars += [(row, METHODS[row.histories[0].method].colour, is_twin(row, section.trained)) for row in section.trained]
    # From six bars a group on, 95.6 is wider than its bar.
    rotation = 90 if len(bars) > 5 else 0
    width = 0.84 / len(bars)
    highest = 0.0
    for place, (row, colour, twin) in enumerate(bars):
        centres = [group + (place - (len(bars) - 1) / 2) * width for group in range(len(drawn))]
        heights = [100 * row.mean(metric) for metric in drawn]
        spread = [100 * (row.sd(metric) or 0.0) for metric in drawn]
        highest = max(highest, *(height + sd for height, sd in zip(heights, spread, strict=True)))
        axes.bar(
            centres,
            heights,
            0.9 * width,
            yerr=spread if any(spread) else None,
            error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2},
            color=colour,
            alpha=0.6 if twin else 1.0,
            hatch="///" if twin else None,
            edgecolor="white",
            linewidth=0,
            label=row.label,
        )
        for centre, height, sd in zip(centres, heights, spread, strict=True):
            axes.annotate(
                f"{height:.1f}",
                (centre, height + sd),
                (0, 4),
                textcoords="offset points",
                horizontalalignment="center",
                rotation=rotation,
                fontsize=8,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},  # no grid line through a number
            )
    axes.set_xticks(range(len(drawn)), list(drawn.values()))
    axes.set_ylim(0, (1.18 if rotation else 1.1) * highest)
    finish(axes, f"{section.evaluation.figure}, %: {tested_on}", len(bars))
    axes.tick_params(axis="x", labelcolor=INK)


def finish(axes: Axes, title: str, n_entries: int) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=12)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    # Below the axes, where no curve or bar can run into it; two lines at most.
    axes.legend(
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        ncols=n_entries if n_entries <= 3 else (n_entries + 1) // 2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.09),
    )
