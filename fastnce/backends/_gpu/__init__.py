"""The host algorithm of the backends with GPU kernels: operands, launches over the tiles, O(N) arithmetic.

What a backend brings is a module of launch functions, here `kernels`:

    tile(kernel, rules, device, parts, depth)                       rows and columns of the tile that a kernel of this name takes
    keeps_output(problem)                                           see Side.own_pos; only where it may be true: forward_output
    forward_rows(view, walk, always, sums, count)                   "rows"
    forward_output(view, walk, sums, out, moment, lift)             "output"
    forward_both(view, walk, row_sums, column_sums)                 "both"
    retrieval(view, walk, bounds, largest, counts)                  "retrieval"
    backward_rows(view, walk, row, column, center, rows, columns, dx, moment)                                                "gradient"
    weights_block(view, tile, row, column, center, columns, row0, column0, down, across, pitch, for_rows, for_columns, moment)  "block"

and, where the CUDA library does not serve both backends (rows.py), its own passes over single rows: prepare, aligned, finish.
"""
