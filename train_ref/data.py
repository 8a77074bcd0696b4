"""The digits: 1797 handwritten 8x8 images that ship with the project (data/README.md has their source and licence)."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Digits:
    """images (1797, 1, 8, 8) float32 in 0..1, labels (1797,) int64; the first N_TRAIN train, the others test."""

    images: Tensor
    labels: Tensor


def load_digits(path: Path = DIGITS) -> Digits:
    """The digits, once the file has proved to be the one the published numbers were measured on.

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
    return Digits(torch.from_numpy(images).float().div(16).unsqueeze(1), torch.from_numpy(labels).long())
