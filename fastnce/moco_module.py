"""The module of moco_loss, which owns a queue."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnce import arguments, autograd, losses
from fastnce.formulas import Reduction
from fastnce.logit_scale import LogitScale
from fastnce.loss_module import Loss
from fastnce.queue import NegativeQueue


class MoCoLoss(Loss):
    """moco_loss with a NegativeQueue of its own, `queue`: the keys of a call are negatives from the next call on.

    Args:
        queue_size: K, how many keys the queue holds.
        dim: D, the width of a key.
        temperature: a float, an nn.Parameter (learned) or another tensor (a buffer). Default: 0.07. It and scale can be read and set.
        scale: 1 / temperature, instead of temperature. It may be a LogitScale, which becomes the submodule `logit_scale`.
        reduction, normalize, backend: as in moco_loss.

    Raises:
        TypeError, ValueError: an option that moco_loss does not take; temperature and scale at once; queue_size or dim below 1.

    Example:
        >>> loss = fastnce.MoCoLoss(2, 4, temperature=1.0)
        >>> loss.queue.enqueue(torch.eye(4)[2:])
        >>> q, k = torch.eye(4)[:2], torch.eye(4)[:2]
        >>> loss(q, k)  # log(e + 2) - 1
        tensor(0.5514)
        >>> torch.equal(loss.queue.keys, k)  # enqueued by the call
        True

    Order of calls. In training mode a call puts its keys into the queue; in eval mode it does not. The loss is computed with a copy of the
    queue, (K, D), which lives until its backward. So several calls may precede one backward, gradients may be accumulated, and the state
    may be saved or loaded in between. To do without the copy, use moco_loss with a NegativeQueue, and enqueue after backward.

    DistributedDataParallel. Every process enqueues the keys of its own part of the batch, and broadcast_buffers=True, the default, replaces
    all queues by that of process 0 at every step. Gather the keys first (as MoCo does), or keep a queue each with broadcast_buffers=False.

    Activation checkpointing. The second run of the last call, inside backward, sees the queue of the first and enqueues nothing. That of an
    earlier call raises RuntimeError.

    He et al. 2020 (arXiv:1911.05722), eq. 1 and algorithm 1.
    """

    _function = staticmethod(losses.moco_loss)
    _replaced: tuple[Tensor, Tensor, Tensor, int] | None = None

    @arguments.without_return_stats
    def __init__(
        self,
        queue_size: int,
        dim: int,
        temperature: float | Tensor | None = None,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, scale=scale, normalize=normalize, backend=backend)
        arguments.count("MoCoLoss", "queue_size", queue_size)
        arguments.count("MoCoLoss", "dim", dim)
        self.queue = NegativeQueue(queue_size, dim)

    def forward(self, q: Tensor, k: Tensor, weight: Tensor | None = None) -> Tensor:
        """moco_loss against the queue, with the options of this module; after that, in training mode, the keys enter the queue.

        Args:
            q, k: (N, D) queries, and keys of the momentum encoder: row i is the positive of query i. The keys get no gradient.
            weight: (N,) floating-point weights of the queries. Default: all equal.

        Returns:
            A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (N,).
        """
        if isinstance(k, Tensor):
            k = k.detach()
        # Inside backward this is the second run of a checkpointed call.
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if again and self.training:
            keys = self._before(k)
        else:
            keys = autograd.copy_of_queue(self.queue.keys) if torch.is_grad_enabled() else self.queue.keys
        loss = losses.moco_loss(q, k, keys, weight=weight, **self._given())
        if self.training and not again:
            self._enqueue(k)
        return loss

    @torch.no_grad()
    def _enqueue(self, k: Tensor) -> None:
        """Put k into the queue, and keep the rows that it replaces, as many as k has. They are no buffer and in no state_dict."""
        if torch.compiler.is_compiling():
            self.queue.enqueue(k)
            return
        places = self.queue.places(k.shape[0])
        rows = self.queue.keys[places]
        self.queue.enqueue(k)
        self._replaced = places, rows, self.queue.pointer.clone(), len(k)

    @torch.no_grad()
    def _before(self, k: Tensor) -> Tensor:
        """The queue before the last call, (queue_size, dim). Where the keys of that call were not k, an error, or on a GPU nan."""
        if self._replaced is not None and self._replaced[3] == len(k):
            places, rows, pointer, _ = self._replaced
            last, now = self.queue.keys[places], k[len(k) - len(places) :].to(rows.dtype)
            # The second run may round differently. The keys of another batch differ by more than a tenth of their norm.
            same = (self.queue.pointer == pointer) & ~((last - now).norm() > 0.1 * last.norm())
            if not arguments.free_to_read(same):
                return self.queue.keys.index_copy(0, places, rows).where(same, torch.nan)
            if same:
                return self.queue.keys.index_copy(0, places, rows)
        raise RuntimeError(
            "MoCoLoss: a checkpointed call runs again, and another call has changed the queue since; "
            "call backward after each checkpointed call, or leave the loss out of the checkpoint"
        )
