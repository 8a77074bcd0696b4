"""nn.Module twins of the losses: they hold what stays the same from step to step, and call losses.py."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastnce import losses
from fastnce.formulas import Loss, Reduction
from fastnce.negatives import Ragged
from fastnce.queue import NegativeQueue


class LogitScale(nn.Module):
    """A learnable logit scale, exp(log_scale), kept at or below `max`: CLIP's parameter, 1 / 0.07 at first and at most 100.

    The parameter itself is clamped when it is used, as CLIP does after every step: the gradient at the limit still lets it come down.
    Its gradient is that of log(scale). Radford et al. 2021 (arXiv:2103.00020), section 2.5.

    >>> round(LogitScale(init=10.0)().item(), 4)
    10.0
    """

    def __init__(self, init: float = 1 / 0.07, max: float | None = 100.0) -> None:
        super().__init__()
        for name, value in (("init", init), ("max", init if max is None else max)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"LogitScale: {name} must be a float, got {type(value).__name__}")
        if not (math.isfinite(init) and init > 0) or (max is not None and not max >= init):
            raise ValueError(f"LogitScale: init must be positive and at most max, got init={init}, max={max}")
        self.max = max
        self.log_scale = nn.Parameter(torch.tensor(math.log(init)))

    def forward(self) -> Tensor:
        if self.max is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max))
        return self.log_scale.exp()

    def extra_repr(self) -> str:
        return f"max={self.max}"


class _Loss(nn.Module):
    """Holds the options of a loss function. temperature or scale: a float, an nn.Parameter (learned), or a tensor (a buffer)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        for name in ("temperature", "scale"):
            if isinstance(options.get(name), nn.Parameter):
                self.register_parameter(name, options.pop(name))
            elif isinstance(options.get(name), Tensor):
                self.register_buffer(name, options.pop(name))

    def _given(self) -> dict[str, Any]:
        return self.options | {name: getattr(self, name) for name in ("temperature", "scale") if hasattr(self, name)}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._given().items() if not isinstance(value, Tensor))


class InfoNCE(_Loss):
    """losses.info_nce as a module; forward(query, positive_key, negative_keys=None, **ids and weight)."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: Reduction = "mean",
        negative_mode: Literal["unpaired", "paired"] = "unpaired",
        *,
        scale: float | Tensor | None = None,
        normalize: bool = True,
        in_batch: bool | None = None,
        symmetric: bool = False,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            negative_mode=negative_mode,
            scale=scale,
            normalize=normalize,
            in_batch=in_batch,
            symmetric=symmetric,
            return_stats=return_stats,
            backend=backend,
        )

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | Ragged | None = None,
        *,
        weight: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        exclude_query_ids: Tensor | None = None,
        exclude_key_ids: Tensor | None = None,
    ) -> Loss:
        return losses.info_nce(
            query,
            positive_key,
            negative_keys,
            weight=weight,
            query_ids=query_ids,
            key_ids=key_ids,
            exclude_query_ids=exclude_query_ids,
            exclude_key_ids=exclude_key_ids,
            **self._given(),
        )


class NTXentLoss(_Loss):
    """losses.nt_xent as a module; forward(z0, z1=None, weight=None)."""

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | None = None,
        normalize: bool = True,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            scale=scale,
            normalize=normalize,
            return_stats=return_stats,
            backend=backend,
        )

    def forward(self, z0: Tensor, z1: Tensor | None = None, weight: Tensor | None = None) -> Loss:
        return losses.nt_xent(z0, z1, weight=weight, **self._given())


class SupConLoss(_Loss):
    """losses.sup_con as a module; forward(features, labels=None, mask=None, weight=None)."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        variant: Literal["out", "in"] = "out",
        views: Literal["all", "one"] = "all",
        reduction: Reduction = "mean",
        *,
        no_positive: Literal["zero", "skip", "error"] = "zero",
        unlabelled: Literal["alone", "own_views"] = "alone",
        scale: float | Tensor | None = None,
        normalize: bool = True,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            variant=variant,
            views=views,
            reduction=reduction,
            no_positive=no_positive,
            unlabelled=unlabelled,
            scale=scale,
            normalize=normalize,
            return_stats=return_stats,
            backend=backend,
        )

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, weight: Tensor | None = None) -> Loss:
        return losses.sup_con(features, labels, mask, weight=weight, **self._given())


class ClipLoss(_Loss):
    """losses.clip_loss as a module; forward(image, text, logit_scale=None, logit_bias=None, ids and weight).

    logit_scale given to forward (as open_clip calls it) is used as it is; without, the module's own LogitScale learns it.
    """

    def __init__(
        self,
        init_scale: float = 1 / 0.07,
        max_scale: float | None = 100.0,
        reduction: Reduction = "mean",
        *,
        normalize: bool = True,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(reduction=reduction, normalize=normalize, return_stats=return_stats, backend=backend)
        self.logit_scale = LogitScale(init_scale, max_scale)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        exclude_image_ids: Tensor | None = None,
        exclude_text_ids: Tensor | None = None,
        aligned: bool | None = None,
        weight: Tensor | None = None,
    ) -> Loss:
        scale = self.logit_scale() if logit_scale is None else logit_scale
        return losses.clip_loss(
            image,
            text,
            scale,
            logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            exclude_image_ids=exclude_image_ids,
            exclude_text_ids=exclude_text_ids,
            aligned=aligned,
            weight=weight,
            **self._given(),
        )


class MoCoLoss(_Loss):
    """losses.moco_loss with its NegativeQueue; forward(q, k, weight=None).

    The keys of a call in training mode enter the queue at the beginning of the next call (or when the state is saved), so that backward
    still finds the queue it was computed with, without a copy per step. So call backward before the next forward. For two losses in one
    step, or gradients accumulated over several batches, use moco_loss and enqueue after backward.
    """

    _waiting: Tensor | None

    def __init__(
        self,
        queue_size: int,
        dim: int,
        temperature: float | Tensor = 0.07,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | None = None,
        normalize: bool = True,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            scale=scale,
            normalize=normalize,
            return_stats=return_stats,
            backend=backend,
        )
        self.queue = NegativeQueue(queue_size, dim)
        self.register_buffer("_waiting", None, persistent=False)
        self.register_state_dict_pre_hook(_flush)

    def forward(self, q: Tensor, k: Tensor, weight: Tensor | None = None) -> Loss:
        # Inside backward this is the second run of a checkpointed step: it must see the queue of the first, and leave it alone.
        again = torch._C._current_graph_task_id() != -1
        if not again:
            self.flush()
        loss = losses.moco_loss(q, k, self.queue, weight=weight, **self._given())
        if self.training and not again:
            # A copy of one batch: a momentum encoder may reuse its output before the next step.
            self._waiting = k.detach().clone()
        return loss

    def flush(self) -> None:
        """Put the keys of the last call into the queue now."""
        if self._waiting is not None:
            keys, self._waiting = self._waiting, None
            self.queue.enqueue(keys)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._waiting = None  # it belongs to the state that is being replaced
        super()._load_from_state_dict(*args, **kwargs)


def _flush(module: MoCoLoss, prefix: str, keep_vars: bool) -> None:
    module.flush()
