"""Draw a chart: peak memory and time of one loss over the number of rows, one line per contestant.

One legend names every line of both panels. A line has its name at its end too, where there is room for it beside the end. The picture is an
SVG whose colours follow the page: light, or dark where the reader asks for that; a program that knows no style sheets shows the light one.

A chart holds everything that is drawn and nothing else, so a digest of it and of the code here says whether a picture is up to date, also
where another version of matplotlib would draw other bytes. Where the version is the same, so are the bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Point = tuple[float, float]
Points = npt.NDArray[np.float64]  # (P, 2), in points of the picture

PAPER, INK, MUTED, GRID, RED, BLUE = "#ffffff", "#22272e", "#5d6671", "#e3e6ea", "#cf222e", "#1f6fb4"
GREYS = ("#3d4550", "#6b7480", "#868f9a", "#a2aab4")
# Each colour on a dark page.
DARK = {PAPER: "#0d1117", INK: "#e6edf3", MUTED: "#9aa4af", GRID: "#2b323a", RED: "#ff7b72", BLUE: "#58a6ff"}
DARK |= dict(zip(GREYS, ("#c9d1d9", "#a7b0ba", "#87909b", "#6a737d"), strict=True))
ACCENT: dict[str, Any] = {"color": BLUE, "linewidth": 2.2, "marker": "o", "markersize": 4.5, "zorder": 3}
OTHERS: tuple[dict[str, Any], ...] = (
    {"color": GREYS[0], "linestyle": "solid", "marker": "s"},
    {"color": GREYS[1], "linestyle": (0, (5, 2)), "marker": "^"},
    {"color": GREYS[2], "linestyle": (0, (1.5, 1.5)), "marker": "D"},
    {"color": GREYS[3], "linestyle": (0, (6, 2, 1.5, 2)), "marker": "v"},
)
REFUSED: dict[str, Any] = {"marker": "x", "markersize": 4.8, "markeredgewidth": 1.5, "color": RED, "clip_on": False, "zorder": 4}
SIZE = (9.0, 3.8)  # inches: at the 830 pixels of a page a letter of 9 points is 11.5 pixels high
PANELS = ((0.078, 0.106, 0.3, 0.675), (0.578, 0.106, 0.3, 0.675))  # above them the legend; the space to the right of each is for names
STYLE = "stroke-linecap: butt}"  # the end of the style sheet that matplotlib writes
SIDE = 6.0  # points from the end of a line to its name
HEIGHTS = (0.0, 3.0, -3.0, 6.0, -6.0)  # of a name over the end of its line: with more it would no longer be beside it
MARGIN = 79.0  # points to the right of a panel, free for names
PAD = 1.0  # points about every text
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
    found.update(b"\0" + Path(__file__).read_bytes())
    return f"sha256 {found.hexdigest()}"


def stamp(chart: Chart) -> str:
    """A picture's words about itself: its digest and, where matplotlib is installed, all else that decides about its bytes."""
    try:
        import matplotlib
        import PIL
    except ImportError:
        return digest(chart)
    return f"{digest(chart)} (matplotlib {matplotlib.__version__}, Pillow {PIL.__version__}, {platform.machine()})"


def stamp_in(picture: bytes) -> str:
    """The stamp of a picture, empty where it has none."""
    found = re.search(rb"sha256 [0-9a-f]{64} \(matplotlib [\w ,.+-]+\)", picture)
    return found[0].decode() if found else ""


def render(chart: Chart) -> bytes:
    """A picture as an SVG file. Raises ImportError where matplotlib is missing."""
    import matplotlib

    with matplotlib.rc_context():
        # Not what the user has set: the same bytes everywhere.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "fastnce", "font.family": "DejaVu Sans"})
        file = io.BytesIO()
        # Left alone, a picture would name the moment it was drawn at.
        draw(chart).savefig(file, format="svg", metadata={"Description": stamp(chart), "Date": None})
    picture = file.getvalue().decode()
    assert picture.count(STYLE) == 1
    return picture.replace(STYLE, f"{STYLE}\n{on_a_dark_page()}").encode()


def on_a_dark_page() -> str:
    """The style sheet that puts the dark colour in place of each light one."""
    rules = (f'[style*="{part}: {light}"]{{{part}: {dark} !important}}' for light, dark in DARK.items() for part in ("fill", "stroke"))
    return "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"


def draw(chart: Chart) -> Figure:
    """Memory on the left, time on the right, one legend above both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # Opaque: where the page is dark and the reader's system is not, the text can be read too.
    figure = Figure(figsize=SIZE, dpi=72, facecolor=PAPER)  # display coordinates are points
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
    keys = [Line2D([], [], label=line.label, **style) for line, style in zip(chart.lines, styles(chart.lines), strict=True)]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (PANELS[0][0] - 0.052, 1.0), "ncols": len(keys)}
    figure.legend(handles=keys, frameon=False, fontsize=9, labelcolor=INK, handlelength=2.6, columnspacing=1.6, **place)
    return figure


def styles(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """How each line is drawn, here and in the legend."""
    greys = iter(OTHERS)
    return [ACCENT if line.ours else {"linewidth": 1.4, "markersize": 3.6} | next(greys) for line in lines]


def prepare(axes: Axes, heading: str, sizes: Sequence[int], values: Sequence[float], ticks: tuple[float, Callable[[float], str]]) -> None:
    """Both axes: N in powers of two, values from a bit below the least to a bit above the largest, a tick at every power of a base."""
    axes.set_facecolor(PAPER)
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
    """Every line; a cross where memory was refused: on the limit, or on the upper edge where no limit is drawn; names where they fit."""
    edge = limit or axes.get_ylim()[1]
    covered = [along(axes, [(x, edge) for x in axes.get_xlim()])]
    ends: list[tuple[Line, Point]] = []
    for (line, measured), style in zip(found, styles([line for line, _ in found]), strict=True):
        points = [(float(n), value) for n, value in sorted(measured.values.items()) if value > 0]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
            ends.append((line, points[-1]))
            covered.append(along(axes, points))
        for n in measured.oom:
            x = aside(axes, n, line, [other for other, its in found if n in its.oom])
            axes.plot(x, edge, gid=f"oom {line.label} {n}", **REFUSED)
            if limit and points and points[-1][0] < n == min(measured.oom):
                # More than the limit is all that is known: the thin line says whose the cross is, not how much was missing.
                axes.plot(*zip(points[-1], (x, edge), strict=True), color=style["color"], linewidth=0.7, linestyle=":")
                covered.append(along(axes, [points[-1], (x, edge)]))
    refused = sorted({n for _, measured in found for n in measured.oom})
    texts = [write(axes, "OOM", (n, edge), (0, 4.5), color=RED, fontsize=7.5, ha="center", va="bottom") for n in refused]
    if limit:
        axes.axhline(limit, color=RED, linewidth=0.9, linestyle=(0, (4, 3)), gid="limit")
        texts.append(write(axes, f"limit {mebibytes(limit)}", (axes.get_xlim()[1], limit), (5, 0), color=RED, fontsize=8.5))
    name_ends(axes, ends, np.concatenate(covered), [extent(text) for text in texts])


# Names at the ends of lines ---------------------------------------------------------------------------------------------------------------


def name_ends(axes: Axes, ends: Sequence[tuple[Line, Point]], covered: Points, taken: Sequence[Bbox]) -> None:
    """Names beside the ends of lines, ours first, each only where it meets no line, no other text and no other end that is nearer."""
    boxes = list(taken)
    corners = {line.label: axes.transData.transform(end) for line, end in ends}
    for line, end in sorted(ends, key=lambda found: not found[0].ours):
        style = {"color": BLUE, "fontweight": "bold"} if line.ours else {"color": INK}
        text = write(axes, line.label, end, (SIDE, 0.0), **style)
        for height in HEIGHTS:
            text.set_position((SIDE, height))
            box = extent(text)
            inside = box.x1 < axes.bbox.x1 + MARGIN and axes.bbox.y0 < box.y0
            start = corners[line.label] + (SIDE, height)
            own = math.dist(corners[line.label], start)
            mistaken = any(math.dist(other, start) < own for label, other in corners.items() if label != line.label)
            if inside and not mistaken and not covers(box, covered) and not any(box.overlaps(other) for other in boxes):
                boxes.append(box)
                break
        else:
            text.remove()


def covers(box: Bbox, points: Points) -> bool:
    return bool(((points > box.min) & (points < box.max)).all(1).any())


def write(axes: Axes, words: str, at: Point, offset: Point, **style: Any) -> Annotation:
    """Words at an offset from a point of the panel."""
    usual: dict[str, Any] = {"fontsize": 9, "va": "center"}
    return axes.annotate(words, at, offset, textcoords="offset points", annotation_clip=False, **(usual | style))


def extent(text: Annotation) -> Bbox:
    """Its box, a little larger than the letters."""
    assert text.figure is not None
    return text.get_window_extent(text.figure.canvas.get_renderer()).padded(PAD)  # type: ignore[attr-defined]


def along(axes: Axes, corners: Sequence[Point]) -> Points:
    """Points at most two apart on a polyline."""
    ends = axes.transData.transform(corners)
    parts = [ends[:1]]
    for a, b in itertools.pairwise(ends):
        parts.append(np.linspace(a, b, 2 + int(math.dist(a, b) / 2)))
    return np.concatenate(parts)


def aside(axes: Axes, n: int, line: Line, lines: Sequence[Line]) -> float:
    """x of one of several crosses at the same N: next to each other, centred."""
    low, high = (math.log2(x) for x in axes.get_xlim())
    octaves = min(CROSSES[0] * (high - low) / axes.bbox.width, CROSSES[1] / len(lines))
    return float(n * 2 ** (octaves * (lines.index(line) - (len(lines) - 1) / 2)))
