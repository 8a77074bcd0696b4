"""The texts made from results: README's figure and table above the fold, the accuracy, what beats fastnce; and all tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from bench.figures import mebibytes
from bench.headline import LOSSES, WIDTH, Headline, Results, headlines, refused, value
from fastnce.bench import table
from fastnce.bench.table import MODES, OURS, Row, rows_of

FIGURES = "docs/figures"
NOTHING = "No result is recorded: `python bench/run.py --out bench/results` makes one."
LESS = 1.0  # MiB: peaks of a process differ by that much from run to run


def bars(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def figure(headline: Headline, folder: str) -> str:
    """The picture as a link to its larger form, with words for those who do not see it."""
    largest = {label: max(headline.fits(label), default=0) for label in headline.shown}
    reach = "; ".join(f"{label} fits up to N = {n:,}" for label, n in largest.items())
    loss = LOSSES.get(headline.loss, headline.loss)
    words = f"{loss} on {table.place(headline.result.env)}: peak memory and time over the number of rows N. {reach}."
    return f"[![{words}]({folder}/{headline.name}.png)]({folder}/{headline.name}.svg)"


# README, above the fold -----------------------------------------------------------------------------------------------------------------


def top(results: Results) -> str:
    """Figure, one table, and what they hold for: the newest result of a CPU. What a GPU does is in docs/benchmarks.md."""
    found = [headline for headline in headlines(results) if "gpu" not in headline.result.env]
    if not found:
        return NOTHING
    chosen = min(found, key=lambda headline: list(LOSSES).index(headline.loss))
    parts = [figure(chosen, FIGURES), "\n".join(summary_table(chosen)), " ".join(sentences(chosen, results)), conditions(chosen)]
    return "\n\n".join(parts)


def summary_table(headline: Headline) -> Iterator[str]:
    yield bars(["rows N", *(f"{label}, MiB / ms" if label != OURS else f"**{label}**, MiB / ms" for label in headline.shown)])
    yield "|" + "--:|" * (1 + len(headline.shown))
    for n in headline.sizes:
        cells = []
        for label in headline.shown:
            both = [cell(headline.row(measure, label, n)) for measure in ("memory", "time")]
            ran = any(row is not None and row["status"] == "ok" for row in (headline.row(m, label, n) for m in ("memory", "time")))
            cells.append(" / ".join(both) if ran else both[0] if both[0] == both[1] else " / ".join(both))
        yield bars([f"{n:,}", *cells])


def cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if row["status"] == "ok":
        return table.number(value(row))
    return "OOM" if refused(row) else table.status(row)


def sentences(headline: Headline, results: Results) -> Iterator[str]:
    """How many times as much eager takes at the largest N that it can do, how far everybody gets, and that the result is the same."""
    common = [n for n in headline.fits("eager") if n in headline.fits(OURS)]
    both = [n for n in common if n in headline.measured("time", "eager").values and n in headline.measured("time", OURS).values]
    if both:
        memory, time = (times_ours(headline, measure, "eager", both[-1]) for measure in ("memory", "time"))
        yield f"**At N = {both[-1]:,} eager takes {memory} times the memory and {time} times the time of {OURS}.**"
    limit = f"in {mebibytes(headline.limit)}" if headline.limit else "in memory"
    reached = {label: max(headline.fits(label)) for label in headline.shown if headline.fits(label)}
    reach = ", ".join(f"{label} {n:,}" for label, n in sorted(reached.items(), key=lambda entry: (-entry[1], entry[0] != OURS)))
    yield f"Largest N measured that fits {limit} above the inputs: {reach}."
    yield from agreement(headline)
    if results.judged:
        inside, cells = (sum(counts) for counts in zip(*accuracy_counts(results), strict=True))
        yield f"[{inside:,} of {cells:,} cells](#accuracy) keep the accuracy contract."


def times_ours(headline: Headline, measure: str, label: str, n: int) -> str:
    """A ratio to fastnce: of times the one taken round by round, where there is one."""
    theirs, ours = headline.row(measure, label, n), headline.row(measure, OURS, n)
    assert theirs is not None and ours is not None
    found = table.ratio(theirs) if measure == "time" else None
    return f"{value(theirs) / max(value(ours), table.RESOLUTION) if found is None else found:.3g}"


def agreement(headline: Headline) -> Iterator[str]:
    """The largest difference to eager's loss and gradient norm in the very runs that are shown."""
    differences: dict[str, float] = {}
    for measure, n in itertools.product(("memory", "time"), headline.sizes):
        ours, theirs = (headline.row(measure, label, n) for label in (OURS, "eager"))
        if ours is None or theirs is None or not ours["status"] == theirs["status"] == "ok":
            continue
        for name in ("loss_value", "gradient_norm"):
            difference = abs(ours[name] - theirs[name]) / abs(theirs[name])
            differences[name] = max(differences.get(name, 0.0), difference)
    if differences:
        loss, gradient = (f"{differences[name]:.1e}" for name in ("loss_value", "gradient_norm"))
        yield f"Same result: in these runs the loss differs from eager's by at most {loss} of it, the norm of the gradient by {gradient}."


def conditions(headline: Headline) -> str:
    env, rows = headline.result.env, headline.rows
    clock = table.clock(rows_of(rows, measure="time")[0])[1]
    limited = f", allocations limited to {mebibytes(headline.limit)} above the inputs" if env["mem_limit_mib"] else ""
    late = any(row["status"] == "timeout" for row in rows)
    waited = " (timeout): steps at a smaller N say that it would take longer than the run allows." if late else ""
    left = f" {env['cells_left']} of the planned cells were not started." if env["cells_left"] else ""
    return (
        f"{LOSSES[headline.loss]}, forward and backward, D = {WIDTH}, {rows[0]['dtype']}; peak memory above the inputs / median {clock}. "
        f"OOM: an allocation was refused, at this N or a smaller one.{waited} {table.place(env)}{limited}, torch {env['torch']}, "
        f"{env['time'][:10]}, sources {env['sources'][:8]}.{left} `{env['command']}`"
        + "".join(f", completed by `{other.env['command']}`" for other in headline.completed_by)
    )


# Accuracy -------------------------------------------------------------------------------------------------------------------------------


def accuracy_counts(results: Results) -> Iterator[tuple[int, int]]:
    """Cells inside the contract, and all cells, of every result of accuracy.py."""
    for result in results.judged:
        cells = sum(row["cells"] for row in result.rows)
        yield cells - sum(row["outside"] for row in result.rows), cells


def accuracy(results: Results) -> str:
    """How many cells of the grid are inside the contract, and the worst of each quantity."""
    parts = []
    for result, (inside, cells) in zip(results.judged, accuracy_counts(results), strict=True):
        env = result.env
        kernels = f"compiled kernels {env['compiled']}, " if "compiled" in env else ""
        lines = [
            f"{inside:,} of {cells:,} cells are inside the contract ({env['cpu']}, torch {env['torch']}, {kernels}"
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


# What beats us --------------------------------------------------------------------------------------------------------------------------


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
            found = table.ratio(row)
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
    """Who takes less time or memory than fastnce, and where, over all results: one line for each."""
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


def everything(results: Results, shown: Sequence[Headline] | None = None, folder: str = "figures") -> str:
    """Every result: conditions, its figures, where another wins, all tables. `shown` are those with a figure, in that folder."""
    shown = headlines(results) if shown is None else shown
    parts = []
    for result in results.measured:
        head, _, rest = table.render(result.content).partition("\n## ")
        title, _, words = head.partition("\n")
        parts += [f"### {title.removeprefix('# ')}, {result.env['time'][:10]}", words.strip()]
        for headline in shown:
            if headline.result is result:
                named = "; ".join(f"{label} is {name} of the tables" for label, name in headline.shown.items() if name != label)
                parts += [figure(headline, folder), *([f"In the figure {named}."] if named else [])]
        for measure, words in (("time", "Where another is faster"), ("memory", "Where another takes less memory")):
            found = beaten_table(result.rows, measure)
            parts += [f"#### {words}", found] if found else []
        parts.append(f"#### {rest}".replace("\n## ", "\n#### ").strip())
    return "\n\n".join(parts) or NOTHING


def own(results: Results, shown: Sequence[Headline]) -> str:
    """A page of results that are nobody else's; `shown` have a figure beside it."""
    parts = ["# What was measured", everything(results, shown, ".")]
    return "\n\n".join([*parts, *(["## Accuracy", accuracy(results)] if results.judged else [])]) + "\n"
