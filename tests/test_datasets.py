"""Fashion-MNIST and CIFAR-10 from files: tiny archives, written here in the formats of the real ones, whole and broken."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from train_ref.data import DIGITS_SHA256, as_float, load_digits
from train_ref.datasets import CIFAR_BATCHES, DATASETS, PUBLISHED, load_data
from train_ref.evaluate import evaluate_features
from train_ref.formats import ArrayUnpickler, read_cifar_batch, read_idx, read_subset

Bytes = NDArray[np.uint8]


def random_bytes(seed: int, *shape: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def ten_classes(n: int) -> Bytes:
    return (np.arange(n) % 10).astype(np.uint8)


# Writers of the real formats -------------------------------------------------------------------------------------------------------------


def idx(values: Bytes) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + b"".join(struct.pack(">i", extent) for extent in values.shape) + values.tobytes()


FASHION = {
    "train-images-idx3-ubyte": random_bytes(0, 30, 28, 28),
    "train-labels-idx1-ubyte": ten_classes(30),
    "t10k-images-idx3-ubyte": random_bytes(1, 12, 28, 28),
    "t10k-labels-idx1-ubyte": ten_classes(12),
}


def write_fashion(folder: Path, packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in FASHION.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))


def python_2_string(text: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(text)) + text


def python_2_int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def python_2_array(values: Bytes) -> bytes:
    """Opcode by opcode what Python 2's cPickle makes of an array, its bytes being a str; Python 3 would write other opcodes."""
    begun = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + python_2_string(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + python_2_string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + python_2_string(b"|") + b"NNN" + python_2_int(-1) * 2 + b"K\x00tb"
    shape = b"(" + b"".join(python_2_int(extent) for extent in values.shape) + b"t"
    return begun + b"(K\x01" + shape + dtype + b"\x89" + python_2_string(values.tobytes()) + b"tb"


def python_2_batch(data: bytes, labels: Sequence[int], label_key: bytes = b"labels") -> bytes:
    """A batch of CIFAR-10 around pickled data."""
    entries = python_2_string(b"batch_label") + python_2_string(b"training batch 1 of 5")
    entries += python_2_string(label_key) + b"](" + b"".join(map(python_2_int, labels)) + b"e"
    entries += python_2_string(b"data") + data
    return b"\x80\x02}(" + entries + b"u."


CIFAR = {name: (random_bytes(i, 10, 3, 32, 32), ten_classes(10)) for i, name in enumerate(CIFAR_BATCHES)}
CIFAR_FILES = {name: python_2_batch(python_2_array(x.reshape(10, 3072)), y.tolist()) for name, (x, y) in CIFAR.items()}


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CIFAR_FILES.items():
        (folder / name).write_bytes(content)


def write_cifar_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_rgb_subset(path: Path, images: Bytes, labels: Bytes, split: Bytes) -> None:
    """(R - G, G, B - G) as differences to the pixel above and then to the left, modulo 256."""
    planes = images.copy()
    planes[:, [0, 2]] -= images[:, 1:2]
    across = np.diff(planes, axis=3, prepend=np.uint8(0))
    both = np.diff(across, axis=2, prepend=np.uint8(0))
    np.savez(path, r=both.transpose(1, 0, 2, 3), y=labels, split=split, idx=np.arange(len(images)))


# Whole files -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("where", [".", "raw", "FashionMNIST/raw"])
def test_fashion_mnist_where_it_may_lie(packed: bool, where: str, tmp_path: Path) -> None:
    write_fashion(tmp_path / where, packed)
    data = load_data("fashion-mnist", tmp_path)
    assert torch.equal(data.images[:30, 0], torch.from_numpy(FASHION["train-images-idx3-ubyte"]))
    assert torch.equal(data.images[30:, 0], torch.from_numpy(FASHION["t10k-images-idx3-ubyte"]))
    assert data.images.dtype == torch.uint8
    assert data.labels.tolist() == [*ten_classes(30), *ten_classes(12)]
    assert (data.n_train, data.n_test, data.n_classes, data.source) == (30, 12, 10, "idx files")


def test_cifar_10_unpacked_inside_it_and_as_archive(tmp_path: Path) -> None:
    unpacked, packed = tmp_path / "unpacked", tmp_path / "packed"
    write_cifar(unpacked / "cifar-10-batches-py")
    packed.mkdir()
    # The real archive holds other files too.
    write_cifar_archive(packed / "cifar-10-python.tar.gz", CIFAR_FILES | {"readme.html": b"<html>", "batches.meta": b"."})
    expected = torch.from_numpy(np.concatenate([images for images, _ in CIFAR.values()]))
    for place, source in ((unpacked, "cifar-10-batches-py"), (unpacked / "cifar-10-batches-py",) * 2, (packed, "cifar-10-python.tar.gz")):
        data = load_data("cifar10", place)
        assert torch.equal(data.images, expected)
        assert data.labels.tolist() == list(range(10)) * 6
        assert (data.n_train, data.n_test) == (50, 10)
        assert data.source == (source if isinstance(source, str) else source.name)
    assert sorted(path.name for path in packed.iterdir()) == ["cifar-10-python.tar.gz"]  # nothing was unpacked to disk


def test_subsets_as_file_or_in_a_folder(tmp_path: Path) -> None:
    split = np.repeat(np.array([0, 1, 2], np.uint8), (20, 3, 11))
    images, labels = random_bytes(0, 34, 3, 32, 32), ten_classes(34)
    write_rgb_subset(tmp_path / "cifar10_sub.npz", images, labels, split)
    np.savez(tmp_path / "fashion_sub.npz", x=images[:, 0, 2:30, 2:30], y=labels, split=split, idx=np.arange(34))
    for name, expected in (("cifar10", images), ("fashion-mnist", images[:, :1, 2:30, 2:30])):
        for place in (tmp_path, tmp_path / {"cifar10": "cifar10_sub.npz", "fashion-mnist": "fashion_sub.npz"}[name]):
            data = load_data(name, place)
            # The validation images, split 1, are in neither part.
            assert np.array_equal(data.images.numpy(), expected[split != 1])
            assert data.labels.tolist() == labels[split != 1].tolist()
            assert (data.n_train, data.n_test) == (20, 11)
            assert data.is_subset
            assert f"20 training images and 11 test images (a subset: the whole has {data.full_size[0]} and 10000)" in data.describe()
    read, read_labels, read_split = read_subset(tmp_path / "cifar10_sub.npz")
    assert np.array_equal(read, images) and np.array_equal(read_labels, labels) and np.array_equal(read_split, split)


def test_the_whole_set_comes_before_a_subset(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=True)
    (tmp_path / "fashion_sub.npz").touch()
    assert load_data("fashion-mnist", tmp_path).source == "idx files"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_sha256_of_every_file_that_was_read(tmp_path: Path) -> None:
    packed, unpacked, archive = (tmp_path / name for name in ("packed", "unpacked", "archive"))
    write_fashion(packed, packed=True)
    write_fashion(unpacked, packed=False)
    (unpacked / "train-images-idx3-ubyte.gz").touch()  # beside it, and not read
    for folder, end in ((packed, ".gz"), (unpacked, "")):
        files = load_data("fashion-mnist", folder).files
        assert files == {f"{name}{end}": sha256(folder / f"{name}{end}") for name in FASHION}
    write_cifar(unpacked)
    assert load_data("cifar10", unpacked).files == {name: sha256(unpacked / name) for name in CIFAR_BATCHES}
    archive.mkdir()
    write_cifar_archive(archive / "cifar-10-python.tar.gz", CIFAR_FILES)
    data = load_data("cifar10", archive)
    assert data.files == {"cifar-10-python.tar.gz": sha256(archive / "cifar-10-python.tar.gz")}
    assert data.hold_out(8).files == data.files
    subset = tmp_path / "mine.npz"
    np.savez(subset, x=random_bytes(0, 30, 28, 28), y=ten_classes(30), split=np.repeat(np.array([0, 2], np.uint8), (20, 10)))
    assert load_data("fashion-mnist", subset).files == {"mine.npz": sha256(subset)}
    assert load_data("digits").files == {"digits.npz": DIGITS_SHA256}


def test_a_file_with_a_published_name_and_another_md5_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path, packed=True)
    names = [f"{name}.gz" for name in FASHION]
    assert load_data("fashion-mnist", tmp_path).unpublished == tuple(names)
    # Were these files the published ones, one changed label would be noticed.
    published = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in names}
    monkeypatch.setitem(PUBLISHED, "fashion-mnist", replace(PUBLISHED["fashion-mnist"], files=published))
    assert load_data("fashion-mnist", tmp_path).unpublished == ()
    (tmp_path / names[1]).write_bytes(gzip.compress(idx(ten_classes(30)[::-1])))
    assert load_data("fashion-mnist", tmp_path).unpublished == (names[1],)
    # Nothing is published of unpacked files and subsets.
    write_fashion(tmp_path, packed=False)
    assert load_data("fashion-mnist", tmp_path).unpublished == ()


def test_digits_need_no_folder() -> None:
    data = load_data("digits")
    assert torch.equal(data.images, load_digits().images)
    assert not data.is_subset
    assert DATASETS == ("digits", "fashion-mnist", "cifar10")


def test_held_out_images_take_the_place_of_the_test_images(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=False)
    whole = load_data("fashion-mnist", tmp_path)
    data = whole.hold_out(8)
    assert (data.n_train, data.n_test, len(data.images)) == (22, 8, 30)
    assert torch.equal(data.images, whole.images[:30]) and torch.equal(data.labels, whole.labels[:30])
    assert "22 training images and 8 held-out training images" in data.describe()
    for n in (0, 11, 30, 31):
        with pytest.raises(ValueError, match=f"{n} cannot be held out of the 30 training images of fashion-mnist: .* 20 of all 10 classes"):
            whole.hold_out(n)


def test_the_fewest_images_that_may_be_left_can_be_evaluated(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=False)
    data = load_data("fashion-mnist", tmp_path).hold_out(10)
    found = evaluate_features(as_float(data.images).flatten(1), data)
    assert all(0 <= accuracy <= 1 for accuracy in (found.knn_20, found.linear, found.one_shot))


def test_no_class_may_vanish_from_training(tmp_path: Path) -> None:
    labels = np.minimum(np.arange(60) // 5, 9).astype(np.uint8)  # the last of class 8 is number 44
    np.savez(tmp_path / "fashion_sub.npz", x=random_bytes(0, 60, 28, 28), y=labels, split=np.repeat(np.array([0, 2], np.uint8), (50, 10)))
    data = load_data("fashion-mnist", tmp_path)
    assert data.hold_out(4).n_train == 46
    with pytest.raises(ValueError, match="5 cannot be held out of the 50 training images of fashion-mnist: .* 20 of all 10 classes"):
        data.hold_out(5)


def test_bytes_become_floats_and_floats_stay() -> None:
    assert torch.equal(as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 0.2, 1]))
    floats = torch.rand(3)
    assert as_float(floats) is floats


# Missing files ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "fashion-mnist",
            [
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz",
                "train-images-idx3-ubyte.gz  md5 8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "t10k-labels-idx1-ubyte.gz  md5 bb300cfdad3c16e7a12a480ee83cd310",
                "FashionMNIST/raw",
                "fashion_sub.npz",
            ],
        ),
        (
            "cifar10",
            [
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz  md5 c58f30108f718f92721af3b95e74349a",
                "cifar-10-batches-py",
                "cifar10_sub.npz",
            ],
        ),
    ],
)
def test_what_is_missing_is_named_with_its_address(name: str, wanted: list[str], tmp_path: Path) -> None:
    for place, said in ((None, "no folder given"), (tmp_path / "none", "none does not exist"), (tmp_path, f"{tmp_path} has no ")):
        with pytest.raises(FileNotFoundError) as raised:
            load_data(name, place)
        assert all(text in str(raised.value) for text in [said, *wanted])


def test_a_single_missing_file_is_named(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    address = r"Fashion-MNIST is to be had from\s+http://\S+/train-images-idx3-ubyte\.gz  md5 8d4f"
    with pytest.raises(FileNotFoundError, match=rf"lacks t10k-labels-idx1-ubyte \(or the same with \.gz\)\. {address}"):
        load_data("fashion-mnist", tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks data_batch_4\. CIFAR-10 is to be had from\s+https://\S+/cifar-10-python\.tar\.gz  md5 c58f"
    ):
        load_data("cifar10", tmp_path)


# Damaged and wrong files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (idx(FASHION["train-images-idx3-ubyte"])[:-1], "it has 23519 values, and its header says 30 x 28 x 28"),
        (idx(FASHION["train-images-idx3-ubyte"]) + b"\0", "it has 23521 values"),
        (idx(FASHION["train-labels-idx1-ubyte"]), "in 3 dimensions: it starts with 00 00 08 01"),
        (b"\0\0\x08\x03\0\0", "in 3 dimensions"),
        (b"", "in 3 dimensions"),
    ],
)
def test_a_damaged_idx_file_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    for path, written in ((tmp_path / "a-idx3-ubyte", content), (tmp_path / "a-idx3-ubyte.gz", gzip.compress(content))):
        path.write_bytes(written)
        with pytest.raises(ValueError, match=f"^{path} .*{said}"):
            read_idx(path, 3)


def test_a_truncated_gz_is_named(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz is damaged"):
        load_data("fashion-mnist", tmp_path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz is damaged"):
        load_data("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (CIFAR_FILES["data_batch_1"][:-1], ""),
        (CIFAR_FILES["data_batch_1"][:20000], ""),
        (b"", ""),
        (b"\x80\x02K\x01.", "not subscriptable"),
        (python_2_batch(python_2_array(random_bytes(0, 10, 3071)), range(10)), r"not \(N, 3072\) of bytes"),
        (python_2_batch(python_2_string(b"none"), range(10)), r"not \(N, 3072\) of bytes"),
        (python_2_batch(python_2_array(random_bytes(0, 9, 3072)), range(10)), r"9 images and labels of shape \(10,\)"),
        (python_2_batch(python_2_array(random_bytes(0, 10, 3072)), range(1, 11)), "its labels go from 1 to 10 instead of 0 to 9"),
        (python_2_batch(python_2_array(random_bytes(0, 10, 3072)), range(10), b"fine_labels"), "it has no 'labels'"),
    ],
)
def test_a_damaged_batch_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3 is damaged or no batch of CIFAR-10: .*{said}"):
        load_data("cifar10", tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    write_cifar_archive(path, {name: content for name, content in CIFAR_FILES.items() if name != "data_batch_2"})
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz lacks data_batch_2"):
        load_data("cifar10", tmp_path)
    write_cifar_archive(path, CIFAR_FILES | {"test_batch": b"\x80\x02N."})
    with pytest.raises(ValueError, match=r"test_batch in .*cifar-10-python\.tar\.gz is damaged"):
        load_data("cifar10", tmp_path)
    write_cifar_archive(path, CIFAR_FILES)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:200], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is damaged"):
            load_data("cifar10", tmp_path)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    attack = pickle.dumps({"data": Malicious(harm), "labels": []}, protocol=2)
    with pytest.raises(ValueError, match=r"batch 7 is damaged .* asks for \w+\.mkdir, which no array needs; nothing of it was run"):
        read_cifar_batch(attack, "batch 7")
    assert not harm.exists()
    pickle.loads(attack)
    assert harm.exists()  # the attack is one: Python's own reader would have run it


@pytest.mark.parametrize("name", ["builtins eval", "__builtin__ eval", "os system", "numpy load", "numpy.core.multiarray fromfile"])
def test_nothing_but_arrays_can_be_named(name: str) -> None:
    asked = "c{}\n{}\n.".format(*name.split()).encode()
    with pytest.raises(pickle.UnpicklingError, match="which no array needs"):
        ArrayUnpickler(asked).load()


@pytest.mark.parametrize("damage", ["truncated", "no zip", "other arrays", "other shape", "objects"])
def test_a_damaged_subset_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "cifar10_sub.npz"
    write_rgb_subset(path, random_bytes(0, 30, 3, 32, 32), ten_classes(30), np.zeros(30, np.uint8))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "no zip":
        path.write_bytes(b"no zip")
    elif damage == "other arrays":
        np.savez(path, images=np.zeros(3))
    elif damage == "other shape":
        np.savez(path, x=random_bytes(0, 30, 28, 28), y=ten_classes(29), split=np.zeros(30, np.uint8))
    else:
        np.savez(path, x=random_bytes(0, 30, 28, 28), y=np.array([Path()] * 30), split=np.zeros(30, np.uint8))
    with pytest.raises(ValueError, match=r"^\S*cifar10_sub\.npz is (damaged or )?no subset: "):
        load_data("cifar10", tmp_path)


def test_images_of_another_size_and_missing_classes_are_refused(tmp_path: Path) -> None:
    split, path = np.repeat(np.array([0, 2], np.uint8), (20, 10)), tmp_path / "sub.npz"
    np.savez(path, x=random_bytes(0, 30, 28, 28), y=ten_classes(30), split=split)
    with pytest.raises(ValueError, match=r"sub\.npz: the training images are 1 x 28 x 28, those of CIFAR-10 3 x 32 x 32"):
        load_data("cifar10", path)
    for labels in (ten_classes(30) % 9, ten_classes(30) + 1):
        np.savez(path, x=random_bytes(0, 30, 28, 28), y=labels, split=split)
        with pytest.raises(ValueError, match="training images of all 10 classes, 0 to 9"):
            load_data("fashion-mnist", path)
    np.savez(path, x=random_bytes(0, 30, 28, 28), y=ten_classes(30), split=0 * split)
    with pytest.raises(ValueError, match="needs test images"):
        load_data("fashion-mnist", path)
    np.savez(path, x=random_bytes(0, 30, 28, 28), y=ten_classes(30), split=np.repeat(np.array([0, 2], np.uint8), (19, 11)))
    with pytest.raises(ValueError, match=r"sub\.npz: 19 training images are too few: 20 of them vote"):
        load_data("fashion-mnist", path)
    write_fashion(tmp_path, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(ten_classes(11)))
    with pytest.raises(ValueError, match="12 test images have 11 labels"):
        load_data("fashion-mnist", tmp_path)
