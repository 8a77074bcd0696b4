"""Part `tiles`: other tiles than the shipped ones, timed in the losses that ask for them.

Every loss runs once to see which tiles it asks fastnce/backends/triton/tiles.py for. Variants of a tile have half or twice the rows or the
columns, other warps or stages. Shipped tile and variant run in turn, so that a slow moment falls on both. A variant that the compiler
refuses (too much shared memory, say) is a row. A faster tile is not adopted by this: its registers, its spills and the errors of every
problem come first.

The dry run asks Triton's interpreter for a few of them, which needs TRITON_INTERPRET=1 before Triton is imported: run.sh sets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import dense, measure, peers
from bench.gpu import measure as gpu_measure
from bench.gpu import part

COLUMNS = ("asked", "tile", "loss", "n", "d", "dtype", "shipped_ms", "ms", "ratio", "faster", "status")
FIGURES = ("shipped_ms", "ms", "ratio", "faster")
# The fields that vary, and their least and largest values. Operands are padded to multiples of 128, so more rows or columns do not divide
# them.
LIMITS = {"rows": (16, 128), "columns": (16, 128), "warps": (2, 8), "stages": (1, 4)}
ROUNDS = 7
ENOUGH = 1.02  # ratios below are noise

Ask = tuple[Any, ...]  # the arguments of tiles.tile


class Shape(NamedTuple):
    loss: str
    n: int
    d: int
    dtype: torch.dtype = torch.bfloat16


# A shape for each kernel and width. float32, whose operands have two halves, comes last.
SHAPES = (
    *(Shape(loss, 16_384, d) for d in (128, 512, 256, 64) for loss in ("nt_xent", "clip", "sup_con")),
    *(Shape("moco", 65_536, d) for d in (128, 256, 64)),
    *(Shape(loss, 8_192, d, torch.float32) for d in (128, 512) for loss in ("nt_xent", "clip", "sup_con", "moco")),
)
DRY = (Shape("nt_xent", 8, 8),)


@contextmanager
def tiles_asked(answers: Mapping[Ask, Any]) -> Iterator[dict[Ask, Any]]:
    """Collects the tiles that are asked for, with the shipped answers; `answers` replaces some. Only this function touches the table."""
    from fastnce.backends.triton import tape, tiles

    shipped, asked = tiles.tile, {}

    def ask(*key: Any) -> Any:
        asked[key] = shipped(*key)
        return answers.get(key, asked[key])

    tape.forget()  # launches that are recorded have their tiles
    with mock.patch.object(tiles, "tile", ask):
        yield asked
    tape.forget()


def variants(tile: Any) -> Iterator[Any]:
    """One field at a time, by a factor of two; stages by one."""
    for field, (least, most) in LIMITS.items():
        value = getattr(tile, field)
        for other in (value - 1, value + 1) if field == "stages" else (value // 2, value * 2):
            if least <= other <= most:
                yield tile._replace(**{field: other})


class Timed:
    """The loss of a shape, ready to be timed."""

    def __init__(self, shape: Shape, device: str, backend: str) -> None:
        self.device, self.leaves = device, dense.leaves(shape.loss, shape.n, shape.d, shape.dtype, device=device)
        self.function = peers.fastnce_loss(shape.loss, backend)

    def step(self) -> Tensor:
        return measure.prepared("full", self.function, self.leaves)()

    def asked(self) -> dict[Ask, Any]:
        with tiles_asked({}) as asked:
            self.step()
        return asked

    def compare(self, key: Ask, shipped: Any, other: Any, rounds: int) -> dict[str, Any]:
        """Times of forward and backward with either tile, in turn, and the median of the rounds' ratios. The first two steps compile."""
        times: dict[Any, list[float]] = {shipped: [], other: []}
        values: dict[Any, float] = {}
        for tile in times:
            with tiles_asked({key: tile}):
                values[tile] = self.step().item()
        for _ in range(rounds):
            for tile, found in times.items():
                with tiles_asked({key: tile}):
                    self.step()  # which records the launches
                    found.append(gpu_measure.milliseconds(self.device, self.step))
        ratio = median(a / b for a, b in zip(times[shipped], times[other], strict=True))
        off = abs(values[other] - values[shipped])
        status = "ok" if off <= 1e-5 * abs(values[shipped]) + 1e-6 else f"another value: {values[other]:.6g}, {values[shipped]:.6g}"
        return {
            "shipped_ms": median(times[shipped]),
            "ms": median(times[other]),
            "ratio": ratio,
            "faster": ratio > ENOUGH,
            "status": status,
        }


def named(shape: Shape) -> dict[str, Any]:
    return shape._asdict() | {"dtype": str(shape.dtype)[6:]}


def attempts(report: part.Report, shape: Shape, seen: set[Ask]) -> Iterator[dict[str, Any]]:
    """A row for every variant of every tile that no shape before has asked for."""
    timed = Timed(shape, report.device, report.backend)
    for key, tile in timed.asked().items():
        if key in seen:
            continue
        seen.add(key)
        for other in list(variants(tile))[: 1 if report.dry else None]:
            row = named(shape) | {"asked": " ".join(map(str, key)), "tile": "x".join(map(str, other))}
            if report.left() < 15:
                yield row | {"status": "no time left"}
                return
            try:
                yield row | timed.compare(key, tile, other, 1 if report.dry else ROUNDS)
            except Exception as error:
                status, detail = measure.status_of(error)
                yield row | {"status": f"{status} {detail}".strip()}
                if report.dry:
                    report.fail(f"{row}: {detail}")


def objections(shape: Shape, backend: str, device: str) -> str:
    """Why the backend cannot run here; empty where it can."""
    try:
        Timed(shape, device, backend).asked()
    except NotImplementedError as error:
        return str(error).strip().splitlines()[-1].strip()
    return ""


def main() -> int:
    report = part.Report("tiles", figures=FIGURES)
    seen: set[Ask] = set()
    if report.dry:
        report.backend = "triton"
    reason = objections(DRY[0], report.backend, report.device)
    for shape in () if reason else DRY if report.dry else SHAPES:
        if report.left() < 15:
            report.add(named(shape) | {"status": "no time left"})
            continue
        with report.step(str(shape)):
            for row in attempts(report, shape, seen):
                report.add(row)
        if report.device == "cuda":
            torch.cuda.empty_cache()
    if reason:
        report.add({"status": reason})
        if not report.dry:
            report.fail(reason)
    report.rows.sort(key=lambda row: -(row.get("ratio") or 0.0))
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
