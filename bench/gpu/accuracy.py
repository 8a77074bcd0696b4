"""Part `accuracy`: the contract of docs/numerics.md at N = 32,768, where tensor cores accumulate and no CPU can tell how.

Four losses, three dtypes, two widths, temperatures from 0.01 (a running maximum) to 0.5, unrelated and aligned positives: mean loss, each
row's loss, the gradients of the features and dL/dscale of every kind of kernels against float64 in blocks (exact.py), next to the error
of dense torch in the same dtype on the same inputs. Limits and verdicts are those of accuracy.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import accuracy, dense
from bench.accuracy import Errors
from bench.exact import Answer, Sizes
from bench.gpu import exact, part
from bench.gpu.kernels import Kernels, chosen

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SHOWN = {"loss": "mean", "row": "row", "gradient": "gradient", "scale": "scale"}  # "loss" is which
COLUMNS = ("kernels", "loss", "dtype", "d", "noise", "temperature", "exact", *SHOWN.values(), "inside", "status")


class Cell(NamedTuple):
    loss: str
    dtype: torch.dtype
    d: int
    noise: float  # of the positives; 3.0 is nearly unrelated, 0.4 is a cosine of 0.93
    temperature: float


def cells(dry: bool) -> Iterator[Cell]:
    """Every loss and dtype comes early: the budget may end before the grid does."""
    for d in (24,) if dry else (128, 512):
        for noise in (0.4, 3.0):
            for temperature in (0.05,) if dry else (0.05, 0.01, 0.1, 0.5):
                for dtype in DTYPES:
                    for loss in ("nt_xent", "clip", "sup_con", "moco"):
                        yield Cell(loss, dtype, d, noise, temperature)


def dense_rows(loss: str, leaves: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    """Row losses as users write them; half precision as autocast runs it: norm and cross entropy in float32, the product in half."""
    wide = torch.float32
    unit = [F.normalize(x.to(wide), dim=1).to(x.dtype) for x in leaves if x.is_floating_point()]
    index = dense.indices(leaves[0])
    if loss == "moco":
        own = (unit[0].to(wide) * unit[1].to(wide)).sum(1, keepdim=True).to(unit[0].dtype)
        logits = torch.cat([own, unit[0] @ unit[2].T], dim=1) * scale.to(unit[0].dtype)
        return F.cross_entropy(logits.to(wide), torch.zeros_like(index), reduction="none")
    logits = ((unit[0] @ unit[-1].T) * scale.to(unit[0].dtype)).to(wide)
    if loss == "clip":
        return (F.cross_entropy(logits, index, reduction="none") + F.cross_entropy(logits.T, index, reduction="none")) / 2
    # In place where autograd allows it: at N = 32,768 each copy is 4 GiB.
    itself = dense.itself(leaves[0])
    logits = logits.masked_fill_(itself, -torch.inf)
    if loss == "nt_xent":
        return F.cross_entropy(logits, dense.partners(leaves[0]), reduction="none")
    positive = (leaves[1][:, None] == leaves[1]) & ~itself
    return logits.logsumexp(1) - logits.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)


def fused_rows(loss: str, leaves: tuple[Tensor, ...], scale: Tensor, backend: str) -> Tensor:
    import fastnce

    functions: dict[str, Any] = {
        "nt_xent": fastnce.nt_xent,
        "clip": fastnce.clip_loss,
        "sup_con": fastnce.sup_con,
        "moco": fastnce.moco_loss,
    }
    name = "logit_scale" if loss == "clip" else "scale"
    rows: Tensor = functions[loss](*leaves, **{name: scale}, reduction="none", backend=backend)
    return rows


def answer(rows_of: Any, leaves: tuple[Tensor, ...], scale: Tensor, scaling: float) -> Answer:
    """Gradients are those of scaling * mean loss, divided by it again in float64."""
    learning = [leaf.detach().requires_grad_() if leaf.requires_grad else leaf for leaf in leaves]
    by = scale.clone().requires_grad_()
    rows = rows_of(tuple(learning), by)
    asked = [leaf for leaf in learning if leaf.requires_grad]
    *gradients, by_scale = torch.autograd.grad(rows.mean() * scaling, [*asked, by])
    found = [gradient.double().cpu().numpy() / scaling for gradient in gradients]
    return Answer(rows.detach().double().mean().item(), rows.detach().double().cpu().numpy(), found, by_scale.item() / scaling)


def judge(cell: Cell, n: int, device: str, every: list[Kernels]) -> Iterator[dict[str, Any]]:
    """By kernels the largest part of its limit that each quantity uses, and what that is."""
    leaves = dense.leaves(cell.loss, n, cell.d, cell.dtype, device=device, noise=cell.noise)
    leaves = leaves[:2] if cell.loss == "clip" else leaves
    stored = tuple(leaf.detach() for leaf in leaves)
    scale = torch.tensor(1 / cell.temperature, device=device)
    true, sizes = exact.exact(cell.loss, stored, scale.double().item())
    rounded, scaling = accuracy.stored_gradients(true, cell.dtype)

    def error_of(rows_of: Any, given: tuple[Tensor, ...], by: float) -> Errors:
        found = accuracy.errors(answer(rows_of, given, scale, by), true, sizes)
        if device == "cuda":
            torch.cuda.empty_cache()
        return found

    def textbook(given: tuple[Tensor, ...], by: Tensor) -> Tensor:
        return dense_rows(cell.loss, given, by)

    same = single = error_of(textbook, leaves, scaling)
    if cell.dtype != torch.float32:
        wide = [leaf.detach().float() if leaf.is_floating_point() else leaf for leaf in leaves]
        wide = [x.requires_grad_() if leaf.requires_grad else x for x, leaf in zip(wide, leaves, strict=True)]
        single = error_of(textbook, tuple(wide), 1.0)
    for kernels in every:

        def ours(given: tuple[Tensor, ...], by: Tensor, backend: str = kernels.backend) -> Tensor:
            return fused_rows(cell.loss, given, by, backend)

        with chosen(kernels):
            found = error_of(ours, leaves, scaling)
        yield {"kernels": kernels.name, **verdict(cell, true, sizes, rounded, found, same, single)}


def verdict(cell: Cell, true: Answer, sizes: Sizes, rounded: Answer, found: Errors, same: Errors, single: Errors) -> dict[str, Any]:
    storing = accuracy.errors(rounded, true, sizes)["gradient"]
    unavoidable = accuracy.rounding(cell.dtype, true, 1 / cell.temperature, storing)
    allowed = accuracy.limits(cell.dtype, true, unavoidable, same, single)
    row: dict[str, Any] = {**cell._asdict(), "dtype": str(cell.dtype)[6:], "exact": true.loss}
    for quantity, name in SHOWN.items():
        error = found[quantity]
        row[name] = float(np.divide(error, allowed[quantity], out=np.zeros_like(error), where=error > 0).max())
        row[f"{name}_error"], row[f"{name}_dense"] = float(error.max()), float(same[quantity].max())
    row["inside"] = all(row[name] <= 1 for name in SHOWN.values())
    return row


def main() -> int:
    report = part.Report("accuracy")
    n = 256 if report.dry else 32_768
    every = report.kernels()
    for cell in cells(report.dry) if every else ():
        if report.left() < 10:
            report.add({**cell._asdict(), "dtype": str(cell.dtype)[6:], "status": "no time left"})
            continue
        with report.step(str(cell)):
            for row in judge(cell, n, report.device, every):
                report.add(row)
        if report.device == "cuda":
            torch.cuda.empty_cache()
    report.more = {"n": n, "meaning": "each quantity: the largest part of its limit that is used; above 1 is outside the contract"}
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
