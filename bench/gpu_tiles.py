"""Part `tiles`: other tiles than the shipped ones, timed in the losses that use them.

Variants of a tile have half or twice the rows or the columns, other warps or stages. A variant replaces the entry of the table for this
architecture while one loss runs, shipped and variant in turn, so that a slow moment falls on both. What a compiler refuses (too much shared
memory, a tile that does not divide the padding) is a row. A tile that is faster is not adopted here: its registers and spills and the
budget of every problem come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import gpu, gpu_measure, peers

COLUMNS = ("kernel", "parts", "depth", "tile", "loss", "shipped_ms", "ms", "ratio", "faster", "status")
LIMITS = {"rows": (16, 128), "columns": (16, 256), "warps": (2, 8), "stages": (1, 4)}
ROUNDS = 7

Key = tuple[str, int, int]


class Entry(NamedTuple):
    """A tile of the table, and a loss whose time it decides."""

    key: Key  # kernel, parts of the operand, padded width or 0 for long rows
    tile: Any
    loss: str


# The loss that each kernel takes most of, and a width for each entry of the table: see fastnce/tiles.py.
LOSS_OF = {"rows": "info_nce", "both": "nt_xent", "output": "moco", "gradient": "nt_xent", "block": "nt_xent"}
WIDTH_OF = {64: 64, 128: 128, 256: 256, 0: 512}


def shipped(architecture: str) -> list[Entry]:
    """The one place here that reads the table of fastnce/tiles.py."""
    from fastnce import tiles

    keys: list[Key] = sorted(tiles._TRITON, key=lambda key: (key[1], key[0], key[2]))
    return [Entry(key, tiles.triton(key[0], architecture, key[1], key[2] or tiles.TRITON_WHOLE + 1), LOSS_OF[key[0]]) for key in keys]


@contextmanager
def replaced(architecture: str, key: Key, tile: Any) -> Iterator[None]:
    """The one place that writes it, for as long as a loss runs."""
    from fastnce import tiles

    table = tiles._TRITON_OF[tiles.nearest(architecture)]
    before = table.get(key)
    table[key] = tile
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before


def variants(tile: Any) -> Iterator[Any]:
    """One field at a time, by a factor of two; stages by one."""
    for field, (least, most) in LIMITS.items():
        value = getattr(tile, field)
        for other in (value - 1, value + 1) if field == "stages" else (value // 2, value * 2):
            if least <= other <= most:
                yield tile._replace(**{field: other})


def architecture_of(device: str) -> str:
    return "sm_90" if device == "cpu" else "sm_%d%d" % torch.cuda.get_device_capability()


def compare(entry: Entry, tile: Any, report: gpu.Report, n: int) -> dict[str, Any]:
    """Forward and backward with the shipped tile and with the other, in turn; the median of the ratios of each round."""
    width = min(WIDTH_OF[entry.key[2]], 16) if report.dry else WIDTH_OF[entry.key[2]]
    dtype = torch.bfloat16 if entry.key[1] == 1 else torch.float32
    leaves = peers.leaves(entry.loss, n, width, dtype, device=report.device)
    loss = peers.fastnce_loss(entry.loss, report.backend)
    architecture = architecture_of(report.device)
    times: dict[Any, list[float]] = {entry.tile: [], tile: []}
    values = {}
    for _ in range(gpu_measure.WARM_UP + ROUNDS):
        for one, found in times.items():
            with replaced(architecture, entry.key, one):
                found.append(gpu_measure.milliseconds(report.device, partial(gpu_measure.step, loss, leaves)))
                values[one] = gpu_measure.step(loss, leaves).item()
    ours, others = (found[gpu_measure.WARM_UP :] for found in times.values())
    ratio = median(a / b for a, b in zip(ours, others, strict=True))
    same = abs(values[tile] - values[entry.tile]) <= 1e-5 * abs(values[entry.tile])
    row = {"shipped_ms": median(ours), "ms": median(others), "ratio": ratio, "faster": None if report.dry else ratio > 1.02}
    return row | {"status": "ok" if same else f"another value: {values[tile]:.6g}, {values[entry.tile]:.6g}"}


def named(entry: Entry, tile: Any) -> dict[str, Any]:
    kernel, parts, depth = entry.key
    return {"kernel": kernel, "parts": parts, "depth": depth, "tile": "x".join(map(str, tile)), "loss": entry.loss}


def main() -> int:
    report = gpu.Report("tiles")
    n = 64 if report.dry else 16_384
    entries = shipped(architecture_of(report.device))
    left = [(entry, tile) for entry in entries for tile in variants(entry.tile)]
    # Half precision first; a dry run takes one variant of each entry.
    for index, (entry, tile) in enumerate(left):
        if report.dry and index and left[index - 1][0] is entry:
            continue
        if report.left() < 15:
            report.add({"kernel": f"{len(left) - index} variants", "status": "no time left"})
            break
        try:
            found = compare(entry, tile, report, n)
        except Exception as error:
            # The compiler may refuse any of them; with the shipped tile it must not, and in a dry run nothing compiles.
            status, detail = gpu_measure.status_of(error)
            found = {"status": f"{status} {detail}".strip()}
            if report.dry:
                report.fail(f"{named(entry, tile)}: {detail}")
        report.add(named(entry, tile) | found)
    report.rows.sort(key=lambda row: -row.get("ratio", 0.0))
    return report.finish(COLUMNS)


if __name__ == "__main__":
    gpu.run(main)
