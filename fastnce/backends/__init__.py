"""Which backend runs. A backend is a module with NAME, unsupported(problem), forward(problem), backward(problem, grads, stats, wanted)."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

from fastnce.problem import Problem

# In order of preference. A module is imported when it is first asked, so that nothing optional is touched by `import fastnce`.
NAMES = ("cpu", "reference")
_AUTO = ("cpu",)


@cache
def load(name: str) -> ModuleType:
    """The module of one backend."""
    return importlib.import_module(f"fastnce.backends.{name}")


def pick(where: str, name: str, problem: Problem) -> str:
    """The name of the backend to run. "auto" takes the first without objections; a named one runs or raises, it never falls back.

    Raises NotImplementedError with every objection of every candidate, ValueError for an unknown name.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{where}: {name!r} is not a valid value for backend; use 'auto' or one of {', '.join(map(repr, NAMES))}")
    objections = []
    for candidate in _AUTO if name == "auto" else (name,):
        reasons = load(candidate).unsupported(problem)
        if not reasons:
            if name == "auto" and problem.q.device.type != "cpu":
                _say_once(candidate, problem.q.device.type)
            return candidate
        objections.append(f"  {candidate}: {'; '.join(reasons)}")
    q = problem.q
    asked = f"query {tuple(q.shape)} {str(q.dtype)[6:]} {q.device.type}"
    raise NotImplementedError(f"{where}: no backend for {asked}:\n" + "\n".join(objections))


@cache
def _say_once(candidate: str, device: str) -> None:
    warnings.warn(f"fastnce has no fused kernel for {device} tensors here; using tiled torch operations ({candidate!r})", stacklevel=4)
