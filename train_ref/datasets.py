"""Fashion-MNIST and CIFAR-10 from files on this machine: where they may lie, and what to fetch when they do not.

Nothing is downloaded. The addresses and md5 sums are those that torchvision's datasets (mnist.py, cifar.py) publish.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from train_ref.data import N_CLASSES, NEIGHBOURS, ImageData, load_digits
from train_ref.formats import TEST, TRAIN, Bytes, read_cifar_archive, read_cifar_folder, read_idx, read_subset

Arrays = tuple[Bytes, Bytes, Bytes, Bytes]  # training images and labels, test images and labels


@dataclass(frozen=True)
class Loaded:
    """Arrays as they were read, the name of their source, and its files."""

    arrays: Arrays
    source: str
    paths: list[Path]


@dataclass(frozen=True)
class Published:
    """A data set as its authors publish it.

    find reads it from a folder, or returns nothing where it is not in there; it raises FileNotFoundError where only a part is.
    """

    title: str
    url: str
    files: dict[str, str]  # name: md5
    where: str
    subset: str
    image_shape: tuple[int, int, int]
    full_size: tuple[int, int]
    find: Callable[[Path], Loaded | None]

    def to_fetch(self) -> str:
        listed = "".join(f"\n  {self.url}{name}  md5 {md5}" for name, md5 in self.files.items())
        return f"{self.title} is to be had from{listed}\nand belongs {self.where}. A folder with {self.subset}, or that file, works too"


def idx_file(folder: Path, name: str) -> Path | None:
    """Unpacked or as published."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def find_fashion(folder: Path) -> Loaded | None:
    for place in (folder, folder / "raw", folder / "FashionMNIST" / "raw"):
        names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        found = {name: idx_file(place, name) for name in names}
        paths = [path for path in found.values() if path]
        if not paths:
            continue
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise FileNotFoundError(f"{place} lacks {', '.join(missing)} (or the same with .gz)")
        images, labels, test_images, test_labels = (read_idx(path, 3 - 2 * (i % 2)) for i, path in enumerate(paths))
        return Loaded((images[:, None], labels, test_images[:, None], test_labels), "idx files", paths)
    return None


CIFAR_BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def find_cifar(folder: Path) -> Loaded | None:
    archive = folder / "cifar-10-python.tar.gz"
    unpacked = [place for place in (folder / "cifar-10-batches-py", folder) if (place / CIFAR_BATCHES[0]).is_file()]
    if unpacked:
        paths = [unpacked[0] / name for name in CIFAR_BATCHES]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{unpacked[0]} lacks {', '.join(missing)}")
        batches, source = read_cifar_folder(unpacked[0], CIFAR_BATCHES), "cifar-10-batches-py"
    elif archive.is_file():
        batches, source, paths = read_cifar_archive(archive, CIFAR_BATCHES), archive.name, [archive]
    else:
        return None
    images, labels = (np.concatenate(parts) for parts in zip(*batches[:-1], strict=True))
    return Loaded((images, labels, *batches[-1]), source, paths)


PUBLISHED = {
    "fashion-mnist": Published(
        title="Fashion-MNIST",
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        files={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        where="into that folder, or its FashionMNIST/raw, packed or unpacked",
        subset="fashion_sub.npz",
        image_shape=(1, 28, 28),
        full_size=(60_000, 10_000),
        find=find_fashion,
    ),
    "cifar10": Published(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/",
        files={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
        where="into that folder, as it is or unpacked to cifar-10-batches-py",
        subset="cifar10_sub.npz",
        image_shape=(3, 32, 32),
        full_size=(50_000, 10_000),
        find=find_cifar,
    ),
}
DATASETS = ("digits", *PUBLISHED)


def load_data(name: str, place: Path | None = None) -> ImageData:
    """The named data: digits, or one of PUBLISHED from a folder or an npz subset; images (N, C, H, W).

    Raises FileNotFoundError, with what to download, where `place` does not have it, and ValueError for a damaged file.
    """
    if name == "digits":
        return load_digits()
    published = PUBLISHED[name]
    if place is None or not place.exists():
        raise FileNotFoundError(f"{'no folder given' if place is None else f'{place} does not exist'}. {published.to_fetch()}")
    subset = place if place.is_file() else place / published.subset
    try:
        found = published.find(place) if place.is_dir() else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {published.to_fetch()}") from None
    if found is None and subset.is_file():
        images, labels, split = read_subset(subset)
        train, test = split == TRAIN, split == TEST
        found = Loaded((images[train], labels[train], images[test], labels[test]), subset.name, [subset])
    if found is None:
        raise FileNotFoundError(f"{place} has no {published.title}. {published.to_fetch()}")
    return checked(name, found, place)


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def checked(name: str, found: Loaded, place: Path) -> ImageData:
    """As one value, once images and labels fit each other and the name, and suffice to evaluate with."""
    images, labels, test_images, test_labels = found.arrays
    published = PUBLISHED[name]
    for part, x, y in (("training", images, labels), ("test", test_images, test_labels)):
        if x.shape[1:] != published.image_shape:
            size = " x ".join(map(str, published.image_shape))
            raise ValueError(f"{place}: the {part} images are {' x '.join(map(str, x.shape[1:]))}, those of {published.title} {size}")
        if len(x) != len(y):
            raise ValueError(f"{place}: {len(x)} {part} images have {len(y)} labels")
    if not len(test_labels) or max(labels.max(initial=0), test_labels.max()) >= N_CLASSES or len(np.unique(labels)) < N_CLASSES:
        raise ValueError(f"{place}: {published.title} needs test images and training images of all {N_CLASSES} classes, 0 to 9")
    if len(labels) < NEIGHBOURS:
        raise ValueError(f"{place}: {len(labels)} training images are too few: {NEIGHBOURS} of them vote on every test image")
    contents = {path.name: path.read_bytes() for path in found.paths}
    return ImageData(
        name=name,
        images=torch.from_numpy(np.concatenate([images, test_images])),
        labels=torch.from_numpy(np.concatenate([labels, test_labels])).long(),
        n_train=len(images),
        n_classes=N_CLASSES,
        source=found.source,
        full_size=published.full_size,
        files={name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        unpublished=tuple(name for name, md5 in published.files.items() if name in contents and md5_of(contents[name]) != md5),
    )
