"""The verdict of a gate: checks, each with the measured number, its limit and where the number was worst."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """measured <= limit is a pass; nan never is. `where` names the worst of the cases behind the number."""

    name: str
    measured: float
    limit: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit

    @property
    def used(self) -> float:
        """Share of the limit. Where the limit is 0, whether the number is too; inf for nan, so that it sorts as worst."""
        if self.measured != self.measured:
            return float("inf")
        if self.limit > 0:
            return self.measured / self.limit
        return 0.0 if self.measured <= self.limit else float("inf")


def failure(name: str, limit: float, error: Exception, where: str = "") -> Check:
    """A check that failed because its subject raised an error."""
    return Check(name, math.nan, limit, f"{where}: {raised(error)}".removeprefix(": "))


def raised(error: Exception) -> str:
    """The error in one line."""
    return f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def worst(checks: Iterable[Check]) -> Check:
    """The one that uses most of its limit."""
    return max(checks, key=lambda check: check.used)


def worst_by_name(checks: Iterable[Check]) -> list[Check]:
    """One check per name, the worst of those that share it, in the order in which the names first come."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.name, []).append(check)
    return [worst(group) for group in groups.values()]


@dataclass
class Verdict:
    """A gate's answer about one subject. A check that could not be measured is in not_run and is no part of a pass.

    missing, a part of not_run, has the checks that a pass may not lack; subjects are compared with yardsticks.
    """

    gate: str
    subject: str
    checks: list[Check] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # numbers to read beside the checks, without a limit
    cpu_seconds: float = 0.0
    yardstick: bool = False

    @property
    def status(self) -> str:
        """pass, fail, or "not run" where nothing was measured, or too little."""
        if self.failed:
            return "fail"
        return "pass" if self.checks and not self.missing else "not run"

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def refused(self, reason: NotImplementedError) -> Verdict:
        """Of a subject that does not take the question: nothing was measured."""
        self.not_run.append(f"everything: {' '.join(str(reason).split())}")
        return self

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {
            "gate": self.gate,
            "subject": self.subject,
            "status": self.status,
            "checks": checks,
            "not_run": self.not_run,
            "missing": self.missing,
            "notes": self.notes,
            "cpu_seconds": self.cpu_seconds,
            "yardstick": self.yardstick,
        }
