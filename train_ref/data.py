"""Labelled images as one value, and the digits: 1797 handwritten 8x8 images that ship with the project (data/README.md)."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
DIGITS_SHA256 = "6f801551877abf69fbf3711373bb642a18dc933430a3385cd6febc235225ea6f"

# As ordered in the file. A random split leaves almost no headroom (raw pixels then reach about 98 % with nearest
# neighbours); in the file's order the last 500 are harder.
N_TRAIN = 1297
N_CLASSES = 10
NEIGHBOURS = 20  # that vote on a test image (evaluate.py): fewer training images cannot be evaluated


@dataclass(frozen=True)
class ImageData:
    """images (N, C, H, W), uint8 0..255 or float32 0..1, and labels (N,) int64; the first n_train train, the others test.

    source is the file or folder it came from, by name; full_size the (training, test) images of the whole set of that name.
    files has the sha256 of every file that was read, by name, and unpublished those that have the name of a published file but not its
    md5.
    unit_features: the linear probe gets features divided by their root mean square, so that a network's unit does not matter.
    """

    name: str
    images: Tensor
    labels: Tensor
    n_train: int
    n_classes: int
    source: str
    full_size: tuple[int, int]
    held_out: bool = False
    unit_features: bool = True
    files: dict[str, str] = field(default_factory=dict)
    unpublished: tuple[str, ...] = ()

    @property
    def n_test(self) -> int:
        return len(self.images) - self.n_train

    @property
    def tested_on(self) -> str:
        return f"{self.n_test} {'held-out training' if self.held_out else 'test'} images"

    @property
    def is_subset(self) -> bool:
        return not self.held_out and (self.n_train, self.n_test) != self.full_size

    def to(self, device: torch.device) -> ImageData:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def hold_out(self, n: int) -> ImageData:
        """Without the test images: the last n training images take their place, for choosing settings.

        Raises ValueError unless enough training images are left to evaluate with.
        """
        if n < 1 or self.n_train - n < NEIGHBOURS or len(self.labels[: self.n_train - n].unique()) < self.n_classes:
            raise ValueError(
                f"{n} cannot be held out of the {self.n_train} training images of {self.name}: it takes at least one, and at least "
                f"{NEIGHBOURS} of all {self.n_classes} classes have to be left"
            )
        kept = slice(self.n_train)
        return replace(self, images=self.images[kept], labels=self.labels[kept], n_train=self.n_train - n, held_out=True)

    def describe(self) -> str:
        """One line: the name, the number of images, the source."""
        train, test = self.full_size
        counts = f"{self.n_train} training images and {self.tested_on}"
        part = f" (a subset: the whole has {train} and {test})" if self.is_subset else ""
        return f"{self.name}: {counts}{part}, from {self.source}"


def as_float(images: Tensor) -> Tensor:
    """Float images as they are, uint8 ones as float32 in 0..1."""
    return images if images.is_floating_point() else images.float() / 255


def load_digits(path: Path = DIGITS) -> ImageData:
    """The digits, once the file has proved to be the one the published numbers were measured on.

    images (1797, 1, 8, 8) float32 in 0..1.
    Raises FileNotFoundError when there is no such file and ValueError when its sha256 is another.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; train_ref/data/README.md has the line that re-creates it") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != DIGITS_SHA256:
        raise ValueError(
            f"{path} is damaged or another file: its sha256 is {digest}, not {DIGITS_SHA256}; "
            "check it out again, or re-create it with the line in train_ref/data/README.md"
        )
    with np.load(io.BytesIO(content)) as arrays:
        images, labels = arrays["x"], arrays["y"]
    return ImageData(
        name="digits",
        images=torch.from_numpy(images).float().div(16).unsqueeze(1),
        labels=torch.from_numpy(labels).long(),
        n_train=N_TRAIN,
        n_classes=N_CLASSES,
        source="data/digits.npz",
        full_size=(N_TRAIN, len(images) - N_TRAIN),
        unit_features=False,  # as in the numbers of train_ref/README.md
        files={path.name: digest},
    )
