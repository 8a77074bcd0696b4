"""The findings, as one page of Markdown and as JSON. A check that was not measured stays visible: it is never a pass."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from train_ref.gates.verdict import Check, Verdict, worst, worst_by_name

GATES = ("formula", "operator", "replay", "free run", "outcome")
REPLAYED = {"loss": "loss", "dz": "‖dz‖", "dtheta": "‖dθ‖", "dscale": "dscale"}


@dataclass
class Report:
    """All verdicts of one run, under which conditions, and what was left out of it altogether.

    Yardsticks are what subjects are compared with: if one fails, so does the validation, but one that passes proves nothing.
    """

    conditions: dict[str, Any]
    verdicts: list[Verdict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """fail if a gate failed, not run if nothing was measured of any subject, pass otherwise."""
        if any(verdict.status == "fail" for verdict in self.verdicts):
            return "fail"
        return "pass" if any(verdict.status == "pass" for verdict in self.verdicts if not verdict.yardstick) else "not run"

    def of(self, gate: str) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.gate == gate]

    @property
    def not_run(self) -> list[str]:
        by_verdict = [f"{verdict.gate}, {verdict.subject}: {what}" for verdict in self.verdicts for what in verdict.not_run]
        return [*self.left_out, *by_verdict]

    def fields(self) -> dict[str, Any]:
        """For JSON, where nan and infinity have no place and become null."""
        content = {
            "schema": 1,
            "status": self.status,
            "conditions": self.conditions,
            "verdicts": [verdict.fields() for verdict in self.verdicts],
            "not_run": self.not_run,
        }
        finite: dict[str, Any] = only_finite(content)
        return finite


def only_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: only_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [only_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    import fastnce

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "fastnce": fastnce.__version__}


def progress(verdict: Verdict) -> str:
    """One line of a running command."""
    if verdict.status == "not run":
        found = verdict.not_run[0]
    else:
        closest = worst(verdict.checks)
        found = f"{len(verdict.checks):>2} checks, closest: {closest.name} at {share(closest)} of its limit"
    return f"{verdict.gate:<9} {verdict.subject:<23} {verdict.status:<8} {found}  ({verdict.cpu_seconds:.1f} CPU s)"


def share(check: Check) -> str:
    return f"{check.used:.2g}"


def markdown(report: Report) -> str:
    """The page: verdicts, then a table per gate, then what failed, what did not run, and the conditions."""
    lines = [f"# Validation: {report.status}", "", *verdict_table(report), "", *legend(report), ""]
    lines += [
        *failures(report),
        *closest_table(report),
        *replay_table(report),
        *free_run_table(report),
        *outcome_table(report),
        "## Not run",
        "",
        "What stands here was not measured. A pass says nothing about it.",
        "",
        *(f"- {line}" for line in report.not_run or ["nothing was left out"]),
        "",
        "## Conditions",
        "",
        *(f"- {name}: {value}" for name, value in report.conditions.items()),
    ]
    return "\n".join(lines) + "\n"


# Subjects by how their names begin, and what they are.
SUBJECTS = {
    "reference losses": "the dense losses that every gate compares with, themselves compared with other projects' results.",
    "noise control": "the reference with its rows in another order: the same mathematics, rounded differently. It has no fault and must "
    "pass; the free run measures by its drift from the reference.",
    "auto": "what a caller gets who names no backend. On the CPU a small problem is dense there, by the operations of the reference: an "
    "error of exactly 0 says that no kernel ran.",
}


def legend(report: Report) -> list[str]:
    """The meaning of the table of verdicts, and of the names of its subjects."""
    present = {name_of(verdict.subject) for verdict in report.verdicts}
    return [
        "- pass: every check that ran is inside its limit. *n* left out: that many parts of the gate did not run.",
        "- not run: nothing was measured, or too little to say anything; the section of that name says why. It is never a pass.",
        "- empty: this gate is not for this subject, or was not asked for.",
        *(f"- {name}: {what}" for name, what in SUBJECTS.items() if any(one.startswith(name) for one in present)),
        "- other names: a backend of fastnce, and the dtype of the features it was given.",
        "- share, in the tables below: the measured error as a part of its limit.",
    ]


def name_of(subject: str) -> str:
    """Without the dtype."""
    name, _, last = subject.rpartition(" ")
    return name if last in ("float32", "bfloat16", "float16") else subject


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def verdict_table(report: Report) -> list[str]:
    """Subjects down, gates across."""
    subjects = list(dict.fromkeys(verdict.subject for verdict in report.verdicts))
    found = {(verdict.subject, verdict.gate): verdict for verdict in report.verdicts}

    def cell(subject: str, gate: str) -> str:
        verdict = found.get((subject, gate))
        if verdict is None:
            return ""
        left_out = f", {len(verdict.not_run)} left out" if verdict.not_run and verdict.checks else ""
        return (f"**{verdict.status}**" if verdict.status == "fail" else verdict.status) + left_out

    return table(["", *GATES], [[subject, *(cell(subject, gate) for gate in GATES)] for subject in subjects])


def failures(report: Report) -> list[str]:
    rows = [
        [verdict.gate, verdict.subject, check.name, f"{check.measured:.2e}", f"{check.limit:.2e}", check.where]
        for verdict in report.verdicts
        for check in verdict.failed
    ]
    return ["## Failed checks", "", *table(["gate", "subject", "check", "measured", "limit", "where"], rows), ""] if rows else []


def closest_table(report: Report) -> list[str]:
    """Of the first two gates the check that is nearest to its limit."""
    verdicts = [verdict for gate in GATES[:2] for verdict in report.of(gate) if verdict.checks]
    rows = []
    for verdict in verdicts:
        check = worst(verdict.checks)
        found = [f"{check.measured:.1e}", f"{check.limit:.1e}", share(check), check.where]
        rows.append([verdict.gate, verdict.subject, str(len(verdict.checks)), check.name, *found])
    head = ["gate", "subject", "checks", "closest to its limit", "measured", "limit", "share", "where"]
    return ["## Formula and operator", "", *table(head, rows), ""] if rows else []


def replay_table(report: Report) -> list[str]:
    """Per subject and quantity the worst scene."""
    rows = []
    limits: dict[str, list[str]] = {}
    for verdict in report.of("replay"):
        if not verdict.notes:
            continue
        by_quantity = [Check(check.name.split()[-1], check.measured, check.limit) for check in verdict.checks]
        found = {check.name: check for check in worst_by_name(by_quantity)}
        rows.append([verdict.subject, *(f"{found[name].measured:.1e}" if name in found else "" for name in REPLAYED)])
        limits[verdict.subject.split()[-1]] = [f"{found[name].limit:.0e}" if name in found else "" for name in REPLAYED]
    rows += [[f"*limit, {dtype}*", *(f"*{limit}*" if limit else "" for limit in values)] for dtype, values in limits.items()]
    explained = "Largest relative errors over all checkpoints against the dense float32 reference at the same parameters: "
    scenes = next((list(verdict.notes) for verdict in report.of("replay") if verdict.notes), [])
    return ["## Replay", "", explained + ", ".join(scenes) + ".", "", *table(["", *REPLAYED.values()], rows), ""] if rows else []


def free_run_table(report: Report) -> list[str]:
    """Deviations beside the control's."""
    verdicts = [verdict for verdict in report.of("free run") if verdict.notes]
    if not verdicts:
        return []
    names = [check.name for check in verdicts[0].checks if check.name.startswith("step")]
    rows = []
    for verdict in verdicts:
        found = {check.name: check for check in verdict.checks}
        cells = [f"{found[name].measured:.1e} (≤ {found[name].limit:.1e})" for name in names]
        rows.append([verdict.subject, *cells, f"{distance(verdict.notes['parameters, distance over path'])}"])
    # A control is judged beside the other one alone.
    notes = next((verdict for verdict in verdicts if not verdict.yardstick), verdicts[0]).notes
    at = [int(name.replace("-", " ").split()[-1]) for name in names]
    rows.append(
        ["*noise controls*", *(f"*{notes['control'][step - 1]:.1e}*" for step in at), f"*{distance(notes['control, distance over path'])}*"]
    )
    explained = "Largest relative deviation of the loss from the reference's over all seeds; parameters: distance at the end over path."
    return ["## Free run", "", explained, "", *table(["", *names, "parameters"], rows), ""]


def distance(share: float) -> str:
    return "not run" if math.isnan(share) else f"{share:.2f}"


def outcome_table(report: Report) -> list[str]:
    """Paired differences in points."""
    rows = []
    for verdict in report.of("outcome"):
        for title, found in verdict.notes.items():
            points = [100 * found[name] for name in ("mean", "low", "high", "sd", "detectable")]
            mean, low, high, sd, detectable = points
            n = str(len(found["differences"]))
            rows.append([verdict.subject, title, n, f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{sd:.2f}", f"{detectable:.2f}"])
    if not rows:
        return []
    head = ["", "accuracy", "seeds", "mean difference", "90 % interval", "sd", "detectable"]
    explained = "Training outcome, not correctness: accuracy of subject minus reference in points, paired by seed; equivalent within ±1."
    return ["## Outcome", "", explained, "", *table(head, rows), ""]
