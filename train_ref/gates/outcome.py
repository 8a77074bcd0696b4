"""Gate 5: are the accuracies that training reaches equivalent? A statement about the outcome, not about correctness.

Two one-sided t tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657) on the differences, subject minus reference, of
runs paired by seed: equivalent within the margin at level 0.05 if the 90 % confidence interval of the mean difference lies
inside it. Pairing takes the spread over seeds out, which is ten times that of the differences.

Losses with plain faults pass: AdamW does not see a gradient that is wrong by a factor. It is the weakest of the gates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from train_ref.gates.replay import LIMITS
from train_ref.gates.student import t_quantile
from train_ref.gates.subject import Subject
from train_ref.gates.trainings import Trainings
from train_ref.gates.verdict import Check, Verdict

MARGIN = 0.01  # one point of accuracy
ALPHA = 0.05
POWER = 0.8
LEAST_SEEDS = 5
METRICS = {"one_shot": "1-shot", "linear": "linear"}


@dataclass(frozen=True)
class Equivalence:
    """Of paired differences, in fractions: detectable is the smallest true difference that a t test at level ALPHA would
    find with a probability of POWER."""

    differences: Sequence[float]
    mean: float
    sd: float
    low: float
    high: float
    detectable: float


def equivalence(differences: Sequence[float]) -> Equivalence:
    """The 90 % confidence interval of the mean. Raises ValueError for fewer than two differences."""
    n = len(differences)
    if n < 2:
        raise ValueError(f"equivalence: {n} difference; a spread needs at least two")
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    error, quantile = sd / math.sqrt(n), t_quantile(1 - ALPHA, n - 1)
    return Equivalence(
        differences, mean, sd, mean - quantile * error, mean + quantile * error, (quantile + t_quantile(POWER, n - 1)) * error
    )


def outcome(subject: Subject, trainings: Trainings, seeds: int = 5) -> Verdict:
    """Per accuracy, how far the confidence interval reaches from 0, against the margin."""
    verdict = Verdict("outcome", subject.label)
    if subject.dtype not in LIMITS:
        verdict.not_run.append("everything: its free run has no limits, so there is nothing to ask of the outcome")
        return verdict
    if seeds < LEAST_SEEDS:
        verdict.not_run.append(f"everything: {seeds} seeds; the interval needs at least {LEAST_SEEDS}")
        return verdict
    try:
        failed = trainings.failure(subject, seeds)
    except NotImplementedError as reason:
        return verdict.refused(reason)
    for metric, title in METRICS.items():
        pairs = [(trainings.of(subject, seed), trainings.of(trainings.reference, seed)) for seed in range(seeds)]
        differences = [getattr(own.accuracies, metric) - getattr(reference.accuracies, metric) for own, reference in pairs]
        if any(math.isnan(difference) for difference in differences):
            verdict.checks.append(Check(title, math.nan, MARGIN, failed or "accuracies are nan"))
            continue
        found = equivalence(differences)
        where = f"90 % interval {100 * found.low:+.2f} to {100 * found.high:+.2f} points"
        verdict.checks.append(Check(title, max(abs(found.low), abs(found.high)), MARGIN, where))
        levels = [getattr(reference.accuracies, metric) for _, reference in pairs]
        verdict.notes[title] = asdict(found) | {"reference": levels}
    return verdict
