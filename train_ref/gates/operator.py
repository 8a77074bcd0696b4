"""Gate 2: one call at a time against float64, on inputs where fused losses go wrong; limits.py has the limits.

Implementations with reduction="none" get a random upstream gradient of either sign for every row; all get a negative
multiple of the mean. Gradients count times the length of their row: those of long rows are as much smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from train_ref.gates.call import Both, Drive, call
from train_ref.gates.cases import BIAS, Case, cases, within_range
from train_ref.gates.limits import expected, largest
from train_ref.gates.subject import Subject, offers
from train_ref.gates.verdict import Check, Verdict, failure, worst_by_name


def operator(subject: Subject, problems: Iterable[Case] | None = None) -> Verdict:
    """Per loss the mean loss, the losses of rows, the gradients and the derivative by the scale, each at its worst case.

    problems: default cases(), all of them. Refusing every call of a loss with one kind of rows leaves a verdict of "not run":
    what remains would say too much. A call that raises anything else has failed.
    """
    verdict = Verdict("operator", subject.label)
    found: list[Check] = []
    missing: dict[str, dict[str, None]] = {}  # reason -> losses, in order
    calls: Counter[str] = Counter()
    refused: Counter[tuple[str, str]] = Counter()  # loss, reason
    kinds: dict[tuple[str, str], bool] = {}  # whether any call was answered
    for case in cases() if problems is None else problems:
        case, loss = within_range(case, subject.dtype), subject.loss(case.loss)
        lacking = [name for name in options(case, subject.device) if not offers(loss, name)]
        if lacking:
            missing.setdefault(f"{case.option}: no argument {lacking[0]}", {})[case.loss] = None
            continue
        drives: list[Drive] = ["mean"]
        if not offers(loss, "reduction"):
            missing.setdefault("values and upstream gradients of single rows: no argument reduction", {})[case.loss] = None
        elif case.option != "sum":
            drives.append("rows")
        for drive in drives:
            calls[case.loss] += 1
            kind = (case.loss, case.kind)
            kinds.setdefault(kind, False)
            try:
                found += judge(subject, case, drive)
                kinds[kind] = True
            except NotImplementedError as reason:
                refused[case.loss, " ".join(str(reason).split())] += 1
    verdict.checks = worst_by_name(found)
    verdict.missing = [f"{loss}: every call with {kind} rows was refused" for (loss, kind), answered in kinds.items() if not answered]
    verdict.not_run = [
        *verdict.missing,
        *(f"{name}: {n} of {calls[name]} calls refused: {reason}" for (name, reason), n in refused.items()),
        *(f"{', '.join(names)}: {reason}" for reason, names in missing.items()),
    ]
    return verdict


def judge(subject: Subject, case: Case, drive: Drive) -> list[Check]:
    """The checks of one call. Raises NotImplementedError where the subject does; any other error of it is a failed check."""
    want = expected(case, drive, subject.dtype)
    where = f"{case}, upstream of {'every row' if drive == 'rows' else 'the mean'}"
    try:
        got = call(both(subject, case, drive), case, case.sides(subject.dtype), drive, want.loss_scale, subject.device)
    except NotImplementedError:
        raise
    except Exception as error:
        return [failure(f"{case.loss} loss", want.mean, error, where)]
    found = [Check(f"{case.loss} loss", abs(got.mean - want.exact.mean), want.mean, where)]
    if drive == "rows":
        found.append(Check(f"{case.loss} rows", largest(got.rows - want.exact.rows), want.rows, where))
    sides = zip(got.gradients, want.exact.gradients, want.gradient_sizes, want.gradients, strict=True)
    for gradient, exact, size, limit in sides:
        found.append(Check(f"{case.loss} gradient", (gradient - exact).norm().item() / size, limit, where))
    by_scale = abs(got.by_scale - want.exact.by_scale) / want.by_scale_size
    return [*found, Check(f"{case.loss} d/dscale", by_scale, want.by_scale, where)]


def options(case: Case, device: torch.device) -> dict[str, Any]:
    """The arguments that the case's option stands for, by name."""
    if ids := case.named_ids():
        return {name: one.to(device) for name, one in ids.items()}
    if (weights := case.weights()) is not None:
        return {"weight": weights.float().to(device)}
    others: dict[str, dict[str, Any]] = {"bias": {"logit_bias": BIAS}, "sum": {"reduction": "sum"}}
    return others.get(case.option, {})


def both(subject: Subject, case: Case, drive: Drive) -> Both:
    """The subject's loss of a case, with its temperature or logit scale made of the scale by autograd; of a sum, its mean."""
    loss, labels, given = subject.loss(case.loss), case.labels(), options(case, subject.device)
    of_rows = [] if labels is None else [labels.to(subject.device)]

    def values(sides: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        parameter = {"logit_scale": scale} if case.loss == "clip_loss" else {"temperature": 1 / scale}
        rows = loss(*sides, *of_rows, **parameter, **given, reduction="none") if drive == "rows" else torch.zeros(0)
        return rows, loss(*sides, *of_rows, **parameter, **given) / (case.rows if case.option == "sum" else 1)

    return values
