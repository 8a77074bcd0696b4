"""Operands of one call: rows that are normalised and scaled, and whether sums need a running maximum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastnce.precision import LOG2E, compute_dtype, inverse_norms, valid_scale, vector_dtype
from fastnce.problem import Problem

# While |s| <= 40 nats, bias included, no running maximum is needed, and one exp2 serves row and column: exp(s), its sum over 2^31 terms and
# exp(-lse) are normal float32 numbers. 20 nats are left for rows whose upstream gradient is smaller than the largest. Without a bias, 40
# nats is a temperature of 0.025.
UNSHIFTED = {torch.float32: 40.0, torch.float64: 300.0}


class Work(NamedTuple):
    """A problem with its scaled rows.

    x, y       (M, width), (N, width) root * r * row, contiguous; where k is q, y is x. width: D up to a multiple of `pitch`, with zeros
    r_x, r_y   (M,), (N,) inverse norms; None where normalize is off
    root       sqrt(scale * log2(e))
    bias       the bias in base 2, rounded to the dtype of x; None without one
    unshifted  exponentials stay in range as they are; otherwise every row keeps its running maximum
    in_tile    positives are found tile by tile; otherwise they are one aligned pair per row, kept out of the tiles
    """

    problem: Problem
    x: Tensor
    y: Tensor
    r_x: Tensor | None
    r_y: Tensor | None
    root: Tensor
    bias: Tensor | None
    unshifted: bool
    in_tile: bool

    @staticmethod
    def of(problem: Problem, pitch: int = 1) -> Work:
        q, k, scale = problem.q, problem.keys, problem.scale
        root = (valid_scale(scale).to(vector_dtype(q)) * LOG2E).sqrt()
        x, r_x = _scaled(problem, q, root, pitch)
        y, r_y = (x, r_x) if problem.symmetric else _scaled(problem, k, root, pitch)
        bias = None if problem.bias is None else (problem.bias.detach().to(root.dtype) * LOG2E).to(x.dtype)
        unshifted = False
        if q.device.type == "cpu":
            # Reading a value costs nothing on a CPU. On any other device the host would wait for it, so there is always a running maximum.
            bound = float(scale.detach())
            if not problem.normalize and min(q.shape[0], k.shape[0]) > 0:
                bound = float(torch.linalg.vector_norm(x, dim=1).max() * torch.linalg.vector_norm(y, dim=1).max()) / LOG2E
            if bias is not None:
                bound += abs(float(bias)) / LOG2E
            unshifted = bound <= UNSHIFTED[x.dtype]
        in_tile = not problem.pairs.one_positive_at_most(q.shape[0], problem.symmetric)
        return Work(problem, x, y, r_x, r_y, root, bias, unshifted, in_tile)

    def sides(self) -> list[Tensor]:
        """The sides whose statistics are asked for: the rows, then the columns where two_sided."""
        return [self.x, self.y] if self.problem.two_sided else [self.x]

    def aligned(self) -> tuple[slice, slice]:
        """Rows and columns of the aligned pairs."""
        return self.problem.pairs.aligned(len(self.x), len(self.y))

    def ends(self, i: slice, j: slice) -> list[tuple[int, slice]]:
        """(side, rows of its statistics) to which the pairs (i, j) belong: their rows, and their columns where these are counted too."""
        return [(0, i), (1, j)] if self.problem.two_sided else [(0, i), (0, j)] if self.problem.symmetric else [(0, i)]


def _scaled(problem: Problem, rows: Tensor, root: Tensor, pitch: int) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(rows.dtype)
    r = inverse_norms(rows, problem.metrics) if problem.normalize else None
    # One rounding for each row. A rounding of root alone would shift all logits the same way, and the mean loss with them.
    factor = root.to(dtype) if r is None else (r.to(root.dtype) * root).to(dtype)[:, None]
    columns = rows.shape[1]
    if columns % pitch == 0:
        return (rows.to(dtype) * factor).contiguous(), r
    padded = rows.new_zeros(len(rows), -(-columns // pitch) * pitch, dtype=dtype)
    padded[:, :columns] = rows
    return padded.mul_(factor), r
