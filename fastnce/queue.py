"""The queue of negatives of MoCo."""

from __future__ import annotations

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce import checks


class NegativeQueue(nn.Module):
    """The last `size` keys, a ring buffer that wraps at any batch size; keys and pointer are in the state_dict (persistent=True).

    keys      (size, dim) buffer; random unit rows to start with, as MoCo
    pointer   0-dim int64 buffer: where the next key goes

    The loss reads `keys` in place, without a copy. Call enqueue after backward: in between, autograd refuses it ("modified by an inplace
    operation"). He et al. 2020 (arXiv:1911.05722), algorithm 1.

    >>> queue = NegativeQueue(4, 2)
    >>> queue.enqueue(torch.ones(3, 2)); queue.enqueue(torch.zeros(3, 2)); queue.keys[:, 0].tolist()
    [0.0, 0.0, 1.0, 0.0]
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, persistent: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"NegativeQueue: {name} must be a positive integer, got {value!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"NegativeQueue: dtype must be a floating-point dtype, got {dtype}")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1).to(dtype or torch.get_default_dtype()), persistent)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64), persistent)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys (B, dim) in the place of the oldest; of more than `size`, the last ones stay. No host synchronisation."""
        checks.features("NegativeQueue.enqueue", keys=keys)
        size, dim = self.keys.shape
        if keys.shape[1] != dim:
            raise ValueError(f"NegativeQueue.enqueue: keys is {tuple(keys.shape)}; this queue holds rows of {dim}")
        checks.same_device("NegativeQueue.enqueue", queue=self.keys, keys=keys)
        kept = keys[-size:] if keys.shape[0] > size else keys
        start = self.pointer + (keys.shape[0] - kept.shape[0])
        places = (start + torch.arange(kept.shape[0], device=kept.device)) % size
        self.keys.index_copy_(0, places, kept.to(self.keys.dtype))
        self.pointer.copy_((self.pointer + keys.shape[0]) % size)

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"
