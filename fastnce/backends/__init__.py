"""Which backend runs. A backend is a module with NAME, unsupported(problem), forward(problem), backward(problem, grads, stats, wanted)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from fastnce import arguments
from fastnce.backends import cpu, cuda, reference, torch_tiles, triton
from fastnce.problem import Problem

# The fastest first. "auto" goes through AUTO. A backend is importable everywhere, and looks for what it needs in unsupported().
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (triton, cuda, cpu, torch_tiles, reference)}
AUTO = ("cpu", "torch")
# Why triton and cuda are not in it.
UNRECORDED = "no run of the fused kernels on a GPU is recorded yet"


def pick(where: str, name: str, problem: Problem) -> str:
    """The name of the backend to run. "auto" takes the first without objections; a named one runs or raises, it never falls back.

    Raises NotImplementedError with every objection of every candidate, ValueError for an unknown name.
    """
    arguments.backend(where, name, BACKENDS)
    objections = []
    for candidate in AUTO if name == "auto" else (name,):
        reasons = BACKENDS[candidate].unsupported(problem)
        if not reasons:
            if name == "auto" and problem.q.device.type == "cuda" and not torch.compiler.is_compiling():
                _say_once(candidate, problem.q.device.type)
            return candidate
        objections.append(f"  {candidate}: {'; '.join(reasons)}")
    q = problem.q
    asked = f"query {tuple(q.shape)} {str(q.dtype)[6:]} {q.device.type}"
    raise NotImplementedError(f"{where}: no backend for {asked}:\n" + "\n".join(objections))


@contextmanager
def without_launches() -> Iterator[None]:
    """Host code of GPU kernels inside allocates its results and launches nothing: what an operator's fake needs."""
    with triton.without_launches():
        yield


def keeps_output(name: str, problem: Problem) -> bool:
    """Whether this backend answers the problem with the mean key in own_pos, see Side. One without a function of this name never does."""
    return getattr(BACKENDS[name], "keeps_output", lambda _: False)(problem)


@cache
def _say_once(candidate: str, device: str) -> None:
    warnings.warn(
        f"fastnce: backend='auto' takes {candidate!r} for {device} tensors, tiles of torch operations: {UNRECORDED}. backend='triton' runs "
        "the kernels; `python -m fastnce` compares them with float64 on this machine",
        stacklevel=4,
    )
