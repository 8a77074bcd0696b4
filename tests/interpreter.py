"""Triton's CPU interpreter, made faithful to the hardware, and a check of every address and every pair of programs.

Triton's own multiplies and adds the bit patterns of bfloat16, truncates float32 to bfloat16 where hardware rounds, ignores input_precision,
and keeps results that ex2.approx.ftz flushes to 0. Importing this module replaces those operations:

    tl.dot      bf16 and fp16: exact products, 16 of them added to the float32 sum at a time, and every such sum rounded towards zero
                (so do tensor cores: Ootomo and Yokota, arXiv 2203.03341). fp32: operands truncated to tf32 (Triton rounds none of them
                before the mma), split in two for "tf32x3", whole for "ieee"
    casts       float32 to bfloat16 to nearest even; bfloat16 widens exactly. Arithmetic on bfloat16 raises: cast to float32 first
    tl.exp2     0 for float32 results below 2^-126; tl.rsqrt: inf for arguments below it
    tl.maximum, tl.minimum drop a NaN, as max.f32 does

Races inside of one program, and the order in which tensor cores add, cannot be shown here. tl.atomic_load and tl.atomic_store count as
plain accesses. An atomic operation with sem="acq_rel" puts what a program does after it behind what other programs did before theirs at the
same address.

    with Checked(out, readonly=(q, k)) as c:
        kernel[grid](q, k, out, ...)
    assert not c.races and c.unwritten(out) == 0

A process has interpreted or compiled kernels, never both: conftest.py chooses, by TRITON_INTERPRET. Where they are compiled or Triton is
missing, importing this module skips the importing test module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

if os.environ.setdefault("TRITON_INTERPRET", "1") != "1":
    pytest.skip("kernels are compiled in this process (TRITON_INTERPRET is not 1)", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl
from roundings import TINY, Array, add_products, round_bf16, round_tf32, truncate_tf32, widen_bf16
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, TensorHandle
from triton.runtime.interpreter import InterpreterBuilder as Builder

if not isinstance(tl.zeros, InterpretedFunction):
    raise ImportError("Triton was imported before TRITON_INTERPRET=1 was set: kernels of this process are compiled. Set it first")

from interpreter_speed import replace  # it changes Triton

Program = tuple[int, int, int]

# Arithmetic of the hardware


def _dot(self: Builder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, input_precision: Any, *rest: Any) -> TensorHandle:
    dtype, precision = a.dtype.scalar, input_precision.name
    if dtype in (tl.bfloat16, tl.float16):
        wide = [widen_bf16(x.data) if dtype == tl.bfloat16 else x.data.astype(np.float32) for x in (a, b)]
        return TensorHandle(add_products(acc.data.astype(np.float32), *wide).astype(acc.data.dtype), acc.dtype.scalar)
    if dtype == tl.float32 and precision == "TF32":
        product = np.matmul(truncate_tf32(a.data), truncate_tf32(b.data))
    elif dtype == tl.float32 and precision == "TF32x3":
        high_a, high_b = round_tf32(a.data), round_tf32(b.data)
        low_a, low_b = truncate_tf32(a.data - high_a), truncate_tf32(b.data - high_b)
        small = np.matmul(low_a, high_b) + np.matmul(high_a, low_b)
        # Infinite operands leave inf - inf in the low parts; Triton drops that NaN, so that the product of the high parts decides.
        product = np.where(np.isnan(small), np.float32(0), small) + np.matmul(high_a, high_b)
    else:
        return _stock_dot(self, a, b, acc, input_precision, *rest)
    return TensorHandle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)


def _cast(self: Builder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    if src.dtype.scalar == tl.bfloat16:
        src = TensorHandle(widen_bf16(src.data), tl.float32)
    if dst_type.scalar == tl.bfloat16:
        return TensorHandle(round_bf16(src.data.astype(np.float32)), tl.bfloat16)
    return _stock_cast(self, src, dst_type)


def _refuse_bf16(*operands: TensorHandle) -> None:
    if any(handle.dtype.scalar == tl.bfloat16 for handle in operands):
        raise TypeError("arithmetic on bfloat16 in a kernel: the interpreter would compute with bit patterns. Cast to float32 first")


def _binary(self: Builder, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
    _refuse_bf16(lhs, rhs)
    return _stock_binary(self, lhs, rhs, op)


def _unary(self: Builder, arg: TensorHandle, op: Any) -> TensorHandle:
    _refuse_bf16(arg)
    return _stock_unary(self, arg, op)


def _exp2(self: Builder, arg: TensorHandle) -> TensorHandle:
    result = _stock_exp2(self, arg)
    if result.data.dtype == np.float32:
        result.data = np.where(result.data < TINY, np.float32(0), result.data)
    return result


def _rsqrt(self: Builder, arg: TensorHandle) -> TensorHandle:
    if arg.data.dtype == np.float32:
        arg = TensorHandle(np.where(np.abs(arg.data) < TINY, np.float32(0), arg.data), arg.dtype)
    return _stock_rsqrt(self, arg)


def _maximum(self: Builder, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
    return self.binary_op(lhs, rhs, np.fmax)


def _minimum(self: Builder, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
    return self.binary_op(lhs, rhs, np.fmin)


# Accesses of programs

# An access of the first kind races with an earlier one of the second kind by another program.
RACES = {
    "load": {"store": "read after write", "atomic": "read after write"},
    "store": {"load": "write after read", "store": "write after write", "atomic": "write after write"},
    "atomic": {"load": "write after read", "store": "write after write"},
}


class Race(NamedTuple):
    """Two programs of one launch touched an element of a tensor (numbered readonly ones first), and their order decides the result."""

    what: str
    tensor: int
    earlier: Program
    later: Program


def addresses(t: Tensor) -> Array:
    """Byte addresses (int64) of the elements of t; a dimension of stride 0 counts once."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = (offsets[:, None] + stride * np.arange(min(size, 1) if stride == 0 else size)).ravel()
    return t.data_ptr() + offsets * t.element_size()


def _layout(t: Tensor) -> tuple[object, ...]:
    return t.data_ptr(), t.shape, t.stride(), t.dtype


class Elements:
    """The elements of some tensors, each once however many views share it, sorted by address and numbered.

    An address is found by its run, that is consecutive elements of one tensor without a gap: a contiguous tensor is one run and a view
    with huge strides one per row, so that the table is as large as the views, whatever they span. Where tensors share an element the
    first one owns it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        each = [addresses(t) for t in tensors]
        every = np.concatenate([np.zeros(0, np.int64), *each])
        owners = np.repeat(np.arange(len(each)), [a.size for a in each])
        self.addresses, first = np.unique(every, return_index=True)  # the first of equal addresses
        owner = owners[first]
        size = np.array([t.element_size() for t in tensors], np.int64)[owner]
        begins = np.ones(owner.size, bool)
        begins[1:] = (np.diff(self.addresses) != size[:-1]) | (np.diff(owner) != 0)
        # Run 0 is empty and lies before every address: a search always ends in some run.
        self.begin = np.concatenate([[0], np.flatnonzero(begins)])
        self.address = np.concatenate([[-1], self.addresses[begins]])
        self.count = np.diff(np.append(self.begin, owner.size))
        self.size = np.concatenate([[1], size[begins]])
        self.owner = np.concatenate([[-1], owner[begins]])

    def find(self, pointers: Array, size: int) -> tuple[Array, Array, Array]:
        """Of each address the number of the element there, its run, and whether an element of so many bytes begins there at all."""
        run = np.searchsorted(self.address, pointers, side="right") - 1
        offset = pointers - self.address[run]
        place = offset // size
        inside = (offset >= 0) & (place < self.count[run]) & (place * size == offset) & (self.size[run] == size)
        return self.begin[run] + place, run, inside


class Checked:
    """with Checked(*tensors, readonly=(...)) as c: kernels may touch the elements of these tensors only, and write all but readonly ones.

    The gaps between the rows of a view are not elements. The first lane that breaks the rule raises IndexError, before memory is touched,
    and the with statement raises it again without Triton's wrapping, also where the code between has caught it.

    arguments=True also admits the tensors that are passed to each launch, for code that allocates its own outputs; they stay admitted and
    alive until the end. readonly wins over everything.

    Afterwards:
        races         set of Race; launches follow each other, so programs race within one launch only
        unwritten(t)  number of elements of t that no program wrote
        launches      how often a kernel was started; a block that starts none raises RuntimeError, for it checks nothing

    CPU tensors only (ValueError). An access must be as wide as the element: other widths are out of bounds.
    """

    active: Checked | None = None

    def __init__(self, *tensors: Tensor, readonly: Iterable[Tensor] = (), arguments: bool = False) -> None:
        readonly = tuple(readonly)
        self.tensors: list[Tensor] = []
        self.n_readonly = len(readonly)
        self.arguments = arguments
        self.races: set[Race] = set()
        self.launches = 0
        self.fault: IndexError | None = None
        self.elements = Elements([])
        self.written = np.zeros(0, bool)
        self.first: dict[str, Array] = {}
        self.released: dict[int, set[int]] = {}
        self.acquired: set[int] = set()
        self.running = (-1, -1, -1)
        self.has_released = False
        self.quiet = np.errstate(all="ignore")  # kernels overflow silently
        self.admit([*readonly, *tensors])

    def admit(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            if t.device.type != "cpu":
                raise ValueError(f"the interpreter runs on the CPU, got a tensor on {t.device}")
        known = {_layout(t) for t in self.tensors}
        new = [t for t in tensors if _layout(t) not in known]
        if not new:
            return
        self.tensors += new
        before, written = self.elements, self.written
        self.elements = Elements(self.tensors)
        self.written = np.zeros(self.elements.addresses.size, bool)
        self.written[np.searchsorted(self.elements.addresses, before.addresses)] = written

    def launch(self) -> None:
        """A kernel starts: nothing before it races with it."""
        self.launches += 1
        self.released, self.running = {}, (-1, -1, -1)
        self.first = {kind: np.full(self.written.size, -1, np.int32) for kind in RACES}

    def fail(self, message: str) -> None:
        self.fault = IndexError(message)
        raise self.fault

    def touch(self, kind: str, pointers: Array, size: int, grid: Program, program: Program) -> None:
        """One access: `pointers` are those of its unmasked lanes."""
        index, run, inside = self.elements.find(pointers, size)
        owner = self.elements.owner[run]
        if not inside.all():
            pointer, near = pointers[~inside][0], owner[~inside][0]
            lanes = f"{(~inside).sum()} of {inside.size} active lanes of {size} bytes"
            place = f"{pointer - self.tensors[near].data_ptr():+} bytes from the start of tensor {near}" if near >= 0 else "before them all"
            self.fail(f"{kind} out of bounds: {lanes}, program {program}, the first one {place}")
        readonly = owner < self.n_readonly
        if kind != "load":
            if readonly.any():
                self.fail(f"{kind} into readonly tensor {owner.min()}: {readonly.sum()} of {owner.size} lanes, program {program}")
            self.written[index] = True
        elif readonly.all():
            return  # no program writes there
        # Programs run one after the other, so an element that another program touched was first touched by another one. What a program does
        # after it has released counts as another program's, whose number is larger by the number of all.
        self._turn_to(program)
        own, all_programs = int(np.ravel_multi_index(program, grid)), int(np.prod(grid))
        number = own + all_programs * self.has_released
        for other, what in RACES[kind].items():
            earlier = self.first[other][index]
            racing = (earlier >= 0) & (earlier % all_programs != own)
            if racing.any() and self.acquired:
                racing &= ~np.isin(earlier, list(self.acquired))
            if racing.any():
                for tensor, by in set(zip(owner[racing].tolist(), earlier[racing].tolist(), strict=True)):
                    x, y, z = (int(i) for i in np.unravel_index(by % all_programs, grid))
                    self.races.add(Race(what, tensor, (x, y, z), program))
        mine = self.first[kind][index]
        self.first[kind][index] = np.where(mine < 0, number, mine)

    def _turn_to(self, program: Program) -> None:
        if program != self.running:
            self.running, self.acquired, self.has_released = program, set(), False

    def synchronize(self, pointer: int, grid: Program, program: Program) -> None:
        """An acquiring and releasing atomic operation. A program may read what others did before their own at this address."""
        self._turn_to(program)
        at = self.released.setdefault(pointer, set())
        self.acquired |= at
        if not self.has_released:
            at.add(int(np.ravel_multi_index(program, grid)))
            self.has_released = True

    def unwritten(self, t: Tensor) -> int:
        own = addresses(t)
        index, _, inside = self.elements.find(own, t.element_size())
        if not inside.all():
            raise ValueError(f"unwritten() of a tensor that was not checked, shape {tuple(t.shape)}, dtype {t.dtype}")
        missing = np.zeros(self.written.size, bool)
        missing[index] = ~self.written[index]  # an element that t shows several times counts once
        return int(missing.sum())

    def __enter__(self) -> Checked:
        if Checked.active is not None:
            raise RuntimeError("one Checked at a time: another one is active")
        Checked.active = self
        self.quiet.__enter__()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        Checked.active = None
        self.quiet.__exit__(None, None, None)
        if self.fault is not None:
            raise self.fault from None
        if error is None and not self.launches:
            raise RuntimeError("no kernel was started: there was nothing to check")


def _access(builder: Builder, kind: str, pointers: TensorHandle, mask: Any, size: int) -> None:
    if Checked.active is not None:
        # A block pointer's mask is a plain array, whose .data is a buffer.
        lanes = np.broadcast_to(np.asarray(mask), pointers.data.shape)
        Checked.active.touch(kind, pointers.data.view(np.int64)[lanes], size, builder.grid_dim, builder.grid_idx)


def _load(self: Builder, ptrs: TensorHandle, mask: TensorHandle, *rest: Any, **options: Any) -> TensorHandle:
    _access(self, "load", ptrs, mask.data, max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
    return _stock_load(self, ptrs, mask, *rest, **options)


def _store(self: Builder, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> None:
    _access(self, "store", ptrs, mask.data, value.data.itemsize)
    _stock_store(self, ptrs, value, mask, *rest)


def _atomic(self: Builder, op: Any, ptr: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
    _access(self, "atomic", ptr, mask.data, value.data.itemsize)
    if Checked.active is not None and rest[0].name == "ACQUIRE_RELEASE":
        for pointer in np.unique(ptr.data.view(np.int64)[np.broadcast_to(mask.data, ptr.data.shape)]).tolist():
            Checked.active.synchronize(pointer, self.grid_dim, self.grid_idx)
    return _stock_atomic(self, op, ptr, value, mask, *rest)


def _compare_and_swap(self: Builder, ptr: TensorHandle, compare: TensorHandle, value: TensorHandle, *rest: Any) -> TensorHandle:
    _access(self, "atomic", ptr, True, value.data.itemsize)
    return _stock_cas(self, ptr, compare, value, *rest)


def _arguments(self: GridExecutor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    hosts, named = _stock_arguments(self, args, kwargs)
    if Checked.active is not None and Checked.active.arguments:
        Checked.active.admit(list(_tensors([*hosts, *named.values()])))
    return hosts, named


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _tensors(arg)
        elif isinstance(tensor := getattr(arg, "base", arg), Tensor):  # reinterpreted tensors and descriptors have a base
            yield tensor


def _set_grid_dim(self: Builder, x: int, y: int, z: int) -> None:
    _stock_set_grid_dim(self, x, y, z)
    if Checked.active is not None:
        Checked.active.launch()


def _patch_tensor(tensor: type, scope: Any) -> None:
    _stock_patch_tensor(tensor, scope)
    # Triton 3.6 converts arrays of shape (1,) with int(), which NumPy 2.4 refuses: no range() with a bound from the host would run.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_stock_dot = replace(Builder, "create_dot", _dot)
_stock_cast = replace(Builder, "cast_impl", _cast)
_stock_binary = replace(Builder, "binary_op", _binary)
_stock_unary = replace(Builder, "unary_op", _unary)
_stock_exp2 = replace(Builder, "create_exp2", _exp2)
_stock_rsqrt = replace(Builder, "create_rsqrt", _rsqrt)
replace(Builder, "create_maxnumf", _maximum)
replace(Builder, "create_minnumf", _minimum)
_stock_load = replace(Builder, "create_masked_load", _load)
_stock_store = replace(Builder, "create_masked_store", _store)
_stock_atomic = replace(Builder, "create_atomic_rmw", _atomic)
_stock_cas = replace(Builder, "create_atomic_cas", _compare_and_swap)
_stock_set_grid_dim = replace(Builder, "set_grid_dim", _set_grid_dim)
_stock_arguments = replace(GridExecutor, "_init_args_hst", _arguments)
_stock_patch_tensor = replace(stock, "_patch_lang_tensor", _patch_tensor)
