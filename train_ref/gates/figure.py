"""One picture of a validation: shares of limits, replay, free run, outcome."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_ref.figure import write_png
from train_ref.gates.replay import LIMITS
from train_ref.gates.report import GATES, Report, name_of
from train_ref.gates.subject import dtype_name
from train_ref.gates.verdict import Verdict, worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#22272e", "#6b7480", "#e3e6ea"
COLOURS = ("#1f6fb4", "#c4511a", "#178a63", "#7d4aa8", "#a8324e")
# By dtype: line style and marker. Float32 is the default of a subject without one in its name.
STYLES: dict[str, Any] = {"float32": ("solid", "o"), "bfloat16": ((0, (4, 2)), "s"), "float16": ((0, (1, 2)), "^")}
LEAST_SHARE = 1e-4  # left edge of the first panel


def save_figure(path: Path, report: Report) -> None:
    """Write a PNG. Raises ImportError where matplotlib is missing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.4), dpi=130, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
    panels = figure.subplots(2, 2)
    names = list(dict.fromkeys(name_of(verdict.subject) for verdict in report.verdicts if not verdict.yardstick))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    draw_shares(panels[0, 0], report, colours)
    draw_replay(panels[0, 1], report.of("replay"), colours)
    draw_free_run(panels[1, 0], report.of("free run"), colours)
    draw_outcome(panels[1, 1], report.of("outcome"), colours)
    figure.suptitle(f"Validation: {report.status}", x=0.012, ha="left", fontsize=14, color=INK)
    entries: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    options: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}
    figure.legend(list(entries.values()), list(entries), fontsize=10, labelcolor=INK, **options)
    write_png(path, figure)


def width(subject: str, colours: dict[str, str]) -> float:
    """Thinner from one implementation to the next: lines that lie on each other can all be seen."""
    return max(1.2, 3.4 - 1.7 * list(colours).index(name_of(subject))) if name_of(subject) in colours else 1.2


def look(subject: str, colours: dict[str, str]) -> tuple[str, Any, str]:
    """Colour, line style, marker: a colour per implementation, a line per dtype, grey for references."""
    style, marker = STYLES.get(subject.rsplit(" ", 1)[-1], STYLES["float32"])
    return colours.get(name_of(subject), MUTED), style, marker


def draw_shares(axes: Axes, report: Report, colours: dict[str, str]) -> None:
    """Per gate and subject the check that is nearest to its limit."""
    for row, gate in enumerate(GATES):
        verdicts = [verdict for verdict in report.of(gate) if verdict.checks]
        for place, verdict in enumerate(verdicts):
            used = worst(verdict.checks).used
            share = min(max(used, LEAST_SHARE), 1e4)
            colour, _, marker = look(verdict.subject, colours)
            height = row + (place - (len(verdicts) - 1) / 2) * 0.7 / max(7, len(verdicts))
            axes.plot(share, height, marker, color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.6)
        if not verdicts:
            axes.text(LEAST_SHARE * 1.3, row, "not run", va="center", fontsize=9, color=MUTED)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(LEAST_SHARE * 0.8, max(4.0, axes.get_xlim()[1]))
    axes.set_yticks(range(len(GATES)), GATES)
    axes.set_ylim(len(GATES) - 0.5, -0.5)
    finish(axes, "Worst check, share of its limit: ● float32 ■ bfloat16 ▲ float16", grid="x")
    axes.tick_params(axis="y", labelcolor=INK)


def draw_replay(axes: Axes, verdicts: list[Verdict], colours: dict[str, str]) -> None:
    """The gradient of the embeddings in the first scene, at every checkpoint."""
    scene = next((name for verdict in verdicts for name in verdict.notes), "")
    verdicts = [verdict for verdict in verdicts if scene in verdict.notes]
    last = 1
    for verdict in verdicts:
        found = verdict.notes[scene]
        colour, style, _ = look(verdict.subject, colours)
        axes.plot(
            found["steps"],
            found["errors"]["dz"],
            color=colour,
            linestyle=style,
            linewidth=width(verdict.subject, colours),
            label=verdict.subject,
        )
        last = max(last, found["steps"][-1])
    for dtype, limits in LIMITS.items():
        if any(verdict.subject.endswith(dtype_name(dtype)) for verdict in verdicts):
            axes.axhline(limits["dz"], color=INK, linewidth=1.0)
            axes.text(last, limits["dz"] * 1.15, f"limit, {dtype_name(dtype)}", ha="right", va="bottom", fontsize=9, color=INK)
    say_if_empty(axes, verdicts)
    if verdicts:
        axes.set_yscale("log")
        axes.set_ylim(top=axes.get_ylim()[1] * 2.5)
    finish(axes, f"Replay{scene and ', '}{scene}: relative error of ‖dL/dz‖ by step", grid="y")


def draw_free_run(axes: Axes, verdicts: list[Verdict], colours: dict[str, str]) -> None:
    """Deviations by step, the control's beside them, and the limits where they are checked."""
    verdicts = [verdict for verdict in verdicts if verdict.notes]
    for verdict in verdicts:
        colour, style, _ = look(verdict.subject, colours)
        series = verdict.notes["deviation"]
        axes.plot(
            range(1, len(series) + 1),
            series,
            color=colour,
            linestyle=style,
            linewidth=width(verdict.subject, colours),
            label=verdict.subject,
        )
        for check in verdict.checks:
            if check.name.startswith("steps"):
                at = int(check.name.split("-")[1])
                axes.plot(at, check.limit, marker="_", color=INK, markersize=12, markeredgewidth=1.6, linestyle="none", zorder=5)
    say_if_empty(axes, verdicts)
    if verdicts:
        # A control is judged beside the other one alone.
        control = next((verdict for verdict in verdicts if not verdict.yardstick), verdicts[0]).notes["control"]
        axes.plot(range(1, len(control) + 1), control, color=MUTED, linewidth=6, alpha=0.35, zorder=1, label="noise controls, free run")
        axes.plot(
            [], [], marker="_", color=INK, markersize=12, markeredgewidth=1.6, linestyle="none", label="limit (float32 5x, bfloat16 20x)"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
    finish(axes, "Free run: relative deviation of the loss, largest so far, by step", grid="y")


def draw_outcome(axes: Axes, verdicts: list[Verdict], colours: dict[str, str]) -> None:
    """90 % intervals of the paired differences between the margins."""
    rows = [
        (verdict, title, found)
        for title in ("1-shot", "linear")
        for verdict in verdicts
        for t, found in verdict.notes.items()
        if t == title
    ]
    say_if_empty(axes, rows)
    for height, (verdict, _, found) in enumerate(rows):
        colour, style, marker = look(verdict.subject, colours)
        axes.plot([100 * found["low"], 100 * found["high"]], [height, height], color=colour, linestyle=style, linewidth=2)
        axes.plot(100 * found["mean"], height, marker, color=colour, markersize=6)
    if rows:
        reach = max(1.3, 110 * max(max(abs(found["low"]), abs(found["high"])) for _, _, found in rows))
        axes.set_xlim(-reach, reach)
        for margin in (-1, 1):
            axes.axvline(margin, color=INK, linewidth=1.2)
        axes.axvline(0, color=MUTED, linewidth=0.8, zorder=0.5)
        axes.set_yticks(range(len(rows)), [f"{title}, {verdict.subject}" for verdict, title, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
    finish(axes, "Outcome: accuracy minus the reference's, points, 90 % interval", grid="x")
    axes.tick_params(axis="y", labelcolor=INK)


def say_if_empty(axes: Axes, content: list[Any]) -> None:
    if not content:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", fontsize=12, color=MUTED)
        axes.set_xticks([])
        axes.set_yticks([])


def finish(axes: Axes, title: str, grid: Any) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, which="both")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
