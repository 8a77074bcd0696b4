"""python -m bench host: in a process of its own, because kernels are taken out of the one that it runs in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "host", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_row_for_each_loss_and_a_limit() -> None:
    done = run("--losses", "nt_xent,clip_loss", "--at-most", "0.001")
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == ["| nt_xent", "| clip"], done.stderr
    assert done.returncode == 1 and "not 0.001" in done.stderr


def test_unknown_losses() -> None:
    done = run("--losses", "hinge")
    assert done.returncode == 2 and "unknown 'hinge'; choose from nt_xent, " in done.stderr
