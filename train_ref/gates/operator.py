"""Gate 2: one call at a time against float64, on inputs where fused losses go wrong; limits.py has the limits.

Implementations with reduction="none" get a random upstream gradient of either sign for every row; all get a negative
multiple of the mean. Gradients count times the length of their row: those of long rows are as much smaller.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from train_ref.gates.call import Both, Drive, call
from train_ref.gates.cases import Case, cases, within_range
from train_ref.gates.limits import expected, largest
from train_ref.gates.subject import Subject, offers
from train_ref.gates.verdict import Check, Verdict, worst_by_name


def operator(subject: Subject, problems: Iterable[Case] | None = None) -> Verdict:
    """Per loss the mean loss, the losses of rows, the gradients and the derivative by the scale, each at its worst case.

    problems: default cases(), all of them.
    """
    verdict = Verdict("operator", subject.label)
    found: list[Check] = []
    missing: dict[str, dict[str, None]] = {}  # reason -> losses, in order
    for case in cases() if problems is None else problems:
        case = within_range(case, subject.dtype)
        drives: list[Drive] = ["mean"]
        if offers(subject.loss(case.loss), "reduction"):
            drives.append("rows")
        else:
            missing.setdefault("values and upstream gradients of single rows: no argument reduction", {})[case.loss] = None
        for drive in drives:
            try:
                found += judge(subject, case, drive)
            except NotImplementedError as reason:
                missing.setdefault(" ".join(str(reason).split()), {})[case.loss] = None
    verdict.checks = worst_by_name(found)
    verdict.not_run = [f"{', '.join(names)}: {reason}" for reason, names in missing.items()]
    return verdict


def judge(subject: Subject, case: Case, drive: Drive) -> list[Check]:
    """The checks of one call."""
    want = expected(case, drive, subject.dtype)
    got = call(both(subject, case, drive), case, case.sides(subject.dtype), drive, want.loss_scale, subject.device)
    where = f"{case}, upstream of {'every row' if drive == 'rows' else 'the mean'}"
    found = [Check(f"{case.loss} loss", abs(got.mean - want.exact.mean), want.mean, where)]
    if drive == "rows":
        found.append(Check(f"{case.loss} rows", largest(got.rows - want.exact.rows), want.rows, where))
    sides = zip(got.gradients, want.exact.gradients, want.gradient_sizes, want.gradients, strict=True)
    for gradient, exact, size, limit in sides:
        found.append(Check(f"{case.loss} gradient", (gradient - exact).norm().item() / size, limit, where))
    by_scale = abs(got.by_scale - want.exact.by_scale) / want.by_scale_size
    return [*found, Check(f"{case.loss} d/dscale", by_scale, want.by_scale, where)]


def both(subject: Subject, case: Case, drive: Drive) -> Both:
    """The subject's loss of a case, with its temperature or logit scale made of the scale by autograd."""
    loss, labels = subject.loss(case.loss), case.labels()
    given = [] if labels is None else [labels.to(subject.device)]

    def values(sides: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        parameter = {"logit_scale": scale} if case.loss == "clip_loss" else {"temperature": 1 / scale}
        rows = loss(*sides, *given, **parameter, reduction="none") if drive == "rows" else torch.zeros(0)
        return rows, loss(*sides, *given, **parameter)

    return values
