"""Draw a chart: peak memory and time of one loss over the number of rows, one line per contestant.

A chart holds everything that is drawn and nothing else, so a digest of it and of the code here says whether a picture is up to date, also
where another version of matplotlib would draw other bytes. Where the version is the same, so are the bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, RED = "#22272e", "#5d6671", "#e3e6ea", "#cf222e"
ACCENT: dict[str, Any] = {"color": "#1f6fb4", "linewidth": 2.2, "marker": "o", "markersize": 4.5, "zorder": 3}
OTHERS: tuple[dict[str, Any], ...] = (
    {"color": "#3d4550", "linestyle": "solid", "marker": "s"},
    {"color": "#6b7480", "linestyle": (0, (5, 2)), "marker": "^"},
    {"color": "#868f9a", "linestyle": (0, (1.5, 1.5)), "marker": "D"},
    {"color": "#a2aab4", "linestyle": (0, (6, 2, 1.5, 2)), "marker": "v"},
)
SYMBOLS = {"o": "•", "s": "▪", "^": "▴", "D": "◆", "v": "▾"}  # the markers as text: next to a name they say which line is meant
REFUSED: dict[str, Any] = {"marker": "x", "markersize": 4.8, "markeredgewidth": 1.5, "color": RED, "clip_on": False, "zorder": 4}
SIZE = (9.0, 3.5)  # inches: at the 830 pixels of a page a letter of 9 points is 11.5 pixels high
PANELS = ((0.078, 0.115, 0.3, 0.735), (0.578, 0.115, 0.3, 0.735))  # the space to the right of each is for names
DPI = 200  # of the PNG
SUFFIXES: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {"Software": None}}  # each with what it shall not say
CROSSES = (6.5, 0.78)  # between two crosses of one N: points, and at most this part of an octave for all of them


@dataclass(frozen=True)
class Measured:
    """Values by N, and the N that ran out of memory: those have none."""

    values: dict[int, float]
    oom: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """One contestant: memory in MiB, time in ms."""

    label: str
    ours: bool
    memory: Measured
    time: Measured


@dataclass(frozen=True)
class Chart:
    """Two panels over the same N. `limit` in MiB, 0 where there was none; `clock` says whose time it is."""

    limit: float
    clock: str
    lines: tuple[Line, ...]


def digest(chart: Chart) -> str:
    """sha256 of what is drawn and of the code that draws it."""
    found = hashlib.sha256(json.dumps(asdict(chart), sort_keys=True).encode())
    for file in (__file__, labels.__file__):
        found.update(b"\0" + Path(file).read_bytes())
    return f"sha256 {found.hexdigest()}"


def stamp(chart: Chart) -> str:
    """What a picture says about itself: its digest and, where matplotlib is installed, what else decides about its bytes."""
    try:
        import matplotlib
        import PIL
    except ImportError:
        return digest(chart)
    return f"{digest(chart)} (matplotlib {matplotlib.__version__}, Pillow {PIL.__version__}, {platform.machine()})"


def stamp_in(picture: bytes) -> str:
    """The stamp of a picture, empty where it has none. Both formats keep it as plain text."""
    found = re.search(rb"sha256 [0-9a-f]{64} \(matplotlib [\w ,.+-]+\)", picture)
    return found[0].decode() if found else ""


def render(chart: Chart, suffix: str) -> bytes:
    """A picture as a file of that suffix. Raises ImportError where matplotlib is missing."""
    import matplotlib

    with matplotlib.rc_context():
        # Not what the user has set: the same bytes everywhere.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "fastnce", "font.family": "DejaVu Sans"})
        file = io.BytesIO()
        # Left alone, a picture would name the moment it was drawn at, or the program.
        draw(chart).savefig(file, format=suffix[1:], dpi=DPI, metadata={"Description": stamp(chart), **SUFFIXES[suffix]})
    return file.getvalue()


def draw(chart: Chart) -> Figure:
    """Memory on the left, time on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # White and opaque, so that the text can be read on a dark page too.
    figure = Figure(figsize=SIZE, dpi=72, facecolor="white")  # display coordinates are points
    FigureCanvasAgg(figure)  # measures text
    memory, times = (figure.add_axes(place) for place in PANELS)
    sizes = sorted({n for line in chart.lines for found in (line.memory, line.time) for n in (*found.values, *found.oom)})
    limits = [chart.limit] if chart.limit else []
    memory_values = [mib for line in chart.lines for mib in line.memory.values.values()]
    time_values = [ms for line in chart.lines for ms in line.time.values.values()]
    prepare(memory, "peak memory above the inputs", sizes, limits + memory_values, (8.0, mebibytes))
    prepare(times, f"time per step, {chart.clock}", sizes, time_values, (10.0, milliseconds))
    draw_panel(memory, [(line, line.memory) for line in chart.lines], chart.limit)
    draw_panel(times, [(line, line.time) for line in chart.lines], 0)
    return figure


def prepare(axes: Axes, heading: str, sizes: Sequence[int], values: Sequence[float], ticks: tuple[float, Callable[[float], str]]) -> None:
    """Both axes: N in powers of two, values from a bit below the least to a bit above the largest, a tick at every power of a base."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = math.log2(sizes[0]), math.log2(sizes[-1])
    axes.set_xlim(2 ** (low - 0.35), 2 ** (high + 0.5))
    every = 2 if high - low > 4 else 1
    marked = [2**power for power in range(math.ceil(low), math.floor(high) + 1) if power % every == 0]
    axes.set_xticks(marked, [rows(n) for n in marked])
    axes.set_xticks(sizes, ["" for _ in sizes], minor=True)
    axes.set_xlabel("rows N", fontsize=9, color=INK, labelpad=2)
    values, (base, word) = [value for value in values if value > 0] or [1.0], ticks
    axes.set_ylim(min(values) / 1.5, max(values) * 1.8)
    powers = range(math.ceil(math.log(min(values) / 1.5, base)), math.floor(math.log(max(values) * 1.8, base)) + 1)
    axes.set_yticks([base**power for power in powers], [word(base**power) for power in powers])
    axes.set_yticks([], minor=True)
    # Where a title would be, but it names the axis: a vertical one would be read last. Above the marks on the upper edge.
    axes.annotate(heading, (0, 1), (-30, 19), "axes fraction", "offset points", fontsize=9.5, color=INK, fontweight="bold")
    axes.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
    axes.tick_params(axis="x", which="both", length=3, color=GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def rows(n: int) -> str:
    """1024 as 1k, 2**20 as 1M."""
    for unit, word in ((2**20, "M"), (2**10, "k")):
        if n % unit == 0:
            return f"{n // unit}{word}"
    return str(n)


def mebibytes(mib: float) -> str:
    if mib < 1:
        return f"{mib * 1024:.3g} KiB"
    return f"{mib:.3g} MiB" if mib < 1024 else f"{mib / 1024:.3g} GiB"


def milliseconds(ms: float) -> str:
    if ms < 1:
        return f"{ms * 1e3:.3g} µs"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1e3:,.6g} s"


def draw_panel(axes: Axes, found: Sequence[tuple[Line, Measured]], limit: float) -> None:
    """Every line and its name; a cross where memory was refused: on the limit, or on the upper edge where no limit is drawn."""
    greys = iter(OTHERS)
    edge = limit or axes.get_ylim()[1]
    covered = [labels.along(axes, [(x, edge) for x in axes.get_xlim()])]
    names = []
    for line, measured in found:
        style = ACCENT if line.ours else {"linewidth": 1.4, "markersize": 3.6} | next(greys)
        points = [(float(n), value) for n, value in sorted(measured.values.items()) if value > 0]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
            names.append(
                labels.Name(
                    line.label, SYMBOLS[style["marker"]], points[-1], style["color"] if line.ours else INK, line.ours, style["color"]
                )
            )
            covered.append(labels.along(axes, points))
        for n in measured.oom:
            x = aside(axes, n, line, [other for other, its in found if n in its.oom])
            axes.plot(x, edge, gid=f"oom {line.label} {n}", **REFUSED)
            if limit and points and points[-1][0] < n == min(measured.oom):
                # More than the limit is all that is known: the thin line says whose the cross is, not how much was missing.
                axes.plot(*zip(points[-1], (x, edge), strict=True), color=style["color"], linewidth=0.7, linestyle=":")
                covered.append(labels.along(axes, [points[-1], (x, edge)]))
    refused = sorted({n for _, measured in found for n in measured.oom})
    texts = [labels.write(axes, "OOM", (n, edge), (0, 4.5), color=RED, fontsize=7.5, ha="center", va="bottom") for n in refused]
    if limit:
        axes.axhline(limit, color=RED, linewidth=0.9, linestyle=(0, (4, 3)), gid="limit")
        texts.append(labels.write(axes, f"limit {mebibytes(limit)}", (axes.get_xlim()[1], limit), (5, 0), color=RED, fontsize=8.5))
    labels.arrange(axes, names, np.concatenate(covered), [labels.extent(text) for text in texts], edge)


def aside(axes: Axes, n: int, line: Line, lines: Sequence[Line]) -> float:
    """x of one of several crosses at the same N: next to each other, centred."""
    low, high = (math.log2(x) for x in axes.get_xlim())
    octaves = min(CROSSES[0] * (high - low) / axes.bbox.width, CROSSES[1] / len(lines))
    return float(n * 2 ** (octaves * (lines.index(line) - (len(lines) - 1) / 2)))
