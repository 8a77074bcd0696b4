"""Checks of arguments, each by itself and of two that have to fit; ids, labels and masks are in relations.py.

Types, shapes, dtypes and devices are known to the host and always checked. Values in tensors are checked only in debug mode, because
reading one from a GPU stalls it.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Callable, Collection, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fastnce.precision import EPS, LARGEST, autocasts, compute_dtype, vector_dtype

REDUCTIONS = ("none", "mean", "sum")
# Options that are one of a few words. An option that is not listed here is True or False.
CHOICES = {
    "reduction": REDUCTIONS,
    "negative_mode": ("unpaired", "paired"),
    "variant": ("out", "in"),
    "views": ("all", "one"),
    "no_positive": ("zero", "skip", "error"),
    "unlabelled": ("alone", "own_views"),
}
# Options that may also be None, where the other arguments decide.
OPEN = ("in_batch", "exclude_self")
# The temperature of each loss where neither temperature nor scale is given.
TEMPERATURES = {"info_nce": 0.1, "nt_xent": 0.5, "dcl_loss": 0.1, "sup_con": 0.1, "moco_loss": 0.07}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Ids are compared as int64, which does not hold all numbers of uint64.
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool)
_LARGEST_COUNT = 2**31 - 1

P = ParamSpec("P")
R = TypeVar("R")

_debug = os.environ.get("FASTNCE_DEBUG", "0") not in ("", "0")


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check the values in tensors too, inside a with block; results do not change.

    Reading values back costs one device synchronisation per call. The environment variable FASTNCE_DEBUG=1 does the same for a whole
    process.

    Args:
        enabled: False switches the checks off again, inside another block. Default: True.

    Returns:
        A context manager.

    Raises:
        ValueError: by a call inside the block, for values that cannot be meant: nan, a zero row, a temperature tensor that is not positive,
            rows without anything to compare with. Values that are legal and look like a mistake are a UserWarning, once for each line that
            calls: a scale given as temperature, anchors without a positive, ids of hash(). docs/numerics.md lists both.

    Example:
        >>> with fastnce.debug():
        ...     fastnce.nt_xent(torch.zeros(2, 3))
        Traceback (most recent call last):
        ValueError: nt_xent: z0 row 0 is zero: its similarities and its gradient are defined as 0
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def debugging(*read: Tensor) -> bool:
    """Whether debug mode is on and these tensors may be read; False in code that is being compiled."""
    return _debug and not torch.compiler.is_compiling() and all(has_values(x) for x in read)


def has_values(x: Tensor) -> bool:
    """Whether x has values that may be read here. A tensor that is meta, fake, traced, or batched by vmap has none."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta
    return plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def free_to_read(x: Tensor) -> bool:
    """Whether reading a value of x costs no synchronisation, or debug mode pays for it."""
    return (_debug or x.device.type == "cpu") and has_values(x)


def a_tensor(where: str, name: str, x: object) -> Tensor:
    """x itself, if it is a plain dense tensor."""
    if not isinstance(x, Tensor):
        as_tensor = f" (torch.as_tensor({name}))" if isinstance(x, list | tuple) or type(x).__name__ == "ndarray" else ""
        raise TypeError(f"{where}: argument '{name}' must be Tensor, not {type(x).__name__}{as_tensor}")
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
            labels = x.dtype in _INTEGERS and x.numel() == x.shape[:1].numel()
            remedy = "; if these are labels, sup_con(features, labels) takes them" if labels else f" ({name}.float())"
            raise TypeError(f"{where}: {name} has dtype {x.dtype}; features must be float32, float16, bfloat16 or float64{remedy}")
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
    device, doubles = tensors[0].device.type, [name for name, x in named.items() if x.dtype == torch.float64]
    if autocasts(device) and not doubles:
        return [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    listed = ", ".join(f"{name}.dtype: {str(x.dtype)[6:]}" for name, x in named.items())
    cast = ", ".join(f"{name}.float()" for name in doubles)
    remedy = f"cast them to one, with {cast} for example: autocast leaves float64 as it is" if doubles else "cast one, or use autocast"
    raise RuntimeError(f"{where}: Expected all features to have the same dtype, but got {listed}; {remedy}")


def without_return_stats(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator of a loss function or its module's __init__: return_stats, an option of earlier versions, raises and names its heirs."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if "return_stats" in kwargs:
            raise TypeError(
                f"{function.__qualname__.split('.')[0]}: return_stats is no option, a loss returns its Tensor alone; ranks, top-k hits and "
                "hardest negatives come from fastnce.retrieval(query, key), or from contrastive_stats(metrics=True)"
            )
        return function(*args, **kwargs)

    return checked


def choice(where: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise unless value is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{where}: {value!r} is not a valid value for {name}; use one of {', '.join(map(repr, allowed))}")


def options(where: str, **given: object) -> None:
    """Options that stay the same from batch to batch: one of the words in CHOICES, or true or false (those in OPEN: or None)."""
    for name, value in given.items():
        if (name, value) == ("negative_mode", "ragged"):
            raise ValueError(
                f"{where}: 'ragged' is not a valid value for negative_mode; negatives are ragged where negative_keys is a tuple "
                "(values (T, D), offsets (M + 1,)), and negative_mode then says nothing: leave it out"
            )
        if name in CHOICES:
            choice(where, name, value, CHOICES[name])
        elif not isinstance(value, bool) and not (value is None and name in OPEN):
            raise TypeError(f"{where}: {name} must be True or False, got {type(value).__name__} {value!r}")


def count(where: str, name: str, value: object) -> None:
    """Raise unless value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{where}: {name} must be a positive integer, got {value!r}")


def reduction(where: str, value: str, rows: int) -> None:
    """none, mean or sum; a mean needs at least one row."""
    choice(where, "reduction", value, REDUCTIONS)
    if value == "mean" and rows == 0:
        raise ValueError(f"{where}: expected at least 1 row for reduction='mean', got 0")


def some_keys(where: str, name: str, keys: Tensor, rows: int) -> None:
    """Raise where there are queries and no keys to compare them with."""
    if keys.shape[0] == 0 and rows > 0:
        raise ValueError(f"{where}: {name} is {tuple(keys.shape)}; at least one key is needed")


def ids(where: str, name: str, value: object, rows: int, like: Tensor, of: str, each: str = "one id per row") -> Tensor | None:
    """An integer vector with one entry per row of `of`, as int64; None stays None. `each` says what an entry is."""
    if value is None:
        return None
    x = a_tensor(where, name, value)
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"{where}: {name} must have an integer dtype, got {x.dtype} ({name}.long())")
    if x.dtype not in _INTEGERS:
        remedy = f"it is compared as int64, which holds numbers below 2^63: {name}.to(torch.int64)"
        raise TypeError(f"{where}: {name} has dtype {x.dtype}; {remedy}")
    if x.shape != (rows,):
        counted = f"Expected {name} batch_size ({x.shape[0] if x.dim() else 1}) to match {of} batch_size ({rows})"
        wrong = counted if x.dim() == 1 else f"{name} must be 1-D, {each}"
        squeeze = f"; use {name}.reshape(-1)" if x.numel() == rows else ""
        raise ValueError(f"{where}: {wrong}; {name} must have shape ({rows},), got {tuple(x.shape)}{squeeze}")
    same_device(where, **{of: like, name: x})
    return x.to(torch.int64)


def weights(where: str, value: object, rows: int, like: Tensor, examples: int | None = None) -> Tensor | None:
    """One floating-point weight per anchor, in the dtype of the loss. `examples`: as many would have done, too."""
    if value is None:
        return None
    x = a_tensor(where, "weight", value)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{where}: weight must have a floating-point dtype, got {x.dtype} (weight.float())")
    if x.shape != (rows,):
        also = "" if examples in (None, rows) else f"; one per example, ({examples},), is right too"
        raise ValueError(f"{where}: weight must have shape ({rows},), one per anchor, got {tuple(x.shape)}{also}")
    same_device(where, features=like, weight=x)
    return savable(x.to(compute_dtype(like.dtype)))


def savable(x: Tensor) -> Tensor:
    """x, or a copy of a tensor made in inference mode, which torch's own operations cannot save for backward."""
    refused = torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.is_inference()
    return x.clone() if refused else x


def scalar(where: str, name: str, value: object, like: Tensor, positive: bool = True) -> Tensor:
    """A Python number or a one-element tensor as a 0-dim tensor in the dtype of the logits, differentiable if it was.

    Only its device knows the value of a tensor. Where that has to be positive and is not, the result is nan, and debug mode raises.
    """
    dtype = compute_dtype(like.dtype)
    if not isinstance(value, Tensor):
        return _filled(_number(where, name, value, dtype, positive), like)
    _one_element(where, name, value)
    if value.device != like.device and (value.device.type != "cpu" or value.requires_grad):
        same_device(where, features=like, **{name: value})
    if _debug and has_values(value):
        _number(where, name, value.item(), dtype, positive)
    return value.reshape(()).to(device=like.device, dtype=dtype)


def held_scale(where: str, name: str, value: object) -> None:
    """Check a temperature or scale that a module is to hold, as `scalar` does, but without features to compare it with."""
    if isinstance(value, Tensor):
        # Where FSDP splits a parameter, all processes but one hold an empty part of it.
        _one_element(where, name, value, at_least=0)
    else:
        _number(where, name, value, torch.float64, True)


def _one_element(where: str, name: str, value: Tensor, at_least: int = 1) -> None:
    if not at_least <= value.numel() <= 1:
        raise ValueError(f"{where}: {name} must have exactly one element, got shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{where}: {name} must have a floating-point dtype, got {value.dtype}")


def _number(where: str, name: str, value: object, dtype: torch.dtype, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: {name} must be a float or a one-element tensor, got {type(value).__name__}")
    # 1 / temperature must be a finite number too. A float stays as it is: torch.compile traces it as a symbol, and float(value) would make
    # a constant of that.
    number, largest = value if isinstance(value, int | float) else float(value), torch.finfo(dtype).max
    if not abs(number) <= largest or (positive and not number >= 1 / largest):
        rule = "a positive finite number" if positive else "a finite number"
        if abs(number) < math.inf and (number > 0 or not positive):  # finite and of the right sign, but too large or too small
            rule = f"between {1 / largest if positive else -largest:.1e} and {largest:.1e}, in {str(dtype)[6:]}"
        hint = " (CLIP starts at 0.07, SimCLR uses 0.1 to 0.5)" if name == "temperature" else ""
        given = float(value) if isinstance(value, float) else value  # a symbol has no text
        raise ValueError(f"{where}: {name} must be {rule}, got {given}{hint}")
    return number


def scale_of(where: str, temperature: float | Tensor | None, scale: float | Tensor | None, like: Tensor) -> Tensor:
    """scale = 1 / temperature, from the one of the two that was given, or else from TEMPERATURES."""
    not_both(where, temperature, scale)
    if scale is not None:
        return scalar(where, "scale", scale, like)
    if temperature is None:
        temperature = TEMPERATURES[where]
    if isinstance(temperature, Tensor):
        return scalar(where, "temperature", temperature, like).reciprocal()
    return _filled(_number(where, "temperature", temperature, compute_dtype(like.dtype), True), like, inverse=True)


def scale_given(
    where: str, temperature: float | Tensor | None, scale: float | Tensor | None, like: Tensor, called: str
) -> tuple[Tensor | None, float, bool]:
    """The same for operators that take either: (tensor or None, scale where it is a number, whether the tensor is a temperature)."""
    not_both(where, temperature, scale)
    if scale is None and temperature is None:
        temperature = TEMPERATURES[where]
    name, given = (called, scale) if scale is not None else ("temperature", temperature)
    if isinstance(given, Tensor):
        return scalar(where, name, given, like), 0.0, scale is None
    number = _number(where, name, given, compute_dtype(like.dtype), True)
    return None, float(number if scale is not None else 1.0 / number), False


def _filled(number: float, like: Tensor, inverse: bool = False) -> Tensor:
    """A Python number, or 1 over it, as a 0-dim tensor in the dtype of the logits."""
    dtype = compute_dtype(like.dtype)
    if torch.compiler.is_compiling():
        # A float that changes from step to step is a symbol here, and arithmetic with a tensor keeps it one. torch.full would compile the
        # code once for each value; so would 1.0 / number in torch 2.11.
        one = torch.ones((), dtype=vector_dtype(like), device=like.device)
        return (one / number if inverse else one * number).to(dtype)
    return torch.full((), 1.0 / number if inverse else number, dtype=dtype, device=like.device)


def not_both(where: str, temperature: object, scale: object) -> None:
    """Raise where temperature and scale are both given."""
    if temperature is not None and scale is not None:
        raise ValueError(f"{where}: give temperature or scale, not both (scale = 1 / temperature)")


def values(where: str, normalize: bool, **named: Tensor) -> None:
    """In debug mode, raise for rows that are not finite, zero, or too long, and name the first of them."""
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


def backend(where: str, name: object, known: Collection[str]) -> None:
    """auto, or the name of a backend."""
    if name != "auto" and name not in list(known):
        raise ValueError(f"{where}: {name!r} is not a valid value for backend; use 'auto' or one of {', '.join(map(repr, known))}")


def backend_of_environment(where: str, known: Collection[str] = ()) -> str:
    """FASTNCE_BACKEND, the backend that takes the place of "auto"; "" without one."""
    given = _environment("FASTNCE_BACKEND")
    if given in ("", "auto"):
        return ""
    if known and given not in list(known):
        raise ValueError(f"{where}: FASTNCE_BACKEND is {given!r}; set it to 'auto' or one of {', '.join(map(repr, known))}, or unset it")
    return given


def _environment(name: str) -> str:
    return os.environ.get(name, "")


# Dynamo takes the answer as a constant. torch.compiler.assume_constant_result does the same, but importing it takes a second.
_environment._dynamo_marked_constant = True  # type: ignore[attr-defined]


def threshold(where: str, value: object, rows: int, like: Tensor) -> Tensor | None:
    """One logit per row; None stays None."""
    if value is None:
        return None
    x = a_tensor(where, "threshold", value)
    if x.shape != (rows,) or not x.dtype.is_floating_point:
        raise ValueError(f"{where}: threshold must have shape ({rows},) and a floating-point dtype, got {tuple(x.shape)}, {x.dtype}")
    same_device(where, features=like, threshold=x)
    return x.detach().to(compute_dtype(like.dtype))


def offset(where: str, value: object) -> int | None:
    """The distance of two rows as an integer, of Python or of numpy, within the largest number of rows; None stays None."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | numbers.Integral | None):
        raise TypeError(f"{where}: offset must be an integer, got {type(value).__name__} {value}")
    found = value if isinstance(value, int | torch.SymInt | None) else int(value)
    if found is not None and not -_LARGEST_COUNT <= found <= _LARGEST_COUNT:
        raise ValueError(f"{where}: offset is {found}; as there are at most 2^31 - 1 rows, it must be from -(2^31 - 1) to 2^31 - 1")
    return found  # type: ignore[return-value]
