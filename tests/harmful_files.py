"""Data files made to do harm: to run code, to take all memory, to end the process, or to keep it busy for ever.

python tests/harmful_files.py FOLDER    reads them one after the other in a process that may not grow much; a line for each
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from test_datasets import python_2_array, python_2_batch, python_2_int, random_bytes

from train_ref.formats import LARGEST, read_cifar_archive, read_cifar_folder, read_idx, read_subset
from train_ref.pickled import LONGEST

MEMORY = 3 * LARGEST  # the most that a reader may take: a file of the largest size in pieces, as a whole, and as its content
SECONDS = 60  # of processor time for all files; they take 10
GIBIBYTE = gzip.compress(bytes(2**24)) * 64  # of zeros, in one megabyte

# CIFAR's batches -------------------------------------------------------------------------------------------------------------------------

IMAGES = random_bytes(0, 10, 3072)
BATCH = python_2_batch(python_2_array(IMAGES), range(10))


class Calls:
    """An object that is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def instead(usual: bytes, other: bytes) -> bytes:
    """A batch with one entry replaced."""
    assert BATCH.count(usual) == 1
    return BATCH.replace(usual, other)


def dtype_state(state: bytes) -> bytes:
    return instead(b"(K\x03T\1\0\0\0|NNN" + python_2_int(-1) * 2 + b"K\0tb", state + b"b")


def shape(*extents: int) -> bytes:
    usual, other = (b"(" + b"".join(map(python_2_int, numbers)) + b"tcnumpy" for numbers in (IMAGES.shape, extents))
    return instead(usual, other)


DOUBLING = b")" + b"q\0h\0\x86" * 100  # a tuple of itself and itself, a hundred times: to hash or to print it takes for ever
CALLS = {"mkdir": (os.mkdir, "harm"), "bytearray": (bytearray, 2**40), "zeros": (np.zeros, (2**40,)), "dtype": (np.dtype, "O")}
BATCHES = {
    "dtype, fields": dtype_state(b"(K\x04T\1\0\0\0|N(T\1\0\0\0at}T\1\0\0\0a(cnumpy\ndtype\nK\0tsK\1K\1K\x3ft"),
    "dtype, objects": dtype_state(b"(K\x03T\1\0\0\0|NNNK\x08K\x08K\x3ft"),
    "dtype, within itself": dtype_state(b"q\1(K\x03T\1\0\0\0|h\1NNK\1K\1K\0t"),
    "dtype, sizes": dtype_state(b"(K\x03T\1\0\0\0|NNN" + python_2_int(2**31 - 1) * 2 + b"K\0t"),
    "dtype, empty": dtype_state(b")"),
    "dtype, None": dtype_state(b"N"),
    "dtype, another": instead(b"T\2\0\0\0u1", b"T\2\0\0\0O8"),
    "array, objects for bytes": instead(b"\x89T" + struct.pack("<i", IMAGES.size) + IMAGES.tobytes(), b"\x89]"),
    "array, no tuple": instead(b"(K\1(", b"](K\1("),
    "array, an element for a state": b"\x80\x02}(T\4\0\0\0data](K\1K\2e(K\1)tbu.",
    "shape, negative": shape(-1, -3072),
    "shape, 2^60": shape(2**30, 2**30),
    "shape, nothing times 2^60": shape(2**30, 0, 2**30),
    "shape, doubling": instead(b"tcnumpy\ndtype", b"0" + DOUBLING + b"tcnumpy\ndtype"),
    "memo, 16 GiB": b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + BATCH[3:],
    "memo, 32 GiB": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + BATCH[3:],
    "memo, protocol 0": b"}p2147483647\n" + BATCH[3:],
    "frame, 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "string, 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"}.",
    "string, 2^31 - 1": b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b".",
    "string, -1": b"\x80\x02T" + struct.pack("<i", -1) + b".",
    "integer, 2^31 - 1": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "name without end": b"\x80\x02c" + b"n" * 10**7,
    "lists": b"\x80\x02" + b"]" * (2 * LONGEST),
    "lists in lists": b"\x80\x02" + b"]" * (LONGEST // 2) + b"a" * (LONGEST // 2 - 1) + b".",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * (LONGEST - 3) + b".",
    "list within itself": b"\x80\x02]q\0h\0a.",
    "doubling": b"\x80\x02" + DOUBLING + b".",
    "doubling, name": b"\x80\x02}" + DOUBLING + b"K\0s.",
    "marks": b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".",
    "nothing to call": b"\x80\x02R.",
    "extension": b"\x80\x02\x82\1.",
    "persistent": b"\x80\x02Pid\n.",
    "one byte": b"\x80",
    **{
        f"protocol {protocol}, {name}": pickle.dumps({"data": Calls(*call), "labels": []}, protocol)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
        for name, call in CALLS.items()
    },
    **{f"protocol {protocol}, not Python 2's": pickle.dumps({"data": IMAGES, "labels": [*range(10)]}, protocol) for protocol in range(6)},
}


# Archives --------------------------------------------------------------------------------------------------------------------------------


def header(size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    found = tarfile.TarInfo("data_batch_1")
    found.size, found.type, found.linkname = size, kind, link
    return found.tobuf(tarfile.GNU_FORMAT)


ARCHIVES = {
    "size, -512": gzip.compress(header(-512) + bytes(1024)),
    "size, -1024": gzip.compress(header(0, tarfile.DIRTYPE) + header(-1024) + bytes(1024)),
    "size, 2^62": gzip.compress(header(2**62) + bytes(1024)),
    "sparse, 2^40": gzip.compress(header(2**40, tarfile.GNUTYPE_SPARSE) + bytes(1024)),
    "pax, 2^33": gzip.compress(header(2**33, tarfile.XHDTYPE) + bytes(1024)),
    "pax, negative size": gzip.compress(header(13, tarfile.XHDTYPE) + b"13 size=-512\n".ljust(512, b"\0") + header(512) + bytes(1024)),
    "link to itself": gzip.compress(header(0, tarfile.LNKTYPE, "data_batch_1") + bytes(1024)),
    "zeros": GIBIBYTE,
    "a gibibyte": gzip.compress(header(2**30)) + GIBIBYTE,
}
EXTENTS = {
    "2^93": (2**31 - 1,) * 3,
    "2^40": (2**20, 2**10, 2**10),
    "0 x 2^62": (0, 2**31 - 1, 2**31 - 1),
    "1": (1, 1, 1),
    "2^30": (2**10,) * 3,
}
IDX = {name: b"\0\0\x08\x03" + b"".join(extent.to_bytes(4, "big") for extent in extents) for name, extents in EXTENTS.items()}


def npy(extents: str, content: bytes = b"", descr: str = "'|u1'") -> bytes:
    said = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {extents}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(said)) + said + content


def npz(content: bytes, packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", packing) as archive:
        for name in ("x", "y", "split"):
            archive.writestr(f"{name}.npy", content)
    return made.getvalue()


def zip_of_a_gibibyte(said: int) -> bytes:
    """An archive with x.npy, and the number of bytes that the archive claims for it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = (packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)) * 64 + b"\3\0"
    sizes = struct.pack("<LLL", 0, len(packed), said)
    local = b"PK\3\4" + struct.pack("<5H", 20, 0, 8, 0, 33) + sizes + struct.pack("<HH", 5, 0) + b"x.npy" + packed
    entry = b"PK\1\2" + struct.pack("<6H", 20, 20, 0, 8, 0, 33) + sizes + struct.pack("<5HLL", 5, 0, 0, 0, 0, 0, 0) + b"x.npy"
    entries = b"".join(entry.replace(b"x.npy", name) for name in (b"x.npy", b"y.npy"))
    return local + entries + b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 2, 2, len(entries), len(local), 0)


def zip_of_entries(n: int) -> bytes:
    entries = (b"PK\1\2" + struct.pack("<6H", 20, 20, 0, 8, 0, 33) + bytes(12) + struct.pack("<5HLL", 5, 0, 0, 0, 0, 0, 0) + b"x.npy") * n
    return entries + b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, n % 2**16, n % 2**16, len(entries), 0, 0)


ZIPS = {
    "shape, 2^62": npz(npy(f"({2**31}, {2**31})")),
    "shape, 2^64": npz(npy(f"({2**32}, {2**32})")),
    "shape, long": npz(npy(f"({'9' * 5000},)")),
    "shape, brackets": npz(npy("(" * 9000)),
    "shape, minuses": npz(npy(f"({'-' * 9000}1,)")),
    "objects": npz(npy("(1,)", pickle.dumps(Calls(os.mkdir, "harm")), "'|O'")),
    "a gibibyte as 100 bytes": zip_of_a_gibibyte(100),
    "a gibibyte as 2^30": zip_of_a_gibibyte(2**30),
    "a gibibyte as 2^32 - 1": zip_of_a_gibibyte(2**32 - 1),
    "entries": zip_of_entries(10**6),
    "another packer": npz(npy("(0,)"), zipfile.ZIP_LZMA),
}


# Reading them ----------------------------------------------------------------------------------------------------------------------------

# Name of the file -> its reader, and its possible contents.
HARMFUL: dict[str, tuple[Callable[[Path], Any], dict[str, bytes]]] = {
    "data_batch_1": (lambda path: read_cifar_folder(path.parent, [path.name]), BATCHES),
    "cifar-10-python.tar.gz": (lambda path: read_cifar_archive(path, ["data_batch_1"]), ARCHIVES),
    "idx3": (lambda path: read_idx(path, 3), {name: content + bytes(100) for name, content in IDX.items()}),
    "idx3.gz": (lambda path: read_idx(path, 3), {name: gzip.compress(content) + GIBIBYTE for name, content in IDX.items()}),
    "subset.npz": (read_subset, ZIPS),
}


def outcome(read: Callable[[Path], Any], path: Path) -> str:
    """Read a file that has to be refused with its one message. Any other outcome is a fault."""
    try:
        read(path)
    except ValueError as error:
        if isinstance(error.__cause__, MemoryError):
            return "out of memory"
        return "refused" if str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000 else f"message: {error}"
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}"
    return "read"


def main(folder: Path) -> None:
    os.chdir(folder)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    for name, (read, contents) in HARMFUL.items():
        for harm, content in contents.items():
            print(f"{name}, {harm}: ", end="", flush=True)
            (folder / name).write_bytes(content)
            print(outcome(read, folder / name), flush=True)
    print("harm done" if (folder / "harm").exists() else "no harm done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
