"""The messages and actions of the CUDA backend without its library; the kernels are tested where it is built for the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastnce
from fastnce.backends import BACKENDS, cuda
from fastnce.compiled import find
from fastnce.pairs import Pairs
from fastnce.problem import Problem


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTNCE_NATIVE", raising=False)
    monkeypatch.setattr(find, "packaged_folder", lambda: tmp_path)
    monkeypatch.setattr(find, "cache_folder", lambda: tmp_path)
    find.objection.cache_clear()
    yield
    find.objection.cache_clear()


def problem(q: torch.Tensor) -> Problem:
    return Problem(q, None, torch.ones(()), None, Pairs(True, 1), False, True)


def test_without_its_library_it_says_how_to_build_it(nothing_built: None) -> None:
    assert cuda.library_path() is None
    assert cuda.unsupported(problem(torch.ones(2, 4))) == [
        "library not built (python -m fastnce build-cuda)",
        "device cpu (needs CUDA)",
    ]


def test_every_reason_at_once(nothing_built: None) -> None:
    """Rows of no memory: as many as no tensor of a test could have."""
    q = torch.ones((), dtype=torch.float64).expand(2**30, 8193)
    *reasons, device = cuda.unsupported(problem(q))
    assert device == "device cpu (needs CUDA)" and reasons[1:] == [
        "dtype float64 (supports float32, float16, bfloat16)",
        "8193 columns (supports up to 8192)",
        f"{2**30} rows (supports up to {2**30 - 2**16})",
    ]
    assert set(reasons[1:]) <= set(BACKENDS["triton"].unsupported(problem(q)))


def test_switched_off_like_the_other_library(nothing_built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNCE_NATIVE", "0")
    assert cuda.unsupported(problem(torch.ones(2, 4)))[0] == "library switched off by FASTNCE_NATIVE=0"


def test_asked_for_by_name_it_runs_or_refuses(nothing_built: None) -> None:
    q, k = torch.ones(2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"cuda: library not built \(python -m fastnce build-cuda\); device cpu"):
        fastnce.info_nce(q, k, backend="cuda")


def test_importing_loads_no_library() -> None:
    code = "import torch, fastnce; print(torch.ops.loaded_libraries)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
