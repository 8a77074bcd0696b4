"""The tile of every Triton kernel: a table by kernel, rules of the pairs, number format, D and architecture.

Nothing is tuned at run time, so equal problems run equal programs.
"""

from __future__ import annotations

from typing import NamedTuple

from fastnce.backends._gpu.tiles import held_depth


class TileShape(NamedTuple):
    """One program: rows x columns of logits, D in steps of depth, and how the compiler lays it out."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Rows per program of the passes over single rows, and columns per step; of the last of them, which holds more, by whether it is spared some
# of that: keys of their own are in no aligned pair, or rows are not normalised.
ROWS = (8, 128)
FINISH = {False: (8, 32), True: (8, 64)}

# By parts of the operand: the products of a block's weights with rows. A tile of the gradient, rows x columns, and sums in steps of depth.
PRODUCTS = {1: TileShape(128, 128, 64, 8, 3), 2: TileShape(128, 64, 64, 8, 2)}

# (kernel, how pairs are told apart, parts of the operand, padded D or 0 for long rows) -> tile. Parts: 1 float16, 2 float32 as a high and a
# low half. Looking at ids takes registers, a mask an address per pair: hence the smaller tiles. Each was the first of a list, from large
# to small, that neither spills nor serialises its products with Triton 3.6.0 and 3.9.0 (tests/aot/); no timing has been recorded.
TILES: dict[tuple[str, str, int, int], TileShape] = {
    ("rows", "index", 1, 64): TileShape(128, 128, 64, 4, 3),
    ("rows", "index", 1, 128): TileShape(128, 128, 128, 4, 2),
    ("rows", "index", 1, 256): TileShape(64, 64, 256, 4, 2),
    ("rows", "index", 1, 0): TileShape(128, 128, 64, 4, 3),
    ("rows", "index", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("rows", "index", 2, 128): TileShape(64, 64, 128, 4, 2),
    ("rows", "index", 2, 0): TileShape(64, 64, 64, 4, 2),
    ("both", "index", 1, 64): TileShape(128, 128, 64, 4, 3),
    ("both", "index", 1, 128): TileShape(128, 128, 128, 4, 2),
    ("both", "index", 1, 256): TileShape(64, 64, 256, 4, 2),
    ("both", "index", 1, 0): TileShape(128, 128, 64, 4, 3),
    ("both", "index", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("both", "index", 2, 128): TileShape(64, 64, 128, 4, 2),
    ("both", "index", 2, 0): TileShape(64, 64, 64, 4, 2),
    ("output", "index", 1, 64): TileShape(128, 64, 64, 4, 3),
    ("output", "index", 1, 128): TileShape(64, 64, 128, 4, 2),
    ("output", "index", 1, 256): TileShape(64, 64, 256, 4, 2),
    ("output", "index", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("output", "index", 2, 128): TileShape(64, 64, 128, 8, 2),
    ("gradient", "index", 1, 64): TileShape(64, 64, 64, 4, 3),
    ("gradient", "index", 1, 128): TileShape(64, 64, 128, 4, 2),
    ("gradient", "index", 1, 256): TileShape(128, 32, 256, 8, 2),
    ("gradient", "index", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("gradient", "index", 2, 128): TileShape(64, 64, 128, 8, 2),
    ("block", "index", 1, 0): TileShape(64, 128, 64, 4, 3),
    ("block", "index", 2, 0): TileShape(128, 64, 64, 8, 2),
    ("rows", "ids", 1, 64): TileShape(64, 64, 64, 8, 3),
    ("rows", "ids", 1, 128): TileShape(64, 64, 128, 8, 2),
    ("rows", "ids", 1, 256): TileShape(64, 64, 256, 8, 1),
    ("rows", "ids", 1, 0): TileShape(64, 64, 64, 4, 1),
    ("rows", "ids", 2, 64): TileShape(64, 64, 64, 8, 2),
    ("rows", "ids", 2, 128): TileShape(64, 32, 128, 4, 2),
    ("rows", "ids", 2, 0): TileShape(64, 64, 64, 4, 1),
    ("both", "ids", 1, 64): TileShape(64, 64, 64, 8, 3),
    ("both", "ids", 1, 128): TileShape(64, 64, 128, 8, 2),
    ("both", "ids", 1, 256): TileShape(64, 64, 256, 8, 2),
    ("both", "ids", 1, 0): TileShape(64, 64, 64, 8, 3),
    ("both", "ids", 2, 64): TileShape(64, 64, 64, 8, 2),
    ("both", "ids", 2, 128): TileShape(64, 64, 128, 8, 1),
    ("both", "ids", 2, 0): TileShape(64, 64, 64, 8, 2),
    ("output", "ids", 1, 64): TileShape(64, 64, 64, 4, 3),
    ("output", "ids", 1, 128): TileShape(64, 64, 128, 4, 2),
    ("output", "ids", 1, 256): TileShape(128, 32, 256, 8, 2),
    ("output", "ids", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("output", "ids", 2, 128): TileShape(64, 32, 128, 4, 2),
    ("gradient", "ids", 1, 64): TileShape(64, 64, 64, 4, 3),
    ("gradient", "ids", 1, 128): TileShape(64, 64, 128, 8, 1),
    ("gradient", "ids", 1, 256): TileShape(128, 32, 256, 8, 2),
    ("gradient", "ids", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("gradient", "ids", 2, 128): TileShape(64, 32, 128, 8, 2),
    ("block", "ids", 1, 0): TileShape(128, 64, 64, 8, 3),
    ("block", "ids", 2, 0): TileShape(128, 64, 64, 8, 2),
    ("retrieval", "ids", 1, 64): TileShape(64, 64, 64, 4, 3),
    ("retrieval", "ids", 1, 128): TileShape(64, 64, 128, 4, 2),
    ("retrieval", "ids", 1, 256): TileShape(64, 64, 256, 4, 2),
    ("retrieval", "ids", 1, 0): TileShape(64, 64, 64, 4, 3),
    ("retrieval", "ids", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("retrieval", "ids", 2, 128): TileShape(64, 64, 128, 4, 2),
    ("retrieval", "ids", 2, 0): TileShape(64, 64, 64, 4, 2),
    ("rows", "mask", 1, 64): TileShape(64, 64, 64, 4, 3),
    ("rows", "mask", 1, 128): TileShape(64, 32, 128, 4, 2),
    ("rows", "mask", 1, 256): TileShape(64, 32, 256, 4, 2),
    ("rows", "mask", 1, 0): TileShape(64, 64, 64, 4, 3),
    ("rows", "mask", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("rows", "mask", 2, 128): TileShape(64, 32, 128, 8, 2),
    ("rows", "mask", 2, 0): TileShape(64, 64, 64, 8, 2),
    ("both", "mask", 1, 64): TileShape(64, 64, 64, 4, 3),
    ("both", "mask", 1, 128): TileShape(32, 32, 128, 4, 2),
    ("both", "mask", 1, 256): TileShape(32, 32, 256, 4, 2),
    ("both", "mask", 1, 0): TileShape(64, 64, 64, 4, 3),
    ("both", "mask", 2, 64): TileShape(64, 64, 64, 4, 2),
    ("both", "mask", 2, 128): TileShape(32, 32, 128, 4, 2),
    ("both", "mask", 2, 0): TileShape(64, 64, 64, 4, 1),
    ("gradient", "mask", 1, 64): TileShape(64, 64, 64, 8, 1),
    ("gradient", "mask", 1, 128): TileShape(32, 32, 128, 4, 2),
    ("gradient", "mask", 1, 256): TileShape(64, 32, 256, 8, 1),
    ("gradient", "mask", 2, 64): TileShape(64, 64, 64, 8, 1),
    ("gradient", "mask", 2, 128): TileShape(32, 32, 128, 4, 2),
    ("block", "mask", 1, 0): TileShape(64, 64, 64, 8, 3),
    ("block", "mask", 2, 0): TileShape(64, 64, 64, 8, 2),
    ("retrieval", "mask", 1, 64): TileShape(64, 32, 64, 4, 3),
    ("retrieval", "mask", 1, 128): TileShape(64, 32, 128, 4, 2),
    ("retrieval", "mask", 1, 256): TileShape(32, 32, 256, 4, 2),
    ("retrieval", "mask", 1, 0): TileShape(64, 32, 64, 4, 3),
    ("retrieval", "mask", 2, 64): TileShape(32, 32, 64, 4, 2),
    ("retrieval", "mask", 2, 128): TileShape(32, 32, 128, 4, 2),
    ("retrieval", "mask", 2, 0): TileShape(32, 32, 64, 4, 2),
}
# Where an architecture wants another one than the table's, which is for sm_90.
TILES_OF: dict[str, dict[tuple[str, str, int, int], TileShape]] = {
    "sm_80": {
        ("rows", "index", 1, 64): TileShape(128, 128, 64, 8, 3),
        ("rows", "index", 1, 128): TileShape(128, 128, 128, 8, 2),
        ("rows", "index", 1, 256): TileShape(64, 64, 256, 4, 1),
        ("rows", "index", 1, 0): TileShape(128, 128, 64, 8, 3),
        ("rows", "index", 2, 128): TileShape(64, 64, 128, 8, 2),
        ("both", "index", 1, 64): TileShape(128, 128, 64, 8, 3),
        ("both", "index", 1, 128): TileShape(128, 128, 128, 8, 2),
        ("both", "index", 1, 0): TileShape(128, 128, 64, 8, 3),
        ("output", "index", 1, 64): TileShape(64, 64, 64, 4, 3),
        ("output", "index", 1, 128): TileShape(64, 64, 128, 8, 2),
        ("output", "index", 1, 256): TileShape(64, 32, 256, 8, 2),
        ("output", "index", 2, 64): TileShape(64, 32, 64, 4, 2),
        ("output", "index", 2, 128): TileShape(32, 64, 128, 8, 2),
        ("gradient", "index", 1, 128): TileShape(64, 64, 128, 8, 2),
        ("gradient", "index", 1, 256): TileShape(64, 32, 256, 8, 2),
        ("gradient", "index", 2, 64): TileShape(64, 32, 64, 4, 2),
        ("gradient", "index", 2, 128): TileShape(64, 64, 128, 8, 1),
        ("block", "index", 1, 0): TileShape(128, 128, 64, 8, 3),
        ("rows", "ids", 1, 64): TileShape(64, 32, 64, 8, 2),
        ("rows", "ids", 1, 256): TileShape(32, 32, 256, 4, 2),
        ("rows", "ids", 1, 0): TileShape(64, 64, 64, 8, 3),
        ("rows", "ids", 2, 64): TileShape(64, 32, 64, 4, 2),
        ("rows", "ids", 2, 128): TileShape(32, 32, 128, 4, 2),
        ("rows", "ids", 2, 0): TileShape(64, 32, 64, 4, 2),
        ("both", "ids", 1, 0): TileShape(64, 64, 64, 8, 1),
        ("both", "ids", 2, 64): TileShape(32, 32, 64, 4, 2),
        ("both", "ids", 2, 128): TileShape(32, 32, 128, 4, 2),
        ("both", "ids", 2, 0): TileShape(32, 32, 64, 4, 2),
        ("output", "ids", 1, 128): TileShape(64, 64, 128, 8, 2),
        ("output", "ids", 1, 256): TileShape(64, 32, 256, 8, 2),
        ("output", "ids", 2, 64): TileShape(64, 32, 64, 4, 2),
        ("output", "ids", 2, 128): TileShape(32, 64, 128, 8, 2),
        ("gradient", "ids", 1, 64): TileShape(64, 32, 64, 8, 2),
        ("gradient", "ids", 1, 256): TileShape(32, 32, 256, 4, 2),
        ("gradient", "ids", 2, 64): TileShape(64, 32, 64, 4, 2),
        ("gradient", "ids", 2, 128): TileShape(32, 64, 128, 4, 1),
        ("retrieval", "ids", 1, 128): TileShape(64, 32, 128, 4, 2),
        ("rows", "mask", 1, 64): TileShape(64, 64, 64, 8, 3),
        ("rows", "mask", 1, 128): TileShape(32, 32, 128, 4, 2),
        ("rows", "mask", 1, 256): TileShape(32, 32, 256, 4, 2),
        ("rows", "mask", 2, 64): TileShape(64, 64, 64, 8, 2),
        ("rows", "mask", 2, 128): TileShape(32, 16, 128, 4, 2),
        ("rows", "mask", 2, 0): TileShape(64, 32, 64, 8, 2),
        ("both", "mask", 1, 64): TileShape(64, 64, 64, 8, 3),
        ("both", "mask", 1, 0): TileShape(64, 64, 64, 8, 3),
        ("both", "mask", 2, 64): TileShape(32, 32, 64, 4, 2),
        ("both", "mask", 2, 0): TileShape(32, 32, 64, 4, 2),
        ("gradient", "mask", 1, 64): TileShape(32, 32, 64, 4, 2),
        ("gradient", "mask", 1, 256): TileShape(32, 32, 256, 8, 2),
        ("gradient", "mask", 2, 64): TileShape(32, 64, 64, 4, 1),
        ("gradient", "mask", 2, 128): TileShape(32, 32, 128, 8, 2),
        ("block", "mask", 2, 0): TileShape(64, 32, 64, 4, 2),
    },
    "sm_90": {},
    "sm_100": {
        ("rows", "index", 1, 64): TileShape(128, 128, 64, 4, 1),
        ("rows", "index", 1, 128): TileShape(128, 128, 128, 4, 1),
        ("rows", "index", 2, 0): TileShape(64, 64, 64, 8, 2),
        ("both", "index", 1, 64): TileShape(128, 128, 64, 4, 1),
        ("both", "index", 1, 128): TileShape(128, 128, 128, 4, 1),
        ("both", "index", 1, 0): TileShape(128, 128, 64, 4, 1),
        ("output", "index", 1, 64): TileShape(64, 64, 64, 4, 3),
        ("output", "index", 1, 256): TileShape(64, 64, 256, 4, 1),
        ("gradient", "index", 1, 256): TileShape(128, 32, 256, 8, 1),
        ("gradient", "index", 2, 64): TileShape(64, 64, 64, 8, 2),
        ("gradient", "index", 2, 128): TileShape(64, 32, 128, 4, 2),
        ("block", "index", 1, 0): TileShape(128, 64, 64, 8, 3),
        ("rows", "ids", 1, 256): TileShape(64, 32, 256, 4, 2),
        ("rows", "ids", 1, 0): TileShape(64, 64, 64, 8, 3),
        ("rows", "ids", 2, 0): TileShape(64, 64, 64, 8, 2),
        ("both", "ids", 2, 128): TileShape(64, 64, 128, 8, 2),
        ("both", "ids", 2, 0): TileShape(64, 64, 64, 8, 1),
        ("output", "ids", 2, 128): TileShape(64, 64, 128, 8, 2),
        ("gradient", "ids", 1, 64): TileShape(64, 64, 64, 8, 3),
        ("gradient", "ids", 1, 256): TileShape(128, 32, 256, 8, 1),
        ("gradient", "ids", 2, 64): TileShape(64, 64, 64, 8, 2),
        ("gradient", "ids", 2, 128): TileShape(64, 32, 128, 8, 1),
        ("block", "ids", 1, 0): TileShape(64, 64, 64, 8, 3),
        ("block", "ids", 2, 0): TileShape(64, 64, 64, 8, 2),
        ("retrieval", "ids", 1, 0): TileShape(64, 32, 64, 4, 3),
        ("retrieval", "ids", 2, 0): TileShape(64, 32, 64, 4, 2),
        ("rows", "mask", 1, 128): TileShape(32, 32, 128, 4, 2),
        ("rows", "mask", 1, 256): TileShape(32, 32, 256, 4, 2),
        ("gradient", "mask", 1, 64): TileShape(32, 64, 64, 4, 3),
        ("gradient", "mask", 2, 64): TileShape(32, 64, 64, 4, 2),
        ("block", "mask", 1, 0): TileShape(64, 32, 64, 4, 3),
        ("block", "mask", 2, 0): TileShape(32, 32, 64, 4, 2),
        ("retrieval", "mask", 1, 64): TileShape(32, 32, 64, 4, 3),
        ("retrieval", "mask", 1, 128): TileShape(32, 32, 128, 4, 2),
        ("retrieval", "mask", 2, 128): TileShape(64, 32, 128, 8, 2),
    },
    "gfx942": {},
}


def tile(kernel: str, rules: str, architecture: str, parts: int, depth: int) -> TileShape:
    """The tile of a kernel. rules: pairs are told apart by "index", by "ids", or by a "mask"."""
    if kernel == "retrieval" and rules == "index":
        # Ranks are asked for now and then: aligned pairs are found as those of labels are.
        rules = "ids"
    elif kernel == "output" and rules == "mask":
        raise ValueError("there are no positives where the output is kept")
    key = (kernel, rules, parts, held_depth(parts, depth))
    return TILES_OF[nearest(architecture)].get(key, TILES[key])


def nearest(architecture: str) -> str:
    """The row of the table for any GPU: those without Hopper's or Blackwell's data-center instructions (sm_86, sm_120) are like sm_80, and
    AMD's like gfx942."""
    kind, _, number = architecture.partition("_")
    if kind != "sm":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(int(number) // 10, "sm_80")
