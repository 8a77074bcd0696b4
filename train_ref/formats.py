"""Readers of image files as others publish them: idx (MNIST's), CIFAR-10's Python batches, and npz subsets of both.

Every reader returns uint8 arrays and raises ValueError, naming the file, for one that is damaged or holds something else. A file may
claim a size up to LARGEST, and no reader runs code from a file.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from train_ref.pickled import Array, ArrayUnpickler

Bytes = NDArray[np.uint8]

# Bytes of a file, packed and unpacked. CIFAR-10's archive has 186 million of them, the largest file of Fashion-MNIST 47.
LARGEST = 2**28
CHUNK = 2**20


class Readable(Protocol):
    """A file of bytes, or of packed ones."""

    def read(self, size: int, /) -> bytes: ...


class Damaged(ValueError):
    """A whole message about a file."""


@contextmanager
def judged(named: Path | str, verdict: str = "is damaged") -> Iterator[None]:
    """Any error while a file is read becomes one message: its name, the verdict, the reason.

    gzip, tarfile, zipfile and numpy raise a dozen kinds of error for damaged files, and none promises that there are no others.
    """
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        # Some reasons hold a part of the file.
        raise Damaged(f"{named} {verdict}: {textwrap.shorten(reason, 300)}") from error


@contextmanager
def opened(path: Path, packed: bool = False) -> Iterator[Readable]:
    """For reading, unpacked by gzip where that is asked. Raises OSError where it cannot be opened."""
    size = path.stat().st_size
    if size > LARGEST:
        raise Damaged(f"{path} has {size} bytes, and no file of these data sets has more than {LARGEST}")
    with gzip.open(path) if packed else path.open("rb") as file:
        yield file


def read_at_most(file: Readable, limit: int) -> bytes:
    """All of it, piece by piece, or the first limit + 1 bytes: a few packed bytes may stand for more than there is memory."""
    parts, left = [], limit + 1
    while left and (part := file.read(min(CHUNK, left))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_all(file: Readable) -> bytes:
    """Raises ValueError where it has more than LARGEST bytes."""
    content = read_at_most(file, LARGEST)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    return content


def read_idx(path: Path, n_dims: int) -> Bytes:
    """An idx file of unsigned bytes: 0 0 8 n_dims, every extent as a big-endian int32, then the values in C order."""
    with opened(path, path.suffix == ".gz") as file, judged(path):
        header = file.read(4 + 4 * n_dims)
        if header[:4] != bytes([0, 0, 8, n_dims]) or len(header) < 4 + 4 * n_dims:
            raise Damaged(f"{path} is no idx file of unsigned bytes in {n_dims} dimensions: it starts with {header[:4].hex(' ')}")
        shape = tuple(int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_dims))
        promised, said = math.prod(shape), " x ".join(map(str, shape))
        if promised > LARGEST:
            raise ValueError(f"its header says {said} values, and no file of these data sets has more than {LARGEST}")
        values = read_at_most(file, promised)
        if len(values) != promised:
            more = " or more" if len(values) > promised else ""
            raise ValueError(f"it has {len(values)} values{more}, and its header says {said}")
        return np.frombuffer(values, np.uint8).reshape(shape)


def read_cifar_batch(content: bytes, named: str) -> tuple[Bytes, Bytes]:
    """data_batch_1..5 or test_batch: images (N, 3, 32, 32) in RGB and labels (N,); `named` is what errors call it."""
    with judged(named, "is damaged or no batch of CIFAR-10"):
        batch = ArrayUnpickler(content).load()
        data, labels = batch["data"], batch["labels"]
        images = data.values if isinstance(data, Array) else None
        if images is None or images.ndim != 2 or images.shape[1] != 3072:
            raise ValueError("its data is not (N, 3072) of bytes")
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise ValueError("its labels are not a list of integers")
        if len(labels) != len(images):
            raise ValueError(f"it has {len(images)} images and labels of shape ({len(labels)},)")
        if labels and not 0 <= min(labels) <= max(labels) <= 9:
            raise ValueError(f"its labels go from {min(labels)} to {max(labels)} instead of 0 to 9")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.uint8)


def read_cifar_folder(folder: Path, names: list[str]) -> list[tuple[Bytes, Bytes]]:
    """The named batches of the unpacked archive. Raises FileNotFoundError for a missing one."""
    found = []
    for name in names:
        with opened(folder / name) as file, judged(folder / name):
            found.append(read_cifar_batch(read_all(file), str(folder / name)))
    return found


def read_cifar_archive(path: Path, names: list[str]) -> list[tuple[Bytes, Bytes]]:
    """The named batches of cifar-10-python.tar.gz, read in memory: nothing is unpacked to disk."""
    with opened(path, packed=True) as file, judged(path):
        found = {name: content for name, content in members(read_all(file)) if name in names}
    absent = [name for name in names if name not in found]
    if absent:
        raise Damaged(f"{path} lacks {', '.join(absent)}")
    return [read_cifar_batch(found[name], f"{name} in {path}") for name in names]


def members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Name, without folders, and content of every file in a tar archive.

    A header of 512 bytes, then the content up to a multiple of 512. tarfile would also follow links and headers that change others'
    sizes: some versions of it never come back from one that is negative.
    """
    place = 0
    while (header := archive[place : place + 512]) != bytes(512):
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        place += 512
        if not 0 <= found.size <= len(archive) - place:
            raise ValueError(f"{found.size} bytes of {found.name!r} should begin at byte {place} of {len(archive)}")
        if found.isreg():
            yield found.name.rpartition("/")[2], archive[place : place + found.size]
        place += -(-found.size // 512) * 512


HEADER = re.compile(rb"(?s)\x93NUMPY\x01\x00..\{'descr': '\|u1', 'fortran_order': (False|True), 'shape': \(((?:\d+, ?)*\d*)\), \} *\n")


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, Bytes]:
    """Those of the named arrays that an npz file has. Raises ValueError for a damaged file and for arrays of anything but bytes.

    numpy's own reader would ask for the memory that a header speaks of, and hand the header to Python's parser.
    """
    with opened(path) as file:
        content = read_all(file)
    # Every entry takes half a kilobyte of memory and begins so; by chance these four bytes occur once in 4 GiB.
    if content.count(b"PK\1\2") > 1000:
        raise ValueError("it has more than 1000 entries")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.getinfo(f"{name}.npy") for name in names if f"{name}.npy" in archive.namelist()}
        if sum(entry.file_size for entry in entries.values()) > LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST} bytes")
        found = {}
        for name, entry in entries.items():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is packed in a way that numpy does not write")
            with archive.open(entry) as file:
                found[name] = array_of(name, read_all(file))
        return found


def array_of(name: str, content: bytes) -> Bytes:
    """An npy file of bytes."""
    header = HEADER.match(content, 0, 500)
    if header is None:
        raise ValueError(f"{name} is no array of bytes: it starts with {content[10:90]!r}")
    shape = tuple(int(extent) for extent in header[2].split(b",") if extent.strip())
    if math.prod(shape) != len(content) - header.end():
        raise ValueError(f"{name} has {len(content) - header.end()} bytes, and its header says {' x '.join(map(str, shape))}")
    # A copy: torch warns of memory that may not be written to.
    return np.frombuffer(content, np.uint8, offset=header.end()).reshape(shape, order="F" if header[1] == b"True" else "C").copy()


TRAIN, VALIDATION, TEST = 0, 1, 2


def read_subset(path: Path) -> tuple[Bytes, Bytes, Bytes]:
    """A subset in one npz file: images (N, C, H, W), labels (N,) and split (N,), TRAIN, VALIDATION or TEST.

    The images are either x (N, H, W), or for RGB r (3, N, H, W), which stores (R - G, G, B - G) as differences to the
    pixel before, along rows and then columns, modulo 256: lossless, and a quarter smaller when compressed.
    """
    with judged(path, "is damaged or no subset"):
        arrays = read_arrays(path, ("x", "r", "y", "split"))
        labels, split = arrays["y"], arrays["split"]
        if "r" in arrays:
            coded = arrays["r"].transpose(1, 0, 2, 3)
            images = coded.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
            images[:, [0, 2]] += images[:, 1:2]
        else:
            images = arrays["x"][:, None]
        n = len(images)
        if images.ndim != 4 or not labels.shape == split.shape == (n,):
            raise ValueError(f"{images.shape} images, {labels.shape} labels, {split.shape} split")
    return images, labels, split
