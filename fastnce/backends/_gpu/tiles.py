"""Sizes that the backends with GPU kernels share: how operands are padded, and how the host cuts its work into launches.

The shape of a tile is the kernel's own: backends/triton/tiles.py, csrc/cuda/tiles.cu.
"""

from __future__ import annotations

# D is padded to one of these, and a tile holds whole rows. A longer D is padded to a multiple of STEP, and read in steps.
DEPTHS = (64, 128, 256)
STEP = 64
# A tile holds rows of up to this many float16 numbers: a float32 row has two of them for each of its own.
LONGEST_HELD = DEPTHS[-1]
# Operands are padded to this many rows, a multiple of every tile's rows and columns.
PADDED = 128
# A launch should have this many programs per multiprocessor. Where there are fewer row blocks, each is split along its columns.
PROGRAMS = 2
# Long rows: this many rows and columns of weights are made at a time. They fill a workspace that stays in L2.
BLOCK = 4096
# Long float32 rows: tensor cores add up this many columns of weights at a time. Of a longer sum they could lose more than 2^-20 of it.
SUM = 512


def padded_depth(columns: int) -> int:
    """D as the operands have it."""
    return next((depth for depth in DEPTHS if columns <= depth), -(-columns // STEP) * STEP)


def held_depth(parts: int, depth: int) -> int:
    """The padded D where a tile holds whole rows of so many parts, otherwise 0."""
    return depth if depth * parts <= LONGEST_HELD else 0
