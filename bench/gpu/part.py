"""The frame of all parts of run.sh: options, a time budget, and the report that a part leaves behind.

A part is a module with main(). It fills a Report and calls finish(), which prints the table, writes <out>/<part>.json and returns the exit
status: 1 where an error was raised that should not have been, whatever the figures are. `python -m bench.gpu.part summary` shows the
reports of all parts.

The dry run is the same code at tiny sizes on the CPU, with backend="torch". Its figures mean nothing, its exit status does. --emulate is a
dry run in which the part `build` compiles the sources of the CUDA library for the CPU, and the parts that use this library run them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.gpu import kernels as known
from bench.gpu.kernels import Kernels
from bench.record import ROOT
from fastnce import files

# Whether the kernels run and agree; whether they are fast; which of them, and of their shapes, is first.
PARTS = ("build", "check", "tests", "sanitize", "accuracy", "bench", "steps", "race", "tiles")
BUDGET = 540.0  # seconds of a part, so that a command of ten minutes ends by itself, with its results written


class Options(argparse.Namespace):
    out: Path
    budget: float
    dry_run: bool
    emulate: bool
    backend: str
    kernels: str


class Report:
    """The rows of a part, and the time that is left for more. `figures` are fields that mean nothing without a GPU: None in a dry run."""

    def __init__(self, part: str, arguments: list[str] | None = None, figures: tuple[str, ...] = ()) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m bench.gpu.{part}", allow_abbrev=False)
        parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
        parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
        parser.add_argument("--backend", default="triton", help="of the parts bench, steps and tiles")
        parser.add_argument("--kernels", default="", help="of the other parts, comma-separated; all of " + ",".join(known.NAMES))
        parser.add_argument("--dry-run", action="store_true")
        parser.add_argument("--emulate", action="store_true")
        options = parser.parse_args(arguments, namespace=Options())
        self.where = "emulated" if options.emulate else "cpu" if options.dry_run else "gpu"
        self.part, self.dry, self.out, self.figures = part, self.where != "gpu", options.out, figures
        if not self.dry and not torch.cuda.is_available():
            parser.error("torch finds no CUDA device here; --dry-run shows on the CPU that everything runs")
        self.device, self.backend = ("cpu", "torch") if self.dry else ("cuda", options.backend)
        self.asked = tuple(filter(None, options.kernels.split(",")))
        if unknown := [name for name in self.asked if name not in known.NAMES]:
            parser.error(f"unknown kernels {', '.join(unknown)}")
        self.rows: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.more: dict[str, Any] = {}
        self._begun, self._budget = time.monotonic(), options.budget

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._budget - (time.monotonic() - self._begun)

    def names(self) -> tuple[str, ...]:
        """The names of the kernels that were asked for."""
        return self.asked or known.names(self.where)

    def kernels(self, names: tuple[str, ...] | None = None, needed: bool = True) -> list[Kernels]:
        """The kernels that run here, of `names` or of all that were asked for. Each that does not gets a row with the reason.

        Where some are needed and none run, that is an error."""
        found = []
        for name in self.names() if names is None else names:
            kernels = Kernels.of(name, self.where)
            if objection := kernels.objection():
                self.add({"kernels": name, "status": objection})
            else:
                found.append(kernels)
        if needed and not found:
            self.fail("none of these kernels run here")
        return found

    @property
    def log(self) -> Path:
        """The log of all parts together, since often only a few files come back from a rented machine."""
        self.out.mkdir(parents=True, exist_ok=True)
        return self.out / "parts.log"

    def add(self, row: dict[str, Any]) -> None:
        if self.dry:
            row = row | {name: None for name in self.figures if name in row}
        self.rows.append(row)
        shown = " ".join(f"{name}={_text(value)}" for name, value in row.items())
        print(f"[{self.part}, {time.monotonic() - self._begun:.0f} s] {shown}", file=sys.stderr, flush=True)

    def fail(self, error: str) -> None:
        """Record an error. The part goes on, and its exit status is 1."""
        self.errors.append(error)
        print(f"[{self.part}] ERROR {error}", file=sys.stderr, flush=True)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step whose exception is recorded, so that the next steps run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")

    def finish(self, columns: tuple[str, ...]) -> int:
        """Print the table, write the results, return the exit status."""
        arguments = ["--backend", self.backend, "--budget", f"{self._budget:g}"]
        arguments += ["--kernels", ",".join(self.asked)] if self.asked else []
        arguments += {"gpu": [], "cpu": ["--dry-run"], "emulated": ["--emulate"]}[self.where]
        env = record.environment(["python", "-m", "bench", "gpu", self.part, *arguments], torch.get_num_threads(), self.device)
        seconds = time.monotonic() - self._begun
        result = {"schema": record.SCHEMA, "part": self.part, "dry_run": self.dry, "seconds": seconds, "env": env}
        result |= {"errors": self.errors, "rows": self.rows, **self.more}
        self.out.mkdir(parents=True, exist_ok=True)
        files.write(self.out / f"{self.part}.json", record.text(result))
        if self.dry and self.figures:
            print("Dry run on the CPU: it shows that everything runs, and measures nothing.")
        print(table(self.rows, columns), flush=True)
        print(f"{self.part}: {seconds:.0f} s, {len(self.rows)} rows, {len(self.errors)} errors", *self.errors, sep="\n  ", flush=True)
        return 1 if self.errors else 0


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """The rows as text, aligned; a column that no row has is left out."""
    shown = [name for name in columns if any(name in row for row in rows)]
    cells = [shown, *([_text(row[name]) if name in row else "" for name in shown] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def run(main: Callable[[], int]) -> None:
    """Run the main() of a part as a command."""
    torch.set_num_threads(1 if {"--dry-run", "--emulate"} & set(sys.argv) else torch.get_num_threads())
    raise SystemExit(files.command(Path(sys.argv[0]).name)(main)())


def summary(out: Path, parts: list[str]) -> int:
    """Print a line for each part that was asked for. Returns 1 where one failed or left no result."""
    lines, failed = [], 0
    for part in parts:
        path = out / f"{part}.json"
        if not path.exists():
            lines.append({"part": part, "status": "left no result"})
            failed = 1
            continue
        found = json.loads(path.read_text())
        marks = [row[key] for row in found["rows"] for key in ("met", "inside", "passed", "clean") if isinstance(row.get(key), bool)]
        status = "error: " + found["errors"][0][:80] if found["errors"] else "done"
        lines.append(
            {"part": part, "status": status, "rows": len(found["rows"]), "yes": sum(marks), "no": len(marks) - sum(marks)}
            | {"open": len(found["rows"]) - len(marks), "seconds": found["seconds"]}
        )
        failed |= bool(found["errors"])
    print(table(lines, ("part", "status", "rows", "yes", "no", "open", "seconds")))
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.part", allow_abbrev=False)
    parser.add_argument("command", choices=("summary", "parts"))
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    options = parser.parse_args()
    if options.command == "parts":
        print(*PARTS)
        return 0
    return summary(options.out, options.parts)


if __name__ == "__main__":
    raise SystemExit(main())
