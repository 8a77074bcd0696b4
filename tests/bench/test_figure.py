"""The figures: nothing is hidden, no text touches another, the same bytes every time."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up import LIMIT, SIZES, environment, measured

from bench import comparison, figure, page
from bench.record import Recorded

pytest.importorskip("matplotlib")


def chart(limit: float = LIMIT) -> figure.Chart:
    rows = measured("nt_xent", limit=limit)
    result = Recorded("a", "b", {"env": environment(mem_limit_mib=int(limit)), "rows": rows})
    found = comparison.comparison_of(result, "nt_xent")
    assert found is not None
    return found.chart()


def panels(chart: figure.Chart) -> list[Any]:
    return list(figure.draw(chart).axes)


def crosses(axes: Any) -> dict[str, tuple[float, float]]:
    return {line.get_gid(): line.get_xydata()[0] for line in axes.lines if str(line.get_gid()).startswith("oom")}


def test_crosses_are_on_the_limit_or_on_the_upper_edge() -> None:
    memory, times = panels(chart())
    expected = {f"oom {name} {n}" for name in ("eager", "torch.compile", "library") for n in SIZES[3:]} | {"oom chunked 16384"}
    for axes, edge in ((memory, LIMIT), (times, times.get_ylim()[1])):
        found = crosses(axes)
        assert found.keys() == expected
        for gid, (x, y) in found.items():
            assert y == edge
            assert abs(math.log2(x / int(gid.split()[-1]))) < 0.5
    (dashed,) = (line for line in memory.lines if line.get_gid() == "limit")
    assert set(dashed.get_ydata()) == {LIMIT}


def test_without_a_limit_nothing_is_dashed() -> None:
    memory, _ = panels(chart(0))
    assert not [line for line in memory.lines if line.get_gid()]


def drawn_texts(figure: Any) -> list[tuple[str, Any]]:
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    figure.canvas.draw()
    found = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_majorticklabels()
        if not inside(label, axes)
    }
    return [(text.get_text(), Text.get_window_extent(text, renderer)) for text in found if text not in ticks]


def inside(label: Any, axes: Any) -> bool:
    """Whether a tick is within the axes: matplotlib keeps labels for others, which it does not draw."""
    x, y = label.get_position()
    low, high = axes.get_xlim() if label in axes.xaxis.get_majorticklabels() else axes.get_ylim()
    return bool(low <= (x if label in axes.xaxis.get_majorticklabels() else y) <= high)


CROWDED = {
    "one bundle": [1.0, 1.02, 0.98, 1.04],
    "two pairs": [1.0, 1.05, 0.3, 0.31],
    "beside ours": [0.02, 0.021, 0.0205, 1.0],
    "far apart": [1.0, 0.3, 0.1, 0.03],
}


@pytest.mark.parametrize("factors", CROWDED.values(), ids=CROWDED)
@pytest.mark.parametrize("limit", [0.0, 300.0])
def test_no_text_touches_another_or_leaves_the_picture(factors: list[float], limit: float) -> None:
    sizes = [2**power for power in range(10, 18)]

    def line(label: str, factor: float, power: float) -> figure.Line:
        mib = {n: 12 * factor * (n / 1024) ** power for n in sizes}
        kept = {n: value for n, value in mib.items() if not limit or value <= limit}
        found = figure.Measured(kept, tuple(n for n in sizes if n not in kept))
        return figure.Line(label, label == "fastnce", found, found)

    names = ("eager", "torch.compile", "chunked", "pytorch-metric-learning")
    lines = [line("fastnce", 0.1, 1.0), *(line(name, factor, 2.0) for name, factor in zip(names, factors, strict=True))]
    drawn = figure.draw(figure.Chart(limit, "process CPU time", tuple(lines)))
    texts = drawn_texts(drawn)
    words = [word for word, _ in texts]
    assert {"fastnce", *names, "rows N", "1k", "64k"} <= set(words)
    assert [word for word in words if word.startswith("limit")] == ([f"limit {figure.mebibytes(limit)}"] if limit else [])
    for index, (word, box) in enumerate(texts):
        assert drawn.bbox.x0 <= box.x0 and box.x1 <= drawn.bbox.x1 and drawn.bbox.y0 <= box.y0 and box.y1 <= drawn.bbox.y1, word
        for other, its in texts[index + 1 :]:
            assert not box.overlaps(its), (word, other)


def test_names_at_ends_stay_clear_of_lines_and_the_others_are_in_the_legend() -> None:
    drawn = figure.draw(chart())
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fastnce", "eager", "torch.compile", "chunked", "library"]
    for axes, named in zip(drawn.axes, ({"fastnce", "chunked"}, {"fastnce"}), strict=True):
        boxes = {
            text.get_text(): figure.extent(text) for text in axes.texts if text.get_text() in ("fastnce", "eager", "chunked", "library")
        }
        assert named <= boxes.keys()
        for line in axes.lines:
            if line.get_gid() is None:
                points = figure.along(axes, [tuple(point) for point in line.get_xydata()])
                assert not any(figure.covers(box, points) for box in boxes.values())


def test_no_thin_line_leads_to_a_name() -> None:
    """A name far from its line, with a line to it, was taken for the name of what that line crossed."""
    for axes in panels(chart()):
        assert all(text.arrow_patch is None for text in axes.texts)
        for text in axes.texts:
            if text.get_text() in ("fastnce", "eager", "torch.compile", "chunked", "library"):
                assert abs(text.xyann[1]) <= max(figure.HEIGHTS)


def test_every_colour_has_another_on_a_dark_page() -> None:
    picture = figure.render(chart()).decode()
    sheet, _, drawn = picture.partition("</style>")
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn))
    assert used >= {figure.PAPER, figure.INK, figure.BLUE, figure.RED}
    assert used <= figure.DARK.keys()
    for colour in used:
        assert f"fill: {figure.DARK[colour]} !important" in sheet and f"stroke: {figure.DARK[colour]} !important" in sheet


def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """With another order of sets and other settings of the user there."""
    code = "import sys, test_figure; sys.stdout.buffer.write(test_figure.figure.render(test_figure.chart()))"
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.grid: True\nsavefig.bbox: tight\n")
    env = os.environ | {
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join([str(page.ROOT), str(Path(__file__).parent)]),
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
    }
    here = figure.render(chart())
    there = subprocess.run([sys.executable, "-c", code], env=env, cwd=page.ROOT, capture_output=True, check=True).stdout
    assert here == there
    assert figure.stamp_in(here) == figure.stamp(chart())


@pytest.mark.parametrize(("value", "words"), [(1 / 16, "64 KiB"), (8, "8 MiB"), (4096, "4 GiB"), (1536, "1.5 GiB")])
def test_memory_in_words(value: float, words: str) -> None:
    assert figure.mebibytes(value) == words


@pytest.mark.parametrize(("value", "words"), [(0.1, "100 µs"), (10, "10 ms"), (1000, "1 s"), (100_000, "100 s")])
def test_times_in_words(value: float, words: str) -> None:
    assert figure.milliseconds(value) == words
