"""The self-test of an installation: every loss, forward and backward, in float32 against float64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce import losses
from fastnce.backends.trial import relative

# float32 rounding reaches 7e-7 here. Matrix products in TF32 show as 4e-5 or more, one lost row of a gradient as 1e-3 or more.
LIMIT = 1e-5
ROWS, COLUMNS, QUEUE = 600, 40, 700  # more than one tile of rows, and no multiple of any tile


class Result(NamedTuple):
    """One loss on one backend. `error` is the largest relative error of its values and gradients, None where there is none to compute."""

    loss: str
    error: float | None
    seconds: float
    ok: bool
    problem: str = ""


class Inputs(NamedTuple):
    """Two views (ROWS, COLUMNS) of the same rows, a queue, integer labels, and the temperature. All but the labels get a gradient."""

    a: Tensor
    b: Tensor
    queue: Tensor
    temperature: Tensor
    labels: Tensor

    @staticmethod
    def make(device: str, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        a, noise = torch.randn(2, ROWS, COLUMNS, generator=generator)
        leaves = (a, a + noise, torch.randn(QUEUE, COLUMNS, generator=generator), torch.tensor(0.2))
        a, b, queue, temperature = (leaf.to(device, dtype).requires_grad_() for leaf in leaves)
        return Inputs(a, b, queue, temperature, torch.randint(50, (ROWS,), generator=generator).to(device))


CASES: dict[str, Callable[[Inputs, str], object]] = {
    "info_nce": lambda x, backend: losses.info_nce(x.a, x.b, None, x.temperature, "none", backend=backend),
    "nt_xent": lambda x, backend: losses.nt_xent(x.a, x.b, x.temperature, "none", backend=backend),
    "dcl_loss": lambda x, backend: losses.dcl_loss(x.a, x.b, x.temperature, "none", backend=backend),
    "sup_con": lambda x, backend: losses.sup_con(x.a, x.labels, None, x.temperature, reduction="none", backend=backend),
    "clip_loss": lambda x, backend: losses.clip_loss(x.a, x.b, 1 / x.temperature, None, "none", backend=backend),
    "moco_loss": lambda x, backend: losses.moco_loss(x.a, x.b, x.queue, x.temperature, "none", backend=backend),
}


def run(backend: str, device: str) -> list[Result]:
    """Every loss on one backend and device. An exception is a result too: this is for installations that may be broken."""
    return [_run(loss, backend, device) for loss in CASES]


def _run(loss: str, backend: str, device: str) -> Result:
    start = time.perf_counter()
    try:
        exact = _exact(loss)
        start = time.perf_counter()
        found = _outputs(loss, backend, device, torch.float32)
        seconds = time.perf_counter() - start
        # Of a tensor the maximum is nan where an entry is; of a list it may not be.
        errors = [relative(got, true) for got, true in zip(found, exact, strict=True)]
        error = float(torch.stack(errors).max())
    except Exception as failure:
        return Result(loss, None, time.perf_counter() - start, False, f"{type(failure).__name__}: {failure}")
    if not math.isfinite(error):
        return Result(loss, None, seconds, False, "a value or a gradient is not finite")
    if error > LIMIT:
        return Result(loss, error, seconds, False, f"relative error {error:.1e}, limit {LIMIT:g}")
    return Result(loss, error, seconds, True)


@cache
def _exact(loss: str) -> list[Tensor]:
    return _outputs(loss, "reference", "cpu", torch.float64)


def _outputs(loss: str, backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The row values, then the gradient of every input that the loss reads, on the CPU."""
    inputs = Inputs.make(device, dtype)
    values = CASES[loss](inputs, backend)
    assert isinstance(values, Tensor)
    # A different upstream gradient for each row: a backward that mixes rows up cannot pass.
    upstream = torch.linspace(0.5, 1.5, len(values), dtype=dtype, device=device)
    leaves = inputs[:4]
    gradients = torch.autograd.grad(values, leaves, upstream, allow_unused=True)
    return [values.detach().cpu(), *(g.cpu() for g in gradients if g is not None)]
