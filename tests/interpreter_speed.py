"""Triton's interpreter with the same results in a fraction of the time: what it makes again at every operation is made once.

interpreter.py imports this, where kernels are interpreted.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle


def replace(owner: Any, name: str, new: Any) -> Any:
    """Put `new` in place of a method and return the old one. AttributeError where this Triton has none of that name."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    return old


@cache
def _languages(function: Any) -> tuple[Any, ...]:
    return tuple({id(value): value for value in function.__globals__.values() if value is tl or value is tl.core}.values())


def _patch_lang(function: Any) -> Any:
    """Triton's interpreter replaces all of the language again at every call inside of a kernel, which takes 40 % of the kernel's time. Here
    only the kernel does it."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _stock_patch_lang(function)
    return stock._LangPatchScope()


_BLOCKS: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
_NUMPY_TYPES: dict[str, Any] = {}


def _block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    """Triton's makes and checks two dozen objects for every result of every operation: a fifth of a kernel's time."""
    key = element_ty.name, tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if key not in _BLOCKS:
        _stock_block_type(self, element_ty, shape)
        _BLOCKS[key] = dict(vars(self))
    self.__dict__.update(_BLOCKS[key], element_ty=element_ty)


def _numpy_type(dtype: tl.dtype) -> Any:
    """Triton's fills its table at every call."""
    name = dtype.scalar.name
    if name not in _NUMPY_TYPES:
        _NUMPY_TYPES[name] = _stock_numpy_type(dtype)
    return _NUMPY_TYPES[name]


@cache
def _shape_of(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


def _tensor(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    """With the shape that all tensors of it share; another fifth."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape_of(tuple(type.shape.values) if type.is_block() else ())


def _broadcast(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Nothing to do where both have one shape; Triton's finds that out by making it a third time."""
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _stock_broadcast(self, lhs, rhs)


_stock_patch_lang = replace(stock, "_patch_lang", _patch_lang)
_stock_numpy_type = replace(stock, "_get_np_dtype", _numpy_type)
_stock_block_type = replace(tl.block_type, "__init__", _block_type)
replace(tl.tensor, "__init__", _tensor)
_stock_broadcast = replace(TritonSemantic, "broadcast_impl_value", _broadcast)
# Triton would do every int32 operation again in int64, for an assertion that is off: 20 % of a kernel's time.
stock.interpreter_builder.options = dataclasses.replace(stock.interpreter_builder.options, sanitize_overflow=False)
