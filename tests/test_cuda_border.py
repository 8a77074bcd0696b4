"""The border between Python and the raw memory of the CUDA library: its schemas, and what its operators refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastnce.backends._gpu.host import NONE

pytestmark = pytest.mark.usefixtures("emulated_cuda")

# The outputs of each operator.
WRITES = {
    "tile": set(),
    "runs_on": set(),
    "prepare": {"operand", "factor", "inverse_norm"},
    "aligned": {"t"},
    "finish": {"out"},
    "forward_rows": {"sums", "count"},
    "forward_both": {"row_sum", "row_count", "column_sum", "column_count"},
    "retrieval": {"largest", "counts"},
    "backward_rows": {"dx", "moment"},
    "weights_block": {"for_rows", "for_columns", "moment"},
    "statistics": {"lse_neg", "lse_pos", "pos", "n_pos", "own_neg", "own_pos"},
    "coefficients": {"vectors", "pair_weights", "scalars"},
    "scale_gradient": {"dscale", "dbias"},
}


def test_schemas() -> None:
    """Every operator, and that nothing is returned which is also written."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space == "fastnce_cuda":
            found[name] = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
            assert bool(schema.returns) == (name in ("tile", "runs_on"))
    assert found == WRITES


def vector(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(count, dtype=dtype)


def matrix(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


INT, LONG, DOUBLE = torch.int32, torch.int64, torch.float64
SIZES = [1, 1, 0, 0, 100, 200, NONE, 0, NONE, 0, 0]
TILES: dict[str, Any] = {
    "x": matrix(128, 1, 64), "y": matrix(256, 1, 64), "a": vector(128), "b": vector(256), "scale": vector(1), "bound": vector(1),
    "q_label": None, "k_label": None, "q_exclude": None, "k_exclude": None, "mask": None, "sizes": SIZES,
}  # fmt: skip
SIDE = [vector(100, DOUBLE)] * 3, [*[vector(100, DOUBLE)] * 3, vector(100, LONG), *[vector(100, DOUBLE)] * 2]
CALLS: dict[str, dict[str, Any]] = {
    "tile": {"kernel": "forward_rows", "rules": "index", "parts": 1, "depth": 64, "architecture": 80},
    "prepare": {
        "x": vector(600).view(100, 6), "operand": matrix(128, 2, 64), "factor": vector(128), "inverse_norm": vector(100), "normalize": True,
    },
    "aligned": {
        "x": vector(600).view(100, 6), "y": vector(300).view(50, 6), "r_x": vector(100), "r_y": vector(50), "scale": vector(1),
        "first_row": 60, "first_column": 10, "t": vector(40),
    },
    "finish": {
        "dx": matrix(2, 128, 64, dtype=torch.float32), "x": vector(600).view(100, 6), "y": vector(300).view(50, 6), "r_x": vector(100),
        "r_y": vector(50), "pair": vector(100), "scale": vector(1), "lift": vector(1), "up": 0, "down": NONE, "normalize": True,
        "out": vector(600).view(100, 6),
    },
    "forward_rows": {**TILES, "always": False, "splits": 2, "per_split": 2, "sums": vector(400), "count": None},
    "forward_both": {
        **TILES, "symmetric": False, "splits": 2, "per_split": 1, "row_sum": vector(100), "row_count": None, "column_sum": vector(200),
        "column_count": None,
    },
    "retrieval": {**TILES, "bounds": vector(200), "splits": 2, "per_split": 2, "largest": vector(400), "counts": vector(600, INT)},
    "backward_rows": {
        **TILES, "row": vector(256), "column": vector(512), "center": vector(1), "of_rows": True, "of_columns": True, "splits": 2,
        "per_split": 2, "dx": vector(2 * 128 * 64), "moment": None,
    },
    "weights_block": {
        **TILES, "row": vector(256), "column": vector(512), "center": vector(1), "of_columns": False, "row0": 0, "column0": 128, "down": 1,
        "across": 1, "pitch": 128, "for_rows": matrix(128, 128), "for_columns": None, "moment": None,
    },
    "statistics": {
        "sums": matrix(2, 3, 100, dtype=torch.float32), "count": None, "unshifted": None, "unshifted_count": None, "pairs": vector(40),
        "ends": [60], "bias": None, **{name: vector(100, DOUBLE) for name in ("lse_neg", "lse_pos", "pos", "own_neg", "own_pos")},
        "n_pos": vector(100, LONG),
    },
    "coefficients": {
        "grads": SIDE[0], "stats": SIDE[1], "factors": [vector(128), vector(256)], "bias": None, "pair_t": vector(40, DOUBLE),
        "pair_ends": [60, 0], "in_tile": False, "symmetric": False, "vectors": [vector(256)], "pair_weights": vector(40),
        "scalars": vector(4, DOUBLE),
    },
    "scale_gradient": {
        "scalars": vector(4, DOUBLE), "about": [vector(7)], "divide": 1.0, "scale": vector(1), "dscale": vector(1), "dbias": vector(1),
    },
}  # fmt: skip


def sizes(at: int, value: int) -> list[int]:
    return [*SIZES[:at], value, *SIZES[at + 1 :]]


# (operator, what is given instead, what it says)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("tile", {"kernel": "finish"}, "no kernel finish"),
    ("tile", {"rules": "labels"}, "rules must be index, ids or mask, got labels"),
    ("tile", {"parts": 3}, "parts must be from 1 to 2, got 3"),
    ("tile", {"architecture": 75}, "architecture must be from 80"),
    ("prepare", {"x": matrix(100, 6, dtype=DOUBLE)}, "x must be float32, float16 or bfloat16, got float64"),
    ("prepare", {"x": vector(600).view(6, 100).T}, "x must have neighbours of a row next to each other"),
    ("prepare", {"x": vector(100)}, "x must be a matrix"),
    ("prepare", {"x": vector(0).view(100, 0)}, "x must be from 1"),
    ("prepare", {"x": vector(6500).view(100, 65)}, "an operand of 128 x 64 cannot hold 100 x 65"),
    ("prepare", {"operand": matrix(100, 2, 64)}, "operand must have a multiple of 128 rows, got 100"),
    ("prepare", {"operand": matrix(128, 3, 64)}, "operand must have 1 or 2 parts, got 3"),
    ("prepare", {"operand": matrix(128, 2, 65)}, "operand must have a multiple of 64 columns, got 65"),
    ("prepare", {"operand": matrix(128, 64)}, r"operand must be \(padded rows, parts, depth\)"),
    ("prepare", {"operand": matrix(128, 2, 64, dtype=torch.float32)}, "operand must be float16, got float32"),
    ("prepare", {"factor": vector(127)}, "factor must have 128 elements, got 127"),
    ("prepare", {"inverse_norm": vector(200)[::2]}, "inverse_norm must be contiguous"),
    ("aligned", {"first_row": 61}, "first_row must be from 0 to 60, got 61"),
    ("aligned", {"first_column": -1}, "first_column must be from 0 to 10, got -1"),
    ("aligned", {"y": vector(350).view(50, 7)}, "x and y must have the same width and dtype"),
    ("aligned", {"r_y": vector(100)}, "r_y must have 50 elements, got 100"),
    ("finish", {"dx": matrix(2, 99, 64, dtype=torch.float32)}, "dx must be .splits, rows.., columns..."),
    ("finish", {"dx": matrix(2, 128, 64)}, "dx must be float32"),
    ("finish", {"out": matrix(100, 6)}, "out must be contiguous and like x"),
    ("finish", {"up": 2**31}, "up must be from -2147483647 to 2147483647"),
    ("finish", {"lift": vector(1, DOUBLE)}, "lift must be float32, got float64"),
    ("forward_rows", {"sizes": SIZES[:-1]}, "sizes must have 11 entries, got 10"),
    ("forward_rows", {"sizes": sizes(4, 129)}, "rows must be from 0 to 128, got 129"),
    ("forward_rows", {"sizes": sizes(5, 257)}, "columns must be from 0 to 256, got 257"),
    ("retrieval", {"sizes": sizes(10, 1)}, "family 1 has no such kernel for operands of 1 x 64"),
    ("forward_rows", {"splits": 1, "per_split": 3}, "1 splits of 3 tiles do not cover 4"),
    ("forward_rows", {"sizes": sizes(6, -(2**31))}, "own must be from"),
    ("forward_rows", {"sizes": sizes(9, 2)}, "in_tile must be from 0 to 1, got 2"),
    ("forward_rows", {"sizes": sizes(10, 2)}, "family must be from 0 to 1, got 2"),
    ("forward_rows", {"sizes": sizes(9, 1), "sums": vector(1000)}, "positives in the tiles must have a count"),
    ("forward_rows", {"y": matrix(256, 1, 128)}, "operands must have the same form, got 1 x 64 and 1 x 128"),
    ("forward_rows", {"a": vector(132)[1:129]}, "factor a must be aligned to 16 bytes"),
    ("forward_rows", {"q_label": vector(128, INT)}, "ids must be given for both sides or for none"),
    ("forward_rows", {"q_exclude": vector(128, LONG)}, "q_exclude must be int32, got int64"),
    ("forward_rows", {"mask": matrix(1, 1)}, "mask must be bool or uint8, got float16"),
    ("forward_rows", {"mask": torch.ones(2, 1, dtype=torch.bool)}, "sizes must hold the shape and the strides of mask"),
    ("forward_rows", {"splits": 0}, "splits must be from 1"),
    ("forward_rows", {"per_split": 0}, "per_split must be from 1"),
    ("forward_rows", {"sums": vector(401)}, "sums must have 400 elements, got 401"),
    ("forward_both", {"symmetric": True}, "a symmetric problem must have as many columns as rows"),
    ("forward_both", {"column_sum": vector(100)}, "column_sum must have 200 elements, got 100"),
    ("retrieval", {"counts": vector(600, LONG)}, "counts must be int32, got int64"),
    ("retrieval", {"bounds": vector(100)}, "bounds must have 200 elements, got 100"),
    ("backward_rows", {"of_rows": False, "of_columns": False}, "the weights must be of rows, of columns, or of both"),
    ("backward_rows", {"column": vector(256)}, "column must have 512 elements, got 256"),
    ("backward_rows", {"moment": vector(100)}, "moment must have 200 elements, got 100"),
    ("weights_block", {"column0": 256}, "leave a block of 128 or operands of 128 and 256 rows"),
    ("weights_block", {"for_columns": matrix(128, 64)}, "for_columns must have 16384 elements, got 8192"),
    ("statistics", {"sums": matrix(3, 3, 100, dtype=torch.float32)}, "sums must be .2 or 5, splits, rows."),
    ("statistics", {"pairs": None}, "positives must be counted in the tiles, or given as pairs"),
    ("statistics", {"ends": [1, 2, 3]}, "ends must have 1 or 2 entries, got 3"),
    ("statistics", {"ends": [61]}, "ends must be from 0 to 60, got 61"),
    ("statistics", {"pos": vector(100)}, "pos must be float64, got float32"),
    ("statistics", {"n_pos": vector(100, INT)}, "n_pos must be int64, got int32"),
    ("coefficients", {"grads": SIDE[0][:2]}, "1 sides must have 3 grads, 6 stats and 2 factors, got 2, 6 and 2"),
    ("coefficients", {"pair_weights": None}, "pairs must have both t and weights"),
    ("coefficients", {"pair_ends": [61, 0]}, r"pair_ends\[0\] must be from 0 to 60, got 61"),
    ("coefficients", {"scalars": vector(5, DOUBLE)}, "scalars must have 4 elements, got 5"),
    ("coefficients", {"vectors": [vector(100)]}, "vectors must have 256 elements, got 100"),
    ("scale_gradient", {"about": [vector(7)] * 5}, "parts of about must be from 0 to 4, got 5"),
]


@pytest.mark.parametrize(("operator", "given", "message"), REFUSED, ids=[f"{name} {', '.join(given)}" for name, given, _ in REFUSED])
def test_arguments_are_checked(operator: str, given: dict[str, Any], message: str) -> None:
    """Before a pointer is read: these operators are the border between Python and raw memory."""
    getattr(torch.ops.fastnce_cuda, operator)(**CALLS[operator])
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastnce_cuda, operator)(**CALLS[operator] | given)
