"""The queue of negatives of MoCo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce import arguments


class NegativeQueue(nn.Module):
    """The last `size` keys, in a ring buffer: the negatives of moco_loss.

    Args:
        size: K, how many keys it holds.
        dim: D, the width of a key.
        persistent: whether keys and pointer are in the state_dict. Default: True.
        dtype: floating-point dtype of the keys. Default: torch's default dtype.

    Attributes:
        keys: (K, D) buffer. It begins with random unit rows, as in MoCo.
        pointer: 0-dim int64 buffer, the row that the next key goes to.

    Raises:
        ValueError: size or dim is no positive integer.
        TypeError: dtype is no floating-point dtype.

    Example:
        >>> queue = fastnce.NegativeQueue(4, 2)
        >>> queue.enqueue(torch.ones(3, 2))
        >>> queue.enqueue(torch.zeros(3, 2))
        >>> queue.keys[:, 0].tolist()
        [0.0, 0.0, 1.0, 0.0]

    moco_loss reads `keys` in place, without a copy, so call enqueue after backward; in between, backward raises and says so. MoCoLoss takes
    a copy instead, and any order is right there.

    He et al. 2020 (arXiv:1911.05722), algorithm 1.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, persistent: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        arguments.count("NegativeQueue", "size", size)
        arguments.count("NegativeQueue", "dim", dim)
        arguments.options("NegativeQueue", persistent=persistent)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"NegativeQueue: dtype must be a floating-point dtype, got {dtype}")
        self.register_buffer("keys", torch.empty(size, dim, dtype=dtype), persistent)
        self.register_buffer("pointer", torch.empty((), dtype=torch.int64), persistent)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random unit rows and pointer 0 again, in place. A queue made on the meta device needs it after to_empty."""
        self.keys.copy_(F.normalize(torch.randn(self.keys.shape, device=self.keys.device), dim=1))
        self.pointer.zero_()

    def places(self, n: int) -> Tensor:
        """The rows that the next keys go to.

        Args:
            n: how many keys; of more than `size`, only the last `size` have rows.

        Returns:
            Rows of `keys`, int64, (min(n, size),), in the order of the keys.
        """
        size = self.keys.shape[0]
        kept = min(n, size)
        return (self.pointer + (n - kept) + torch.arange(kept, device=self.keys.device)) % size

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by these. The host does not wait for the device.

        Args:
            keys: (B, dim), cast to the queue's dtype; of more than `size`, the last ones stay.

        Raises:
            TypeError, ValueError, RuntimeError: no features, another width, another device.
        """
        arguments.features("NegativeQueue.enqueue", keys=keys)
        n, (size, dim) = keys.shape[0], self.keys.shape
        if keys.shape[1] != dim:
            raise ValueError(f"NegativeQueue.enqueue: keys is {tuple(keys.shape)}; this queue holds rows of {dim}")
        arguments.same_device("NegativeQueue.enqueue", queue=self.keys, keys=keys)
        self.keys.index_copy_(0, self.places(n), keys[-size:].to(self.keys.dtype))
        self.pointer.copy_((self.pointer + n) % size)

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"
