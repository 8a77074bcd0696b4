"""The host's time of a step, forward and backward: fastnce on a GPU, with its kernels taken out, and eager.

    python -m bench host [--losses all] [--at-most 1.5]

On a GPU a small step lasts as long as its launches take to be made. This runs without one: all that the backend "triton" does on the host
is done, and the kernels that it calls do nothing. Eager is that of bench/dense.py on the CPU, on 8 rows of 16 columns, where arithmetic is
little beside the calls. The driver's part of a launch is missing on both sides. Times are processor time of one thread; the ratio is the
median of those of rounds in which the two take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from bench import dense, peers
from fastnce import files
from fastnce.backends.triton import launches

PROGRAM = "python -m bench host"
ROWS, COLUMNS = 8, 16
ROUNDS, STEPS = 9, 100


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", default="all", help=f"all, or of {', '.join(dense.LOSSES)}")
    parser.add_argument("--at-most", type=float, help="exit 1 unless ours is at most so many times eager's, for each loss")
    options = parser.parse_args(arguments)
    options.losses = list(dense.LOSSES) if options.losses == "all" else dense.spelled_as(dense.LOSSES, options.losses.split(","))
    if unknown := set(options.losses) - set(dense.LOSSES):
        parser.error(f"--losses: unknown {min(unknown)!r}; choose from {', '.join(dense.LOSSES)}")
    return options


def without_kernels() -> None:
    """From now on this process calls kernels that do nothing, on tensors of the CPU."""
    os.environ["TRITON_INTERPRET"] = "1"  # so that the backend takes these

    def nothing(*arguments: object, stream: object) -> None: ...

    def compiled(asked: list[launches.Launch]) -> list[Callable[..., None]]:
        return [nothing for _ in asked]

    launches.compiled = compiled  # type: ignore[assignment]
    launches.stream = lambda: 0


def step(function: dense.Contestant, leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    asked, upstream = [x for x in leaves if x.requires_grad], torch.ones(())
    return lambda: torch.autograd.grad(function(*leaves), asked, upstream)


def microseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(STEPS):
        call()
    return 1e6 * (time.process_time() - start) / STEPS


def compared(loss: str) -> tuple[float, float, float]:
    """Microseconds of our step, of eager's, and the ratio."""
    leaves = dense.leaves(loss, ROWS * (dense.QUERIES if loss == "moco" else 1), COLUMNS)
    calls = [step(peers.contestant(loss, name, "triton"), leaves) for name in (peers.OURS, "eager")]
    for call in calls:
        microseconds(call)
    rounds = []
    for turn in range(ROUNDS):
        times = [microseconds(call) for call in (calls if turn % 2 else calls[::-1])]
        rounds.append(tuple(times if turn % 2 else times[::-1]))
    ours, theirs = (median(times) for times in zip(*rounds, strict=True))
    return ours, theirs, median(a / b for a, b in rounds)


@files.command(PROGRAM)
def main(arguments: list[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    without_kernels()
    most = 0.0
    print("| loss | ours, us | eager, us | ratio |\n|---|--:|--:|--:|")
    for loss in options.losses:
        ours, theirs, ratio = compared(loss)
        print(f"| {loss} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |", flush=True)
        most = max(most, ratio)
    if options.at_most is not None and most > options.at_most:
        print(f"{PROGRAM}: a step takes {most:.2f} times eager's, not {options.at_most:g}", file=sys.stderr)
        return 1
    return 0
