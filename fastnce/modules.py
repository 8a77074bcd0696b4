"""nn.Module twins of the losses: they hold what stays the same from step to step, and call losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastnce import arguments, autograd, losses, statistics
from fastnce.formulas import Reduction
from fastnce.logit_scale import LogitScale, StaysPrecise
from fastnce.negatives import Ragged
from fastnce.queue import NegativeQueue


class _Loss(StaysPrecise):
    """Holds the options of a loss function, and its temperature or its scale: whichever was given.

    temperature, scale   a float, an nn.Parameter (learned) or another tensor (a buffer); scale may be a LogitScale, which is then the
                         submodule `logit_scale`. Both can be read, each as 1 over the other. Setting one drops what was held before
    """

    _function: ClassVar[Callable[..., Tensor]]
    options: dict[str, Any]
    logit_scale: LogitScale  # where one is held

    def __init__(self, temperature: float | Tensor | None = None, scale: float | Tensor | LogitScale | None = None, **options: Any) -> None:
        super().__init__()
        where = self._where
        arguments.options(where, **{name: value for name, value in options.items() if name != "backend"})
        statistics.check_backend(where, options["backend"])
        arguments.not_both(where, temperature, scale)
        self.options = options
        if scale is not None:
            self.scale = scale
        else:
            self.temperature = arguments.TEMPERATURES[where] if temperature is None else temperature

    @property
    def _where(self) -> str:
        """Messages begin with the name of the function, whoever called it."""
        return type(self)._function.__name__

    @property
    def temperature(self) -> float | Tensor:
        """As it was given, or 1 / scale; differentiable."""
        return self._value("temperature", "scale")

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        if isinstance(value, LogitScale):
            raise TypeError(f"{self._where}: a LogitScale is no temperature; give it as scale")
        self._hold("temperature", value)

    @property
    def scale(self) -> float | Tensor:
        """As it was given, what a LogitScale gives, or 1 / temperature; differentiable."""
        return self._value("scale", "temperature")

    @scale.setter
    def scale(self, value: float | Tensor | LogitScale) -> None:
        self._hold("scale", value)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers a Parameter before it looks for a property.
        if name in ("temperature", "scale"):
            object.__setattr__(self, name, value)
        elif name == "logit_scale" and isinstance(value, LogitScale):
            self.scale = value
        elif name == "logit_scale" and not isinstance(value, nn.Module):
            given = f"{self._where}: logit_scale must be a LogitScale, got {type(value).__name__}"
            raise TypeError(f"{given}; a scale that is exponentiated already is set as scale")
        else:
            super().__setattr__(name, value)

    def _hold(self, name: str, value: Any) -> None:
        if not isinstance(value, LogitScale):
            arguments.held_scale(self._where, name, value)
        for store in (self.options, self._parameters, self._buffers, self._modules):
            for held in ("temperature", "scale", "logit_scale"):
                store.pop(held, None)
        if isinstance(value, LogitScale):
            super().__setattr__("logit_scale", value)
        elif isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            self.options[name] = value

    def _value(self, name: str, other: str) -> Any:
        held = self._held()
        if not held:  # nn.Module asks whether there is an attribute of that name before it registers one
            raise AttributeError(f"{type(self).__name__} holds no {name}")
        return held[name] if name in held else 1 / held[other]

    def _held(self) -> dict[str, Any]:
        """{"temperature": ...} or {"scale": ...}; empty while it is being set."""
        if "logit_scale" in self._modules:
            return {"scale": self.logit_scale()}
        names, stores = ("temperature", "scale"), (self.options, self._parameters, self._buffers)
        held = {name: store[name] for store in stores for name in names if name in store}
        # torch.nn.utils.parametrize takes it out of these, and gives the class a property of its own by that name.
        return held or {name: getattr(self, name) for name in names if getattr(type(self), name) is not getattr(_Loss, name)}

    def _given(self) -> dict[str, Any]:
        held = self._held()
        if not held:
            raise AttributeError(f"{type(self).__name__} holds neither temperature nor scale any more: set one of them")
        return self.options | held

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A pickle from when a loss also returned its metrics, and from when a default temperature and no scale were options too.
        self.options.pop("return_stats", None)
        if self.options.get("scale", 0) is None:
            del self.options["scale"]
        if any("scale" in store for store in (self.options, self._parameters, self._buffers)):
            self.options.pop("temperature", None)


class InfoNCE(_Loss):
    """losses.info_nce as a module; forward(query, positive_key, negative_keys=None, **ids and weight)."""

    _function = staticmethod(losses.info_nce)

    @arguments.without_return_stats
    def __init__(
        self,
        temperature: float | Tensor | None = None,
        reduction: Reduction = "mean",
        negative_mode: Literal["unpaired", "paired"] = "unpaired",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        in_batch: bool | None = None,
        symmetric: bool = False,
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
    ) -> Tensor:
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

    _function = staticmethod(losses.nt_xent)

    @arguments.without_return_stats
    def __init__(
        self,
        temperature: float | Tensor | None = None,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            scale=scale,
            normalize=normalize,
            backend=backend,
        )

    def forward(self, z0: Tensor, z1: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return losses.nt_xent(z0, z1, weight=weight, **self._given())


class DCLLoss(_Loss):
    """losses.dcl_loss as a module; forward(z0, z1=None, weight=None)."""

    _function = staticmethod(losses.dcl_loss)

    @arguments.without_return_stats
    def __init__(
        self,
        temperature: float | Tensor | None = None,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, scale=scale, normalize=normalize, backend=backend)

    def forward(self, z0: Tensor, z1: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return losses.dcl_loss(z0, z1, weight=weight, **self._given())


class SupConLoss(_Loss):
    """losses.sup_con as a module; forward(features, labels=None, mask=None, weight=None)."""

    _function = staticmethod(losses.sup_con)

    @arguments.without_return_stats
    def __init__(
        self,
        temperature: float | Tensor | None = None,
        variant: Literal["out", "in"] = "out",
        views: Literal["all", "one"] = "all",
        reduction: Reduction = "mean",
        *,
        no_positive: Literal["zero", "skip", "error"] = "zero",
        unlabelled: Literal["alone", "own_views"] = "alone",
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
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
            backend=backend,
        )

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return losses.sup_con(features, labels, mask, weight=weight, **self._given())


class ClipLoss(_Loss):
    """losses.clip_loss as a module; forward(image, text, logit_scale=None, logit_bias=None, ids and weight).

    init_scale, max_scale   of its own LogitScale, `logit_scale`: 1 / 0.07 and 100 unless given
    scale                   instead of those two: the model's LogitScale, a parameter or a tensor, already exponentiated; a float is fixed,
                            and the module then owns no parameter

    logit_scale given to forward (as open_clip calls it) is used as it is, in place of the module's. The module's own parameter then has a
    gradient of 0, so that DistributedDataParallel finds every parameter used; weight decay alone would move it.
    """

    _function = staticmethod(losses.clip_loss)

    @arguments.without_return_stats
    def __init__(
        self,
        init_scale: float | None = None,
        max_scale: float | None = 100.0,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        if scale is None:
            scale = LogitScale(1 / 0.07 if init_scale is None else init_scale, max_scale)
        elif init_scale is not None or max_scale != 100.0:
            raise ValueError("ClipLoss: give scale, or init_scale and max_scale, not both (scale=LogitScale(init, max))")
        super().__init__(scale=scale, reduction=reduction, normalize=normalize, backend=backend)

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
    ) -> Tensor:
        own = self.scale
        loss = losses.clip_loss(
            image,
            text,
            own if logit_scale is None else logit_scale,
            logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            exclude_image_ids=exclude_image_ids,
            exclude_text_ids=exclude_text_ids,
            aligned=aligned,
            weight=weight,
            **{name: value for name, value in self.options.items() if name not in ("temperature", "scale")},
        )
        if logit_scale is None or not isinstance(own, Tensor):
            return loss
        # The sum of no element: 0 whatever it holds, and its gradient too.
        return loss + own.reshape(1)[:0].sum().to(loss.dtype)


class MoCoLoss(_Loss):
    """losses.moco_loss with its NegativeQueue, `queue`; forward(q, k, weight=None).

    The keys of a call in training mode are negatives from the next call on, in eval mode of none. They are detached: k gets no gradient.
    The loss is computed with a copy of the queue, (queue_size, dim), which lives until its backward. So several calls may precede one
    backward, gradients may be accumulated, and the state may be saved or loaded in between. To do without the copy, use moco_loss with a
    NegativeQueue, and enqueue after backward.

    Under DistributedDataParallel every process enqueues the keys of its own part of the batch, and broadcast_buffers=True, its default,
    replaces all queues by that of process 0 at every step. Gather the keys first (as MoCo does), or keep a queue each with
    broadcast_buffers=False.

    Under activation checkpointing the second run of the last call, inside backward, sees the queue of the first and enqueues nothing. That
    of an earlier call raises.
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
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            scale=scale,
            normalize=normalize,
            backend=backend,
        )
        arguments.count("MoCoLoss", "queue_size", queue_size)
        arguments.count("MoCoLoss", "dim", dim)
        self.queue = NegativeQueue(queue_size, dim)

    def forward(self, q: Tensor, k: Tensor, weight: Tensor | None = None) -> Tensor:
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
        """Put k into the queue and remember which rows it replaces: as many as k has, no buffer, in no state_dict."""
        if torch.compiler.is_compiling():
            self.queue.enqueue(k)
            return
        places = self.queue.places(k.shape[0])
        rows = self.queue.keys[places]
        self.queue.enqueue(k)
        self._replaced = places, rows, self.queue.pointer.clone(), len(k)

    @torch.no_grad()
    def _before(self, k: Tensor) -> Tensor:
        """The queue before the last call, (queue_size, dim), if the keys of that call were k: an error, on a GPU nan, if they were not."""
        if self._replaced is not None and self._replaced[3] == len(k):
            places, rows, pointer, _ = self._replaced
            last, now = self.queue.keys[places], k[len(k) - len(places) :].to(rows.dtype)
            # The second run may round otherwise than the first; another batch is further away than a tenth.
            same = (self.queue.pointer == pointer) & ~((last - now).norm() > 0.1 * last.norm())
            if not arguments.free_to_read(same):
                return self.queue.keys.index_copy(0, places, rows).where(same, torch.nan)
            if same:
                return self.queue.keys.index_copy(0, places, rows)
        raise RuntimeError(
            "MoCoLoss: a checkpointed call runs again, and another call has changed the queue since; "
            "call backward after each checkpointed call, or leave the loss out of the checkpoint"
        )
