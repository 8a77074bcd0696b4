"""Compiled kernels are called directly: with the arguments, grid and stream that Triton's own way of calling them gives their launchers.

    TRITON_INTERPRET=0 python tests/direct_calls.py

There is no GPU: kernels are compiled for one, and their launchers only note the calls. test_tape.py runs this with the installed Triton,
.ci/run with the oldest one that is supported.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import triton
from pretended_gpu import Launched, pretend
from torch import Tensor

from fastnce import fused
from fastnce.backends.triton import kernels_rows, losses, statistics, tape
from fastnce.pairs import Pairs
from fastnce.problem import WITHOUT_METRICS, LossProblem, LossWanted, Problem, Side, SideGrad, Wanted

METRICS = Side._fields[WITHOUT_METRICS:]


@contextmanager
def same_memory() -> Iterator[Callable[[], None]]:
    """Inside, tensors are made once: after a call of the function that this yields, the first of them is given again, then the second."""
    made: list[Tensor] = []
    count = 0

    def instead(new: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: object, **kwargs: object) -> Tensor:
            nonlocal count
            if count == len(made):
                made.append(new(*args, **kwargs))
            count += 1
            return made[count - 1]

        return make

    def restart() -> None:
        nonlocal count
        count = 0

    with mock.patch.object(torch, "empty", instead(torch.empty)), mock.patch.object(torch, "empty_strided", instead(torch.empty_strided)):
        yield restart


def through_triton(one: tape.Tape) -> tape.Tape:
    """A tape whose launches Triton calls."""
    return one._replace(calls=tuple(call._replace(run=None) for call in one.calls))


def compared(launches: list[Launched], one: tape.Tape, given: tuple[Tensor | None, ...], number: float) -> int:
    launches.clear()
    with same_memory() as restart:
        one.play(given, number)
        directly = list(launches)
        launches.clear()
        restart()
        through_triton(one).play(given, number)
    assert directly and directly == launches, (directly, launches)
    return len(directly)


def asked(name: str, q: Tensor, k: Tensor) -> LossProblem:
    scale = torch.tensor(0.1, requires_grad=True)
    if name == "info_nce":
        return fused.ask(name, q, k, Pairs(False, 0), 0.1, None, True, "out", "mean")
    if name == "nt_xent":
        return fused.ask(name, q, None, Pairs(True, len(q)), scale, None, True, "out", "mean", second=k)
    return fused.ask(name, q, k, Pairs(False, 0), scale, None, False, "out", "sum", two_sided=True, weight=torch.rand(len(q)))


def of_statistics(launches: list[Launched]) -> int:
    """Both directions of a problem that asks for all there is."""
    q, k, scale, bias = torch.randn(200, 48), torch.randn(160, 48), torch.tensor(9.0), torch.tensor(0.5)
    problem = Problem(q, k, scale, bias, Pairs(False, 3), True, True, metrics=True)
    stats = [side._replace(**dict.fromkeys(METRICS)) for side in statistics.forward(problem)]
    grads = [SideGrad(*torch.ones(3, len(side.pos), dtype=side.pos.dtype)) for side in stats]
    statistics.backward(problem, grads, stats, Wanted(True, True, True, True))
    forward, backward = statistics._TAPES.held.values()
    of_problem = q, k, scale, bias, None, None, None, None, None, None
    given = *of_problem, *(x for side in (*grads, *stats) for x in side)
    return compared(launches, forward, of_problem, 0.0) + compared(launches, backward, given, 0.0)


def of_failure() -> None:
    """An error of a compiler is raised as it is, each time."""

    def killed(*args: object, **kwargs: object) -> object:
        raise RuntimeError("ptxas was killed")

    q, k = (torch.randn(200, 48, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    for _ in range(2):
        with mock.patch.object(kernels_rows.prepare, "compile", killed), pytest.raises(RuntimeError, match="ptxas was killed"):
            losses.loss(asked("info_nce", q, k))


def main() -> int:
    launches = pretend()
    compilers: set[int] = set()
    compile_of_triton = triton.compiler.compile

    def noted(*args: object, **kwargs: object) -> object:
        compilers.add(threading.get_ident())
        return compile_of_triton(*args, **kwargs)

    count = 0
    with mock.patch.object(triton.compiler, "compile", noted):
        for name in ("info_nce", "nt_xent", "clip_loss"):
            q, k = (torch.randn(200, 48, requires_grad=True) for _ in range(2))
            ask = asked(name, q, k)
            _, kept = losses.loss(ask)
            (step,) = losses._STEPS.held.values()
            (of_gradients,) = step.gradients.values()  # recorded, and compiled, with the loss
            wanted = LossWanted(*(x is not None and x.requires_grad for x in ask.tensors[:7]))
            upstream = torch.ones(())
            before = len(launches)
            losses.gradients(ask, kept, upstream, wanted)
            assert len(launches) > before and list(step.gradients.values()) == [of_gradients]
            count += compared(launches, step.loss, ask.tensors, 3.0)
            count += compared(launches, of_gradients, (*ask.tensors, kept.view(-1), upstream), 0.0)
            tape.forget()
        count += of_statistics(launches)
    of_failure()
    print(f"triton {triton.__version__}: {count} launches as by Triton itself, compiled by {len(compilers)} threads")
    assert len(compilers) > 1 and threading.get_ident() not in compilers
    return 0


if __name__ == "__main__":
    sys.exit(main())
