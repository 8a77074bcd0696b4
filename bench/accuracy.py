"""How far from exact: fastnce and dense torch in the same dtype, both against float64 on the same stored inputs.

    python -m bench accuracy [--losses nt_xent,clip_loss] [--backend torch] [--n 514] [--quick] [--out DIR]

Sums grow with N, and their rounding: the contract is also measured at N = 8192, on a corner of the grid, which takes 2 GiB:

    python -m bench accuracy --losses=nt_xent,clip_loss --backend=torch --n=8192 --quick --dtypes=float32

At every point of the grid four quantities of a loss are compared: the mean loss, each row's loss, the gradients of the features
(relative Frobenius error, of each side of the product) and the derivative by the scale 1/temperature (relative; that by the temperature
has the same relative error). An error is inside the contract, train_ref/truth/contract.py, or it is listed.

float16 runs under a loss scale, as GradScaler would have found it: the largest power of two up to 65536 at which the exact gradient is
finite in float16.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import record
from bench.dense import spelled_as
from bench.inputs import REGIMES, Extended, example
from fastnce import files
from train_ref.truth import LOSSES, Loss, contract
from train_ref.truth.exact import Answer, Sizes, exact, sides_of

DIMENSIONS = (1, 5, 24, 64, 128, 512, 768)
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTITIES = ("loss", "row", "gradient", "scale")


class Point(NamedTuple):
    """Of the grid: one loss in one dtype on one kind of input."""

    loss: str
    dtype: torch.dtype
    regime: str
    d: int
    temperature: float

    def fields(self) -> dict[str, Any]:
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}


def inputs(point: Point, n: int) -> tuple[dict[str, Tensor], Tensor]:
    """The stored tensors of a call, and the stored parameter: a temperature, or a logit scale where the loss takes that."""
    value = 1 / point.temperature if parameter_of(LOSSES[point.loss]) == "logit_scale" else point.temperature
    wide = torch.promote_types(point.dtype, torch.float32)
    return example(LOSSES[point.loss], point.regime, n, point.d, point.dtype), torch.tensor(value, dtype=wide)


def parameter_of(loss: Loss) -> str:
    return "temperature" if loss.number == "scale" else loss.number


Run = Callable[[dict[str, Tensor], str], Tensor]  # of the tensors of a call, the parameter among them, and the reduction


def fused(loss: Loss, backend: str) -> Run:
    import fastnce

    def run(tensors: dict[str, Tensor], reduction: str) -> Tensor:
        value: Tensor = getattr(fastnce, loss.name)(**tensors, reduction=reduction, backend=backend)
        return value

    return run


def dense(loss: Loss) -> Run:
    def run(tensors: dict[str, Tensor], reduction: str) -> Tensor:
        rows = loss.function(**tensors)
        return rows if reduction == "none" else rows.mean()

    return run


def answer(run: Run, loss: Loss, tensors: dict[str, Tensor], parameter: Tensor, scaling: float) -> Answer:
    """Run a loss. Gradients are taken of scaling * loss, and divided by it again in float64."""
    name = parameter_of(loss)
    leaves = {one: tensor.clone().requires_grad_() for one, tensor in {**tensors, name: parameter}.items() if tensor.is_floating_point()}
    mean = run({**tensors, **leaves}, "mean")
    found = dict(zip(leaves, torch.autograd.grad(mean * scaling, list(leaves.values())), strict=True))
    with torch.no_grad():
        rows = run({**tensors, **leaves}, "none")
    by_scale = found[name].double().item() / scaling
    if name == "temperature":
        by_scale *= -(parameter.double().item() ** 2)
    return Answer(mean.double().item(), rows.double(), [side.double() / scaling for side in sides_of(loss, found)], by_scale)


# ---------------------------------------------------------------- the contract


class Verdict(NamedTuple):
    """One quantity at one point: a cell of the report. `used` is error / limit; above 1 the cell is outside the contract."""

    error: float
    dense: float
    used: float
    rounding: bool  # the error is within the u term, where its ratio to dense says nothing


Errors = dict[str, Tensor]  # by quantity, (1,) of the loss and the scale, one for every row and for every side; float64 on the CPU


def errors(got: Answer, true: Answer, sizes: Sizes) -> Errors:
    """Absolute of the loss and of every row, relative of every gradient and of dL/dscale; inf where not finite."""
    gradients = zip(got.gradients, true.gradients, relative_to(true, sizes)[0], strict=True)
    found = {
        "loss": torch.tensor([abs(got.mean - true.mean)]),
        "row": (got.rows - true.rows).abs().cpu(),
        "gradient": torch.tensor([(g - t).norm().item() / size for g, t, size in gradients]),
        "scale": torch.tensor([abs(got.by_scale - true.by_scale) / relative_to(true, sizes)[1]]),
    }
    return {name: torch.where(error.isfinite(), error, torch.inf).double() for name, error in found.items()}


def relative_to(true: Answer, sizes: Sizes) -> tuple[list[float], float]:
    """The exact value of gradients and dL/dscale, or its terms where float32 could not tell their sum from 0."""

    def size(value: float, terms: float) -> float:
        return value if value > contract.U * terms else max(terms, 1e-300)

    pairs = zip(true.gradients, sizes.gradients, strict=True)
    return [size(t.norm().item(), terms) for t, terms in pairs], size(abs(true.by_scale), sizes.by_scale)


class Dense(NamedTuple):
    """The errors of dense torch in the dtype of the features, and of half-precision features in float32."""

    same: Errors
    single: Errors


def limits(dtype: torch.dtype, scale: float, true: Answer, sizes: Sizes, storing: Tensor, dense: Dense) -> Errors:
    """The contract."""
    (same, single), half = dense, dtype in contract.STORED
    autocast = same if half else {name: torch.full_like(error, torch.inf) for name, error in same.items()}
    # A loss in float64 has terms of its own size; its derivative by the scale has not.
    cancelling = contract.FLOAT64 * sizes.by_scale / relative_to(true, sizes)[1] if dtype == torch.float64 else 0.0
    gradients = zip(single["gradient"].tolist(), autocast["gradient"].tolist(), storing.tolist(), strict=True)
    found = {
        "loss": torch.tensor([contract.mean_loss(dtype, single["loss"].item(), true.mean, autocast["loss"].item())]),
        "row": contract.row_loss(dtype, single["row"], scale, true.rows.cpu()),
        "gradient": torch.tensor([contract.gradient(dtype, m, by_half, storing=least) for m, by_half, least in gradients]),
        "scale": torch.tensor([contract.scalar(dtype, single["scale"].item(), autocast["scale"].item(), cancelling=cancelling)]),
    }
    if half and abs(true.mean) < contract.UNDERFLOW:  # DCL may be negative
        found |= {name: torch.full_like(found[name], torch.inf) for name in ("gradient", "scale")}
    return found


def stored_gradients(true: Answer, dtype: torch.dtype) -> tuple[Answer, float]:
    """The exact answer with its gradients rounded to the dtype, and the loss scale they were rounded at."""
    scaling = 1.0
    if dtype == torch.float16:
        most = max(g.abs().max().item() for g in true.gradients)
        scaling = 2.0 ** min(16, math.floor(math.log2(torch.finfo(dtype).max / max(most, 1e-300))))
    return true._replace(gradients=[(g * scaling).to(dtype).double() / scaling for g in true.gradients]), scaling


class Exact:
    """The exact answers of one call at every temperature."""

    def __init__(self, loss: Loss, tensors: dict[str, Tensor]) -> None:
        self.loss, self.tensors = loss, tensors
        self.extended = Extended(loss, tensors) if tensors[loss.leaves[0]].dtype == torch.float64 else None

    def scale(self, parameter: Tensor) -> Any:
        """1 / temperature in the precision of the logits."""
        wide: Callable[[float], Any] = np.longdouble if self.extended else float
        return 1 / wide(parameter.item()) if parameter_of(self.loss) == "temperature" else wide(parameter.item())

    def at(self, parameter: Tensor) -> tuple[Answer, Sizes]:
        scale = self.scale(parameter)
        return exact(self.loss, self.tensors, float(scale), partial(self.extended.logits, scale) if self.extended else None)


Runs = dict[str, tuple[Run, Callable[[], AbstractContextManager[Any]]]]  # by name: a run, and where forward and backward happen


def judge(truth: Exact, parameter: Tensor, runs: Runs) -> tuple[Answer, dict[str, dict[str, Verdict]]]:
    """The exact answer, and of every run the verdict on each quantity."""
    loss, tensors = truth.loss, truth.tensors
    dtype = tensors[loss.leaves[0]].dtype
    true, sizes = truth.at(parameter)
    rounded, scaling = stored_gradients(true, dtype)
    storing = errors(rounded, true, sizes)["gradient"]

    def error_of(run: Run, given: dict[str, Tensor], by: float) -> Errors:
        return errors(answer(run, loss, given, parameter, by), true, sizes)

    same = single = error_of(dense(loss), tensors, scaling)
    if dtype in contract.STORED:
        wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        single = error_of(dense(loss), wide, 1.0)
    none = {name: torch.zeros_like(error) for name, error in same.items()}
    scale = float(truth.scale(parameter))
    allowed, unavoidable = (limits(dtype, scale, true, sizes, storing, m) for m in (Dense(same, single), Dense(none, none)))

    def verdict(found: Errors, name: str) -> Verdict:
        used = torch.where(found[name] > 0, found[name] / allowed[name], 0.0)
        # Of two gradients the one that is further off speaks for both.
        worst = int(found[name].argmax()) if name == "gradient" else slice(None)
        within = bool((found[name] <= unavoidable[name]).all())
        return Verdict(found[name].max().item(), same[name][worst].max().item(), used.max().item(), within)

    verdicts = {}
    for who, (run, where) in runs.items():
        with where():
            found = error_of(run, tensors, scaling)
        verdicts[who] = {name: verdict(found, name) for name in QUANTITIES}
    return true, verdicts


def verdicts_of(truth: Exact, parameter: Tensor, backend: str) -> dict[str, Verdict]:
    return judge(truth, parameter, {backend: (fused(truth.loss, backend), nullcontext)})[1][backend]


# ---------------------------------------------------------------- the grid


class Grid(NamedTuple):
    n: int
    losses: list[str]
    dimensions: tuple[int, ...]
    temperatures: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    backend: str

    def run(self) -> Iterator[tuple[Point, dict[str, Verdict]]]:
        for loss in self.losses:
            for dtype in self.dtypes:
                for regime in REGIMES:
                    for d in self.dimensions:
                        truth = None
                        for temperature in self.temperatures:
                            point = Point(loss, dtype, regime, d, temperature)
                            tensors, parameter = inputs(point, self.n)
                            truth = truth or Exact(LOSSES[loss], tensors)
                            yield point, verdicts_of(truth, parameter, self.backend)


def summarise(results: list[tuple[Point, dict[str, Verdict]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Per dtype, loss and quantity the worst figures and where; and every cell outside the contract."""
    rows: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    for dtype, loss in dict.fromkeys((point.dtype, point.loss) for point, _ in results):
        group = [(point, verdicts) for point, verdicts in results if (point.dtype, point.loss) == (dtype, loss)]
        for quantity in QUANTITIES:
            here = [(point, verdicts[quantity]) for point, verdicts in group]
            above = [(v.error / v.dense, point) for point, v in here if not v.rounding and v.dense > 0]
            error, at = max(((v.error, point) for point, v in here), key=lambda pair: pair[0])
            ratio, ratio_at = max(above, key=lambda pair: pair[0]) if above else (None, None)
            failed = [(point, v) for point, v in here if not v.used <= 1]
            rows.append(
                {
                    "dtype": at.fields()["dtype"],
                    "loss": loss,
                    "quantity": quantity,
                    "cells": len(here),
                    "worst_error": error,
                    "worst_error_at": at.fields(),
                    "worst_dense_error": max(v.dense for _, v in here),
                    "worst_ratio": ratio,
                    "worst_ratio_at": ratio_at and ratio_at.fields(),
                    "most_of_limit": max(v.used for _, v in here),
                    "outside": len(failed),
                }
            )
            outside += [{**point.fields(), "quantity": quantity, **v._asdict()} for point, v in failed]
    return rows, outside


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def render(result: dict[str, Any]) -> str:
    env, outside = result["env"], result["outside"]
    lines = [
        f"# Accuracy, N = {result['n']}, backend {result['backend']}, on {env['cpu']} ({env['vector']})",
        "",
        f"{env['time']}, fastnce {env['fastnce']} (sources {env['sources'][:8]}), torch {env['torch']}.",
        f"`{env['command']}`",
        "",
        "Errors against float64: absolute of loss and row, relative of gradient and scale. Ratio: to dense torch in",
        "the same dtype (half precision: autocast), over the cells above rounding level. Of limit: the most that any",
        "cell uses of what the contract allows it.",
        "",
        "| dtype | loss | quantity | cells | worst error | dense, worst | worst ratio | of limit | outside |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        figures = " | ".join(_number(row[key]) for key in ("worst_error", "worst_dense_error", "worst_ratio", "most_of_limit"))
        lines.append(f"| {row['dtype']} | {row['loss']} | {row['quantity']} | {row['cells']} | {figures} | {row['outside']} |")
    lines += ["", f"{len(outside)} of {sum(row['cells'] for row in result['rows'])} outside the contract."]
    if outside:
        lines += ["", "| dtype | loss | quantity | regime | D | temperature | error | dense | of limit |"]
        lines += ["|---|---|---|---|--:|--:|--:|--:|--:|"]
        for row in sorted(outside, key=lambda row: -row["used"]):
            words = " | ".join(str(row[key]) for key in ("dtype", "loss", "quantity", "regime", "d", "temperature"))
            lines.append(f"| {words} | " + " | ".join(_number(row[key]) for key in ("error", "dense", "used")) + " |")
    return "\n".join(lines) + "\n"


@files.command("python -m bench accuracy")
def main(arguments: list[str]) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m bench accuracy", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--losses", default=",".join(LOSSES), help=f"of {', '.join(LOSSES)}")
    parser.add_argument("--dtypes", default=",".join(str(dtype).removeprefix("torch.") for dtype in DTYPES))
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--n", type=int, default=514, help="rows; not a multiple of a tile by default. Also measured: 8192 with --quick --dtypes=float32"
    )
    parser.add_argument("--quick", action="store_true", help="a corner of the grid")
    parser.add_argument("--out", type=Path, default=record.OUT, help=f"bench/results records it; default: {record.OUT}")
    options = parser.parse_args(arguments)
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    losses, dtypes = spelled_as(LOSSES, options.losses.split(",")), options.dtypes.split(",")
    options.losses = ",".join(losses)
    if not set(losses) <= set(LOSSES) or not set(dtypes) <= known.keys() or options.n < 4 or options.n % 2:
        parser.error(f"--losses are of {', '.join(LOSSES)}; --dtypes of {', '.join(known)}; --n is even and at least 4")
    dimensions, temperatures = (DIMENSIONS[::3], TEMPERATURES[::4]) if options.quick else (DIMENSIONS, TEMPERATURES)
    torch.set_num_threads(1)
    shown = [f"--{name}={getattr(options, name)}" for name in ("losses", "dtypes", "backend", "n")]
    env = record.environment(["python", "-m", "bench", "accuracy", *shown, *["--quick"] * options.quick], threads=1)
    grid = Grid(options.n, losses, dimensions, temperatures, tuple(known[name] for name in dtypes), options.backend)
    rows, outside = summarise(list(grid.run()))
    result = {"schema": record.SCHEMA, "env": env, "n": options.n, "backend": options.backend}
    result |= {"rows": rows, "outside": outside}
    markdown = render(result)
    record.save(result, markdown, options.out, "accuracy")
    print(markdown)
    return 0
