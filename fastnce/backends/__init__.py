"""Which backend runs. A backend is a module with NAME, unsupported(problem), forward(problem), backward(problem, grads, stats, wanted)."""

from __future__ import annotations

from types import ModuleType

from fastnce import arguments
from fastnce.backends import cpu, cuda, proof, reference, torch_tiles, triton, verdicts
from fastnce.backends._gpu import limits
from fastnce.problem import LossProblem, Problem

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
    proven = name == "auto" and not given and q.device.type in verdicts.DEVICES
    if proven and (chosen := _proven(problem, proof.asked(problem), loss=False)):
        return chosen
    objections = []
    for candidate in (given,) if given else [c for c in AUTO if c not in PROVEN] if name == "auto" else (name,):
        reasons = BACKENDS[candidate].unsupported(problem)
        if not reasons:
            return candidate
        objections.append(f"  {candidate}: {'; '.join(reasons)}")
    asked = f"query {tuple(q.shape)} {str(q.dtype)[6:]} {q.device.type}" + (", and FASTNCE_BACKEND names it" if given else "")
    raise NotImplementedError(f"{where}: no backend for {asked}:\n" + "\n".join(objections))


def may_have_loss(name: str, device: str) -> bool:
    """Whether a backend of this name may have the pair of functions of fused.py. "auto" takes such backends on a GPU alone."""
    names = (name,) if name != "auto" else PROVEN if device in verdicts.DEVICES else ()
    return any(hasattr(BACKENDS.get(one), "loss") for one in names)


def pick_loss(where: str, name: str, ask: LossProblem) -> str:
    """The name of the backend to make a loss by its pair of functions; "" where a loss is made from statistics. Raises as pick does."""
    problem = ask.problem
    if name == "auto" and problem.q.device.type in verdicts.DEVICES and not arguments.backend_of_environment(where, BACKENDS):
        return _proven(problem, proof.asked_of_loss(ask), loss=True)
    chosen = pick(where, name, problem)
    return chosen if hasattr(BACKENDS[chosen], "loss") else ""


def _proven(problem: Problem, asked: proof.Asked, loss: bool) -> str:
    """The first of PROVEN without objection that is right on this device, "" without one. A later call looks the answer up."""
    q, keys = problem.q, problem.keys
    if max(q.shape[0], keys.shape[0]) > limits.LARGEST:  # the one objection that may differ between calls that ask the same
        return ""
    chosen = verdicts.known(q.device, asked)
    if chosen is None:
        names = [name for name in PROVEN if not loss or hasattr(BACKENDS[name], "loss")]
        chosen = verdicts.choose(tuple(name for name in names if not BACKENDS[name].unsupported(problem)), q.device, asked)
    return chosen


def keeps_output(name: str, problem: Problem) -> bool:
    """Whether this backend answers the problem with the mean key in own_pos, see Side. One without a function of this name never does."""
    return getattr(BACKENDS[name], "keeps_output", lambda _: False)(problem)


def rounds(name: str, problem: Problem) -> bool:
    """Whether this backend returns the vectors of Side in the compute dtype."""
    return problem.rounded and getattr(BACKENDS[name], "ROUNDED", False)
