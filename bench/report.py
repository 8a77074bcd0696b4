"""Render the recorded results: the figures, and the generated regions of README.md and docs/benchmarks.md.

    python bench/report.py            # write them
    python bench/report.py --check    # write nothing; exit 1 and say what differs from bench/results

Everything comes from the JSON files of bench/results. A picture is judged by the digest it carries, of the data and of the code that
drew it; by its bytes only where matplotlib is there in the version that drew it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as in run.py: this checkout

from bench import figures, headline, regions
from fastnce.bench import record

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = "docs/benchmarks.md"

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
            path.write_text(texts[path][1])
        elif path in expected:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(figures.render(expected[path], path.suffix))
        else:
            path.unlink()


def main(arguments: list[str]) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="bench/report.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something differs from the results")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="default: bench/results")
    parser.add_argument("--root", type=Path, default=ROOT, help=f"folder of README.md and {BENCHMARKS}; default: this checkout")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder; bench/run.py --out makes one")
    results = headline.load(options.results)
    for left in results.left_out:
        print(f"left out: {left.machine}/{left.name} has schema {left.content['schema']}; measure it again", file=sys.stderr)
    if results.measured and results.measured[0].env["sources"] != record.digest():
        print(f"the newest result is of sources {results.measured[0].env['sources'][:8]}; these are {record.digest()[:8]}", file=sys.stderr)
    try:
        found = stale(options.root, results)
        if not options.check:
            write(options.root, results, found)
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: figures are drawn with it; pip install matplotlib, or use --check, which needs none")
    for path in found:
        print(f"{'differs from the results' if options.check else 'brought up to date'}: {path.relative_to(options.root).as_posix()}")
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
