"""The kinds of kernels that a part runs.

    cuda           backend "cuda" as its tile table chooses: on compute capability 9.0 wgmma, for the problems it serves; else mma.sync
    cuda-mma       the same without wgmma, as on every other GPU
    triton         backend "triton"

Without a GPU all of them are the backend "torch". Emulated, the two of cuda run csrc/cuda, compiled for the CPU (tests/emulated.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from fastnce.backends import BACKENDS
from fastnce.backends.cuda import launches
from fastnce.pairs import Pairs
from fastnce.problem import Problem

NAMES = ("cuda", "cuda-mma", "triton")
HOPPER, OLDEST = 90, 80  # architectures of launches.architecture: with wgmma, without
# `where` is "gpu", or without one "cpu" or "emulated". The variable tells processes that take no arguments.
WHERE, WORDS = "FASTNCE_GPU_DRY_RUN", {"": "gpu", "1": "cpu", "emulated": "emulated"}
ASKED = "FASTNCE_GPU_KERNELS"


class Kernels(NamedTuple):
    """A kind of kernels: its name in NAMES, and how to run it. `architecture` replaces the device's, 0: does not."""

    name: str
    device: str
    backend: str
    architecture: int = 0

    @staticmethod
    def of(name: str, where: str) -> Kernels:
        backend, _, variant = name.partition("-")
        if where == "cpu" or (where == "emulated" and backend != "cuda"):
            return Kernels(name, "cpu", "torch")
        # Emulated, the tiles are those of a Hopper; left to itself, the emulated library would say that it is the oldest GPU.
        architecture = OLDEST if variant == "mma" else HOPPER if where == "emulated" else 0
        return Kernels(name, "cuda" if where == "gpu" else "cpu", backend, architecture)

    def objection(self) -> str:
        """Why these kernels do not run here; empty where they do. Loads the library."""
        q = torch.ones(1, 1, device=self.device)
        problem = Problem(q, None, q[0, 0], None, Pairs(True, 1), two_sided=False, normalize=True)
        if reasons := BACKENDS[self.backend].unsupported(problem):
            return "; ".join(reasons)
        if self.backend == "cuda" and self.device == "cuda" and self.architecture and not _wgmma(q.device):
            return "cuda runs the same kernels here"
        return ""


def _wgmma(device: torch.device) -> bool:
    """Whether the table chooses wgmma here, for the problems it serves."""
    return launches._tile("forward_rows", "index", 1, 64, launches.architecture(device)).family != 0


@contextmanager
def chosen(kernels: Kernels) -> Iterator[None]:
    """Forward and backward inside run these kernels, where their backend is named."""
    with ExitStack() as stack:
        if kernels.architecture:
            stack.enter_context(mock.patch.object(launches, "architecture", return_value=kernels.architecture))
        yield


def names(where: str) -> tuple[str, ...]:
    """The kernels that differ from each other there."""
    return {"gpu": NAMES, "emulated": NAMES[:2], "cpu": ("torch",)}[where]


def where() -> str:
    """Where the kernels run, from the environment."""
    return WORDS[os.environ.get(WHERE, "")]


def asked() -> tuple[str, ...]:
    """The names of the kernels, from the environment; all by default."""
    return tuple(filter(None, os.environ.get(ASKED, "").split(","))) or names(where())


def environment(where: str, kernels: tuple[str, ...]) -> dict[str, str]:
    """The variables from which a process reads both."""
    word = next(word for word, found in WORDS.items() if found == where)
    return {WHERE: word, ASKED: ",".join(kernels)}
