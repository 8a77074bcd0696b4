"""Half-precision tensors that one loss uses more than once: their gradients are added before they are rounded.

Every use of a tensor gives it a gradient, and autograd adds these gradients in the tensor's own dtype. In half precision each is rounded
before it is added. Where the gradients cancel (features with a common part), only the rounding would be left. So such a tensor gets a
stand-in in the inner precision: gradients go to the stand-in, are added there, and are rounded once on the way to the tensor.
"""

from __future__ import annotations

from torch import Tensor

from fastnce import autograd
from fastnce.precision import compute_dtype


def shared(*uses: Tensor) -> list[Tensor | None]:
    """For every use of a feature tensor in a loss: the stand-in that takes the gradient of this use, or None where the tensor takes it.

    A tensor that is used once, or has the inner precision, needs none. A stand-in is one number expanded to the tensor's shape: it takes no
    memory. Every use gets an object of its own, because Dynamo refuses the same one twice.
    """
    found: list[Tensor | None] = [None] * len(uses)
    for n, x in enumerate(uses):
        same = [m for m, other in enumerate(uses) if other is x]
        if same[0] == n and len(same) > 1 and x.dtype != compute_dtype(x.dtype):
            stand_in = autograd.wide(x)
            for m in same:
                found[m] = stand_in.view_as(stand_in)
    return found
