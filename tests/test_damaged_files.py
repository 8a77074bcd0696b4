"""Files of data that are cut off, changed or made to do harm: one message that names the file, in little memory, and nothing of it runs."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harmful_files import HARMFUL, outcome
from test_datasets import CIFAR_FILES, FASHION, idx, random_bytes, write_cifar_archive, write_rgb_subset

from train_ref.formats import read_cifar_archive, read_cifar_folder, read_idx, read_subset

ROOT = Path(__file__).resolve().parent.parent


def write_idx(folder: Path, packed: bool) -> Path:
    path = folder / f"images-idx3-ubyte{'.gz' if packed else ''}"
    content = idx(FASHION["t10k-images-idx3-ubyte"])
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def write_batch(folder: Path) -> Path:
    (folder / "data_batch_1").write_bytes(CIFAR_FILES["data_batch_1"])
    return folder / "data_batch_1"


def write_archive(folder: Path) -> Path:
    write_cifar_archive(folder / "cifar-10-python.tar.gz", {"data_batch_1": CIFAR_FILES["data_batch_1"]})
    return folder / "cifar-10-python.tar.gz"


def write_subset(folder: Path, rgb: bool) -> Path:
    path, labels, split = folder / "subset.npz", (np.arange(20) % 10).astype(np.uint8), np.zeros(20, np.uint8)
    if rgb:
        write_rgb_subset(path, random_bytes(0, 20, 3, 32, 32), labels, split)
    else:
        np.savez_compressed(path, x=random_bytes(0, 20, 28, 28), y=labels, split=split)
    return path


# Name -> who writes it into a folder, and who reads it.
FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "idx": (lambda folder: write_idx(folder, packed=False), lambda path: read_idx(path, 3)),
    "idx.gz": (lambda folder: write_idx(folder, packed=True), lambda path: read_idx(path, 3)),
    "CIFAR batch": (write_batch, lambda path: read_cifar_folder(path.parent, [path.name])),
    "CIFAR archive": (write_archive, lambda path: read_cifar_archive(path, ["data_batch_1"])),
    "npz": (lambda folder: write_subset(folder, rgb=False), read_subset),
    "npz of RGB": (lambda folder: write_subset(folder, rgb=True), read_subset),
}


def damaged(whole: bytes, seed: int) -> Iterator[bytes]:
    """Cut off; a bit changed, or four bytes to a huge number: near the beginning and the end, where headers are, and anywhere."""
    random = np.random.default_rng(seed)
    for place in (*range(40), *np.linspace(40, len(whole) - 1, 20).astype(int)):
        yield whole[:place]
    yield whole + b"more"
    for _ in range(120):
        changed = bytearray(whole)
        near = min(len(whole), 400)
        place = int(random.choice([random.integers(near), len(whole) - 1 - random.integers(near), random.integers(len(whole))]))
        changed[place] ^= 1 << random.integers(8)
        yield bytes(changed)
        changed[place : place + 4] = random.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"])
        yield bytes(changed)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_named(name: str, tmp_path: Path) -> None:
    write, read = FORMATS[name]
    path = write(tmp_path)
    read(path)
    whole = path.read_bytes()
    refused = 0
    for content in damaged(whole, seed=len(whole)):
        path.write_bytes(content)
        found = outcome(read, path)
        assert found in ("read", "refused")
        refused += found == "refused"
    # All that were cut off, but for the last zeros of an archive. Bytes that are never read may change.
    assert refused >= 50


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much memory a process holds is read from Linux's /proc")
def test_files_that_are_made_to_do_harm_are_refused(tmp_path: Path) -> None:
    """In a process that may grow by three times the largest file, and that has a minute. If it dies, its last line says where."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", "import harmful_files, pathlib, sys; harmful_files.main(pathlib.Path(sys.argv[1]))", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0, f"{last}\n{done.stderr}"
    assert last == "no harm done"
    assert [line for line in lines if not line.endswith(": refused")] == []
    assert len(lines) == sum(len(contents) for _, contents in HARMFUL.values())
