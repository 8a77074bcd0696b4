"""Part `accuracy`: the contract of docs/numerics.md at N = 32,768, where tensor cores accumulate and no CPU can tell how.

Every loss of train_ref/truth, three dtypes, two widths, temperatures from 0.01 (a running maximum) to 0.5, unrelated and aligned
positives: mean loss, each row's loss, the gradients of the features and dL/dscale of every kind of kernels against float64 in blocks, next
to the error of dense torch in the same dtype on the same inputs. Limits and verdicts are those of bench/accuracy.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import accuracy, inputs
from bench.gpu import part
from bench.gpu.kernels import Kernels, chosen
from train_ref.truth import LOSSES

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SHOWN = {"loss": "mean", "row": "row", "gradient": "gradient", "scale": "scale"}  # "loss" is which
COLUMNS = ("kernels", "loss", "dtype", "d", "noise", "temperature", "exact", *SHOWN.values(), "inside", "status")


class Point(NamedTuple):
    """Of the grid, as that of bench/accuracy.py; its inputs are made on the device."""

    loss: str
    dtype: torch.dtype
    d: int
    noise: float  # of the positives; 3.0 is nearly unrelated, 0.4 is a cosine of 0.93
    temperature: float


def grid(dry: bool) -> Iterator[Point]:
    """Every loss and dtype comes early: the budget may end before the grid does."""
    for d in (24,) if dry else (128, 512):
        for noise in (0.4, 3.0):
            for temperature in (0.05,) if dry else (0.05, 0.01, 0.1, 0.5):
                for dtype in DTYPES:
                    for loss in LOSSES:
                        yield Point(loss, dtype, d, noise, temperature)


def stored(point: Point, n: int, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a call with n keys, and its temperature or logit scale."""
    loss = LOSSES[point.loss]
    generator = torch.Generator(device).manual_seed(0)  # the device's own: on a GPU a million rows are there at once
    first, aside = torch.randn(2, n // (1 + loss.symmetric), point.d, generator=generator, device=device)
    value = point.temperature if accuracy.parameter_of(loss) == "temperature" else 1 / point.temperature
    return inputs.call(loss, first.to(point.dtype), (first + point.noise * aside).to(point.dtype)), torch.tensor(value, device=device)


@contextmanager
def alone(kernels: Kernels, device: str) -> Iterator[None]:
    with chosen(kernels):
        yield
    if device == "cuda":
        torch.cuda.empty_cache()


def judge(point: Point, n: int, device: str, every: list[Kernels]) -> Iterator[dict[str, Any]]:
    """By kernels the largest part of its limit that each quantity uses, and what that is."""
    tensors, parameter = stored(point, n, device)
    loss = LOSSES[point.loss]
    runs: accuracy.Runs = {kernels.name: (accuracy.fused(loss, kernels.backend), partial(alone, kernels, device)) for kernels in every}
    true, verdicts = accuracy.judge(accuracy.Exact(loss, tensors), parameter, runs)
    for who, found in verdicts.items():
        row: dict[str, Any] = {"kernels": who, **point._asdict(), "dtype": str(point.dtype)[6:], "exact": true.mean}
        for quantity, name in SHOWN.items():
            verdict = found[quantity]
            row |= {name: verdict.used, f"{name}_error": verdict.error, f"{name}_dense": verdict.dense}
        yield row | {"inside": all(row[name] <= 1 for name in SHOWN.values())}


def main() -> int:
    report = part.Report("accuracy")
    n = 256 if report.dry else 32_768
    every = report.kernels()
    for point in grid(report.dry) if every else ():
        if report.left() < 10:
            report.add({**point._asdict(), "dtype": str(point.dtype)[6:], "status": "no time left"})
            continue
        with report.step(str(point)):
            for row in judge(point, n, report.device, every):
                report.add(row)
        if report.device == "cuda":
            torch.cuda.empty_cache()
    report.more = {"n": n, "meaning": "each quantity: the largest part of its limit that is used; above 1 is outside the contract"}
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
