"""Render results: those recorded here into README.md, docs/benchmarks.md and their figures, one's own into a page and figures of their own.

    python -m bench page                                  # README.md, docs/benchmarks.md and docs/figures, from bench/results
    python -m bench page --check                          # write nothing; exit 1 and say what differs from bench/results
    python -m bench page --results fastnce-bench --plot   # one's own: report.md and figures in --out, and nothing anywhere else

Everything comes from the JSON files of the results. A picture is judged by the digest it carries, of the data and of the code that
drew it; by its bytes only where matplotlib is there in the version that drew it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import comparison, figure, record, table
from bench.comparison import LOSSES, WIDTH, Comparison, comparisons, refused, value
from bench.figure import mebibytes
from bench.gpu import bars as bars_of_gpus
from bench.peers import OURS
from bench.record import MODES, ROOT, Results, Row, rows_of
from fastnce import files

BENCHMARKS = "docs/benchmarks.md"
OUT = Path("fastnce-report")  # in the current folder, as fastnce-bench
FIGURES = "docs/figures"
NOTHING = "No result is recorded: `python -m bench time memory --out bench/results` makes one."
LESS = 1.0  # MiB: peaks of a process differ by that much from run to run


def bars(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def picture(compared: Comparison, folder: str) -> str:
    """The picture, with words for those who do not see it."""
    largest = {label: max(compared.fits(label), default=0) for label in compared.shown}
    reach = "; ".join(f"{label} fits up to N = {n:,}" for label, n in largest.items())
    loss = LOSSES.get(compared.loss, compared.loss)
    words = f"{loss} on {table.place(compared.result.env)}: peak memory and time over the number of rows N. {reach}."
    return f"![{words}]({folder}/{compared.name}.svg)"


# README ---------------------------------------------------------------------------------------------------------------------------------


def newest(results: Results) -> Comparison | None:
    """Of a CPU, of the first loss that has one. The results of a GPU are further down in docs/benchmarks.md."""
    found = [compared for compared in comparisons(results) if "gpu" not in compared.result.env]
    return min(found, key=lambda compared: list(LOSSES).index(compared.loss), default=None)


def four_numbers(results: Results) -> str:
    """Four numbers, memory and time of eager and of fastnce at the largest N that eager can do, and one line with their conditions."""
    compared = newest(results)
    if compared is None or (n := largest_of_both(compared)) is None:
        return NOTHING
    env, clock = compared.result.env, record.clock(rows_of(compared.rows, measure="time")[0])[1]
    lines = [bars([f"{LOSSES[compared.loss]}, N = {n:,}", "peak memory", "time"]), "|---|--:|--:|"]
    for label, name in (("eager", "eager PyTorch"), (OURS, f"**{OURS}**")):
        lines.append(bars([name, *(f"{cell(compared.row(m, label, n))} {unit}" for m, unit in (("memory", "MiB"), ("time", "ms")))]))
    lines += [
        "",
        f"N counts both views. Forward and backward, D = {WIDTH}, {compared.rows[0]['dtype']}; memory above the inputs, median {clock}; "
        f"{table.place(env)}, torch {env['torch']}, {kernels(env)}{env['time'][:10]}, sources {env['sources'][:8]}. {small(results)}",
    ]
    return "\n".join(lines)


def small(results: Results) -> str:
    """Up to which N another is faster on a CPU, by loss, and at most how many times: a sentence."""
    found = [row for result in results.measured if "gpu" not in result.env for row in beaten(result.rows, "time")]
    if not found:
        return "In no recorded cell is another faster."
    last: dict[str, int] = {}
    for row, *_ in found:
        last[row["loss"]] = max(last.get(row["loss"], 0), row["n"])
    losses = {n: [loss for loss in last if last[loss] == n] for n in sorted(set(last.values()))}
    where = ", ".join(f"{n:,} ({', '.join(names)})" for n, names in losses.items())
    most = max(times for *_, times in found)
    faster = f"Small batches: other implementations are up to {most:.1f} times as fast"
    return f"{faster}, at most to N = {where}: [where]({BENCHMARKS}#who-is-faster)."


def kernels(env: dict[str, Any]) -> str:
    """Whether the library of backend="cpu" was built, where the result says it: the beginning of a list."""
    return f"compiled kernels {env['compiled']}, " if "compiled" in env else ""


def largest_of_both(compared: Comparison) -> int | None:
    """The largest N of which memory and time of eager and of fastnce are known; None where there is none."""
    sizes = (set(compared.measured(measure, label).values) for measure in ("memory", "time") for label in ("eager", OURS))
    return max(set.intersection(*sizes), default=None)


# The summary ----------------------------------------------------------------------------------------------------------------------------


def summary(results: Results) -> str:
    """One table of the newest result, its sentences and its conditions. Its figure is beside the result itself."""
    compared = newest(results)
    if compared is None:
        return NOTHING
    return "\n\n".join(["\n".join(summary_table(compared)), " ".join(sentences(compared, results)), conditions(compared)])


def summary_table(compared: Comparison) -> Iterator[str]:
    yield bars(["rows N", *(f"{label}, MiB / ms" if label != OURS else f"**{label}**, MiB / ms" for label in compared.shown)])
    yield "|" + "--:|" * (1 + len(compared.shown))
    for n in compared.sizes:
        cells = []
        for label in compared.shown:
            both = [cell(compared.row(measure, label, n)) for measure in ("memory", "time")]
            ran = any(row is not None and row["status"] == "ok" for row in (compared.row(m, label, n) for m in ("memory", "time")))
            cells.append(" / ".join(both) if ran else both[0] if both[0] == both[1] else " / ".join(both))
        yield bars([f"{n:,}", *cells])


def cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if row["status"] == "ok":
        return table.number(value(row))
    return "OOM" if refused(row) else table.status(row)


def sentences(compared: Comparison, results: Results) -> Iterator[str]:
    """How many times as much eager takes at the largest N that it can do, how far everybody gets, and that the result is the same."""
    if (n := largest_of_both(compared)) is not None:
        memory, time = (times_ours(compared, measure, "eager", n) for measure in ("memory", "time"))
        yield f"**At N = {n:,} eager takes {memory} times the memory and {time} times the time of {OURS}.**"
    limit = f"in {mebibytes(compared.limit)}" if compared.limit else "in memory"
    reached = {label: max(compared.fits(label)) for label in compared.shown if compared.fits(label)}
    reach = ", ".join(f"{label} {n:,}" for label, n in sorted(reached.items(), key=lambda entry: (-entry[1], entry[0] != OURS)))
    yield f"Largest N measured that fits {limit} above the inputs: {reach}."
    yield from agreement(compared)
    if results.judged:
        inside, cells = (sum(counts) for counts in zip(*accuracy_counts(results), strict=True))
        yield f"[{inside:,} of {cells:,} cells](#accuracy) keep the accuracy contract."


def times_ours(compared: Comparison, measure: str, label: str, n: int) -> str:
    """A ratio to fastnce: of times the one taken round by round, where there is one."""
    theirs, ours = compared.row(measure, label, n), compared.row(measure, OURS, n)
    assert theirs is not None and ours is not None
    found = record.ratio(theirs) if measure == "time" else None
    return f"{value(theirs) / max(value(ours), table.RESOLUTION) if found is None else found:.3g}"


def agreement(compared: Comparison) -> Iterator[str]:
    """The largest difference to eager's loss and gradient norm in the very runs that are shown."""
    differences: dict[str, float] = {}
    for measure, n in itertools.product(("memory", "time"), compared.sizes):
        ours, theirs = (compared.row(measure, label, n) for label in (OURS, "eager"))
        if ours is None or theirs is None or not ours["status"] == theirs["status"] == "ok":
            continue
        for name in ("loss_value", "gradient_norm"):
            difference = abs(ours[name] - theirs[name]) / abs(theirs[name])
            differences[name] = max(differences.get(name, 0.0), difference)
    if differences:
        loss, gradient = (f"{differences[name]:.1e}" for name in ("loss_value", "gradient_norm"))
        yield f"Same result: in these runs the loss differs from eager's by at most {loss} of it, the norm of the gradient by {gradient}."


def conditions(compared: Comparison) -> str:
    env, rows = compared.result.env, compared.rows
    clock = record.clock(rows_of(rows, measure="time")[0])[1]
    limited = f", allocations limited to {mebibytes(compared.limit)} above the inputs" if env["mem_limit_mib"] else ""
    late = any(row["status"] == "timeout" for row in rows)
    waited = " (timeout): steps at a smaller N say that it would take longer than the run allows." if late else ""
    left = f" {env['cells_left']} of the planned cells were not started." if env["cells_left"] else ""
    return (
        f"{LOSSES[compared.loss]}, forward and backward, D = {WIDTH}, {rows[0]['dtype']}; peak memory above the inputs / median {clock}. "
        f"OOM: an allocation was refused, at this N or a smaller one.{waited} {table.place(env)}{limited}, torch {env['torch']}, "
        f"{env['time'][:10]}, sources {env['sources'][:8]}.{left} `{env['command']}`"
        + "".join(f", completed by `{other.env['command']}`" for other in compared.completed_by)
    )


# Accuracy -------------------------------------------------------------------------------------------------------------------------------


def accuracy_counts(results: Results) -> Iterator[tuple[int, int]]:
    """Cells inside the contract, and all cells, of every result of accuracy."""
    for result in results.judged:
        cells = sum(row["cells"] for row in result.rows)
        yield cells - sum(row["outside"] for row in result.rows), cells


def accuracy(results: Results) -> str:
    """How many cells of the grid are inside the contract, and the worst of each quantity."""
    parts = []
    for result, (inside, cells) in zip(results.judged, accuracy_counts(results), strict=True):
        env = result.env
        lines = [
            f"{inside:,} of {cells:,} cells are inside the contract ({env['cpu']}, torch {env['torch']}, {kernels(env)}"
            f"sources {env['sources'][:8]}, `{env['command']}`). Worst of each quantity as a fraction of its limit, and cells outside:",
            "",
            "| dtype | loss | mean loss | row | gradient | d/d scale | outside |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for dtype, loss in dict.fromkeys((row["dtype"], row["loss"]) for row in result.rows):
            rows = {row["quantity"]: row for row in rows_of(result.rows, dtype=dtype, loss=loss)}
            used = [f"{rows[name]['most_of_limit']:.2g}" for name in ("loss", "row", "gradient", "scale")]
            missed = ", ".join(f"{row['outside']} {name}" for name, row in rows.items() if row["outside"]) or "0"
            lines.append(bars([dtype, loss, *used, missed]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOTHING


# Contestants that beat us ----------------------------------------------------------------------------------------------------------------


def beaten(rows: Sequence[Row], measure: str) -> Iterator[tuple[Row, Row, float]]:
    """(theirs, ours, ours over theirs) wherever another takes less time, or less memory by more than the noise of it."""
    problem = ("loss", "dtype", "mode", "n", "d", "threads", "device")
    measured = [row for row in rows_of(list(rows), measure=measure) if row["status"] == "ok"]
    ours = {tuple(row[name] for name in problem): row for row in measured if row["contestant"] == OURS}
    for row in measured:
        mine = ours.get(tuple(row[name] for name in problem))
        if mine is None or mine is row:
            continue
        if measure == "memory":
            if value(mine) - value(row) > LESS:
                yield row, mine, value(mine) / max(value(row), table.RESOLUTION)
        else:
            found = record.ratio(row)
            times = value(mine) / value(row) if found is None else 1 / found
            if times > 1:
                yield row, mine, times


def beaten_table(rows: Sequence[Row], measure: str) -> str:
    """Every cell that another wins; empty where there is none."""
    unit = {"time": "ms", "memory": "MiB"}[measure]
    lines = [
        bars(["loss", "dtype", "pass", "N", "D", "contestant", f"its {unit}", f"{OURS}, {unit}", "times"]),
        "|---|---|---|--:|--:|---|--:|--:|--:|",
    ]
    for row, mine, times in beaten(rows, measure):
        where = [row["loss"], row["dtype"], MODES[row["mode"]], f"{row['n']:,}", str(row["d"]), row["contestant"]]
        lines.append(bars([*where, table.number(value(row)), table.number(value(mine)), f"{times:.2f}"]))
    return "\n".join(lines) if len(lines) > 2 else ""


def faster(results: Results) -> str:
    """The contestants that take less time or memory than fastnce, and where, over all results: one line for each."""
    lines = [bars(["on", "loss", "pass", "contestant", "is", "at N", "at most"]), "|---|---|---|---|---|---|--:|"]
    for result, (measure, words) in itertools.product(results.measured, (("time", "faster"), ("memory", "smaller"))):
        groups: dict[tuple[str, ...], list[tuple[Row, float]]] = {}
        for row, _, times in beaten(result.rows, measure):
            groups.setdefault((f"{row['loss']}, {row['dtype']}", MODES[row["mode"]], row["contestant"]), []).append((row, times))
        for group, won in groups.items():
            sizes: dict[int, list[str]] = {}
            for row, _ in won:
                sizes.setdefault(row["d"], []).append(f"{row['n']:,}")
            where = "; ".join(f"{', '.join(at)} (D = {d})" for d, at in sizes.items())
            lines.append(bars([table.place(result.env), *group, words, where, f"{max(times for _, times in won):.1f}×"]))
    if len(lines) > 2:
        return "\n".join(lines)
    return "In no recorded cell does another take less time or less memory." if results.measured else NOTHING


# docs/benchmarks.md, and a page of one's own results --------------------------------------------------------------------------------------


def everything(results: Results, shown: Sequence[Comparison] | None = None, folder: str = "figures") -> str:
    """Every result: conditions, its figures, where another wins, all tables. `shown` are those with a figure, in that folder."""
    shown = comparisons(results) if shown is None else shown
    parts = []
    for result in results.measured:
        head, _, rest = table.render(result.content).partition("\n## ")
        title, _, words = head.partition("\n")
        parts += [f"### {title.removeprefix('# ')}, {result.env['time'][:10]}", words.strip()]
        for compared in shown:
            if compared.result is result:
                named = "; ".join(f"{label} is {name} of the tables" for label, name in compared.shown.items() if name != label)
                parts += [picture(compared, folder), *([f"In the figure {named}."] if named else [])]
        for measure, words in (("time", "Where another is faster"), ("memory", "Where another takes less memory")):
            found = beaten_table(result.rows, measure)
            parts += [f"#### {words}", found] if found else []
        parts.append(f"#### {rest}".replace("\n## ", "\n#### ").strip())
    return "\n\n".join(parts) or NOTHING


def own(results: Results, shown: Sequence[Comparison]) -> str:
    """A page of results that are nobody else's; `shown` have a figure beside it."""
    parts = ["# What was measured", everything(results, shown, ".")]
    return "\n\n".join([*parts, *(["## Accuracy", accuracy(results)] if results.judged else [])]) + "\n"


# The files -----------------------------------------------------------------------------------------------------------------------------

# Page -> region -> its text.
GENERATED: dict[str, dict[str, Callable[[Results], str]]] = {
    "README.md": {"bench": four_numbers},
    BENCHMARKS: {
        "summary": summary,
        "faster": faster,
        "accuracy": accuracy,
        "unshown": lambda results: bars_of_gpus.unshown(results.parts),
        "bars": lambda results: bars_of_gpus.table(results.parts),
        "bench": everything,
    },
}


def replace(text: str, region: str, content: str, page: str) -> str:
    """A page with other text between the marks of a region. Raises ValueError unless both marks are there once, in order."""
    begin, end = f"<!-- {region}:begin (generated) -->", f"<!-- {region}:end -->"
    counts = text.count(begin), text.count(end)
    if counts != (1, 1) or text.index(end) < text.index(begin):
        raise ValueError(f"{page}: {counts[0]} x {begin!r} and {counts[1]} x {end!r}; one of each is needed, in this order")
    return f"{text.partition(begin)[0]}{begin}\n{content}\n{end}{text.partition(end)[2]}"


def pages(root: Path, results: Results) -> dict[Path, tuple[str, str]]:
    """Page -> its text as it is, and as the results say."""
    found = {}
    for name, texts in GENERATED.items():
        before = after = (root / name).read_text()
        for region, content in texts.items():
            after = replace(after, region, content(results), name)
        found[root / name] = (before, after)
    return found


def charts(root: Path, results: Results) -> dict[Path, figure.Chart]:
    """File -> the chart that is drawn in it."""
    return {root / FIGURES / f"{shown.name}.svg": shown.chart() for shown in comparisons(results)}


def strays(root: Path, expected: dict[Path, figure.Chart]) -> list[Path]:
    """Figures that were drawn here and that no result asks for any more."""
    return [path for path in sorted((root / FIGURES).glob("*.svg")) if path not in expected and figure.stamp_in(path.read_bytes())]


def is_stale(path: Path, chart: figure.Chart) -> bool:
    """Whether a picture shows something else than a chart, or was changed since."""
    if not path.exists():
        return True
    picture = path.read_bytes()
    stamp = figure.stamp_in(picture)
    if stamp != figure.stamp(chart):
        return not stamp.startswith(figure.digest(chart))
    return figure.render(chart) != picture


def stale(root: Path, results: Results) -> list[Path]:
    """The files that differ from the results: pages, figures, and figures that no result asks for any more."""
    expected = charts(root, results)
    found = [path for path, (before, after) in pages(root, results).items() if before != after]
    return found + [path for path, chart in expected.items() if is_stale(path, chart)] + strays(root, expected)


def write(root: Path, results: Results, paths: Sequence[Path]) -> None:
    """Bring these up to date."""
    texts, expected = pages(root, results), charts(root, results)
    for path in paths:
        if path in texts:
            files.write(path, texts[path][1])
        elif path in expected:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, figure.render(expected[path]))
        else:
            path.unlink()


def write_own(out: Path, results: Results, plot: bool) -> list[Path]:
    """A page of results that are not recorded here, and with `plot` a figure of all that have one."""
    shown = comparison.every_comparison(results) if plot else []
    content: dict[Path, str | bytes] = {out / "report.md": own(results, shown)}
    for found in shown:
        content |= {out / f"{found.name}.svg": figure.render(found.chart())}
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
        results = record.load(options.results)
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
