"""Part `bench`: the bars of speed, rate and memory in bars.py, one row each.

Forward and backward with normalisation, bfloat16, all contestants of a problem in one process and interleaved (measure.py). A ratio is the
peer's time over ours, and has to be at least the bar. A rate is a part of that of a plain bfloat16 matrix product, measured on the same
device. Memory is above inputs and gradients. A peer that is not installed or fails leaves its row open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from bench import peers
from bench.gpu import part
from bench.gpu.bars import KERNELS, LARGEST, MEMORY, RATES, RATIOS, SOLVED, Contest
from bench.gpu.peers import OTHER_VALUE
from bench.measure import here
from bench.record import Cell, Row
from bench.sweep import in_a_process

COLUMNS = ("bar", "case", "peer", "ours", "theirs", "unit", "ratio", "at_least", "at_most", "met", "status")
GEMM = 8192
FLASH_WIDTH = 256  # columns; with more, weights pass through a workspace
WORKSPACE_MIB = 128.0
FIGURES = ("ours", "theirs", "ratio", "met")
CELL_SECONDS = 150.0  # of the slowest contestant: torch.compile of an eager loss, and its runs


class Bars:
    def __init__(self, report: part.Report) -> None:
        self.report = report

    def cell(self, measure: str, loss: str, n: int, d: int, names: tuple[str, ...], **more: Any) -> Cell:
        small = self.report.dry
        cell = Cell(measure, loss, min(n, 64) if small else n, min(d, 16) if small else d, names, dtype="bfloat16", clock="device")
        seconds = min(60.0, max(self.report.left() / 4, 1.0))
        cell = replace(cell, device=self.report.device, backend=self.report.backend, repeats=2 if small else 20, seconds=seconds)
        return replace(cell, **more)

    def measured(self, cell: Cell) -> list[Row]:
        """The rows of a cell. Where one contestant ended the process for all, each peer runs again, with ours alone."""

        def once(*names: str) -> list[Row]:
            one = replace(cell, names=names)
            # A dry run starts a single process, for the matrix product, to show that it can. Each takes seconds to import torch.
            return (
                here(one)
                if self.report.dry and cell.measure != "gemm"
                else in_a_process(one, min(CELL_SECONDS, max(self.report.left(), 1.0)))
            )

        rows = once(*cell.names)
        if len(cell.names) > 2 and all(row["status"] in ("crash", "timeout") for row in rows) and self.report.left() > CELL_SECONDS:
            pairs = [once(peers.OURS, name) for name in cell.names[1:]]
            rows = [pairs[0][0], *(pair[1] for pair in pairs)]
        for row in rows:
            ours = row["contestant"] == peers.OURS or (self.report.dry and row["contestant"] not in peers.PACKAGES)
            if ours and row["status"] == "crash":
                self.report.fail(f"{cell.title().strip()}, {row['contestant']}: {row.get('detail', '')}")
        return rows

    def late(self, bar: int, case: str) -> bool:
        """Whether there is no time for another row; then a row says so."""
        if self.report.left() > (0 if self.report.dry else 20):
            return False
        self.report.add({"bar": bar, "case": case, "met": None, "status": "no time left"})
        return True

    @cache  # noqa: B019 - one object, for one run
    def gemm(self) -> float | None:
        n = 64 if self.report.dry else GEMM
        (row,) = self.measured(replace(self.cell("gemm", "gemm", n, n, ("cublas",)), n=n, d=n))
        return float(row["tflops"]) if row["status"] == "ok" else None

    def ratios(self, contest: Contest) -> Iterator[dict[str, Any]]:
        more = SOLVED if contest.solved else {}
        ours, *theirs = self.measured(self.cell("time", contest.loss, contest.n, contest.d, (peers.OURS, *contest.peers), **more))
        for row in theirs:
            found = {
                "bar": contest.bar,
                "case": contest.title(),
                "peer": row["contestant"],
                "unit": "ms",
                "at_least": contest.peers[row["contestant"]],
            }
            failed = next((r for r in (ours, row) if r["status"] != "ok"), None)
            if failed is not None:
                yield found | {"met": None, "status": f"{failed['contestant']}: {failed['status']} {failed.get('detail', '')}".strip()}
                continue
            found |= {"ours": ours["gpu_ms"]["median"], "theirs": row["gpu_ms"]["median"], "ratio": row["gpu_ratio"]}
            found |= {"met": row["gpu_ratio"] >= found["at_least"], "iterations": row["iterations"], "status": _agreement(ours, row)}
            yield found

    def rate(self, n: int, d: int, least: float) -> dict[str, Any]:
        (row,) = self.measured(self.cell("time", "nt_xent", n, d, (peers.OURS,)))
        found = {"bar": 6, "case": f"nt_xent N={n} D={d} nominal rate", "peer": "gemm", "unit": "TFLOP/s", "at_least": least}
        return found | self._against_gemm(row, row.get("tflops"), least)

    def kernel(self, n: int, d: int, words: str, units: float, least: float) -> dict[str, Any]:
        cell = self.cell("kernels", "nt_xent", n, d, (peers.OURS,))
        (row,) = self.measured(cell)
        found = {"bar": 7, "case": f"nt_xent N={n} D={d} kernels *{words}*", "peer": "gemm", "unit": "TFLOP/s", "at_least": least}
        matching = [kernel for kernel in row.get("kernels", []) if words in kernel["kernel"]]
        if row["status"] == "ok" and not matching:
            seen = ", ".join(kernel["kernel"][:40] for kernel in row["kernels"][:6])
            return found | {"met": None, "status": f"no such kernel among {seen or 'none'}", "kernels": row["kernels"]}
        milliseconds = sum(kernel["ms"] for kernel in matching)
        rate = units * 2.0 * cell.n**2 * cell.d / milliseconds / 1e9 if matching else None
        return found | self._against_gemm(row, rate, least) | {"kernels": row.get("kernels", [])}

    def _against_gemm(self, row: Row, rate: float | None, least: float) -> dict[str, Any]:
        ceiling = self.gemm()
        if rate is None or ceiling is None:
            return {"met": None, "status": f"{row['status']} {row.get('detail', '')}".strip() if rate is None else "no matrix product"}
        return {"ours": rate, "theirs": ceiling, "ratio": rate / ceiling, "met": rate / ceiling >= least, "status": "ok"}

    def memory(self, loss: str, n: int, d: int) -> dict[str, Any]:
        (row,) = self.measured(self.cell("memory", loss, n, d, (peers.OURS,)))
        found = {"bar": 8, "case": f"{loss} N={n} D={d} memory", "unit": "MiB"}
        if row["status"] != "ok":
            return found | {"met": None, "status": f"{row['status']} {row.get('detail', '')}".strip()}
        above = row["peak_mib"] - row["gradient_mib"]
        most = 3 * row["input_mib"] + (0.0 if d <= FLASH_WIDTH else WORKSPACE_MIB)
        return found | {"ours": above, "at_most": most, "met": above <= most, "status": "ok"}

    def largest(self, n: int, d: int, most: float) -> dict[str, Any]:
        (row,) = self.measured(self.cell("time", "nt_xent", n, d, (peers.OURS,), repeats=5))
        found = {"bar": 9, "case": f"nt_xent N={n} D={d}", "unit": "ms", "at_most": most}
        if row["status"] != "ok":
            return found | {"met": None, "status": f"{row['status']} {row.get('detail', '')}".strip()}
        took = row["gpu_ms"]["median"]
        return found | {"ours": took, "met": took <= most, "iterations": row["iterations"], "status": "ok"}


def _agreement(ours: Row, theirs: Row) -> str:
    """ "ok" where both computed the same loss, since a faster wrong one would win. bfloat16 logits of 14 nats are off by 2^-9 of that."""
    if theirs["contestant"] in OTHER_VALUE:
        return "another loss"
    value, other = ours["loss_value"], theirs["loss_value"]
    return "ok" if abs(value - other) <= 0.02 * abs(value) + 0.02 else f"values differ: {value:.4g}, {other:.4g}"


def main() -> int:
    report = part.Report("bench", figures=FIGURES)
    bars = Bars(report)
    # A dry run takes one of each kind: another loss, nearly solved, small.
    first, rest = RATIOS[:4], (*RATIOS[4:7], RATIOS[9], RATIOS[-1]) if report.dry else RATIOS[4:]
    for contest in (*first, None, *rest):
        if contest is None:
            # After the bars that matter most, and before the many small ones.
            for n, d, least in RATES:
                if not bars.late(6, f"nt_xent N={n} D={d} nominal rate"):
                    with report.step(f"rate N={n} D={d}"):
                        report.add(bars.rate(n, d, least))
            for loss, n, d in MEMORY:
                if not bars.late(8, f"{loss} N={n} D={d} memory"):
                    with report.step(f"memory {loss} N={n} D={d}"):
                        report.add(bars.memory(loss, n, d))
            if not bars.late(9, f"nt_xent N={LARGEST[0]}"):
                with report.step("largest"):
                    report.add(bars.largest(*LARGEST))
        elif not bars.late(contest.bar, contest.title()):
            with report.step(contest.title()):
                for row in bars.ratios(contest):
                    report.add(row)
    for n, d, words, units, least in KERNELS:
        if not bars.late(7, f"nt_xent N={n} D={d} kernels *{words}*"):
            with report.step(f"kernels N={n} D={d}"):
                report.add(bars.kernel(n, d, words, units, least))
    report.rows.sort(key=lambda row: row["bar"])
    report.more = {"gemm_tflops": bars.gemm()}
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
