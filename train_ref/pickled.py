"""CIFAR-10's batches are pickles of Python 2. This reads such a pickle without Python's own unpickler.

A pickle is a program for a machine with a stack and a memo. Python's unpickler obeys it: it calls what the program names, hands numpy a
state that the program made up, and makes the memo as long as the largest index in it. The machine below knows the instructions that Python
2 writes for arrays of bytes, lists, dicts, strings and integers, and no others. It calls nothing: the two calls in a pickled array are
recognised by their arguments, and the array is made here, of as many bytes as its shape says.
"""

from __future__ import annotations

import math
import pickle
import struct
from typing import Any

import numpy as np

# A batch of 10,000 images has 50,000 instructions, most of them for labels and file names. So many leave stack and memo below 200 MB.
LONGEST = 2**20


class Name:
    """A function or a class that a pickle may name."""


class Array:
    """An array of bytes: `values` are there when its state has been set."""

    values: np.ndarray[Any, np.dtype[np.uint8]] | None = None


RECONSTRUCT, NDARRAY, DTYPE, BYTE, MARK = Name(), Name(), Name(), Name(), Name()
NAMES = {("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT, ("numpy", "ndarray"): NDARRAY, ("numpy", "dtype"): DTYPE}


class ArrayUnpickler:
    """One pickle. Its strings become bytes, as Python 2 meant them, but for the names in a dict, and its arrays Array."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The content of the pickle. Raises pickle.UnpicklingError for one that is damaged, or that holds anything else."""
        try:
            for _ in range(LONGEST):
                instruction = self.take(1)
                if instruction == b".":
                    return self.pop(1)[0]
                self.obey(instruction)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise pickle.UnpicklingError(f"it cannot be read beyond byte {self.place}") from error
        raise pickle.UnpicklingError(f"it has more than {LONGEST} instructions")

    def obey(self, instruction: bytes) -> None:
        match instruction:
            case b"\x80":
                if (protocol := self.integer("<B")) != 2:
                    raise pickle.UnpicklingError(f"it is of protocol {protocol}, and the highest of Python 2 is 2")
            case b"N":
                self.stack.append(None)
            case b"\x89":
                self.stack.append(False)
            case b"K":
                self.stack.append(self.integer("<B"))
            case b"M":
                self.stack.append(self.integer("<H"))
            case b"J":
                self.stack.append(self.integer("<i"))
            case b"U":
                self.stack.append(self.take(self.integer("<B")))
            case b"T":
                self.stack.append(self.take(self.integer("<i")))
            case b"X":
                self.stack.append(self.take(self.integer("<I")))
            case b"q":
                self.keep(self.integer("<B"))
            case b"r":
                self.keep(self.integer("<I"))
            case b"h":
                self.stack.append(self.memo[self.integer("<B")])
            case b"j":
                self.stack.append(self.memo[self.integer("<I")])
            case b"(":
                self.stack.append(MARK)
            case b")":
                self.stack.append(())
            case b"\x85" | b"\x86" | b"\x87":
                self.stack.append(self.pop(instruction[0] - 0x84))
            case b"t":
                self.stack.append(self.marked())
            case b"]":
                self.stack.append([])
            case b"a":
                self.extend(self.pop(1))
            case b"e":
                self.extend(self.marked())
            case b"}":
                self.stack.append({})
            case b"s":
                self.update(self.pop(2))
            case b"u":
                self.update(self.marked())
            case b"c":
                self.stack.append(self.named(self.line(), self.line()))
            case b"R":
                self.stack.append(called(*self.pop(2)))
            case b"b":
                set_state(self.stack[-2], self.pop(1)[0])
            case _:
                raise pickle.UnpicklingError(f"byte {self.place - 1} is {instruction!r}, which stands for nothing that is in a batch")

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        found = self.content[self.place : self.place + n] if n >= 0 else b""
        if len(found) != n:
            raise pickle.UnpicklingError(f"{n} bytes should begin at byte {self.place} of {len(self.content)}")
        self.place += n
        return found

    def integer(self, form: str) -> int:
        """The next one; form is struct's."""
        found: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return found

    def line(self) -> str:
        """The rest of a line, which is part of a name and not long."""
        end = self.content.index(b"\n", self.place, self.place + 100)
        return self.take(end + 1 - self.place)[:-1].decode("ascii")

    def pop(self, n: int) -> tuple[Any, ...]:
        """The last n, in their order."""
        if len(self.stack) < n:
            raise IndexError("the stack has no more")
        found = tuple(self.stack[-n:])
        del self.stack[-n:]
        return found

    def keep(self, index: int) -> None:
        """Remember the last thing on the stack under that number; Python 2 numbers them in order."""
        if index > LONGEST:
            raise pickle.UnpicklingError(f"it keeps something as number {index}, and a batch has not so much")
        self.memo[index] = self.stack[-1]

    def marked(self) -> tuple[Any, ...]:
        """All behind the last mark, which goes with them."""
        n = 1
        while self.stack[-n] is not MARK:
            n += 1
        return self.pop(n)[1:]

    def extend(self, items: tuple[Any, ...]) -> None:
        """Of the list that is last on the stack."""
        if not isinstance(self.stack[-1], list):
            raise TypeError("items belong into a list")
        self.stack[-1] += items

    def update(self, items: tuple[Any, ...]) -> None:
        """Of the dict that is last on the stack. Its keys are strings: to hash a tuple of tuples of tuples may take for ever."""
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, bytes) for key in items[::2]):
            raise TypeError("items with names belong into a dict")
        self.stack[-1].update(zip((key.decode("latin1") for key in items[::2]), items[1::2], strict=True))

    def named(self, module: str, name: str) -> Name:
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs; nothing of it was run")
        return NAMES[module, name]


def called(function: Any, arguments: Any) -> Any:
    """The two calls of a pickled array: its dtype, and itself while it is still empty."""
    if function is DTYPE and arguments == (b"u1", 0, 1):
        return BYTE
    if function is RECONSTRUCT and arguments == (NDARRAY, (0,), b"b"):
        return Array()
    raise pickle.UnpicklingError("it calls something else than an array of bytes needs; nothing of it was run")


def set_state(of: Any, state: Any) -> None:
    """Of the dtype, which has but one, and of an array: version, shape, dtype, whether its columns come first, bytes."""
    if of is BYTE and state == (3, b"|", None, None, None, -1, -1, 0):
        return
    if isinstance(of, Array) and isinstance(state, tuple) and len(state) == 5:
        version, shape, dtype, by_columns, content = state
        extents = isinstance(shape, tuple) and len(shape) <= 4 and all(type(extent) is int and extent >= 0 for extent in shape)
        if version == 1 and extents and dtype is BYTE and by_columns is False and isinstance(content, bytes):
            if math.prod(shape) != len(content):
                raise pickle.UnpicklingError(f"an array of shape {shape} has {len(content)} bytes")
            of.values = np.frombuffer(content, np.uint8).reshape(shape)
            return
    raise pickle.UnpicklingError("it gives something a state that no array of bytes has; nothing of it was set")
