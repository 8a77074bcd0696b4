"""Which backend runs. A backend is a module with NAME, unsupported(problem), forward(problem), backward(problem, grads, stats, wanted)."""

from __future__ import annotations

from types import ModuleType

from fastnce import arguments
from fastnce.backends import cpu, cuda, proof, reference, torch_tiles, triton, verdicts
from fastnce.problem import Problem

# The fastest first. "auto" goes through AUTO. A backend is importable everywhere, and looks for what it needs in unsupported().
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (triton, cuda, cpu, torch_tiles, reference)}
AUTO = ("triton", "cuda", "cpu", "torch")
PROVEN = ("triton", "cuda")  # of these, the ones that "auto" takes on a GPU alone, and there after a proof


def pick(where: str, name: str, problem: Problem) -> str:
    """The name of the backend to run. "auto" takes the first without objections; a named one runs or raises, it never falls back.

    Raises NotImplementedError with every objection of every candidate, ValueError for an unknown name.
    """
    arguments.backend(where, name, BACKENDS)
    q, given = problem.q, arguments.backend_of_environment(where, BACKENDS) if name == "auto" else ""
    if name == "auto" and not given and q.device.type in verdicts.DEVICES:
        able = tuple(candidate for candidate in PROVEN if not BACKENDS[candidate].unsupported(problem))
        if able and (chosen := verdicts.choose(able, q.device.type, q.device.index, *proof.variant(problem))):
            return chosen
    objections = []
    for candidate in (given,) if given else [c for c in AUTO if c not in PROVEN] if name == "auto" else (name,):
        reasons = BACKENDS[candidate].unsupported(problem)
        if not reasons:
            return candidate
        objections.append(f"  {candidate}: {'; '.join(reasons)}")
    asked = f"query {tuple(q.shape)} {str(q.dtype)[6:]} {q.device.type}" + (", and FASTNCE_BACKEND names it" if given else "")
    raise NotImplementedError(f"{where}: no backend for {asked}:\n" + "\n".join(objections))


def keeps_output(name: str, problem: Problem) -> bool:
    """Whether this backend answers the problem with the mean key in own_pos, see Side. One without a function of this name never does."""
    return getattr(BACKENDS[name], "keeps_output", lambda _: False)(problem)


def rounds(name: str, problem: Problem) -> bool:
    """Whether this backend returns the vectors of Side in the compute dtype."""
    return problem.rounded and getattr(BACKENDS[name], "ROUNDED", False)
