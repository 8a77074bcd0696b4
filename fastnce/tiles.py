"""Sizes of the passes that torch operations make over tiles, rows and listed pairs, on any device.

The GPU kernels have their own: backends/_gpu/tiles.py, and beside the kernels backends/triton/tiles.py and csrc/cuda/tiles.cu.
"""

from __future__ import annotations

from torch import Tensor

# A 512 x 512 float32 tile is 1 MiB: it stays in the L2 cache of one core between its matrix product, exp2, sums and second product.
# Measured on an AMD Zen 5 core at N = 4096: 2048 x 2048 loses 30 to 80 %, 256 x 256 loses 0 to 9 %. Square, because where k is q a tile
# must be its own mirror image on the diagonal.
CPU_TILE = 512
# On other devices each operation on a tile is a launch, which costs the host about 5 us however small the tile is. A step of any loss with
# 16,384 rows is at most 500 launches with this tile, and more than 11,000 with the CPU's. A float32 tile is 64 MiB, and up to six of its
# size exist at a time, or seven where the temperature is learned.
GPU_TILE = 4096

# A sum of a tile is brought to the maximum of its row by a dozen operations on vectors. On a CPU that happens tile by tile. Elsewhere each
# operation is a launch, so the sums of this many tiles wait for it: 64 bytes a row, or 128 with positives inside of the tiles.
CPU_WAITING, GPU_WAITING = 1, 8

# Rows per step of the O(N D) passes that would otherwise allocate another copy of their input; off the CPU as many as fill a tile.
CPU_ROWS = 4096

# Listed keys are converted or multiplied one by one. So many of their numbers are read at a time: on a CPU 4 MiB of float32, on a GPU
# 16 MiB. On a CPU, pieces that stay in L2 between their passes gain up to a tenth, but start four times as many parallel loops, whose
# threads wait for each other. On a GPU, large pieces mean few launches.
CPU_LISTED = 2**20
GPU_LISTED = 2**22
# Listed keys of one query are summed in groups of this many: a float32 sum loses a bit each time the number of its terms doubles twice.
CPU_SUM = 512


def tile_of(x: Tensor) -> int:
    """Rows and columns of a tile on the device of x."""
    return CPU_TILE if x.device.type == "cpu" else GPU_TILE


def waiting_of(x: Tensor) -> int:
    """Tiles of a row whose sums wait for each other on the device of x."""
    return CPU_WAITING if x.device.type == "cpu" else GPU_WAITING


def rows_of(x: Tensor) -> int:
    """Rows of x per step of a pass that allocates a copy of them."""
    return CPU_ROWS if x.device.type == "cpu" else GPU_TILE**2 // max(x.shape[1], 1) + 1
