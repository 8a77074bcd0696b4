"""Pairs to train on: halves of digits, emoji and their names, sentences and their translations."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from train_ref.data import load_digits
from train_ref.formats import Damaged, judged, opened, read_all, read_arrays
from train_ref.two_towers.text import Bags, hashed_n_grams

EMOJI_FILE = "noto_emoji32.npz"
EMOJI_WHAT = (
    "a NumPy archive of emoji and their names: x uint8 (N, 3, 32, 32), RGB on white; names, uint8 bytes of N lines of UTF-8; made from "
    "github.com/googlefonts/noto-emoji, png/32, and the names of Unicode's emoji-test.txt"
)
TATOEBA_FILE = "tatoeba_laser_v1.tsv.gz"
TATOEBA_WHAT = (
    "gzipped UTF-8 lines 'language<TAB>English sentence<TAB>its translation'; made from github.com/facebookresearch/LASER, data/tatoeba/v1"
)

# Tatoeba has 7 million bytes in 89,000 lines. A letter of a text takes a hundred bytes of memory while its n-grams are hashed.
LARGEST_TEXT, MOST_LINES = 2**24, 2**20

# Held out from training, whatever the seed: the candidates of the test, and those on which settings are chosen.
EMOJI_TEST, EMOJI_VALIDATION = 300, 200  # of 1413 motifs
TATOEBA_TEST, TATOEBA_VALIDATION = 4000, 4000
# Words that only say which person an emoji shows.
PERSONS = {"person", "man", "woman", "people", "men", "women"}
# The digits' own split (train_ref/data.py): the last 500 of the file test; the 300 before them choose.
DIGITS_TEST, DIGITS_VALIDATION = 500, 300


@dataclass(frozen=True)
class Images:
    """pixels (N, C, H, W) float32 in 0..1."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def select(self, index: Tensor) -> Tensor:
        """(B, C, H, W): those images, in that order."""
        return self.pixels[index]


def no_index() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class PairData:
    """Row i of `left` belongs to row i of `right`, and to those of all rows with the same id (N,).

    train are the indices of the training pairs, validation and test those of the candidates for choosing settings and for the results;
    no id is in two of them. unlabelled are further pairs of training ids that only mining meets, and further_validation and further_test
    those that nothing meets, one of an id: candidates of their own.
    """

    name: str
    left: Images | Bags
    right: Images | Bags
    left_name: str
    right_name: str
    ids: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    unlabelled: Tensor = field(default_factory=no_index)
    further_validation: Tensor = field(default_factory=no_index)
    further_test: Tensor = field(default_factory=no_index)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def corpus(self) -> Tensor:
        """The pairs whose right halves hard negatives are mined from: the training pairs first."""
        return torch.cat([self.train, self.unlabelled])


def equal_ids(things: Sequence[Hashable]) -> Tensor:
    """(N,) int64: equal things get the same id, numbered as they first appear."""
    seen: dict[Hashable, int] = {}
    return torch.tensor([seen.setdefault(thing, len(seen)) for thing in things])


def linked(*labels: Tensor) -> Tensor:
    """(N,) int64: the same number for rows that are equal in any of the labels, directly or over other rows.

    labels (N,) int64 from 0 to N - 1, as equal_ids has them; the result is numbered like them.
    """
    n = len(labels[0])
    group = torch.arange(n)
    while True:
        before = group
        for label in labels:
            group = torch.full((n,), n).scatter_reduce(0, label, group, "amin")[label]
        if torch.equal(group, before):
            return equal_ids(group.tolist())


def motif(name: str) -> str:
    """An emoji's name without what tells its variants apart: all behind a colon (skin tone, hair, members), and who it shows.

    'man detective: dark skin tone' and 'detective' have the motif 'detective'.
    """
    return " ".join(word for word in name.partition(":")[0].split() if word not in PERSONS)


def load_digit_halves() -> PairData:
    """The left four columns of every digit and its right four; every pair has an id of its own."""
    images = load_digits().images
    train, validation, test = torch.arange(len(images)).split(
        [len(images) - DIGITS_VALIDATION - DIGITS_TEST, DIGITS_VALIDATION, DIGITS_TEST]
    )
    left, right = Images(images[..., :4].contiguous()), Images(images[..., 4:].contiguous())
    return PairData("digit-halves", left, right, "left half", "right half", torch.arange(len(images)), train, validation, test)


def the_file(where: Path, name: str, what: str) -> Path:
    """`where` itself, or the file of that name in it. Raises FileNotFoundError with what the file should be."""
    path = where / name if where.is_dir() else where
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected {name}, {what}")
    return path


def sha256_of(path: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def load_emoji(where: Path) -> PairData:
    """Images of emoji and their names; pixelwise equal images share an id.

    Variants of a motif, and what looks the same, are on one side of the split, and a held-out motif has one candidate, its first emoji.
    Split by id, 295 of 501 test names had a training name that differs from them only behind the colon, 247 of them in the skin tone.
    Raises FileNotFoundError without the file, and ValueError when it is damaged or holds something else.
    """
    path = the_file(where, EMOJI_FILE, EMOJI_WHAT)
    expected = f"; expected {EMOJI_FILE}, {EMOJI_WHAT}"
    with judged(path, "is damaged or another file", expected):
        arrays = read_arrays(path, ("x", "names"))
        x, text = arrays["x"], arrays["names"].tobytes()
        n_names = text.count(b"\n") + 1
        if x.shape != (n_names, 3, 32, 32):
            raise Damaged(f"{path} holds x {x.dtype} {x.shape} and {n_names} names{expected}")
        if len(text) > LARGEST_TEXT:
            raise ValueError(f"its names have more than {LARGEST_TEXT} bytes")
        names = text.decode("utf-8").split("\n")
    ids = equal_ids([image.tobytes() for image in x])
    motifs = linked(ids, equal_ids([motif(name) for name in names]))
    train, validation, test = split_by_id(motifs, EMOJI_VALIDATION, EMOJI_TEST)
    validation, test = first_of_each(motifs, validation), first_of_each(motifs, test)
    left = Images(torch.from_numpy(x).float().div(255))
    return PairData("emoji", left, hashed_n_grams(names), "image", "name", ids, train, validation, test, files=sha256_of(path))


def load_tatoeba(where: Path, min_copies: int = 1, one_of_each: bool = False) -> PairData:
    """English sentences and their translations into some hundred languages; pairs with the same English sentence share an id.

    The candidates are the first pair of every held-out English sentence: all English sentences among them are distinct and unseen in
    training. min_copies leaves only those training pairs whose sentence has at least so many of them. one_of_each trains on one pair
    of every sentence (label_one_of_each).
    Raises FileNotFoundError without the file, and ValueError when it is damaged or holds something else.
    """
    path = the_file(where, TATOEBA_FILE, TATOEBA_WHAT)
    expected = f"; expected {TATOEBA_FILE}, {TATOEBA_WHAT}"
    with opened(path, packed=True) as file, judged(path, "is damaged or another file", expected):
        text = read_all(file, LARGEST_TEXT).decode("utf-8")
        if text.count("\n") > MOST_LINES:
            raise ValueError(f"it has more than {MOST_LINES} lines")
        rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")] if text else []
        for number, row in enumerate(rows, 1):
            if len(row) != 3:
                raise Damaged(f"{path}: line {number} has {len(row)} fields instead of 3{expected}")
        if not rows:
            raise Damaged(f"{path} is empty{expected}")
    _, english, other = zip(*rows, strict=True)
    ids = equal_ids(english)
    train, validation, test = split_by_id(ids, TATOEBA_VALIDATION, TATOEBA_TEST)
    train = train[ids[train].bincount(minlength=len(rows))[ids[train]] >= min_copies]
    data = PairData("tatoeba", hashed_n_grams(english), hashed_n_grams(other), "English", "other language", ids, train, validation, test)
    data = replace(data, files=sha256_of(path), validation=first_of_each(ids, validation), test=first_of_each(ids, test))
    return label_one_of_each(data) if one_of_each else data


def label_one_of_each(data: PairData) -> PairData:
    """One random but fixed pair of every training id to train on, one held out from everything where there is another, the rest unlabelled.

    As in retrieval: one known answer to a query, and a corpus that holds others nobody has marked.
    """
    shuffled = data.train[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))]
    labelled = first_of_each(data.ids, shuffled)
    others = shuffled[~torch.isin(shuffled, labelled)]
    further = first_of_each(data.ids, others)
    unlabelled = others[~torch.isin(others, further)]
    return replace(data, train=labelled, unlabelled=unlabelled, further_validation=further[::2], further_test=further[1::2])


def split_by_id(ids: Tensor, n_validation: int, n_test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the training, validation and test pairs: of all ids in a random but fixed order, the first n_test test, the next
    n_validation validate. Small data keep half of their ids for training."""
    n_ids = int(ids.max()) + 1
    if n_validation + n_test > n_ids // 2:
        n_validation, n_test = n_ids // 4, n_ids // 4
    place = torch.randperm(n_ids, generator=torch.Generator().manual_seed(0))[ids]
    split = [place >= n_validation + n_test, (place >= n_test) & (place < n_validation + n_test), place < n_test]
    train, validation, test = (mask.nonzero().flatten() for mask in split)
    return train, validation, test


def first_of_each(ids: Tensor, index: Tensor) -> Tensor:
    """The first of the indices for every id among them, in ascending order of the indices."""
    seen: dict[int, int] = {}
    for place, number in zip(index.tolist(), ids[index].tolist(), strict=True):
        seen.setdefault(number, place)
    return torch.tensor(sorted(seen.values()), dtype=torch.int64)
