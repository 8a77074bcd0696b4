"""CLIP's learnable scale, and the base that keeps it precise in a model of half precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PRECISE = (torch.float32, torch.float64)


class StaysPrecise(nn.Module):
    """A module whose own parameters and buffers, not those of its children, stay float32 or float64 in a model cast to half precision.

    The logarithm of a scale of 14.3 is 2.66. In bfloat16 it moves in steps of 0.016, and an update of 0.001 is rounded away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def precise(x: Tensor) -> Tensor:
            found = fn(x)
            narrowed = found.is_floating_point() and found.dtype != x.dtype and found.dtype not in _PRECISE
            return x.to(found.device, torch.float32) if narrowed else found

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(precise, recurse=False)


class LogitScale(StaysPrecise):
    """CLIP's learnable logit scale, exp(log_scale), kept between `min` and `max`.

    Args:
        init: the scale to begin with. Default: 1 / 0.07.
        max: upper limit; None: no limit. Default: 100.
        min: lower limit. Default: no limit.

    Attributes:
        log_scale: (1,) parameter, the natural logarithm of the scale: FSDP splits no 0-dim tensor. A state_dict with a 0-dim one loads. It
            stays float32 where a model is cast to half precision.

    Calling it returns the scale, a 0-dim tensor. The value is clamped, the parameter never written. At or beyond a limit, a gradient that
    would push the parameter further is 0, and one that leads back is whole. So plain descent ends at most one step beyond the limit, and
    comes back.

    Raises:
        TypeError: init, max or min is no Python number.
        ValueError: init is not positive or not between min and max.

    Example:
        >>> scale = fastnce.LogitScale(init=10.0)
        >>> round(scale().item(), 4)
        10.0

    Radford et al. 2021 (arXiv:2103.00020), section 2.5.
    """

    def __init__(self, init: float = 1 / 0.07, max: float | None = 100.0, min: float | None = None) -> None:
        super().__init__()
        for name, value in (("init", init), ("max", init if max is None else max), ("min", init if min is None else min)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"LogitScale: {name} must be a float, got {type(value).__name__}")
        below, above = max is None or init <= max, min is None or 0 < min <= init
        if not (math.isfinite(init) and init > 0 and below and above):
            rule, got = ("", "") if min is None else (", at least min, which is positive,", f", min={min}")
            raise ValueError(f"LogitScale: init must be positive{rule} and at most max, got init={init}, max={max}{got}")
        self.init, self.max, self.min = init, max, min
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """`init` again, in place. A scale made on the meta device needs it after to_empty."""
        self.log_scale.fill_(math.log(self.init))

    def forward(self) -> Tensor:
        """The scale between its limits, a 0-dim tensor."""
        scale: Tensor = _Exp.apply(self.log_scale.reshape(()), self.min, self.max)
        return scale

    def extra_repr(self) -> str:
        return f"max={self.max}" if self.min is None else f"min={self.min}, max={self.max}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of earlier versions have neither `min` nor `init`.
        super().__setstate__({"min": None, "init": min(1 / 0.07, state["max"] or math.inf)} | state)
        if self.log_scale.dim() == 0:
            self.log_scale = nn.Parameter(self.log_scale.detach().reshape(1), self.log_scale.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}log_scale")
        if isinstance(saved, Tensor) and saved.dim() == 0:
            state_dict[f"{prefix}log_scale"] = saved.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Exp(torch.autograd.Function):
    """y = exp(x), clamped to low and high; dL/dx = y dL/dy, but 0 at or beyond a limit where descent would push x further."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float | None, high: float | None) -> Tensor:
        y = x.exp()
        return y if low is None and high is None else y.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | None, float | None], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, y = ctx.saved_tensors
        dx = grad * y
        if ctx.high is not None:
            dx = dx.masked_fill((x >= math.log(ctx.high)) & (dx < 0), 0.0)
        if ctx.low is not None:
            dx = dx.masked_fill((x <= math.log(ctx.low)) & (dx > 0), 0.0)
        return dx, None, None
