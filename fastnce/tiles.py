"""Tile sizes, and the only place that knows one."""

from __future__ import annotations

# A 512 x 512 float32 tile is 1 MiB: it stays in the L2 cache of one core between its matrix product, exp2, sums and second product.
# Measured on an AMD Zen 5 core at N = 4096: 2048 x 2048 loses 30 to 80 %, 256 x 256 loses 0 to 9 %. Square, because where k is q a tile
# must be its own mirror image on the diagonal.
CPU_TILE = 512

# Rows per step of the O(N D) passes that would otherwise allocate another copy of their input.
CPU_ROWS = 4096
