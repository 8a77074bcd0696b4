"""Render results: those recorded here into README.md, docs/benchmarks.md and their figures, one's own into a page and figures of their own.

    python -m bench page                                  # README.md, docs/benchmarks.md and docs/figures, from bench/results
    python -m bench page --check                          # write nothing; exit 1 and say what differs from bench/results
    python -m bench page --results fastnce-bench --plot   # one's own: report.md and figures in --out, and nothing anywhere else

Everything comes from the JSON files of the results. A picture is judged by the digest it carries, of the data and of the code that
drew it; by its bytes only where matplotlib is there in the version that drew it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import figures, headline, record, regions
from bench.record import ROOT
from fastnce import files

BENCHMARKS = "docs/benchmarks.md"
OUT = Path("fastnce-report")  # in the current folder, as fastnce-bench

# Page -> region -> its text.
REGIONS: dict[str, dict[str, Callable[[headline.Results], str]]] = {
    "README.md": {"bench": regions.top, "accuracy": regions.accuracy, "faster": regions.faster},
    BENCHMARKS: {"bench": regions.everything},
}


def replace(text: str, region: str, content: str, page: str) -> str:
    """A page with other text between the marks of a region. Raises ValueError unless both marks are there once, in order."""
    begin, end = f"<!-- {region}:begin (generated) -->", f"<!-- {region}:end -->"
    counts = text.count(begin), text.count(end)
    if counts != (1, 1) or text.index(end) < text.index(begin):
        raise ValueError(f"{page}: {counts[0]} x {begin!r} and {counts[1]} x {end!r}; one of each is needed, in this order")
    return f"{text.partition(begin)[0]}{begin}\n{content}\n{end}{text.partition(end)[2]}"


def pages(root: Path, results: headline.Results) -> dict[Path, tuple[str, str]]:
    """Page -> its text as it is, and as the results say."""
    found = {}
    for name, texts in REGIONS.items():
        before = after = (root / name).read_text()
        for region, content in texts.items():
            after = replace(after, region, content(results), name)
        found[root / name] = (before, after)
    return found


def charts(root: Path, results: headline.Results) -> dict[Path, figures.Chart]:
    """File -> what is to be seen in it, as SVG and as PNG."""
    found = {}
    for shown in headline.headlines(results):
        for suffix in figures.SUFFIXES:
            found[root / regions.FIGURES / f"{shown.name}{suffix}"] = shown.chart()
    return found


def strays(root: Path, expected: dict[Path, figures.Chart]) -> list[Path]:
    """Figures that were drawn here and that no result asks for any more."""
    there = (path for suffix in figures.SUFFIXES for path in sorted((root / regions.FIGURES).glob(f"*{suffix}")))
    return [path for path in there if path not in expected and figures.stamp_in(path.read_bytes())]


def is_stale(path: Path, chart: figures.Chart) -> bool:
    """Whether a picture shows something else than a chart, or was changed since."""
    if not path.exists():
        return True
    picture = path.read_bytes()
    stamp = figures.stamp_in(picture)
    if stamp != figures.stamp(chart):
        return not stamp.startswith(figures.digest(chart))
    return figures.render(chart, path.suffix) != picture


def stale(root: Path, results: headline.Results) -> list[Path]:
    """What differs from the results: pages, figures, and figures that no result asks for any more."""
    expected = charts(root, results)
    found = [path for path, (before, after) in pages(root, results).items() if before != after]
    return found + [path for path, chart in expected.items() if is_stale(path, chart)] + strays(root, expected)


def write(root: Path, results: headline.Results, paths: Sequence[Path]) -> None:
    """Bring these up to date."""
    texts, expected = pages(root, results), charts(root, results)
    for path in paths:
        if path in texts:
            files.write(path, texts[path][1])
        elif path in expected:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, figures.render(expected[path], path.suffix))
        else:
            path.unlink()


def write_own(out: Path, results: headline.Results, plot: bool) -> list[Path]:
    """A page of results that are not recorded here, and with `plot` a figure of all that have one."""
    shown = headline.every_headline(results) if plot else []
    content: dict[Path, str | bytes] = {out / "report.md": regions.own(results, shown)}
    for found in shown:
        content |= {out / f"{found.name}{suffix}": figures.render(found.chart(), suffix) for suffix in figures.SUFFIXES}
    out.mkdir(parents=True, exist_ok=True)
    for path, text in content.items():
        files.write(path, text)
    return list(content)


@files.command("python -m bench page")
def main(arguments: list[str]) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m bench page", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something differs from the results")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="one's own, such as fastnce-bench; default: bench/results")
    parser.add_argument("--out", type=Path, help=f"folder for the page of one's own results; default: {OUT}")
    parser.add_argument("--plot", action="store_true", help="of one's own results: a figure of every loss and width with two N or more")
    parser.add_argument("--root", type=Path, help=f"bring README.md and {BENCHMARKS} of this folder up to date; default: of this checkout")
    options = parser.parse_args(arguments)
    own = bool(options.out or options.plot or options.results.resolve() != record.RESULTS) and options.root is None
    if own and options.check:
        parser.error("--check compares this checkout with bench/results, and takes none of --results, --out and --plot")
    if options.root and (options.out or options.plot):
        parser.error("--root is for pages that are there; --out and --plot make a page of one's own results")
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder; python -m bench time memory --out makes one")
    try:
        results = headline.load(options.results)
    except ValueError as error:
        parser.error(f"--results: {error}")
    for left in results.left_out:
        print(f"left out: {left.machine}/{left.name} has schema {left.content['schema']}; measure it again", file=sys.stderr)
    if own:
        try:
            written = write_own(options.out or OUT, results, options.plot)
        except ImportError as error:
            parser.error(f"--plot: {error}: figures are drawn with it; pip install matplotlib")
        print(*written, sep="\n")
        if options.plot and len(written) == 1:
            print("no figure: it takes times and memory of fastnce and eager at two N or more, forward and backward", file=sys.stderr)
        return 0
    if results.measured and results.measured[0].env["sources"] != record.digest():
        print(f"the newest result is of sources {results.measured[0].env['sources'][:8]}; these are {record.digest()[:8]}", file=sys.stderr)
    root = options.root or ROOT
    try:
        found = stale(root, results)
        if not options.check:
            write(root, results, found)
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: figures are drawn with it; pip install matplotlib, or use --check, which needs none")
    for path in found:
        print(f"{'differs from the results' if options.check else 'brought up to date'}: {path.relative_to(root).as_posix()}")
    return int(options.check and bool(found))
