"""How far from exact: fastnce and dense torch in the same dtype, both against float64 on the same stored inputs.

    python -m bench accuracy [--losses nt_xent,clip] [--backend torch] [--n 514] [--quick] [--out DIR]

Sums grow with N, and their rounding: the contract is also measured at N = 8192, on a corner of the grid, which takes 2 GiB:

    python -m bench accuracy --backend=torch --n=8192 --quick --dtypes=float32

Every cell of the grid compares four quantities: the mean loss, each row's loss, the gradients of the features (relative
Frobenius error) and the derivative by the scale 1/temperature (relative; that by the temperature has the same relative
error). An error is inside the contract of docs/numerics.md or the cell is listed. u = 2^-24, L = the exact loss:

    float32              loss <= 2 m + 4 u max(1, L)     row <= 2 m + 32 u max(scale, L)
                         gradient <= 2 m + 16 u          scale <= 2 m + 1e-5        where m is dense float32's error
    bfloat16, float16    loss and row as float32, m of dense float32 on the rounded inputs
                         gradient <= 2^-8 (float16: 2^-10 + its final rounding)     scale <= 1e-3
                         and loss, gradient, scale no worse than dense autocast, or than float32's u terms above
    float64              loss and row <= 1e-13 relative

The limits on the gradient cannot be below what storing the exact gradient in that dtype costs, and nothing is asked of
the derivatives of half precision where they underflow (an exact loss below 1e-30). float16 runs under a loss scale, as
GradScaler would have found it: the largest power of two up to 65536 at which the exact gradient is finite in float16.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import record
from bench.exact import REGIMES, Answer, Array, Cosines, Sizes, exact, features, materialised
from fastnce import files

DIMENSIONS = (1, 5, 24, 64, 128, 512, 768)
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOSSES = ("nt_xent", "clip")
QUANTITIES = ("loss", "row", "gradient", "scale")

UNDERFLOW = 1e-30


class Cell(NamedTuple):
    loss: str
    dtype: torch.dtype
    regime: str
    d: int
    temperature: float

    def fields(self) -> dict[str, Any]:
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}


def inputs(cell: Cell, n: int) -> tuple[list[Tensor], Tensor]:
    """The stored features, and the stored parameter: the temperature of nt_xent, the logit scale of clip."""
    pair = features(cell.regime, n // 2 if cell.loss == "nt_xent" else n, cell.d, seed=0)
    arrays = [np.concatenate(pair)] if cell.loss == "nt_xent" else list(pair)
    value = cell.temperature if cell.loss == "nt_xent" else 1 / cell.temperature
    wide = torch.promote_types(cell.dtype, torch.float32)
    return [torch.tensor(array).to(cell.dtype) for array in arrays], torch.tensor(value, dtype=wide)


Loss = Callable[[list[Tensor], Tensor, str], Tensor]  # of the features, the parameter, and the reduction


def fused(loss: str, backend: str) -> Loss:
    import fastnce

    functions: dict[str, Callable[..., Any]] = {"nt_xent": fastnce.nt_xent, "clip": fastnce.clip_loss}

    def call(sides: list[Tensor], parameter: Tensor, reduction: str) -> Tensor:
        name = "temperature" if loss == "nt_xent" else "logit_scale"
        value: Tensor = functions[loss](*sides, **{name: parameter}, reduction=reduction, backend=backend)
        return value

    return call


def dense(loss: str) -> Loss:
    def call(sides: list[Tensor], parameter: Tensor, reduction: str) -> Tensor:
        rows = materialised(loss, sides, parameter)
        return rows if reduction == "none" else rows.mean()

    return call


def answer(loss: Loss, sides: list[Tensor], parameter: Tensor, by_temperature: bool, scaling: float) -> Answer:
    """Run a loss. Gradients are taken of scaling * loss, and divided by it again in float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in (*sides, parameter)]
    mean = loss(leaves[:-1], leaves[-1], "mean")
    *gradients, by_parameter = torch.autograd.grad(mean * scaling, leaves)
    with torch.no_grad():
        rows = loss(leaves[:-1], leaves[-1], "none")
    by_scale = by_parameter.double().item() / scaling
    if by_temperature:
        by_scale *= -(parameter.double().item() ** 2)
    by_feature = [gradient.double().numpy() / scaling for gradient in gradients]
    return Answer(mean.double().item(), rows.double().numpy(), by_feature, by_scale)


# ---------------------------------------------------------------- the contract


class Verdict(NamedTuple):
    """One quantity of one cell. `used` is error / limit: above 1 the cell is outside the contract."""

    error: float
    dense: float
    used: float
    rounding: bool  # the error is within the u term, where its ratio to dense says nothing


Errors = dict[str, Array]


def errors(got: Answer, true: Answer, sizes: Sizes) -> Errors:
    """Absolute of the loss and of every row, relative of every gradient and of dL/dscale; inf where not finite.

    Relative to the exact value, or to its terms where float32 could not tell their sum from 0.
    """

    def size(value: float, terms: float) -> float:
        return value if value > 2.0**-24 * terms else max(terms, 1e-300)

    gradients = [
        np.linalg.norm(g - t) / size(float(np.linalg.norm(t)), s)
        for g, t, s in zip(got.gradients, true.gradients, sizes.gradients, strict=True)
    ]
    found = {
        "loss": np.array([abs(got.loss - true.loss)]),
        "row": np.abs(got.rows - true.rows),
        "gradient": np.array(gradients),
        "scale": np.array([abs(got.scale - true.scale) / size(abs(true.scale), sizes.scale)]),
    }
    return {name: np.where(np.isfinite(error), error, np.inf) for name, error in found.items()}


def rounding(dtype: torch.dtype, true: Answer, scale: float, storing: Array) -> Errors:
    """The u terms: what an implementation cannot be blamed for, however lucky the dense one was."""
    u = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return {
        "loss": np.array([4 * u * max(1.0, true.loss)]),
        "row": 32 * u * np.maximum(scale, true.rows),
        "gradient": 16 * u + storing,
        "scale": np.array([1e-13 if dtype == torch.float64 else 1e-5]),
    }


def limits(dtype: torch.dtype, true: Answer, unavoidable: Errors, same: Errors, single: Errors) -> Errors:
    """The contract. same, single: the errors of dense torch in this dtype and in float32."""
    ones = np.ones_like(same["gradient"])
    unlimited = {"gradient": np.inf * ones, "scale": np.array([np.inf])}
    if dtype == torch.float64:
        # Of the derivatives the contract asks gradcheck, which is a test and not a number.
        return unlimited | {"loss": np.array([1e-13 * true.loss]), "row": 1e-13 * true.rows}
    if dtype == torch.float32:
        return {name: 2 * same[name] + unavoidable[name] for name in QUANTITIES}
    found = {name: 2 * single[name] + unavoidable[name] for name in ("loss", "row")}
    # float16 is held to its accuracy before the final cast, which rounds by more than that where gradients are small.
    found["gradient"] = 2.0**-8 * ones if dtype == torch.bfloat16 else 2.0**-10 + unavoidable["gradient"]
    found["scale"] = np.array([1e-3])
    for name in ("loss", "gradient", "scale"):
        found[name] = np.minimum(found[name], np.maximum(same[name], unavoidable[name]))
    if true.loss < UNDERFLOW:
        found |= unlimited
    return found


def stored_gradients(true: Answer, dtype: torch.dtype) -> tuple[Answer, float]:
    """The exact answer with its gradients rounded to the dtype, and the loss scale they were rounded at."""
    scaling = 1.0
    if dtype == torch.float16:
        most = max(float(np.abs(g).max()) for g in true.gradients)
        scaling = 2.0 ** min(16, math.floor(math.log2(torch.finfo(dtype).max / max(most, 1e-300))))
    rounded = [(torch.from_numpy(g) * scaling).to(dtype).double().numpy() / scaling for g in true.gradients]
    return true._replace(gradients=rounded), scaling


def judge(cell: Cell, sides: list[Tensor], parameter: Tensor, cos: Cosines, backend: str) -> dict[str, Verdict]:
    scale = 1 / cos.wide(parameter.item()) if cell.loss == "nt_xent" else cos.wide(parameter.item())
    true, sizes = exact(cos, scale)
    rounded, scaling = stored_gradients(true, cell.dtype)
    storing = errors(rounded, true, sizes)["gradient"]

    def error_of(loss: Loss, tensors: list[Tensor], by: float) -> Errors:
        return errors(answer(loss, tensors, parameter, cell.loss == "nt_xent", by), true, sizes)

    found, same = (error_of(loss, sides, scaling) for loss in (fused(cell.loss, backend), dense(cell.loss)))
    half = cell.dtype in (torch.bfloat16, torch.float16)
    single = error_of(dense(cell.loss), [side.float() for side in sides], 1.0) if half else same
    unavoidable = rounding(cell.dtype, true, float(scale), storing)
    allowed = limits(cell.dtype, true, unavoidable, same, single)
    verdicts: dict[str, Verdict] = {}
    for name in QUANTITIES:
        used = np.divide(found[name], allowed[name], out=np.zeros_like(found[name]), where=found[name] > 0)
        # Of two gradients the one that is further off speaks for both.
        worst = found[name].argmax() if name == "gradient" else slice(None)
        verdicts[name] = Verdict(
            float(found[name].max()),
            float(np.max(same[name][worst])),
            float(used.max()),
            bool((found[name] <= unavoidable[name]).all()),
        )
    return verdicts


# ---------------------------------------------------------------- the grid


class Grid(NamedTuple):
    n: int
    losses: list[str]
    dimensions: tuple[int, ...]
    temperatures: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    backend: str

    def run(self) -> Iterator[tuple[Cell, dict[str, Verdict]]]:
        for loss in self.losses:
            for dtype in self.dtypes:
                for regime in REGIMES:
                    for d in self.dimensions:
                        cos = None
                        for temperature in self.temperatures:
                            cell = Cell(loss, dtype, regime, d, temperature)
                            stored, parameter = inputs(cell, self.n)
                            cos = cos or Cosines.of(loss, stored)  # the same at every temperature
                            yield cell, judge(cell, stored, parameter, cos, self.backend)


def summarise(results: list[tuple[Cell, dict[str, Verdict]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Per dtype, loss and quantity the worst figures and where; and every cell outside the contract."""
    rows: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    for dtype, loss in dict.fromkeys((cell.dtype, cell.loss) for cell, _ in results):
        group = [(cell, verdicts) for cell, verdicts in results if (cell.dtype, cell.loss) == (dtype, loss)]
        for quantity in QUANTITIES:
            here = [(cell, verdicts[quantity]) for cell, verdicts in group]
            above = [(v.error / v.dense, cell) for cell, v in here if not v.rounding and v.dense > 0]
            error, at = max(((v.error, cell) for cell, v in here), key=lambda pair: pair[0])
            ratio, ratio_at = max(above, key=lambda pair: pair[0]) if above else (None, None)
            failed = [(cell, v) for cell, v in here if not v.used <= 1]
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
            outside += [{**cell.fields(), "quantity": quantity, **v._asdict()} for cell, v in failed]
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
    losses, dtypes = options.losses.split(","), options.dtypes.split(",")
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
