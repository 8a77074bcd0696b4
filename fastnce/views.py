"""Two views of a batch of examples: what nt_xent and dcl_loss make of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnce import arguments, hints
from fastnce.pairs import Pairs
from fastnce.problem import Problem
from fastnce.wide import shared as shared_uses


def two_views(
    where: str,
    z0: Tensor,
    z1: Tensor | None,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    normalize: bool,
    reduction: str,
    weight: Tensor | None,
) -> tuple[Problem, Tensor | None]:
    """Every row of z = [z0; z1] against all others, the other view of its example being its positive; and the weights of the rows."""
    if z1 is None:
        arguments.features(where, z0=z0)
        if z0.shape[0] % 2:
            raise ValueError(f"{where}: z0 is {tuple(z0.shape)}; without z1 it holds two views, [view 0; view 1]: an even number of rows")
        arguments.values(where, normalize, z0=z0)
        z, wide = z0, None
    else:
        arguments.features(where, z0=z0, z1=z1)
        z0, z1 = arguments.one_dtype(where, z0=z0, z1=z1)
        if z0.shape != z1.shape:
            raise ValueError(f"{where}: z0 is {tuple(z0.shape)} and z1 is {tuple(z1.shape)}; two views have the same number of rows")
        arguments.values(where, normalize, z0=z0, z1=z1)
        z, (wide, other) = torch.cat([z0, z1]), shared_uses(z0, z1)
        wide = None if wide is None or other is None else torch.cat([wide, other])
    rows = z.shape[0]
    arguments.reduction(where, reduction, rows)
    arguments.options(where, normalize=normalize)
    if weight is not None and isinstance(weight, Tensor) and weight.shape == (rows // 2,) and rows:
        weight = torch.cat([weight, weight])
    weight = arguments.weights(where, weight, rows, z, rows // 2)
    hints.temperature(where, temperature, scale, normalize)
    scale = arguments.scale_of(where, temperature, scale, z)
    return Problem(z, None, scale, None, Pairs(True, rows // 2), False, normalize, q_wide=wide), weight
