"""Names at the ends of lines, placed so that they cover neither a line nor each other.

Every name has a few hundred places about the end of its line. One after the other, the names take the best place that is free; in which
order decides who has to give way, so all orders are tried. Nothing is random: the same lines give the same places.
All coordinates but those of an end are display coordinates, in points.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Point = tuple[float, float]
Points = npt.NDArray[np.float64]  # (P, 2)

SIDE = 6.0  # from the end of a line to its name
GAP = 0.6  # of that, covered by a thin line, which so passes by other names
HEIGHTS = [2.5 * step for step in range(-36, 37)]  # tried on either side
PAD = 1.0  # about every text
MARGIN = 79.0  # to the right of a panel, free for names
LONG = 12  # letters: a longer name is broken at its hyphens
NEAR = 7.0  # a name further up or down than that is no longer beside its end
# As bad as that many points of distance: left of the end; an order unlike that of the lines; a thin line that crosses another; nearer to
# the end of another line; a name on a line; two names on each other.
LEFT, SWAPPED, CROSSED, MISTAKEN, ON_LINE, ON_NAME = 6.0, 15.0, 25.0, 30.0, 200.0, 1e5


@dataclass(frozen=True)
class Name:
    words: str
    symbol: str  # of its line, at the side away from it
    end: Point  # in data coordinates
    colour: str
    bold: bool
    thread: str  # colour of the thin line


@dataclass(frozen=True)
class Place:
    """Where a name may stand: its offset from the end, its box, the way from the end to there, and how bad that is."""

    offset: Point
    box: Bbox
    way: Points
    cost: float

    def meets(self, other: Place) -> bool:
        return bool(self.box.overlaps(other.box)) or covers(self.box, other.way) or covers(other.box, self.way)


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


def arrange(axes: Axes, names: Sequence[Name], lines: Points, boxes: Sequence[Bbox], top: float) -> None:
    """Write every name below `top`, clear of points on lines and of the boxes of other texts.

    One that is not beside its end gets a thin line from there.
    """
    from matplotlib.transforms import Bbox

    texts = [
        write(
            axes, f"{broken(name.words)} {name.symbol}", name.end, (0, 0), color=name.colour, fontweight="bold" if name.bold else "normal"
        )
        for name in names
    ]
    ends = [axes.transData.transform(name.end) for name in names]
    panel = Bbox.from_extents(axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.transData.transform((1.0, top))[1])
    choices = [places(panel, end, ends, extent(text), lines, boxes) for end, text in zip(ends, texts, strict=True)]
    best = min((taken(choices, order) for order in itertools.permutations(range(len(names)))), key=lambda found: cost(names, found))
    for name, text, place in zip(names, texts, best, strict=True):
        text.set_position(place.offset)
        if place.offset[0] < 0:
            text.set_horizontalalignment("right")
            text.set_text(f"{name.symbol} {broken(name.words)}")
        if abs(place.offset[1]) > NEAR:
            thin = {"arrowstyle": "-", "color": name.thread, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
            write(axes, "", name.end, (GAP * place.offset[0], place.offset[1]), arrowprops=thin)


def broken(words: str) -> str:
    """A long name in lines of at most LONG letters, where its hyphens allow that."""
    lines = [""]
    for part in re.findall("[^-]+-?", words):
        if lines[-1] and len(lines[-1] + part) > LONG:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def places(panel: Bbox, end: Points, ends: Sequence[Points], found: Bbox, lines: Points, boxes: Sequence[Bbox]) -> list[Place]:
    """Places for a text whose box is `found` where it starts at its end, clear of other texts, the best first; `ends` are those of all."""
    free = []
    for side, height in itertools.product((SIDE, -SIDE), HEIGHTS):
        box = found.translated(side if side > 0 else side - found.width + 2 * PAD, height)
        inside = panel.x0 < box.x0 and box.x1 < panel.x1 + MARGIN and panel.y0 < box.y0 and box.y1 < panel.y1
        if inside and not any(box.overlaps(other) for other in boxes):
            way = np.linspace(end, end + (side * GAP, height), 17)
            crossed = abs(height) > NEAR and bool((np.linalg.norm(way[4:, None] - lines[None], axis=2) < 1.5).any())
            mistaken = min(math.dist(end + (side, height), other) for other in ends) < math.dist((0, 0), (side, height)) - 1e-6
            cost = abs(height) + LEFT * (side < 0) + CROSSED * crossed + MISTAKEN * mistaken + ON_LINE * covers(box, lines)
            free.append(Place((side, height), box, way, cost))
    return sorted(free, key=lambda place: place.cost) or [Place((SIDE, 0.0), found.translated(SIDE, 0.0), end[None], ON_NAME)]


def taken(choices: Sequence[Sequence[Place]], order: Sequence[int]) -> list[Place]:
    """The place of every name when they choose in this order; where none is free, their best."""
    found: dict[int, Place] = {}
    for index in order:
        free = (place for place in choices[index] if not any(place.meets(other) for other in found.values()))
        found[index] = next(free, choices[index][0])
    return [found[index] for index in range(len(choices))]


def cost(names: Sequence[Name], found: Sequence[Place]) -> float:
    """Of all places together: names that meet are worst, and upper lines want upper names."""
    total = sum(place.cost for place in found)
    for i, j in itertools.combinations(range(len(names)), 2):
        total += ON_NAME * found[i].meets(found[j])
        total += SWAPPED * ((names[i].end[1] - names[j].end[1]) * (found[i].box.y0 - found[j].box.y0) < 0)
    return total
