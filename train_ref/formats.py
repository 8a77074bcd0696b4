"""Readers of image files as others publish them: idx (MNIST's), CIFAR-10's Python batches, and npz subsets of both.

Every reader returns uint8 arrays and raises ValueError, naming the file, for one that is damaged or holds something else.
No reader runs code from a file: CIFAR-10's batches are pickles, and theirs may name nothing but arrays.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# What reading a file that was cut off or changed can raise, by gzip, tarfile, zipfile, pickle and numpy.
DAMAGE = (
    *(EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile, pickle.UnpicklingError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError, RuntimeError),
)


def read_bytes(path: Path) -> bytes:
    """The content, unpacked where the name ends in .gz."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_idx(path: Path, n_dims: int) -> Bytes:
    """An idx file of unsigned bytes: 0 0 8 n_dims, every extent as a big-endian int32, then the values in C order."""
    content = read_bytes(path)
    start = 4 + 4 * n_dims
    if content[:4] != bytes([0, 0, 8, n_dims]) or len(content) < start:
        raise ValueError(f"{path} is no idx file of unsigned bytes in {n_dims} dimensions: it starts with {content[:4].hex(' ')}")
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_dims))
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} is damaged: it has {len(content) - start} values, and its header says {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class ArrayUnpickler(pickle.Unpickler):
    """Python 2's pickles of arrays, lists, dicts, numbers and strings; every other name in the pickle is refused."""

    # numpy's own way to begin an array, wherever the installed version keeps it.
    ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs; nothing of it was run") from None


def read_cifar_batch(content: bytes, named: str) -> tuple[Bytes, Bytes]:
    """data_batch_1..5 or test_batch: images (N, 3, 32, 32) in RGB and labels (N,); `named` is what errors call it."""
    try:
        batch = ArrayUnpickler(content).load()
        images, labels = batch["data"], np.asarray(batch["labels"])
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
            raise ValueError("its data is not (N, 3072) of bytes")
        if labels.shape != (len(images),) or labels.dtype.kind != "i":
            raise ValueError(f"it has {len(images)} images and labels of shape {labels.shape}, type {labels.dtype}")
        if len(labels) and not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"its labels go from {labels.min()} to {labels.max()} instead of 0 to 9")
    except DAMAGE as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{named} is damaged or no batch of CIFAR-10: {said}") from None
    return images.reshape(-1, 3, 32, 32), labels.astype(np.uint8)


def read_cifar_folder(folder: Path, names: list[str]) -> list[tuple[Bytes, Bytes]]:
    """The named batches of the unpacked archive. Raises FileNotFoundError for a missing one."""
    return [read_cifar_batch((folder / name).read_bytes(), str(folder / name)) for name in names]


def read_cifar_archive(path: Path, names: list[str]) -> list[tuple[Bytes, Bytes]]:
    """The named batches of cifar-10-python.tar.gz, read in memory: nothing is unpacked to disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                opened = archive.extractfile(member) if name in names else None
                if opened is not None:
                    found[name] = opened.read()
    except (*DAMAGE, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return [read_cifar_batch(found[name], f"{name} in {path}") for name in names]


TRAIN, VALIDATION, TEST = 0, 1, 2


def read_subset(path: Path) -> tuple[Bytes, Bytes, Bytes]:
    """A subset in one npz file: images (N, C, H, W), labels (N,) and split (N,), TRAIN, VALIDATION or TEST.

    The images are either x (N, H, W), or for RGB r (3, N, H, W), which stores (R - G, G, B - G) as differences to the
    pixel before, along rows and then columns, modulo 256: lossless, and a quarter smaller when compressed.
    """
    try:
        with np.load(path) as arrays:
            labels, split = arrays["y"], arrays["split"]
            if "r" in arrays:
                coded = arrays["r"].transpose(1, 0, 2, 3)
                images = coded.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
                images[:, [0, 2]] += images[:, 1:2]
            else:
                images = arrays["x"][:, None]
    except (*DAMAGE, OSError) as error:
        raise ValueError(f"{path} is damaged or no subset: {error}") from None
    n = len(images)
    if images.ndim != 4 or not labels.shape == split.shape == (n,) or not images.dtype == labels.dtype == split.dtype == np.uint8:
        raise ValueError(f"{path} is no subset: {images.shape} {images.dtype} images, {labels.shape} labels, {split.shape} split")
    return images, labels, split
