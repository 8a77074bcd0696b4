"""The launches of a function, recorded once for a form of its arguments, and played again with other tensors of that form.

Shapes, strides, dtypes and flags decide what a function allocates and launches; its tensors only decide the addresses. Working this out
takes Python longer than small kernels run. A tape holds the result: the compiled kernels, their arguments, and where memory goes into them.

A function can be recorded if all that it does with tensors is to allocate them, to look at parts of them, and to launch kernels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce.backends._gpu.host import up
from fastnce.backends.triton import launches
from fastnce.backends.triton.launches import Launch

# Every tensor in a tape's memory starts at a multiple of this many bytes, as torch's own do on a GPU.
ALIGNED = 512
# Under this switch of torch's the driver gives every tensor memory of its own, so that a sanitizer sees its end. Tensors that share the
# memory of a tape would hide theirs: then no tape is played.
APART = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"
_PYTHON = torch._C._dispatch_key_parse("Python")
_NEW = frozenset(getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))


class Number(float):
    """A float among the arguments that differs from call to call."""


class Like(NamedTuple):
    """A tensor without its memory."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Like:
        return Like(x.dtype, tuple(x.shape), x.stride())

    def at(self, memory: Tensor, offset: int) -> Tensor:
        """The tensor that lies so many bytes behind the start of another one."""
        if memory.dtype != self.dtype:
            memory = memory.view(self.dtype)
        return memory.as_strided(self.size, self.stride, memory.storage_offset() + offset // self.dtype.itemsize)


@dataclass(frozen=True)
class StandIn:
    """A tensor as Triton's compiler looks at one: whether it is aligned, and for AMD's GPUs whether 32 bits reach all of it."""

    dtype: torch.dtype
    address: int
    size: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return self.size


class Place(NamedTuple):
    """An argument that differs from call to call: so many bytes behind a base. like: None for a number."""

    argument: int
    base: int
    offset: int
    like: Like | None


class Call(NamedTuple):
    """One launch. Arguments that have a place are None here.

    arguments  all of them, constants too, in the order of their names
    run        the compiled kernel, None where kernels are interpreted
    """

    launch: Launch
    arguments: list[Any]
    places: list[Place]
    run: Callable[..., None] | None

    def with_tensors(self, bases: Sequence[Any]) -> Launch:
        arguments = list(self.launch.arguments)
        for argument, base, offset, like in self.places:
            arguments[argument] = bases[base] if like is None else like.at(bases[base], offset)
        return self.launch._replace(arguments=tuple(arguments))


def packed(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where tensors go that share one memory, in bytes, and how long it is. Empty ones take nothing."""
    places, size = [], 0
    for x in tensors:
        places.append(size)
        size += up(x.numel() * x.element_size(), ALIGNED)
    return places, size


class Tape(NamedTuple):
    """A recorded function: what it allocates, and what it launches.

    results  what it returns
    kept     what it keeps, and where in the memory that holds it
    sizes    bytes of that memory, and of the memory for all else

    Places count through these bases: the tensors that it is given, the number, its results, the two memories.
    """

    device: torch.device
    results: list[Like | None]
    kept: list[tuple[int, Like]]
    sizes: tuple[int, int]
    calls: tuple[Call, ...]

    def play(self, given: Sequence[Tensor | None], number: float = 0.0) -> tuple[list[Tensor | None], Tensor]:
        """What the function returns, and the memory with what it keeps."""
        device = self.device
        results = [None if x is None else torch.empty_strided(x.size, x.stride, dtype=x.dtype, device=device) for x in self.results]
        kept, other = (torch.empty(size, dtype=torch.uint8, device=device) for size in self.sizes)
        tensors = *given, number, *results, kept, other
        addresses: list[Any] = [x.data_ptr() if isinstance(x, Tensor) else x for x in tensors]
        stream = launches.stream() if self.calls and self.calls[-1].run is not None else None
        for call in self.calls:
            if call.run is None:
                call.with_tensors(tensors).start()
                continue
            arguments = call.arguments.copy()
            for argument, base, offset, _ in call.places:
                arguments[argument] = addresses[base] + offset
            call.run(*arguments, stream=stream)
        return results, kept

    def of(self, memory: Tensor) -> list[Tensor]:
        """The tensors that are kept in this memory."""
        return [like.at(memory, offset) for offset, like in self.kept]


# Recording ------------------------------------------------------------------------------------------------------------------------------


class _Zero:
    """torch's own fill, in the place of a kernel."""

    arg_names = ("x",)
    __name__ = "zero"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        return Tensor.zero_


class _Watch(TorchDispatchMode):
    """Sees every operation of torch: new tensors, zeros, which are one launch, views, and no other."""

    def __init__(self, seen: list[Launch]) -> None:
        super().__init__()
        self.seen = seen
        self.new: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        # No other mode: one may give a tensor that is a part of another one.
        with torch._C._DisableTorchDispatch():
            found = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        if kind in _NEW or kind == torch.ops.aten.new_zeros:
            self.new.append(found)
            if kind not in _NEW:
                self.seen.append(Launch(_Zero(), 1, (found,), {}))
        elif not func.is_view:
            raise RuntimeError(f"fastnce: {func} cannot be recorded")
        return found


class Recording(NamedTuple):
    """A tape that has no calls yet, and its launches, each with the places of its arguments."""

    tape: Tape
    launches: list[tuple[Launch, list[Place]]]


def record(function: Callable[[], tuple[Sequence[Tensor | None], Sequence[Tensor]]], given: Sequence[Tensor | None]) -> Recording:
    """Record a function that reads the given tensors and returns (results, tensors to keep). Nothing is launched."""
    seen: list[Launch] = []
    with launches.handed_to(seen.append), _Watch(seen) as watch:
        results, kept = function()
    _own_memory([x for x in (*results, *kept) if x is not None and x.numel()], watch.new)
    first = len(given) + 1
    bases = {_storage(x): (first + n, 0) for n, x in enumerate(results) if x is not None}
    kept_at, kept_size = packed(kept)
    bases |= {_storage(x): (first + len(results), at) for x, at in zip(kept, kept_at, strict=True) if x.numel()}
    others = {_storage(x): x for x in watch.new if x.numel() and _storage(x) not in bases}
    # The interpreter that checks every address tells tensors apart by theirs.
    other_at, other_size = _reused(others, seen, reuse=any(launches.is_compiled(one) for one in seen))
    bases |= {storage: (first + len(results) + 1, at) for storage, at in other_at.items()}
    own = {x.data_ptr(): n for n, x in reversed(list(enumerate(given))) if x is not None}

    def place(argument: int, x: Tensor | Number) -> Place:
        if isinstance(x, Number):
            return Place(argument, len(given), 0, None)
        if x.numel() == 0:
            return Place(argument, first + len(results) + 1, 0, Like.of(x))
        address, storage = x.data_ptr(), _storage(x)
        if storage in bases:
            base, start = bases[storage]
            return Place(argument, base, start + address - storage, Like.of(x))
        if address in own:
            return Place(argument, own[address], 0, Like.of(x))
        around = [n for n, y in enumerate(given) if y is not None and y.data_ptr() < address < y.data_ptr() + _extent(y)]
        if len(around) != 1:
            raise RuntimeError("fastnce: a kernel is given memory that is neither new nor an argument's")
        whole = given[around[0]]
        assert whole is not None
        return Place(argument, around[0], address - whole.data_ptr(), Like.of(x))

    device = next(x.device for x in given if x is not None)
    like = [None if x is None else Like.of(x) for x in results]
    tape = Tape(device, like, [(at, Like.of(x)) for x, at in zip(kept, kept_at, strict=True)], (kept_size, other_size), ())
    placed = []
    for one in seen:
        places = [place(n, x) for n, x in enumerate(one.arguments) if isinstance(x, Tensor | Number)]
        placed.append((one._replace(arguments=tuple(_without_memory(x) for x in one.arguments)), places))
    return Recording(tape, placed)


def _without_memory(x: Any) -> Any:
    """An argument as the compiler needs it: a recording must not hold the tensors that it has made."""
    if isinstance(x, Tensor):
        return StandIn(x.dtype, x.data_ptr() % ALIGNED, x.untyped_storage().nbytes())
    return float(x) if isinstance(x, Number) else x


def _reused(tensors: dict[int, Tensor], seen: Sequence[Launch], reuse: bool = True) -> tuple[dict[int, int], int]:
    """Where tensors go that are not kept, by their storage, and how long the memory is that they share. With reuse, a tensor gives its
    place to those that are first used behind its last use."""
    uses: dict[int, list[int]] = {}
    for n, one in enumerate(seen):
        for x in one.arguments:
            if isinstance(x, Tensor) and x.numel() and (storage := _storage(x)) in tensors:
                uses.setdefault(storage, []).append(n)
    placed: list[tuple[int, int, int, int]] = []  # start, stop, first use, last use
    found, total = {}, 0
    for storage in sorted(uses, key=lambda storage: -tensors[storage].untyped_storage().nbytes()):
        first, last = (min(uses[storage]), max(uses[storage])) if reuse else (0, len(seen))
        size = up(tensors[storage].untyped_storage().nbytes(), ALIGNED)
        start = 0
        for other_start, other_stop, other_first, other_last in sorted(placed):
            if other_first <= last and first <= other_last and other_start < start + size and start < other_stop:
                start = other_stop
        placed.append((start, start + size, first, last))
        found[storage], total = start, max(total, start + size)
    return found, total


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _extent(x: Tensor) -> int:
    """Bytes from its first to its last number."""
    return x.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def _own_memory(tensors: list[Tensor], new: list[Tensor]) -> None:
    """Each of them must be new, and alone in its memory: a tape makes memory for each."""
    storages, made = [_storage(x) for x in tensors], {_storage(x) for x in new}
    whole = all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in tensors)
    if not (whole and len(set(storages)) == len(storages) and made >= set(storages)):
        raise RuntimeError("fastnce: results that share memory, or are not new, cannot be recorded")


def ready(recordings: Sequence[Recording]) -> list[Tape]:
    """Tapes that can be played. The kernels of all of them are compiled beside each other."""
    runs = iter(launches.compiled([one for recording in recordings for one, _ in recording.launches]))
    tapes = []
    for tape, seen in recordings:
        calls = []
        for one, places in seen:
            # What has a place must not keep its first value.
            varied = {place.argument for place in places}
            fixed = tuple(None if n in varied else x for n, x in enumerate(one.arguments))
            run, ordered = next(runs), one.ordered()[len(fixed) :]
            calls.append(Call(one._replace(arguments=fixed), [*fixed, *ordered], places, run))
        tapes.append(tape._replace(calls=tuple(calls)))
    return tapes


# Which tape ------------------------------------------------------------------------------------------------------------------------------


Held = TypeVar("Held")
_ALL: list[Recent[Any]] = []


class Recent(Generic[Held]):
    """What was made last, by its key. There are few, so that lengths which never come again do not fill memory."""

    most = 256

    def __init__(self) -> None:
        self.held: dict[tuple[Any, ...], Held] = {}
        self.lock = threading.Lock()
        _ALL.append(self)

    def of(self, key: tuple[Any, ...], make: Callable[[], Held]) -> Held:
        found = self.held.get(key)
        if found is None:
            found = make()
            with self.lock:
                while len(self.held) >= self.most:
                    del self.held[next(iter(self.held))]
                self.held[key] = found
        return found


def forget() -> None:
    """Forget all of them."""
    for recent in _ALL:
        recent.held.clear()


def unrecorded() -> bool:
    """Whether functions run as they are. Where torch's dispatch to Python is off nothing can be recorded."""
    return APART or torch._C._dispatch_tls_is_dispatch_key_excluded(_PYTHON)


def form(given: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """All of some tensors that a recording depends on. Addresses count by their last bits, for which kernels are compiled, and by which of
    them are equal."""
    addresses = [0 if x is None else x.data_ptr() for x in given]
    present = [address for address in addresses if address]
    equal = () if len(set(present)) == len(present) else tuple(map(addresses.index, addresses))
    return equal, *[
        None if x is None else (x.shape, x.stride(), x.dtype, address % 16) for x, address in zip(given, addresses, strict=True)
    ]
