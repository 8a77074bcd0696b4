"""The arguments of the operators in autograd.py: their schemas, and the same arguments by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastnce.pairs import Pairs
from fastnce.problem import DIFFERENTIABLE, WITHOUT_METRICS, Problem, Side, SideGrad

PROBLEM = (
    "Tensor q, Tensor? k, Tensor scale, Tensor? bias, Tensor? q_label, Tensor? k_label, Tensor? q_exclude, Tensor? k_exclude, "
    "Tensor? mask, Tensor? threshold, Tensor? q_wide, Tensor? k_wide, SymInt? offset, bool exclude_self, bool two_sided, bool normalize, "
    "bool metrics, bool frozen, bool rounded, str backend"
)
TENSORS = 12  # of the arguments above, the first are tensors
WIDE = (10, 11)  # q_wide and k_wide, which take the gradients of q and k
# One argument per vector, and no lists. Under the batched gradients of torch.autograd (is_grads_batched) torch repeats an operator for
# every gradient, but only one without lists of tensors among its arguments.
GRADS, STATS = (
    ", ".join(f"Tensor? {side}_{field}" for side in ("rows", "columns") for field in fields)
    for fields in (SideGrad._fields, Side._fields[:WITHOUT_METRICS])
)


class Arguments(NamedTuple):
    """The problem as the flat arguments of the operators."""

    q: Tensor
    k: Tensor | None
    scale: Tensor
    bias: Tensor | None
    q_label: Tensor | None
    k_label: Tensor | None
    q_exclude: Tensor | None
    k_exclude: Tensor | None
    mask: Tensor | None
    threshold: Tensor | None
    q_wide: Tensor | None
    k_wide: Tensor | None
    offset: int | None
    exclude_self: bool
    two_sided: bool
    normalize: bool
    metrics: bool
    frozen: bool
    rounded: bool
    backend: str

    @staticmethod
    def of(problem: Problem, backend: str) -> Arguments:
        p, rules = problem, problem.pairs
        ids = (rules.q_label, rules.k_label, rules.q_exclude, rules.k_exclude, rules.mask)
        flags = (rules.exclude_self, p.two_sided, p.normalize, p.metrics, p.frozen, p.rounded)
        return Arguments(p.q, p.k, p.scale, p.bias, *ids, p.threshold, p.q_wide, p.k_wide, rules.offset, *flags, backend)

    def problem(self) -> Problem:
        rules = Pairs(self.exclude_self, self.offset, self.q_label, self.k_label, self.q_exclude, self.k_exclude, self.mask)
        flags = (self.two_sided, self.normalize, self.metrics, self.threshold, self.frozen, self.q_wide, self.k_wide, self.rounded)
        return Problem(self.q, self.k, self.scale, self.bias, rules, *flags)

    @property
    def differentiable(self) -> tuple[Tensor, Tensor | None]:
        """The tensors that take the gradients of the features: their stand-ins where there are any."""
        return self.q if self.q_wide is None else self.q_wide, self.k if self.k_wide is None else self.k_wide


class Request(NamedTuple):
    """The arguments of backward. Vectors are those of the rows, then those of the columns, which are None where not two_sided."""

    grads: Sequence[Tensor | None]
    stats: Sequence[Tensor]
    wanted: Sequence[bool]
    of: Arguments

    @staticmethod
    def read(flat: Sequence[Any]) -> Request:
        grads, stats = 2 * DIFFERENTIABLE, 2 * WITHOUT_METRICS
        return Request(flat[:grads], flat[grads : grads + stats], flat[grads + stats], Arguments(*flat[grads + stats + 1 :]))

    def flat(self) -> list[Any]:
        def two(vectors: Sequence[Tensor | None], per_side: int) -> list[Tensor | None]:
            return [*vectors, *[None] * (2 * per_side - len(vectors))]

        return [*two(self.grads, DIFFERENTIABLE), *two(self.stats, WITHOUT_METRICS), self.wanted, *self.of]
