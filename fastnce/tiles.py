"""Tile sizes, and the only place that knows one: nothing is tuned at run time, so equal problems run equal programs."""

from __future__ import annotations

from typing import NamedTuple

# A 512 x 512 float32 tile is 1 MiB: it stays in the L2 cache of one core between its matrix product, exp2, sums and second product.
# Measured on an AMD Zen 5 core at N = 4096: 2048 x 2048 loses 30 to 80 %, 256 x 256 loses 0 to 9 %. Square, because where k is q a tile
# must be its own mirror image on the diagonal.
CPU_TILE = 512

# Rows per step of the O(N D) passes that would otherwise allocate another copy of their input.
CPU_ROWS = 4096

# Numbers of the keys that are listed for single queries which are read at a time, where they are converted or multiplied one by one:
# 4 MiB of float32. Pieces that stay in L2 between their passes gain up to a tenth, and start four times as many parallel loops, whose
# threads wait for each other. On a GPU 16 MiB, so that its launches are few.
CPU_LISTED = 2**20
GPU_LISTED = 2**22
# Keys of one query whose sum is made at once: the terms of a float32 sum lose a bit each time their number doubles twice.
CPU_SUM = 512


class Tile(NamedTuple):
    """One program: rows x columns of logits, D in steps of depth, and how the compiler lays it out."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# GPU kernels: D is padded to one of these and held whole; a longer D is padded to a multiple of GPU_DEPTH and read in steps.
GPU_DEPTHS = (64, 128, 256)
GPU_WHOLE = GPU_DEPTHS[-1]
GPU_DEPTH = 64
# Operands are padded to this many rows, a multiple of every tile.
GPU_PADDED = 128
# Programs that a launch should have at least, per multiprocessor: fewer row blocks are split along the columns, in a fixed order.
GPU_PROGRAMS = 2
# Long rows: the gradient is made in blocks of this many rows and columns of weights, which fill a fixed workspace that stays in L2.
GPU_BLOCK = 4096
# Columns of weights whose products tensor cores add up for float32 in two parts: of such a sum they may lose 2^-20, see kernels.py.
GPU_SUM = 512


class CudaTile(NamedTuple):
    """What a CUDA kernel takes: rows x columns of logits; family is opaque and goes back to the library that named it."""

    rows: int
    columns: int
    family: int


# Triton: rows per program of the passes over single rows, and columns per step.
TRITON_ROWS = (8, 128)

# (kernel, how pairs are told apart, parts of the operand, padded D or 0 for long rows) -> tile. Parts: 1 float16, 2 float32 as a high and a
# low half. Looking at ids takes registers, a mask an address per pair: hence the smaller tiles. Each was the first of a list, from large
# to small, that neither spills nor serialises its products with Triton 3.6.0 and 3.9.0 (docs/backends.md); no timing has been recorded.
_TRITON: dict[tuple[str, str, int, int], Tile] = {
    ("rows", "index", 1, 64): Tile(128, 128, 64, 4, 3),
    ("rows", "index", 1, 128): Tile(128, 128, 128, 4, 2),
    ("rows", "index", 1, 256): Tile(64, 64, 256, 4, 2),
    ("rows", "index", 1, 0): Tile(128, 128, 64, 4, 3),
    ("rows", "index", 2, 64): Tile(64, 64, 64, 4, 2),
    ("rows", "index", 2, 128): Tile(64, 64, 128, 4, 2),
    ("rows", "index", 2, 0): Tile(64, 64, 64, 4, 2),
    ("both", "index", 1, 64): Tile(128, 128, 64, 4, 3),
    ("both", "index", 1, 128): Tile(128, 128, 128, 4, 2),
    ("both", "index", 1, 256): Tile(64, 64, 256, 4, 2),
    ("both", "index", 1, 0): Tile(128, 128, 64, 4, 3),
    ("both", "index", 2, 64): Tile(64, 64, 64, 4, 2),
    ("both", "index", 2, 128): Tile(64, 64, 128, 4, 2),
    ("both", "index", 2, 0): Tile(64, 64, 64, 4, 2),
    ("output", "index", 1, 64): Tile(128, 64, 64, 4, 3),
    ("output", "index", 1, 128): Tile(64, 64, 128, 4, 2),
    ("output", "index", 1, 256): Tile(64, 64, 256, 4, 2),
    ("output", "index", 2, 64): Tile(64, 64, 64, 4, 2),
    ("output", "index", 2, 128): Tile(64, 64, 128, 8, 2),
    ("gradient", "index", 1, 64): Tile(64, 64, 64, 4, 3),
    ("gradient", "index", 1, 128): Tile(64, 64, 128, 4, 2),
    ("gradient", "index", 1, 256): Tile(128, 32, 256, 8, 2),
    ("gradient", "index", 2, 64): Tile(64, 64, 64, 4, 2),
    ("gradient", "index", 2, 128): Tile(64, 64, 128, 8, 2),
    ("block", "index", 1, 0): Tile(128, 128, 64, 8, 3),
    ("block", "index", 2, 0): Tile(128, 128, 64, 8, 2),
    ("rows", "ids", 1, 64): Tile(64, 64, 64, 8, 3),
    ("rows", "ids", 1, 128): Tile(64, 64, 128, 8, 2),
    ("rows", "ids", 1, 256): Tile(64, 64, 256, 8, 1),
    ("rows", "ids", 1, 0): Tile(64, 64, 64, 4, 1),
    ("rows", "ids", 2, 64): Tile(64, 64, 64, 8, 2),
    ("rows", "ids", 2, 128): Tile(64, 32, 128, 4, 2),
    ("rows", "ids", 2, 0): Tile(64, 64, 64, 4, 1),
    ("both", "ids", 1, 64): Tile(64, 64, 64, 8, 3),
    ("both", "ids", 1, 128): Tile(64, 64, 128, 8, 2),
    ("both", "ids", 1, 256): Tile(64, 64, 256, 8, 2),
    ("both", "ids", 1, 0): Tile(64, 64, 64, 8, 3),
    ("both", "ids", 2, 64): Tile(64, 64, 64, 8, 2),
    ("both", "ids", 2, 128): Tile(64, 64, 128, 8, 1),
    ("both", "ids", 2, 0): Tile(64, 64, 64, 8, 2),
    ("output", "ids", 1, 64): Tile(64, 64, 64, 4, 3),
    ("output", "ids", 1, 128): Tile(64, 64, 128, 4, 2),
    ("output", "ids", 1, 256): Tile(128, 32, 256, 8, 2),
    ("output", "ids", 2, 64): Tile(64, 64, 64, 4, 2),
    ("output", "ids", 2, 128): Tile(64, 32, 128, 4, 2),
    ("gradient", "ids", 1, 64): Tile(64, 64, 64, 4, 3),
    ("gradient", "ids", 1, 128): Tile(64, 64, 128, 8, 1),
    ("gradient", "ids", 1, 256): Tile(128, 32, 256, 8, 2),
    ("gradient", "ids", 2, 64): Tile(64, 64, 64, 4, 2),
    ("gradient", "ids", 2, 128): Tile(64, 32, 128, 8, 2),
    ("block", "ids", 1, 0): Tile(128, 64, 64, 8, 3),
    ("block", "ids", 2, 0): Tile(128, 64, 64, 8, 2),
    ("retrieval", "ids", 1, 64): Tile(64, 64, 64, 4, 3),
    ("retrieval", "ids", 1, 128): Tile(64, 64, 128, 4, 2),
    ("retrieval", "ids", 1, 256): Tile(64, 64, 256, 4, 2),
    ("retrieval", "ids", 1, 0): Tile(64, 64, 64, 4, 3),
    ("retrieval", "ids", 2, 64): Tile(64, 64, 64, 4, 2),
    ("retrieval", "ids", 2, 128): Tile(64, 64, 128, 4, 2),
    ("retrieval", "ids", 2, 0): Tile(64, 64, 64, 4, 2),
    ("rows", "mask", 1, 64): Tile(64, 64, 64, 4, 3),
    ("rows", "mask", 1, 128): Tile(64, 32, 128, 4, 2),
    ("rows", "mask", 1, 256): Tile(64, 32, 256, 4, 2),
    ("rows", "mask", 1, 0): Tile(64, 64, 64, 4, 3),
    ("rows", "mask", 2, 64): Tile(64, 64, 64, 4, 2),
    ("rows", "mask", 2, 128): Tile(64, 32, 128, 8, 2),
    ("rows", "mask", 2, 0): Tile(64, 64, 64, 8, 2),
    ("both", "mask", 1, 64): Tile(64, 64, 64, 4, 3),
    ("both", "mask", 1, 128): Tile(32, 32, 128, 4, 2),
    ("both", "mask", 1, 256): Tile(32, 32, 256, 4, 2),
    ("both", "mask", 1, 0): Tile(64, 64, 64, 4, 3),
    ("both", "mask", 2, 64): Tile(64, 64, 64, 4, 2),
    ("both", "mask", 2, 128): Tile(32, 32, 128, 4, 2),
    ("both", "mask", 2, 0): Tile(64, 64, 64, 4, 1),
    ("gradient", "mask", 1, 64): Tile(64, 64, 64, 8, 1),
    ("gradient", "mask", 1, 128): Tile(32, 32, 128, 4, 2),
    ("gradient", "mask", 1, 256): Tile(64, 32, 256, 8, 1),
    ("gradient", "mask", 2, 64): Tile(64, 64, 64, 8, 1),
    ("gradient", "mask", 2, 128): Tile(32, 32, 128, 4, 2),
    ("block", "mask", 1, 0): Tile(64, 64, 64, 8, 3),
    ("block", "mask", 2, 0): Tile(64, 64, 64, 8, 2),
}
# Where an architecture wants another one than the table's, which is for sm_90.
_TRITON_OF: dict[str, dict[tuple[str, str, int, int], Tile]] = {
    "sm_80": {
        ("rows", "index", 1, 64): Tile(128, 128, 64, 8, 3),
        ("rows", "index", 1, 128): Tile(128, 128, 128, 8, 2),
        ("rows", "index", 1, 256): Tile(64, 64, 256, 4, 1),
        ("rows", "index", 1, 0): Tile(128, 128, 64, 8, 3),
        ("rows", "index", 2, 128): Tile(64, 64, 128, 8, 2),
        ("both", "index", 1, 64): Tile(128, 128, 64, 8, 3),
        ("both", "index", 1, 128): Tile(128, 128, 128, 8, 2),
        ("both", "index", 1, 0): Tile(128, 128, 64, 8, 3),
        ("output", "index", 1, 64): Tile(64, 64, 64, 4, 3),
        ("output", "index", 1, 128): Tile(64, 64, 128, 8, 2),
        ("output", "index", 1, 256): Tile(64, 32, 256, 8, 2),
        ("output", "index", 2, 64): Tile(64, 32, 64, 4, 2),
        ("output", "index", 2, 128): Tile(32, 64, 128, 8, 2),
        ("gradient", "index", 1, 128): Tile(64, 64, 128, 8, 2),
        ("gradient", "index", 1, 256): Tile(64, 32, 256, 8, 2),
        ("gradient", "index", 2, 64): Tile(64, 32, 64, 4, 2),
        ("gradient", "index", 2, 128): Tile(64, 64, 128, 8, 1),
        ("block", "index", 2, 0): Tile(128, 64, 64, 8, 2),
        ("rows", "ids", 1, 64): Tile(64, 32, 64, 8, 2),
        ("rows", "ids", 1, 256): Tile(32, 32, 256, 4, 2),
        ("rows", "ids", 1, 0): Tile(64, 64, 64, 8, 3),
        ("rows", "ids", 2, 64): Tile(64, 32, 64, 4, 2),
        ("rows", "ids", 2, 128): Tile(32, 32, 128, 4, 2),
        ("rows", "ids", 2, 0): Tile(64, 32, 64, 4, 2),
        ("both", "ids", 1, 0): Tile(64, 64, 64, 8, 1),
        ("both", "ids", 2, 64): Tile(32, 32, 64, 4, 2),
        ("both", "ids", 2, 128): Tile(32, 32, 128, 4, 2),
        ("both", "ids", 2, 0): Tile(32, 32, 64, 4, 2),
        ("output", "ids", 1, 128): Tile(64, 64, 128, 8, 2),
        ("output", "ids", 1, 256): Tile(64, 32, 256, 8, 2),
        ("output", "ids", 2, 64): Tile(64, 32, 64, 4, 2),
        ("output", "ids", 2, 128): Tile(32, 64, 128, 8, 2),
        ("gradient", "ids", 1, 64): Tile(64, 64, 64, 8, 2),
        ("gradient", "ids", 1, 256): Tile(32, 32, 256, 4, 2),
        ("gradient", "ids", 2, 64): Tile(64, 32, 64, 4, 2),
        ("gradient", "ids", 2, 128): Tile(32, 64, 128, 4, 1),
        ("rows", "mask", 1, 64): Tile(64, 64, 64, 8, 3),
        ("rows", "mask", 1, 128): Tile(32, 32, 128, 4, 2),
        ("rows", "mask", 1, 256): Tile(32, 32, 256, 4, 2),
        ("rows", "mask", 2, 64): Tile(64, 64, 64, 8, 2),
        ("rows", "mask", 2, 128): Tile(32, 16, 128, 4, 2),
        ("rows", "mask", 2, 0): Tile(64, 32, 64, 8, 2),
        ("both", "mask", 1, 64): Tile(64, 64, 64, 8, 3),
        ("both", "mask", 1, 0): Tile(64, 64, 64, 8, 3),
        ("both", "mask", 2, 64): Tile(32, 32, 64, 4, 2),
        ("both", "mask", 2, 0): Tile(32, 32, 64, 4, 2),
        ("gradient", "mask", 1, 64): Tile(32, 64, 64, 4, 3),
        ("gradient", "mask", 1, 256): Tile(32, 32, 256, 8, 2),
        ("gradient", "mask", 2, 64): Tile(32, 64, 64, 4, 1),
        ("gradient", "mask", 2, 128): Tile(32, 32, 128, 8, 2),
        ("block", "mask", 2, 0): Tile(64, 32, 64, 4, 2),
    },
    "sm_90": {},
    "sm_100": {
        ("rows", "index", 1, 64): Tile(128, 128, 64, 4, 1),
        ("rows", "index", 1, 128): Tile(128, 128, 128, 4, 1),
        ("rows", "index", 2, 0): Tile(64, 64, 64, 8, 2),
        ("both", "index", 1, 64): Tile(128, 128, 64, 4, 1),
        ("both", "index", 1, 128): Tile(128, 128, 128, 4, 1),
        ("both", "index", 1, 0): Tile(128, 128, 64, 4, 1),
        ("output", "index", 1, 64): Tile(64, 64, 64, 4, 3),
        ("output", "index", 1, 256): Tile(64, 64, 256, 4, 1),
        ("gradient", "index", 1, 256): Tile(128, 32, 256, 8, 1),
        ("gradient", "index", 2, 64): Tile(64, 64, 64, 8, 2),
        ("gradient", "index", 2, 128): Tile(64, 32, 128, 8, 2),
        ("block", "index", 1, 0): Tile(128, 64, 64, 8, 3),
        ("block", "index", 2, 0): Tile(128, 64, 64, 8, 2),
        ("rows", "ids", 1, 256): Tile(64, 32, 256, 4, 2),
        ("rows", "ids", 1, 0): Tile(64, 64, 64, 8, 3),
        ("rows", "ids", 2, 0): Tile(64, 64, 64, 8, 2),
        ("both", "ids", 2, 128): Tile(64, 64, 128, 8, 2),
        ("both", "ids", 2, 0): Tile(64, 64, 64, 8, 1),
        ("output", "ids", 2, 128): Tile(64, 64, 128, 8, 2),
        ("gradient", "ids", 1, 64): Tile(64, 64, 64, 8, 3),
        ("gradient", "ids", 1, 256): Tile(128, 32, 256, 8, 1),
        ("gradient", "ids", 2, 64): Tile(64, 64, 64, 8, 2),
        ("gradient", "ids", 2, 128): Tile(64, 32, 128, 8, 1),
        ("block", "ids", 1, 0): Tile(64, 64, 64, 8, 3),
        ("block", "ids", 2, 0): Tile(64, 64, 64, 8, 2),
        ("retrieval", "ids", 1, 0): Tile(64, 64, 64, 4, 1),
        ("rows", "mask", 1, 128): Tile(32, 32, 128, 4, 2),
        ("rows", "mask", 1, 256): Tile(32, 32, 256, 4, 2),
        ("gradient", "mask", 1, 64): Tile(32, 64, 64, 4, 3),
        ("gradient", "mask", 2, 64): Tile(32, 64, 64, 4, 2),
        ("block", "mask", 1, 0): Tile(64, 32, 64, 4, 3),
        ("block", "mask", 2, 0): Tile(32, 32, 64, 4, 2),
    },
    "gfx942": {},
}


def gpu_depth(columns: int) -> int:
    """D as the operands hold it."""
    return next((d for d in GPU_DEPTHS if columns <= d), -(-columns // GPU_DEPTH) * GPU_DEPTH)


def triton(kernel: str, rules: str, architecture: str, parts: int, depth: int) -> Tile:
    """The tile of a kernel. rules: pairs are told apart by "index", by "ids", or by a "mask"."""
    if kernel == "retrieval":
        # Ranks are asked for now and then: one tile, whatever the rules.
        rules = "ids"
    elif kernel == "output" and rules == "mask":
        raise ValueError("there are no positives where the output is kept")
    key = (kernel, rules, parts, depth if depth * parts <= GPU_WHOLE else 0)
    return _TRITON_OF[nearest(architecture)].get(key, _TRITON[key])


def nearest(architecture: str) -> str:
    """The row of the table for any GPU: those without Hopper's or Blackwell's data-center instructions (sm_86, sm_120) are like sm_80."""
    kind, _, number = architecture.partition("_")
    if kind != "sm":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(int(number) // 10, "sm_80")
