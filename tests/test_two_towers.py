"""The two-tower runs: tiny files in the real formats, ids, batches, losses with ids, retrieval, and the script from end to end."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from named import IN_FLOAT64
from torch import Tensor

from train_ref.implementations import LossFunctions, dense_losses, fused_losses
from train_ref.train_pairs import main
from train_ref.two_towers.data import Images, PairData, linked, load_digit_halves, load_emoji, load_tatoeba, motif
from train_ref.two_towers.loop import History, Settings, train_towers
from train_ref.two_towers.mining import mine
from train_ref.two_towers.objectives import VARIANTS, false_negatives, mined_false_negatives, objective
from train_ref.two_towers.report import Row, differences
from train_ref.two_towers.retrieval import DIRECTIONS, FURTHER, Retrieval, chance, evaluate, places, retrieval
from train_ref.two_towers.text import ROWS, Bags, hashed_n_grams
from train_ref.two_towers.towers import TwoTowers, build_towers

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Text -------------------------------------------------------------------------------------------------------------------------------------


def bag(bags: Bags, i: int) -> list[int]:
    return bags.values[bags.offsets[i] : bags.offsets[i + 1]].tolist()


def slow_row(gram: str) -> int:
    """The documented hash in Python's own integers."""
    state = len(gram)
    for character in gram:
        state = (state ^ ord(character)) * 0x9E3779B97F4A7C15 % 2**64
    return state >> 49


@pytest.mark.parametrize("text", ["a", "Hello", "ǅ ß", "日本語です", "😀 ok", ""])
def test_a_text_is_all_its_n_grams(text: str) -> None:
    padded = f" {text.casefold()} "
    expected = [slow_row(padded[i : i + n]) for i in range(len(padded)) for n in (1, 2, 3, 4) if i + n <= len(padded)]
    # Neighbours change nothing: no n-gram reaches into the next text.
    bags = hashed_n_grams(["first", text, "last"])
    assert bag(bags, 1) == expected
    assert all(0 <= row < ROWS for row in expected)


def test_rows_are_the_same_in_every_process() -> None:
    expected = [12947, 19125, 1903, 5323, 595, 8551, 9843, 13744, 32235, 6071, 16302, 20314, 32254, 12947]
    assert bag(hashed_n_grams(["Zoë"]), 0) == expected
    code = "from train_ref.two_towers.text import hashed_n_grams; print(hashed_n_grams(['Zoë']).values.tolist())"
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout) == expected


def test_n_grams_spread_over_the_table() -> None:
    """Three-letter words into 2^15 rows: about as many different rows as random ones would be."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = {slow_row(a + b + c) for a in letters for b in letters for c in letters}
    random = ROWS * (1 - (1 - 1 / ROWS) ** 26**3)
    assert abs(len(rows) - random) < 0.03 * random


def test_selected_bags_are_those_of_the_texts() -> None:
    bags = hashed_n_grams(["one", "", "three", "two"])
    selected = bags.select(torch.tensor([2, 1, 2, 0]))
    assert [bag(selected, i) for i in range(len(selected))] == [bag(bags, i) for i in (2, 1, 2, 0)]


def test_left_out_n_grams() -> None:
    bags = hashed_n_grams(["abcdefgh" * 20, "xyz" * 40])
    index = torch.tensor([1, 0])
    half, again = (bags.select(index).thinned(0.5, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(half.values, again.values) and torch.equal(half.offsets, again.offsets)
    for i, whole in enumerate((1, 0)):
        kept, all_of_it = bag(half, i), bag(bags, whole)
        assert 0.4 < len(kept) / len(all_of_it) < 0.6
        rest = iter(all_of_it)
        assert all(row in rest for row in kept)  # in order, and none but its own


# Data -------------------------------------------------------------------------------------------------------------------------------------

WORDS = ["cat", "dog", "house", "tree", "river", "stone", "bread", "night"]
SENTENCES = [f"The {a} and the {b}." for a in WORDS for b in WORDS if a < b]  # 28
# Every other sentence has a second translation, every fourth a third: 28 + 14 + 7 pairs.
LINES = [(lang, s, f"{lang} {s[::-1]}") for every, lang in ((1, "aaa"), (2, "bbb"), (4, "ccc")) for s in SENTENCES[::every]]


def write_tatoeba(folder: Path, lines: Sequence[tuple[str, ...]] = LINES) -> Path:
    path = folder / "tatoeba_laser_v1.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines("\t".join(line) + "\n" for line in lines)
    return path


def emoji_names(n: int) -> list[str]:
    """Two variants of every motif, one behind a colon and one by who it shows in turn; the last name is a motif of its own."""
    first, second = ("man with é {}", "man with é {}: dark skin tone"), ("woman with é {}", "person with é {}")
    return [*((first, second)[i // 2 % 2][i % 2].format(i // 2) for i in range(n - 1)), "copy"]


def write_emoji(folder: Path, n: int = 24) -> Path:
    """n images, the last one a copy of the first under another name."""
    x = np.random.default_rng(0).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    x[-1] = x[0]
    names = emoji_names(n)
    path = folder / "noto_emoji32.npz"
    as_bytes = {"names": names, "groups": ["Smileys", "Flags"]}
    arrays = {key: np.frombuffer("\n".join(lines).encode(), np.uint8) for key, lines in as_bytes.items()}
    np.savez_compressed(path, x=x, alpha=x[:, 0], y=np.zeros(n, np.uint8), codes=arrays["names"], **arrays)
    return path


def splits(data: PairData) -> list[set[int]]:
    return [set(data.ids[part].tolist()) for part in (data.train, data.validation, data.test)]


def test_tatoeba(tmp_path: Path) -> None:
    path = write_tatoeba(tmp_path)
    data = load_tatoeba(tmp_path)
    assert torch.equal(load_tatoeba(path).test, data.test)
    assert len(data.left) == len(data.right) == len(data.ids) == 49
    # Equal English sentences, and only those, share an id.
    english = [line[1] for line in LINES]
    assert all((data.ids[i] == data.ids[j]).item() == (english[i] == english[j]) for i in range(49) for j in range(49))
    assert bag(data.left, 30) == bag(hashed_n_grams([LINES[30][1]]), 0)
    assert bag(data.right, 30) == bag(hashed_n_grams([LINES[30][2]]), 0)
    train, validation, test = splits(data)
    assert not train & validation and not train & test and not validation & test
    assert len(train) == 14 and len(train | validation | test) == 28
    # Candidates are distinct English sentences; training has all pairs of its own.
    assert len(data.test) == len(test) == 7 and len(data.validation) == len(validation) == 7
    assert len(data.train) == sum(LINES[i][1] in {LINES[j][1] for j in data.train} for i in range(49))


def test_tatoeba_with_repeated_sentences_only(tmp_path: Path) -> None:
    write_tatoeba(tmp_path)
    data, repeated = load_tatoeba(tmp_path), load_tatoeba(tmp_path, min_copies=3)
    assert torch.equal(repeated.test, data.test)
    counts = data.ids[data.train].bincount()
    assert repeated.train.tolist() == [i for i in data.train.tolist() if counts[data.ids[i]] >= 3]
    assert 0 < len(repeated.train) < len(data.train)


def test_one_labelled_pair_of_every_sentence(tmp_path: Path) -> None:
    write_tatoeba(tmp_path)
    data, one = load_tatoeba(tmp_path), load_tatoeba(tmp_path, one_of_each=True)
    assert not len(data.further_test) and torch.equal(data.corpus, data.train)
    further = torch.cat([one.further_validation, one.further_test])
    counts = data.ids[data.train].bincount()
    assert sorted(data.ids[one.train].tolist()) == (counts > 0).nonzero().flatten().tolist()
    assert sorted(data.ids[further].tolist()) == (counts > 1).nonzero().flatten().tolist()
    assert sorted(data.ids[one.unlabelled].tolist()) == (counts > 2).nonzero().flatten().tolist() != []
    assert abs(len(one.further_validation) - len(one.further_test)) <= 1
    # Every pair has one place, and what is evaluated is not in the corpus.
    assert sorted([*one.corpus.tolist(), *further.tolist()]) == data.train.tolist()
    assert one.corpus.tolist() == [*one.train.tolist(), *one.unlabelled.tolist()]
    assert torch.equal(one.test, data.test) and torch.equal(one.validation, data.validation)


def test_emoji(tmp_path: Path) -> None:
    data = load_emoji(write_emoji(tmp_path))
    assert isinstance(data.left, Images)
    assert data.left.shape == (3, 32, 32) and data.left.pixels.dtype == torch.float32
    assert data.left.pixels.min() >= 0 and data.left.pixels.max() == 1
    names = emoji_names(24)
    assert bag(data.right, 3) == bag(hashed_n_grams([names[3]]), 0)
    assert data.ids.tolist() == [*range(23), 0]  # equal images belong together
    assert data.files == {"noto_emoji32.npz": hashlib.sha256((tmp_path / "noto_emoji32.npz").read_bytes()).hexdigest()}
    train, validation, test = splits(data)
    assert not train & validation and not train & test and not validation & test
    # Twelve motifs, "copy" looking like one of them, three of them held out for each purpose, with one candidate each.
    assert (len(data.validation), len(data.test)) == (3, 3)
    parts = [{motif(names[i]) for i in part} for part in (data.train, data.validation, data.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert sorted(parts[0] | parts[1] | parts[2] | {"copy"}) == sorted({motif(name) for name in names})
    for i in (*data.validation.tolist(), *data.test.tolist()):
        assert i == min(j for j in range(24) if motif(names[j]) == motif(names[i]))  # the first of its motif
    assert 24 - len(data.train) == sum(motif(name) in parts[1] | parts[2] for name in names) + (data.ids[0] in validation | test)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("detective", "detective"),
        ("man detective: dark skin tone", "detective"),
        ("people with bunny ears", "with bunny ears"),
        ("woman and man holding hands: light skin tone, dark skin tone", "and holding hands"),
        ("woman: red hair", ""),
        ("snowman", "snowman"),
        ("woman’s boot", "woman’s boot"),
        ("keycap: 7", "keycap"),
    ],
)
def test_variants_have_one_motif(name: str, expected: str) -> None:
    assert motif(name) == expected


def test_rows_are_linked_over_other_rows() -> None:
    one, other = torch.tensor([0, 1, 2, 3, 1, 5, 5]), torch.tensor([0, 1, 2, 0, 2, 3, 4])
    # 1 and 4 are equal in one label, 4 and 2 in the other, 0 and 3 too.
    assert linked(one, other).tolist() == [0, 1, 1, 0, 1, 2, 2]
    chain = torch.arange(100)
    assert linked(chain // 2, (chain + 1) // 2).tolist() == [0] * 100
    assert linked(chain).tolist() == chain.tolist()


def test_digit_halves() -> None:
    data = load_digit_halves()
    assert isinstance(data.left, Images) and isinstance(data.right, Images)
    assert data.left.shape == data.right.shape == (1, 8, 4)
    assert data.train.tolist() + data.validation.tolist() + data.test.tolist() == list(range(1797))
    assert len(data.ids.unique()) == 1797 and len(data.test) == 500


@pytest.mark.parametrize("load", [load_emoji, load_tatoeba])
def test_missing_and_damaged_files_are_named(load: object, tmp_path: Path) -> None:
    assert callable(load)
    write, expected = {
        load_emoji: (write_emoji, r"noto_emoji32\.npz, a NumPy archive of emoji and their names.*googlefonts/noto-emoji"),
        load_tatoeba: (write_tatoeba, r"tatoeba_laser_v1\.tsv\.gz, gzipped UTF-8 lines.*facebookresearch/LASER"),
    }[load]
    with pytest.raises(FileNotFoundError, match=rf"there is no file .*; expected {expected}"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"there is no file .*nowhere; expected {expected}"):
        load(tmp_path / "nowhere")
    path = write(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"something else\n" * 9):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name} (is|holds) .*; expected {expected}"):
            load(tmp_path)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    write_tatoeba(tmp_path, [*LINES, ("eng", "only two")])
    with pytest.raises(ValueError, match="line 50 has 2 fields instead of 3"):
        load_tatoeba(tmp_path)
    np.savez(tmp_path / "noto_emoji32.npz", x=np.zeros((2, 32, 32, 3), np.uint8), names=np.frombuffer(b"a\nb", np.uint8))
    with pytest.raises(ValueError, match=r"holds x uint8 \(2, 32, 32, 3\) and 2 names"):
        load_emoji(tmp_path)
    np.savez(tmp_path / "noto_emoji32.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"noto_emoji32\.npz is damaged or another file"):
        load_emoji(tmp_path)


# Losses -----------------------------------------------------------------------------------------------------------------------------------


def test_false_negatives_of_a_batch() -> None:
    assert false_negatives(torch.tensor([5, 3, 5, 5, 9])) == pytest.approx(6 / 5)
    assert false_negatives(torch.arange(7)) == 0


def test_false_negatives_among_the_mined() -> None:
    ids, mined = torch.tensor([5, 3, 5, 9]), torch.tensor([[5, 1], [4, 5], [5, 5], [3, 2]])
    own, met = mined_false_negatives(ids, mined)
    assert own == pytest.approx((1 + 0 + 2 + 0) / 4)
    assert met == pytest.approx((4 + 1 + 4 + 0) / 4)


def gradients(
    functions: LossFunctions, variant: str, left: Tensor, right: Tensor, scale: Tensor, ids: Tensor, *mined: Tensor
) -> list[Tensor]:
    """mined: right halves and their ids, or nothing."""
    leaves = [t.clone().requires_grad_() for t in (left, right, scale, *mined[:1])]
    loss = objective(variant, functions)(*leaves[:3], ids, *leaves[3:], *mined[1:])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def embedded_batch(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Both halves of all training pairs, with left-out n-grams, in float64."""
    data = load_tatoeba(write_tatoeba(folder))
    assert isinstance(data.left, Bags) and isinstance(data.right, Bags)
    towers = build_towers(data, 0, CPU).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        left, right = towers(*(side.select(data.train).thinned(0.2, generator) for side in (data.left, data.right)))
    return left, right, data.ids[data.train]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_fused_gradients_are_the_dense_ones_on_a_real_batch(variant: str, backend: str, tmp_path: Path) -> None:
    left, right, ids = embedded_batch(tmp_path)
    assert false_negatives(ids) > 0.5
    scale = torch.tensor(12.0, dtype=torch.float64)
    fused = gradients(fused_losses(backend), variant, left, right, scale, ids)
    for got, expected in zip(fused, gradients(dense_losses(), variant, left, right, scale, ids), strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert expected.norm() > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_fused_gradients_are_the_dense_ones_with_hard_negatives(variant: str, backend: str, tmp_path: Path) -> None:
    """Of batches of 12 with two mined for each, the first in float64: copies in the batch, among the own mined and among the others'."""
    left, right, ids = embedded_batch(tmp_path)
    data = load_tatoeba(tmp_path)
    mined = mine(build_towers(data, 0, CPU), data, 2)[:12].flatten()
    position = torch.searchsorted(data.train, mined)
    batch = (left[:12], right[:12], torch.tensor(12.0, dtype=torch.float64), ids[:12], right[position] + 0.01, ids[position])
    own, met = mined_false_negatives(ids[:12], ids[position].view(12, 2))
    assert met > own
    dense = gradients(dense_losses(), variant, *batch)
    for got, expected in zip(gradients(fused_losses(backend), variant, *batch), dense, strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert expected.norm() > 0
    without = gradients(dense_losses(), variant, *batch[:4])
    assert (dense[0] - without[0]).abs() > 1e-3


def test_dense_losses_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    ids, scale = [4, 7, 4, 4, 1], 3.0
    cos = torch.nn.functional.cosine_similarity(left[:, None], right[None], dim=2) * scale
    expected = dict.fromkeys(VARIANTS, 0.0)
    for s in (cos, cos.T):
        for i in range(5):
            copies = [j for j in range(5) if ids[j] == ids[i]]
            everyone = sum(s[i, j].exp() for j in range(5))
            others = sum(s[i, j].exp() for j in range(5) if j == i or j not in copies)
            expected["plain"] += (everyone.log() - s[i, i]).item() / 10
            expected["exclude"] += (others.log() - s[i, i]).item() / 10
            expected["multi-positive"] += (everyone.log() - sum(s[i, j] for j in copies) / len(copies)).item() / 10
    for variant in VARIANTS:
        got = objective(variant, dense_losses())(left, right, torch.tensor(scale, dtype=torch.float64), torch.tensor(ids))
        assert got.item() == pytest.approx(expected[variant], rel=1e-13)
    assert len({round(value, 6) for value in expected.values()}) == 3


def test_dense_losses_with_hard_negatives_pair_by_pair() -> None:
    """The mined halves are met from left to right only, and a mined copy is a negative, nothing or a positive."""
    generator = torch.Generator().manual_seed(4)
    left, right, mined = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (4, 4, 6))
    ids, mined_ids, scale = [4, 7, 4, 1], [7, 4, 2, 4, 3, 1], 3.0
    there = torch.nn.functional.cosine_similarity(left[:, None], torch.cat([right, mined])[None], dim=2) * scale
    expected = dict.fromkeys(VARIANTS, 0.0)
    for s, key_ids in ((there, ids + mined_ids), (there[:, :4].T, ids)):
        for i in range(4):
            copies = [j for j in range(len(key_ids)) if key_ids[j] == ids[i]]
            everyone = sum(s[i, j].exp() for j in range(len(key_ids)))
            others = sum(s[i, j].exp() for j in range(len(key_ids)) if j == i or j not in copies)
            expected["plain"] += (everyone.log() - s[i, i]).item() / 8
            expected["exclude"] += (others.log() - s[i, i]).item() / 8
            expected["multi-positive"] += (everyone.log() - sum(s[i, j] for j in copies) / len(copies)).item() / 8
    batch = (left, right, torch.tensor(scale, dtype=torch.float64), torch.tensor(ids), mined, torch.tensor(mined_ids))
    for variant in VARIANTS:
        assert objective(variant, dense_losses())(*batch).item() == pytest.approx(expected[variant], rel=1e-13)


@pytest.mark.parametrize("functions", [dense_losses(), fused_losses("torch")], ids=["reference", "fused"])
def test_copies_with_one_embedding_make_plain_and_multi_positive_the_same(functions: LossFunctions, tmp_path: Path) -> None:
    """And so their gradients in whatever comes before the embedding; excluding the copies is another loss."""
    _, right, ids = embedded_batch(tmp_path)
    sentences = torch.randn(int(ids.max()) + 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for variant in VARIANTS:
        table, other = sentences.clone().requires_grad_(), right.clone().requires_grad_()
        loss = objective(variant, functions)(table[ids], other, torch.tensor(12.0, dtype=torch.float64), ids)
        found[variant] = [loss.detach(), *torch.autograd.grad(loss, (table, other))]
    for plain, several, excluded in zip(*(found[variant] for variant in ("plain", "multi-positive", "exclude")), strict=True):
        assert (plain - several).norm() <= 1e-12 * plain.norm()
        assert (plain - excluded).norm() > 0.01 * plain.norm()


def test_mined_copies_with_the_embedding_of_the_positive_pull_less_but_never_push() -> None:
    """One query with its positive, a mined copy of that and a mined wrong one, all unit vectors of the plane: only an angle moves."""

    def pull(copy_apart: float, variant: str) -> tuple[float, float]:
        """The derivatives of the loss by how far the positive, and its copy, turn from the query's direction."""
        angles = torch.tensor([0.5, 0.5 + copy_apart], dtype=torch.float64, requires_grad=True)
        places = torch.cat([angles, torch.tensor([0.6], dtype=torch.float64)])
        keys = torch.stack([places.cos(), places.sin()], 1)
        query, id_of = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([7])
        scale = torch.tensor(10.0, dtype=torch.float64)
        loss = objective(variant, dense_losses())(query, keys[:1], scale, id_of, keys[1:], torch.tensor([7, 8]))
        positive, copy = torch.autograd.grad(loss, angles)[0].tolist()
        return positive, copy

    # Smaller angles are nearer: a positive derivative pulls.
    together, alone = sum(pull(0.0, "plain")), sum(pull(0.0, "exclude"))
    assert 0 < together < alone
    assert pull(0.2, "plain")[1] < 0 == pull(0.2, "exclude")[1] < pull(0.2, "multi-positive")[1]


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="variant is 'mixed'; it must be one of plain, exclude, multi-positive"):
        objective("mixed", dense_losses())


# Retrieval --------------------------------------------------------------------------------------------------------------------------------


def test_places_of_the_best_correct_candidate() -> None:
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3],  # its own, first
            [0.5, 0.4, 0.3, 0.2],  # behind candidate 0
            [0.8, 0.1, 0.2, 0.7],  # own is third, but 3 has its id: second
            [0.6, 0.6, 0.6, 0.6],  # ties are lost: behind 0 and 1
        ]
    )
    ids = torch.tensor([0, 1, 2, 2])
    assert places(scores, ids).tolist() == [1, 2, 2, 3]
    found = retrieval(scores, ids)
    assert (found.r1, found.r5) == (0.25, 1.0)
    assert found.mrr == pytest.approx((1 + 1 / 2 + 1 / 2 + 1 / 3) / 4)
    assert places(torch.zeros(6, 6), torch.arange(6)).tolist() == [6] * 6


def test_chance_is_what_random_scores_give() -> None:
    ids = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 6])
    generator = torch.Generator().manual_seed(0)
    found = [retrieval(torch.rand(10, 10, generator=generator), ids) for _ in range(3000)]
    expected = chance(ids)
    for metric in ("r1", "r5", "mrr"):
        assert np.mean([getattr(f, metric) for f in found]) == pytest.approx(getattr(expected, metric), abs=0.006)
    alone = chance(torch.arange(8))
    assert (alone.r1, alone.r5, alone.mrr) == pytest.approx((1 / 8, 5 / 8, sum(1 / k for k in range(1, 9)) / 8))
    assert chance(torch.arange(3)).r5 == pytest.approx(1)


class Fixed(TwoTowers):
    """The pixels themselves; notes in which modes it is called."""

    def __init__(self, data: PairData, changes: bool = False) -> None:
        super().__init__(data)
        self.changes, self.modes = changes, set[bool]()

    def forward(self, left: Tensor | Bags, right: Tensor | Bags) -> tuple[Tensor, Tensor]:
        assert isinstance(left, Tensor) and isinstance(right, Tensor)
        self.modes.add(self.training)
        if self.changes:
            next(self.parameters()).mul_(1.001)
        return left.flatten(1), right.flatten(1)


def test_evaluation_finds_equal_embeddings_in_eval_mode() -> None:
    halves = load_digit_halves()
    data = PairData("same", halves.left, halves.left, "a", "b", halves.ids, halves.train, halves.validation, halves.test)
    towers = Fixed(data)
    found = evaluate(towers, data, data.test)
    assert set(found) == set(DIRECTIONS)
    assert found["left_to_right"] == found["right_to_left"]
    assert found["left_to_right"].r1 > 0.99  # a few halves are the same up to their brightness
    assert towers.modes == {False} and towers.training
    with pytest.raises(RuntimeError, match=r"evaluation changed the towers \(left\.layers\.0\.weight\)"):
        evaluate(Fixed(data, changes=True), data, data.test)


def test_mining_finds_the_nearest_copies_and_never_the_pair_itself() -> None:
    # Four training pairs in the plane by angle, and a further one; 0, 2 and 4 are copies with one right half.
    angles = torch.tensor([[0.0, 10.0], [200.0, 30.0], [5.0, 10.0], [90.0, 100.0], [50.0, 10.0], [0.0, 0.0]]).deg2rad()
    left, right = (Images(torch.stack([a.cos(), a.sin()], 1).view(-1, 2, 1, 1)) for a in angles.T)
    part = torch.arange
    data = PairData(
        "plane",
        left,
        right,
        "a",
        "b",
        torch.tensor([0, 1, 0, 2, 0, 3]),
        part(4),
        part(0),
        torch.tensor([5]),
        unlabelled=torch.tensor([4]),
    )
    towers = Fixed(data)
    mined = mine(towers, data, 2)
    assert mined.shape == (4, 2)
    assert set(mined[0].tolist()) == set(mined[2].tolist()) ^ {0, 2} == {2, 4}
    # 90 degrees is nearest to its own 100, then to 30 and to any of the 10s; the test pair is not in the corpus.
    assert mined[3, 0] == 1 and mined[3, 1] in (0, 2, 4)
    assert mined[1, 0] == 3
    assert mined_false_negatives(data.ids[data.train], data.ids[mined])[0] == pytest.approx((2 + 0 + 2 + 0) / 4)
    assert towers.modes == {False} and towers.training


# Training ---------------------------------------------------------------------------------------------------------------------------------

SMALL = Settings(epochs=2, batch_size=10, temperature=0.1, learning_rate=1e-2, dropout=0.2)


def train(
    data: PairData, variant: str, seed: int, functions: LossFunctions | None = None, settings: Settings = SMALL
) -> tuple[TwoTowers, History]:
    return train_towers(data, settings, variant, functions or dense_losses(), seed=seed, device=CPU, on_epoch=lambda history: None)


def test_batches_are_the_same_for_a_seed_and_for_all_variants(tmp_path: Path) -> None:
    data = load_tatoeba(write_tatoeba(tmp_path))
    (towers, first), (again, second), (_, other) = train(data, "plain", 0), train(data, "plain", 0), train(data, "plain", 1)
    assert first.step_losses == second.step_losses and first.order_sha256 == second.order_sha256
    assert all(torch.equal(a, b) for a, b in zip(towers.parameters(), again.parameters(), strict=True))
    assert first.order_sha256 != other.order_sha256 and first.step_losses != other.step_losses
    for variant in VARIANTS[1:]:
        _, history = train(data, variant, 0)
        assert history.order_sha256 == first.order_sha256 and history.false_negatives == first.false_negatives
        assert history.step_losses[0] != first.step_losses[0]
    assert first.false_negatives > 0.2
    assert len(first.step_losses) == 2 * (len(data.train) // 10)


def test_hard_negatives_after_a_first_epoch_without(tmp_path: Path) -> None:
    write_tatoeba(tmp_path)
    data, mining = load_tatoeba(tmp_path, one_of_each=True), replace(SMALL, hard_negatives=2)
    steps = len(data.train) // 10
    (_, without), *histories = train(data, "plain", 0), *(train(data, variant, 0, settings=mining) for variant in VARIANTS)
    assert without.mined_false_negatives == without.met_false_negatives == 0
    for _, history in histories:
        assert history.order_sha256 == without.order_sha256
        assert 0 < history.mined_false_negatives <= 2 and history.met_false_negatives > history.mined_false_negatives
    plain = histories[0][1]
    assert plain.step_losses[:steps] == without.step_losses[:steps]
    assert all(a > b for a, b in zip(plain.step_losses[steps:], without.step_losses[steps:], strict=True))
    assert len({history.step_losses[-1] for _, history in histories}) == 3


def test_the_logit_scale_learns_alike_in_both_implementations(tmp_path: Path) -> None:
    data = load_tatoeba(write_tatoeba(tmp_path))
    scales = [[e.logit_scale for e in train(data, "exclude", 0, f)[1].epochs] for f in (dense_losses(), fused_losses("torch"))]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)
    assert scales[0][-1] != pytest.approx(10.0, abs=1e-3)


def test_paired_differences() -> None:
    def row(variant: str, r1: Sequence[float]) -> Row:
        found = [dict.fromkeys(DIRECTIONS, Retrieval(value, 1.0, 1.0)) for value in r1]
        return Row(variant, found, [History(variant, "fused", seed) for seed in range(len(r1))])

    (change,) = differences([row("plain", [0.1, 0.2]), row("exclude", [0.2, 0.4])])
    assert (change.variant, change.minus) == ("exclude", "plain")
    entry = change.entry()
    assert entry["per_seed"]["left_to_right_r1"] == pytest.approx([0.1, 0.2])
    assert entry["summary"]["left_to_right_r1"] == pytest.approx({"mean": 0.15, "sd": 0.1 / 2**0.5})


# The script -------------------------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Any:
    text = (folder / "result.json").read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(folder) not in text and os.uname().nodename not in text
    return json.loads(text)


def test_digit_halves_fused_and_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    assert main(["--quick", "--loss", "both", "--variant", "all", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    result = read(tmp_path)
    assert set(result) == {
        "schema",
        "config",
        "versions",
        "seconds",
        "cpu_seconds",
        "summary",
        "differences",
        "comparisons",
        "runs",
    }
    labels = [row["row"] for row in result["summary"]]
    assert labels == ["chance", "untrained towers", *(f"{v}, {loss}" for v in VARIANTS for loss in ("fused", "reference"))]
    assert all(label in shown for label in labels)
    assert result["config"]["backend"] == "torch" and result["config"]["n_candidates"] == 500
    assert result["summary"][0]["left_to_right_r1"] == {"mean": pytest.approx(1 / 500), "sd": None}
    assert len(result["comparisons"]) == 3
    for comparison in result["comparisons"]:
        assert comparison["same_order"]
        assert comparison["first_step"] < 1e-6 and comparison["all_steps"] < 1e-3
    for run in result["runs"]:
        assert f"{run['variant']:<14} {run['loss']:<9} seed 0  epoch 2/2  loss {run['epochs'][1]['loss']:.4f}  scale" in shown
        assert run["false_negatives"] == 0 and len(run["step_losses"]) == 6
        assert run["epochs"][1]["loss"] < run["epochs"][0]["loss"]
    picture = image.imread(tmp_path / "result.png")
    assert picture.shape[1] > picture.shape[0] > 500
    assert (picture[:4] == 1).all()  # opaque white, whatever is behind it


def test_digit_halves_find_each_other(tmp_path: Path) -> None:
    assert main(["--seeds", "1", "--epochs", "15", "--candidates", "validation", "--out", str(tmp_path)]) == 0
    result = read(tmp_path)
    by_chance, _, trained = result["summary"]
    assert by_chance["left_to_right_r1"]["mean"] == pytest.approx(1 / 300)
    assert trained["left_to_right_r1"]["mean"] > 0.06 and trained["right_to_left_r1"]["mean"] > 0.06


@pytest.mark.parametrize("name", ["emoji", "tatoeba"])
def test_other_data_from_a_folder(name: str, tmp_path: Path) -> None:
    (write_emoji if name == "emoji" else write_tatoeba)(tmp_path)
    options = ["--data", name, "--data-dir", str(tmp_path), "--quick", "--variant", "plain", "exclude", "--seeds", "2"]
    assert main([*options, "--batch-size", "8", "--out", str(tmp_path)]) == 0
    result = read(tmp_path)
    assert result["config"]["data"] == name and result["config"]["seeds"] == [0, 1]
    ((file, digest),) = result["config"]["files"].items()
    assert digest == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    (change,) = result["differences"]
    assert (change["variant"], change["minus"]) == ("exclude", "plain")
    assert len(change["per_seed"]["left_to_right_r1"]) == 2
    if name == "tatoeba":
        assert all(run["false_negatives"] > 0.2 for run in result["runs"])


def test_hard_negatives_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tatoeba(tmp_path)
    options = ["--data", "tatoeba", "--data-dir", str(tmp_path), "--quick", "--variant", "all", "--batch-size", "8"]
    assert main([*options, "--one-of-each", "--hard-negatives", "2", "--loss", "both", "--out", str(tmp_path)]) == 0
    result, shown = read(tmp_path), capsys.readouterr().out
    held = load_tatoeba(tmp_path, one_of_each=True)
    assert result["config"]["hard_negatives"] == 2 and result["config"]["training_pairs"] == len(held.train)
    n_further = result["config"]["n_further"]
    assert n_further == len(held.further_test)
    assert result["summary"][0]["further_left_to_right_r1"]["mean"] == pytest.approx(1 / n_further)
    for run in result["runs"]:
        assert set(run["retrieval"]) == {*DIRECTIONS, *FURTHER}
        assert run["met_false_negatives"] >= run["mined_false_negatives"] > 0
        assert f"{run['variant']}, {run['loss']}: {run['mined_false_negatives']:.3f} of the hard negatives" in shown
    assert all(set(DIRECTIONS + FURTHER) == {name.rsplit("_", 1)[0] for name in d["per_seed"]} for d in result["differences"])
    assert all(c["same_order"] and c["first_step"] < 1e-6 and c["all_steps"] < 1e-3 for c in result["comparisons"])
    assert f"among {n_further} further pairs of training sentences" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--epochs 0", "argument --epochs: '0' is not a whole number of at least 1"),
        ("--batch-size 1", "argument --batch-size: '1' is not a whole number of at least 2"),
        ("--batch-size 998", "argument --batch-size: 998 is more than the 997 training pairs of digit-halves"),
        ("--temperature 0.001", "argument --temperature: '0.001' is not a number of at least 0.01"),
        ("--variant half", "argument --variant: invalid choice: 'half'"),
        ("--data flickr", "argument --data: invalid choice: 'flickr'"),
        ("--data emoji", "argument --data-dir: --data emoji is not in the repository; name the folder"),
        ("--data tatoeba --data-dir {file}/none", "none; expected tatoeba_laser_v1.tsv.gz"),
        ("--data emoji --data-dir {file}", "file is damaged or another file"),
        ("--data-dir {file}", "argument --data-dir: digit-halves are in the repository"),
        ("--min-copies 2", "argument --min-copies: the pairs of digit-halves have no repeated sentences"),
        ("--data tatoeba --data-dir {tatoeba} --min-copies 9", "argument --min-copies: no English sentence has 9 training pairs"),
        ("--hard-negatives -1", "argument --hard-negatives: '-1' is not a whole number of at least 0"),
        ("--hard-negatives 997", "argument --hard-negatives: 997 is not less than the 997 pairs to mine from"),
        ("--one-of-each", "argument --one-of-each: the pairs of digit-halves have no repeated sentences"),
        ("--device nowhere", "argument --device: 'nowhere' cannot be used"),
        ("--backend fastest", "argument --backend: 'fastest' cannot be used on cpu"),
        ("--backend torch --loss reference", "argument --backend: the reference losses have no backends"),
        ("--out {file}/below", "argument --out: cannot make the folder"),
        ("--temp 0.2", "unrecognized arguments: --temp 0.2"),
    ],
)
def test_bad_options_are_named(arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    given = arguments.format(file=file, tatoeba=write_tatoeba(tmp_path)).split()
    with pytest.raises(SystemExit) as left:
        main([*given, *([] if "--out" in arguments else ["--out", str(tmp_path / "out")])])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert said in error and "train.py --method clip: error:" in error
    assert not (tmp_path / "out").exists()


def test_fused_without_fastnce_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "fastnce", None)
    with pytest.raises(SystemExit) as left:
        main(["--quick", "--out", str(tmp_path)])
    assert left.value.code == 2
    assert "argument --loss: fused needs fastnce" in capsys.readouterr().err
    assert main(["--quick", "--loss", "reference", "--out", str(tmp_path)]) == 0
    assert "fastnce" not in read(tmp_path)["versions"]


# What is recorded -------------------------------------------------------------------------------------------------------------------------

RECORDED = sorted(path for name in ("emoji", "tatoeba") for path in (ROOT / "train_ref" / "results").glob(f"{name}-*.json"))


def test_something_is_recorded() -> None:
    assert {path.name.split("-")[0] for path in RECORDED} == {"emoji", "tatoeba"}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_summaries_are_those_of_their_runs(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert len(result["config"]["seeds"]) == 3 and result["config"]["candidates"] == "test"
    summary = {row["row"]: row for row in result["summary"]}
    for variant in result["config"]["variants"]:
        runs = [run for run in result["runs"] if run["variant"] == variant]
        assert [run["seed"] for run in runs] == result["config"]["seeds"]
        for direction in runs[0]["retrieval"]:
            for metric in ("r1", "r5", "mrr"):
                values = [run["retrieval"][direction][metric] for run in runs]
                expected = {"mean": np.mean(values), "sd": np.std(values, ddof=1)}
                assert summary[f"{variant}, fused"][f"{direction}_{metric}"] == pytest.approx(expected)
                assert min(values) > 3 * summary["chance"][f"{direction}_{metric}"]["mean"]
        # Hard negatives were there exactly where they were asked for, and some of them were correct answers.
        assert all((run.get("mined_false_negatives", 0) > 0) == (result["config"].get("hard_negatives", 0) > 0) for run in runs)
    # All variants of a seed saw the same batches in the same order.
    for seed in result["config"]["seeds"]:
        assert len({run["order_sha256"] for run in result["runs"] if run["seed"] == seed}) == 1
