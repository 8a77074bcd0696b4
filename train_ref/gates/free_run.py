"""Gate 4: trainings of their own, beside the drift of the reference from itself.

After the first step two trainings no longer see equal inputs, and training amplifies every rounding: the reference itself,
with the pairs of each batch in another order, is 1e-3 of the loss away after 100 steps. So no fixed limit means anything
there: the subject may be as far from the reference as a multiple of such noise controls, in two other orders, on the same
seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import zip_longest

import torch

from train_ref.gates.replay import LIMITS
from train_ref.gates.subject import Subject
from train_ref.gates.trainings import Run, Trainings
from train_ref.gates.verdict import Check, Verdict

TIMES_CONTROL = {torch.float32: 5.0, torch.bfloat16: 20.0}
STEPS = (10, 50)  # and the last
# To judge one control beside the other alone: by step 10 one seed has led 8e-8 away and another 9e-5.
CONTROL_SEEDS = 5


def free_run(subject: Subject, trainings: Trainings, seeds: int = 5) -> Verdict:
    """Relative deviation of the loss from the reference's, the largest so far over all seeds, at three steps.

    A noise control is judged beside the other one. Raises RuntimeError if batches of one seed came in another order, which
    no subject decides.
    """
    verdict = Verdict("free run", subject.label)
    if subject.dtype not in LIMITS:
        verdict.not_run.append("everything: no limits are set for this dtype")
        return verdict
    controls = [control for control in trainings.controls if control.label != subject.label]
    if len(controls) < len(trainings.controls) and seeds < CONTROL_SEEDS:
        verdict.not_run.append(f"everything: {seeds} seeds; beside one other control it needs at least {CONTROL_SEEDS}")
        return verdict
    try:
        failed = trainings.failure(subject, seeds)
    except NotImplementedError as reason:
        return verdict.refused(reason)
    for seed in range(seeds):
        same_order([trainings.of(who, seed) for who in (trainings.reference, subject, *controls)])

    def deviations_of(who: Subject) -> list[list[float]]:
        return [deviations(trainings.of(who, seed), trainings.of(trainings.reference, seed)) for seed in range(seeds)]

    found = largest_so_far(deviations_of(subject))
    control = largest_so_far([series for who in controls for series in deviations_of(who)])
    verdict.checks.append(Check("step 1", found[0], LIMITS[subject.dtype]["loss"], failed or f"control {control[0]:.1e}"))
    factor = TIMES_CONTROL[subject.dtype]
    for step in [*(step for step in STEPS if step < len(found)), len(found)]:
        noise_here = control[step - 1]
        where = failed or f"{factor:g} times the control's {noise_here:.1e}"
        verdict.checks.append(Check(f"steps 1-{step}", found[step - 1], factor * noise_here, where))
    verdict.notes = {
        "deviation": found,
        "control": control,
        "parameters, distance over path": distance(trainings, subject, seeds),
        "control, distance over path": max(distance(trainings, who, seeds) for who in controls),
        "order_sha256": [trainings.of(trainings.reference, seed).orders[-1] for seed in range(seeds)],
    }
    return verdict


def same_order(runs: Sequence[Run]) -> None:
    """Raises RuntimeError unless all saw the same batches for as long as they went on."""
    for hashes in zip_longest(*(run.orders for run in runs)):
        if len(set(hashes) - {None}) > 1:
            raise RuntimeError("free run: trainings of one seed saw their batches in different orders")


def deviations(run: Run, reference: Run) -> list[float]:
    """|loss - reference's| / |reference's| of every step."""
    return [abs(one - other) / abs(other) for one, other in zip(run.losses, reference.losses, strict=True)]


def largest_so_far(series: Sequence[Sequence[float]]) -> list[float]:
    """Running maximum of the maximum over several series of the same length; nan from the first nan on."""
    found = torch.tensor([list(one) for one in series], dtype=torch.float64).amax(0)
    return [float(value) for value in found.cummax(0).values]


def distance(trainings: Trainings, subject: Subject, seeds: int) -> float:
    """How far apart the parameters end, as a share of how far the reference's went: mean over seeds; nan if stopped early."""
    return statistics.fmean(
        (trainings.of(subject, seed).parameters - trainings.of(trainings.reference, seed).parameters).norm().item() / trainings.path(seed)
        for seed in range(seeds)
    )
