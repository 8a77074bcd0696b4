"""Half-precision tensors that one loss uses more than once: their gradients are added before they are rounded.

Each use of a tensor gives it a gradient, and autograd adds these in the tensor's own dtype: in half precision it would add what is rounded
already, and where the gradients cancel (features with a common part) only rounding is left. So such a tensor gets a stand-in in the inner
precision. Gradients go to the stand-in, are added there, and are rounded once on the way to the tensor.
"""

from __future__ import annotations

from torch import Tensor

from fastnce import autograd
from fastnce.precision import compute_dtype


def shared(*uses: Tensor) -> list[Tensor | None]:
    """For every use of a feature tensor in a loss: the stand-in that takes the gradient of that use, or None where the tensor does.

    Those that occur once, and those of the inner precision, need none. A stand-in is one number expanded to the tensor's shape: it takes
    no memory. Each use gets an object of its own, because Dynamo refuses the same one twice.
    """
    found: list[Tensor | None] = [None] * len(uses)
    for n, x in enumerate(uses):
        same = [m for m, other in enumerate(uses) if other is x]
        if same[0] == n and len(same) > 1 and x.dtype != compute_dtype(x.dtype):
            stand_in = autograd.wide(x)
            for m in same:
                found[m] = stand_in.view_as(stand_in)
    return found
