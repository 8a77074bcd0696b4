"""The backends `triton` and `cuda` on the host: operands, launches over the tiles in their order, O(N) arithmetic.

    limits.py       problems that the kernels can run
    tiles.py        sizes of operands and launches
    host.py         operands, and the arguments that every launch over tiles has
    statistics.py   forward
    gradients.py    backward

Each backend brings a module of launch functions, here `kernels`:

    tile(kernel, rules, device, parts, depth)                       rows and columns of the tile that a kernel of this name takes
    keeps_output(problem)                                           see Side.own_pos; only where it may be true: forward_output
    forward_rows(view, walk, always, sums, count)                   "rows"
    forward_output(view, walk, sums, out, moment, lift)             "output"
    forward_both(view, walk, row_sums, column_sums)                 "both"
    backward_rows(view, walk, row, column, center, rows, columns, dx, moment)                                                "gradient"
    weights_block(view, tile, row, column, center, columns, row0, column0, down, across, pitch, for_rows, for_columns, moment)  "block"

and passes over single rows: prepare, statistics, with_metrics, coefficients, finish.
"""
