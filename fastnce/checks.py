"""Bad input: every message of the package. What the host knows is always checked; values only in debug mode, because reading one
from a GPU stalls it."""

from __future__ import annotations

import contextlib
import numbers
import os
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from fastnce.norms import EPS, LARGEST, autocasts, compute_dtype, vector_dtype

REDUCTIONS = ("none", "mean", "sum")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_LARGEST_COUNT = 2**31 - 1

_debug = os.environ.get("FASTNCE_DEBUG", "0") not in ("", "0")


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check values too (nan, zero rows, temperature <= 0, nothing to compare with), at the price of a device synchronisation per call.

    The environment variable FASTNCE_DEBUG=1 does the same for the whole process. Results do not change.
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def has_values(x: Tensor) -> bool:
    """Whether x's values exist and may be read here: not where it is meta or fake, traced, or batched by vmap."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta
    return plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def free_to_read(x: Tensor) -> bool:
    """Whether reading a value of x costs no synchronisation, or debug mode pays for it."""
    return (_debug or x.device.type == "cpu") and has_values(x)


def a_tensor(where: str, name: str, x: object) -> Tensor:
    """x itself, if it is a plain dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: argument '{name}' must be Tensor, not {type(x).__name__}")
    kind = "nested" if x.is_nested else str(x.layout)[6:] if x.layout != torch.strided else "quantized" if x.is_quantized else ""
    if type(x).__name__ == "DTensor":
        kind = "DTensor"
    if kind:
        raise NotImplementedError(f"{where}: {name} is a {kind} tensor: fastnce does not support {kind} tensors; pass a dense one")
    return x


def features(where: str, dims: tuple[int, ...] = (2,), **named: object) -> None:
    """Feature matrices: dense floating-point tensors of these dimensions, at least one column each, on one device, of equal width."""
    first_name, first = "", None
    for name, value in named.items():
        x = a_tensor(where, name, value)
        if x.dtype not in _FLOATS:
            raise TypeError(f"{where}: {name} has dtype {x.dtype}; features must be float32, float16, bfloat16 or float64 ({name}.float())")
        if x.dim() not in dims:
            wanted = " or ".join({2: "2-D (rows, features)", 3: "3-D (rows, views or keys, features)"}[d] for d in dims)
            raise ValueError(f"{where}: expected {name} to be {wanted}, got shape {tuple(x.shape)}")
        if x.shape[-1] == 0:
            raise ValueError(f"{where}: {name} is {tuple(x.shape)}; it needs at least one feature column")
        if x.shape[0] > _LARGEST_COUNT:
            raise ValueError(f"{where}: {name} has {x.shape[0]} rows; at most 2^31 - 1 are supported")
        if first is None:
            first_name, first = name, x
        elif x.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"{where}: {first_name} is {tuple(first.shape)} and {name} is {tuple(x.shape)}; "
                f"expected the same feature size, got {first.shape[-1]} and {x.shape[-1]}"
            )
    same_device(where, **{name: x for name, x in named.items() if isinstance(x, Tensor)})


def same_device(where: str, **named: Tensor | None) -> None:
    """Raise where two tensors live on different devices; nothing is ever copied silently."""
    present = {name: x.device for name, x in named.items() if x is not None}
    devices = list(dict.fromkeys(present.values()))
    if len(devices) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in present.items())
        found = f"found at least two devices, {devices[0]} and {devices[1]}!"
        raise RuntimeError(f"{where}: Expected all tensors to be on the same device, but {found} ({listed})")


def one_dtype(where: str, **named: Tensor) -> list[Tensor]:
    """The tensors in one dtype: as they are if equal, in the autocast dtype under autocast, an error otherwise."""
    tensors = list(named.values())
    if len({x.dtype for x in tensors}) == 1:
        return tensors
    device = tensors[0].device.type
    if autocasts(device) and all(x.dtype != torch.float64 for x in tensors):
        return [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    listed = ", ".join(f"{name}.dtype: {str(x.dtype)[6:]}" for name, x in named.items())
    raise RuntimeError(f"{where}: Expected all features to have the same dtype, but got {listed}; cast one, or use autocast")


def choice(where: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless value is one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{where}: {value!r} is not a valid value for {name}; use one of {', '.join(map(repr, allowed))}")


def negative_mode(where: str, value: object) -> None:
    """unpaired or paired; ragged negatives are told by their type."""
    if value == "ragged":
        raise ValueError(
            f"{where}: 'ragged' is not a valid value for negative_mode; negatives are ragged where negative_keys is a tuple "
            "(values (T, D), offsets (M + 1,)), and negative_mode then says nothing: leave it out"
        )
    choice(where, "negative_mode", value, ("unpaired", "paired"))


def reduction(where: str, value: str, rows: int) -> None:
    """none, mean or sum; a mean needs at least one row."""
    choice(where, "reduction", value, REDUCTIONS)
    if value == "mean" and rows == 0:
        raise ValueError(f"{where}: expected at least 1 row for reduction='mean', got 0")


def some_keys(where: str, name: str, keys: Tensor, rows: int) -> None:
    """A query without any key to be compared with is a mistake."""
    if keys.shape[0] == 0 and rows > 0:
        raise ValueError(f"{where}: {name} is {tuple(keys.shape)}; at least one key is needed")


def ids(where: str, name: str, value: object, rows: int, like: Tensor, of: str) -> Tensor | None:
    """An integer vector with one entry per row of `of`, as int64; None stays None."""
    if value is None:
        return None
    x = a_tensor(where, name, value)
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{where}: {name} must have an integer dtype, got {x.dtype} ({name}.long())")
    if x.dim() != 1 or x.shape[0] != rows:
        squeeze = f"; use {name}.reshape(-1)" if x.numel() == rows else ""
        raise ValueError(
            f"{where}: Expected {name} batch_size ({x.shape[0] if x.dim() else 1}) to match {of} batch_size ({rows}); "
            f"{name} must have shape ({rows},), got {tuple(x.shape)}{squeeze}"
        )
    same_device(where, **{of: like, name: x})
    return x.to(torch.int64)


def id_pair(
    where: str, q_name: str, q_ids: object, k_name: str, k_ids: object, like: Tensor, rows: int, columns: int, paired: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Ids of queries and of keys; where only one is given and row i of one belongs to row i of the other (paired), it serves both."""
    if q_ids is None and k_ids is None:
        return None, None
    if (q_ids is None or k_ids is None) and not paired:
        missing = q_name if q_ids is None else k_name
        raise ValueError(f"{where}: {missing} is missing: with {rows} queries and {columns} keys both {q_name} and {k_name} are needed")
    q_ids, k_ids = k_ids if q_ids is None else q_ids, q_ids if k_ids is None else k_ids
    return ids(where, q_name, q_ids, rows, like, "query"), ids(where, k_name, k_ids, columns, like, "key")


def mask(where: str, name: str, value: object, like: Tensor, shape: tuple[int, int] | None = None) -> Tensor | None:
    """A boolean matrix of positives; None stays None."""
    if value is None:
        return None
    x = a_tensor(where, name, value)
    if x.dtype != torch.bool:
        raise TypeError(f"{where}: {name} must have dtype torch.bool, got {x.dtype} ({name}.bool())")
    if x.dim() != 2 or (0 in x.shape if shape is None else x.shape != shape):
        wanted = "a non-empty matrix" if shape is None else f"of shape {shape}, one row and column per example"
        raise ValueError(f"{where}: {name} must be {wanted}, got shape {tuple(x.shape)}")
    same_device(where, features=like, **{name: x})
    return x


def weights(where: str, value: object, rows: int, like: Tensor) -> Tensor | None:
    """One floating-point weight per anchor, in the dtype of the loss."""
    if value is None:
        return None
    x = a_tensor(where, "weight", value)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{where}: weight must have a floating-point dtype, got {x.dtype} (weight.float())")
    if x.shape != (rows,):
        raise ValueError(f"{where}: weight must have shape ({rows},), one per anchor, got {tuple(x.shape)}")
    same_device(where, features=like, weight=x)
    return savable(x.to(compute_dtype(like.dtype)))


def savable(x: Tensor) -> Tensor:
    """x, or a copy where torch's own operations could not save it for backward: tensors made in inference mode."""
    refused = torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.is_inference()
    return x.clone() if refused else x


def scalar(where: str, name: str, value: object, like: Tensor, positive: bool = True) -> Tensor:
    """A Python number or a one-element tensor as a 0-dim tensor in the dtype of the logits, differentiable if it was.

    The value of a tensor is known to its device alone: where it must be positive and is not, the result is nan; debug mode raises.
    """
    dtype = compute_dtype(like.dtype)
    if not isinstance(value, Tensor):
        return _filled(_number(where, name, value, dtype, positive), like)
    if value.numel() != 1:
        raise ValueError(f"{where}: {name} must have exactly one element, got shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{where}: {name} must have a floating-point dtype, got {value.dtype}")
    if value.device != like.device and (value.device.type != "cpu" or value.requires_grad):
        same_device(where, features=like, **{name: value})
    if _debug and has_values(value):
        _number(where, name, value.item(), dtype, positive)
    return value.reshape(()).to(device=like.device, dtype=dtype)


def _number(where: str, name: str, value: object, dtype: torch.dtype, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: {name} must be a float or a one-element tensor, got {type(value).__name__}")
    # 1 / temperature must be a number too. Not float(value) of a float: where torch.compile traces one as a symbol, that makes a constant
    # of it.
    number, largest = value if isinstance(value, int | float) else float(value), torch.finfo(dtype).max
    if not abs(number) <= largest or (positive and not number >= 1 / largest):
        rule = "a positive finite number" if positive else "a finite number"
        hint = " (CLIP starts at 0.07, SimCLR uses 0.1 to 0.5)" if name == "temperature" else ""
        given = float(value) if isinstance(value, float) else value  # a symbol has no text
        raise ValueError(f"{where}: {name} must be {rule}, got {given}{hint}")
    return number


def scale_of(where: str, temperature: float | Tensor, scale: float | Tensor | None, default: float, like: Tensor) -> Tensor:
    """scale = 1 / temperature, from whichever of the two was given."""
    if scale is not None:
        if isinstance(temperature, Tensor) or temperature != default:
            raise ValueError(f"{where}: give temperature or scale, not both (scale = 1 / temperature)")
        return scalar(where, "scale", scale, like)
    if isinstance(temperature, Tensor):
        return scalar(where, "temperature", temperature, like).reciprocal()
    return _filled(_number(where, "temperature", temperature, compute_dtype(like.dtype), True), like, inverse=True)


def _filled(number: float, like: Tensor, inverse: bool = False) -> Tensor:
    """A Python number, or 1 over it, as a 0-dim tensor in the dtype of the logits."""
    dtype = compute_dtype(like.dtype)
    if torch.compiler.is_compiling():
        # A float that changes from step to step is a symbol here. Arithmetic between it and a tensor keeps it one; torch.full, and in torch
        # 2.11 also 1.0 / number, would compile once for each value.
        one = torch.ones((), dtype=vector_dtype(like), device=like.device)
        return (one / number if inverse else one * number).to(dtype)
    return torch.full((), 1.0 / number if inverse else number, dtype=dtype, device=like.device)


def values(where: str, normalize: bool, **named: Tensor) -> None:
    """Debug mode only: rows that are not finite, zero, or too long, by name and first index."""
    for name, x in named.items():
        if not _debug or not has_values(x):
            continue
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.numel() == 0:
            continue
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        problems = [(~torch.isfinite(rows).all(1), "contains non-finite values")]
        if normalize:
            problems.append((norm < EPS, "is zero: its similarities and its gradient are defined as 0"))
            if x.dtype != torch.float64:
                problems.append((norm > LARGEST, f"has a norm above {LARGEST:g}: its similarities are nan"))
        for bad, what in problems:
            if bad.any():
                raise ValueError(f"{where}: {name} row {int(bad.nonzero()[0])} {what}")


def something_to_learn(where: str, lse_neg: Tensor, n_pos: Tensor) -> None:
    """Debug mode only: in a batch of several rows, one at least must have a positive and something beside it."""
    if _debug and has_values(lse_neg) and lse_neg.numel() > 1 and not bool(((n_pos > 0) & ((lse_neg > -torch.inf) | (n_pos > 1))).any()):
        raise ValueError(
            f"{where}: no row has both a positive and another candidate: the ids, labels or mask leave a loss of 0 that trains nothing"
        )


def something_to_compare(where: str, lse_neg: Tensor, n_pos: Tensor) -> None:
    """Debug mode only: one row at least must have a candidate."""
    if _debug and has_values(lse_neg) and lse_neg.numel() > 1 and not bool(((n_pos > 0) | (lse_neg > -torch.inf)).any()):
        raise ValueError(f"{where}: no row has any candidate: the ids, labels or mask exclude every pair")


def backend(where: str, name: object, known: Collection[str]) -> None:
    """auto, or the name of a backend."""
    if name != "auto" and name not in known:
        raise ValueError(f"{where}: {name!r} is not a valid value for backend; use 'auto' or one of {', '.join(map(repr, known))}")


def threshold(where: str, value: object, rows: int, like: Tensor) -> Tensor | None:
    """One logit per row; None stays None."""
    if value is None:
        return None
    x = a_tensor(where, "threshold", value)
    if x.shape != (rows,) or not x.dtype.is_floating_point:
        raise ValueError(f"{where}: threshold must have shape ({rows},) and a floating-point dtype, got {tuple(x.shape)}, {x.dtype}")
    same_device(where, features=like, threshold=x)
    return x.detach().to(compute_dtype(like.dtype))


def integer(where: str, name: str, value: object) -> None:
    """Raise unless value is an integer or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | torch.SymInt)):
        raise TypeError(f"{where}: {name} must be an integer, got {type(value).__name__} {value}")
