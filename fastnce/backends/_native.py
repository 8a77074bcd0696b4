"""The tiles of the CPU backend in csrc/cpu, where that library is built: float32 on the CPU, every rule and statistic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce import native
from fastnce.pairs import Pairs

PITCH = 16  # floats: csrc/cpu/problem.h


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library is there and computes in this dtype."""
    return device.type == "cpu" and dtype == torch.float32 and native.objection("cpu") is None


def pitched(columns: int) -> int:
    """The width that the kernels read: columns rounded up to whole vectors, for any rows at all."""
    return -(-columns // PITCH) * PITCH


def rules(pairs: Pairs, symmetric: bool) -> list[object]:
    """The arguments of both operators that say which pair is what."""
    ids = [pairs.q_label, None if symmetric else pairs.k_label, pairs.q_exclude, None if symmetric else pairs.k_exclude]
    dense = [None if vector is None else _aligned(vector.to(torch.int64).contiguous()) for vector in ids]
    return [pairs.offset, *dense, None if pairs.mask is None else pairs.mask.contiguous()]


def _aligned(ids: Tensor) -> Tensor:
    """The user's own may lie anywhere: numpy reads them from the middle of a file."""
    return ids if ids.data_ptr() % ids.element_size() == 0 else ids.clone()


def best_positives(x: Tensor, y: Tensor | None, depth: int, flags: Sequence[bool], pairs: Pairs, best: list[Tensor]) -> None:
    torch.ops.fastnce_cpu.best_positives(x, y, depth, [int(flag) for flag in flags], *rules(pairs, y is None), best)


def forward(x: Tensor, y: Tensor | None, depth: int, flags: Sequence[bool], pairs: Pairs, sums: list[Tensor]) -> None:
    torch.ops.fastnce_cpu.forward(x, y, depth, [int(flag) for flag in flags], *rules(pairs, y is None), sums)


def backward(
    x: Tensor,
    y: Tensor | None,
    depth: int,
    flags: Sequence[bool],
    pairs: Pairs,
    weights: list[Tensor],
    center: float,
    dx: Tensor | None,
    dy: Tensor | None,
    moment: Tensor | None,
) -> None:
    arguments = (weights, center, dx, dy, moment)
    torch.ops.fastnce_cpu.backward(x, y, depth, [int(flag) for flag in flags], *rules(pairs, y is None), *arguments)
