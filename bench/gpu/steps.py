"""Part `steps`: the launches of a step, and the time that the host takes for one, ours and eager's: bars 12 and 13.

A launch is a kernel, a copy or a fill that torch's profiler sees on the device during forward and backward. The host's time is that of a
step that nobody waits for. Where there are few rows, it is most of the time of a step.

`torch` is in the table too: its tiles of torch operations are what a CUDA tensor gets where the kernels are not taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench import dense, peers
from bench.gpu import part
from bench.gpu.bars import HOST, LAUNCHES
from bench.measure import here
from bench.record import Cell, Row

EAGER, FALLBACK = "eager autocast", "torch"
COLUMNS = ("bar", "case", "backend", "ours", "theirs", "unit", "ratio", "at_most", "met", "status")
FIGURES = ("ours", "theirs", "ratio", "met")


def cell_of(report: part.Report, measure: str, loss: str, n: int, d: int) -> Cell:
    names = (peers.OURS, EAGER)
    cell = Cell(measure, loss, min(n, 64) if report.dry else n, min(d, 16) if report.dry else d, names, dtype="bfloat16", clock="device")
    return replace(cell, device=report.device, repeats=2 if report.dry else 20, seconds=5.0)


def compared(rows: list[Row], of: str, most: float, by_ratio: bool) -> dict[str, Any]:
    """Ours and eager's number of one name, and whether ours, or its ratio to eager's, is at most the bar."""
    failed = next((row for row in rows if row["status"] != "ok"), None)
    if failed is not None:
        return {"met": None, "status": f"{failed['contestant']}: {failed['status']} {failed.get('detail', '')}".strip()}
    ours, theirs = (row[of] for row in rows)
    ratio = ours / theirs if theirs else None
    judged = ratio if by_ratio else ours
    return {"ours": ours, "theirs": theirs, "ratio": ratio, "met": None if judged is None else judged <= most, "status": "ok"}


def found(report: part.Report, backend: str, loss: str) -> Iterator[dict[str, Any]]:
    """The rows of a loss by one backend. Those of the fallback have no bar here."""
    for number, measure, unit, of, (n, d, most) in (
        *((12, "kernels", "launches", "launches", bar) for bar in LAUNCHES),
        (13, "host", "ms", "host_ms", HOST),
    ):
        one = replace(cell_of(report, measure, loss, n, d), backend=backend)
        # The profiler sees one contestant at a time.
        cells = [replace(one, names=(name,)) for name in one.names] if measure == "kernels" else [one]
        row = compared([row for cell in cells for row in here(cell)], of, most, by_ratio=number == 13)
        judged = {"at_most": most} if backend != FALLBACK or report.dry else {"bar": 0, "met": None}
        yield {"bar": number, "case": f"{loss} N={n} D={d}", "backend": backend, "unit": unit} | row | judged


def main() -> int:
    report = part.Report("steps", figures=FIGURES)
    for backend in dict.fromkeys((report.backend, FALLBACK)):
        for loss in dense.LOSSES:
            if report.left() < (0 if report.dry else 20):
                report.add({"bar": 12, "case": loss, "backend": backend, "met": None, "status": "no time left"})
                continue
            with report.step(f"{loss} by {backend}"):
                for row in found(report, backend, loss):
                    report.add(row)
                    if row["status"] != "ok" and (report.dry or row["status"].startswith(peers.OURS)):
                        report.fail(f"{row['case']}: {row['status']}")
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
