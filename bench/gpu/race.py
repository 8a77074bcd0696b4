"""Part `race`: the kinds of kernels against each other, shape by shape, and at small N against eager torch.

Forward and backward with normalisation, all contestants of a shape in one process and in turn (measure.py). A ratio is taken within a
round, and the median over the rounds counts. A row names the first, and every kind within ENOUGH of it; up to N = 1,024 also whether the
first is not slower than eager torch (bar 10). The order in which "auto" tries the GPU backends is settled by a recorded run of this part.

One process runs shape after shape and answers each with a row. Where it dies, or prints nothing for PATIENCE seconds, every contestant of
that shape runs alone. One that ends its process again is out of the race, and the others go on. Triton's kernels are compiled before, by
several processes at once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from bench import dense, peers
from bench.dense import Contestant
from bench.gpu import measure as gpu_measure
from bench.gpu import part
from bench.gpu.kernels import NAMES, Kernels, chosen
from bench.record import ROOT, Cell, Row

EAGER = ("eager", "eager autocast")
COLUMNS = ("loss", "n", "d", "dtype", *NAMES, *EAGER, "first", "ahead", "eager_over", "met", "kernels", "status")
FIGURES = (*NAMES, *EAGER, "first", "ahead", "eager_over", "met", "ratios")
SMALL, LARGE = (64, 256, 1024), (4096, 16_384, 65_536)
ENOUGH = 1.02  # ratios below are noise
SECONDS = 1.5  # of rounds; three are done in any case
PATIENCE = 45.0
WORKERS = 8  # processes that compile

Answers = Callable[[list[str], Sequence[Cell], float], Generator[Row]]


def cells(device: str, names: tuple[str, ...], dry: bool) -> Iterator[Cell]:
    """bfloat16 and a width of 128 first: the budget may end before the list does."""
    for dtype in ("bfloat16", "float32"):
        for widths in ((8,),) if dry else ((128,), (64, 256, 512)):
            for n in (32,) if dry else (*SMALL, *LARGE):
                # Autocast goes with bfloat16 inputs. In float32 it would have another precision than our kernels.
                eager = EAGER[: 2 if dtype == "bfloat16" else 1] if n <= SMALL[-1] else ()
                for d in widths:
                    for loss in dense.LOSSES:
                        cell = Cell("time", loss, n, d, (*names, *eager), dtype=dtype, clock="device", device=device)
                        yield replace(cell, repeats=2 if dry else 20, seconds=SECONDS)


# ---------------------------------------------------------------- one shape


def answer(cell: Cell, where: str) -> Row:
    def contestant(loss: str, name: str, backend: str) -> Contestant:
        return peers.fastnce_loss(loss, Kernels.of(name, where).backend) if name in NAMES else peers.contestant(loss, name)

    def within(name: str) -> AbstractContextManager[object]:
        return chosen(Kernels.of(name, where)) if name in NAMES else nullcontext()

    return judged(cell, *gpu_measure.interleaved(cell, contestant, within))


def problem(cell: Cell) -> Row:
    return {"loss": cell.loss, "n": cell.n, "d": cell.d, "dtype": cell.dtype}


def judged(cell: Cell, rows: dict[str, Row], samples: dict[str, list[float]]) -> Row:
    """Medians in milliseconds by name, the first of them, and `ratios`: the time of each over that of the first, round by round."""
    found: Row = problem(cell) | {name: median(times) for name, times in samples.items()}
    broken = [f"{name}: {row['status']} {row.get('detail', '')}".strip() for name, row in rows.items() if row["status"] != "ok"]
    ours = sorted((name for name in samples if name in NAMES), key=found.__getitem__)
    if ours:
        first = samples[ours[0]]
        ratios = {name: median(a / b for a, b in zip(times, first, strict=True)) for name, times in samples.items()}
        level = [name for name in ours if ratios[name] < ENOUGH]
        found |= {"first": " = ".join(level), "ahead": min((ratios[name] for name in ours if name not in level), default=1.0)}
        if eager := [ratios[name] for name in EAGER if name in ratios]:
            found |= {"eager_over": min(eager), "met": min(eager) >= 1}
        found |= {"ratios": ratios, "rounds": len(first)}
        broken += [f"{name} computed something else" for name in ours if not same(rows[name], rows[ours[0]])]
    return found | {"failed": [name for name in cell.names if name not in samples], "status": "; ".join(broken) or "ok"}


def same(a: Row, b: Row) -> bool:
    """Whether two kinds of kernels computed the same: they differ in the order of float32 sums and in the rounding of gradients."""
    loss, norm = (abs(a[key] - b[key]) for key in ("loss_value", "gradient_norm"))
    return loss <= 1e-4 * abs(b["loss_value"]) + 1e-5 and norm <= 1e-2 * b["gradient_norm"]


# ---------------------------------------------------------------- processes


def inside(where: str) -> None:
    """Answers to the shapes on standard input, a line each."""
    for given in json.load(sys.stdin):
        cell = Cell(**{**given, "names": tuple(given["names"])})
        row = answer(cell, where)
        if gpu_measure.lost():
            os._exit(1)
        print(json.dumps(row), flush=True)


def this_program(where: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu.race", "--inside", where]


def answers(command: list[str], given: Sequence[Cell], patience: float) -> Generator[Row]:
    """The rows of a process, until it ends, dies, or says nothing for `patience` seconds; it is gone afterwards."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, start_new_session=True, **pipes)
    assert child.stdin is not None
    assert child.stdout is not None
    given_to, taken_from = child.stdin, child.stdout
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in taken_from:
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        # It may have died before.
        with suppress(BrokenPipeError), given_to:
            json.dump([asdict(cell) for cell in given], given_to)
        while line := lines.get(timeout=patience):
            if line.startswith("{"):
                yield json.loads(line)
    except queue.Empty:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        reader.join(5)
        taken_from.close()


def compile_ahead(report: part.Report, names: tuple[str, ...]) -> None:
    """Fill Triton's cache: each width, dtype and loss at a small and a large N."""
    wanted = tuple(name for name in names if Kernels.of(name, report.where).backend == "triton")
    if not wanted:
        return
    every = [replace(cell, names=wanted, repeats=1) for cell in cells(report.device, names, report.dry) if cell.n in (256, 16_384)]
    begun, limit = report.left(), report.left() / 3

    def run(some: Sequence[Cell]) -> int:
        done = 0
        with closing(answers(this_program(report.where), some, PATIENCE)) as rows:
            for _ in rows:
                done += 1
                if begun - report.left() > limit:
                    break
        return done

    with ThreadPoolExecutor(WORKERS) as pool:
        done = sum(pool.map(run, [every[start::WORKERS] for start in range(WORKERS)]))
    print(f"[race] compiled for {done} of {len(every)} shapes in {begun - report.left():.0f} s", file=sys.stderr, flush=True)


def race(report: part.Report, given: Sequence[Cell], run: Answers = answers) -> None:
    """Rows of all shapes, however many processes that takes."""
    command, pending, out = this_program(report.where), list(given), set[str]()
    while pending and report.left() > 15:
        pending = [replace(cell, names=tuple(name for name in cell.names if name not in out)) for cell in pending]
        done = 0
        with closing(run(command, pending, PATIENCE)) as rows:
            for row in rows:
                failed(report, row)
                report.add(row)
                done += 1
                if report.left() < 15:
                    break
        pending = pending[done:]
        if not pending or report.left() < 15:
            break
        guilty = [name for name in pending[0].names if not list(run(command, [replace(pending[0], names=(name,))], PATIENCE))]
        for name in guilty:
            report.add(problem(pending[0]) | {"status": f"{name}: its process died, or did not answer for {PATIENCE:.0f} s"})
        report.fail(f"{pending[0].title().strip()}: {', '.join(guilty) or 'none alone'} ended the process")
        out |= set(guilty)
        if not guilty:
            pending = pending[1:]
    for cell in pending:
        report.add(problem(cell) | {"status": "no time left"})


def failed(report: part.Report, row: Row) -> None:
    """A contestant of ours that raised, or that computed something else, is an error."""
    named = row.pop("failed")
    if "something else" in row["status"] or any(name in NAMES or report.dry for name in named):
        report.fail(f"{row['loss']} N={row['n']} D={row['d']} {row['dtype']}: {row['status']}")


def standings(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """By dtype and size, for how many shapes each was first, or level with the first."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        if row.get("first"):
            size = f"{row['dtype']} N {'up to' if row['n'] <= SMALL[-1] else 'above'} {SMALL[-1]}"
            counts = found.setdefault(size, Counter())
            counts["shapes"] += 1
            counts.update(row["first"].split(" = "))
    return {size: dict(counts) for size, counts in found.items()}


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2])
        return 0
    report = part.Report("race", figures=FIGURES)
    wanted = report.asked or NAMES
    names = tuple(kernels.name for kernels in report.kernels(wanted))
    given = list(cells(report.device, names, report.dry)) if names else []
    with report.step("race"):
        if report.where == "cpu":
            # In this process: another one takes seconds to import torch.
            race(report, given, lambda _, some, patience: (answer(cell, report.where) for cell in some))
        else:
            compile_ahead(report, names)
            race(report, given)
    report.more = {"first": standings(report.rows), "meaning": "milliseconds; first: with all within 2 % of it; ahead: of the next"}
    for size, counts in report.more["first"].items():
        print(f"first: {size}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
