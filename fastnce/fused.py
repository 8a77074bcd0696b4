"""A loss as one number, or as one of each row, by one operator, for backends that have the functions for it.

    loss(ask: LossProblem) -> (loss, kept)                              kept: a tensor, in whatever form the backend reads it
    gradients(ask, kept, upstream, wanted: LossWanted) -> list          the gradients in the order of LossWanted
    fake_loss(ask)                                                      results of the same shapes as `loss`, for tensors without values

All arithmetic of a row is then theirs, so that a step is a handful of launches, where statistics, formulas and reduction are dozens.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fastnce import arguments, autograd, backends
from fastnce.pairs import Pairs
from fastnce.precision import no_autocast
from fastnce.problem import LossProblem, LossWanted, Problem

_PROBLEM = (
    "Tensor q, Tensor? second, Tensor? k, Tensor? partners, Tensor? scale, Tensor? bias, Tensor? weight, Tensor? q_label, Tensor? k_label, "
    "Tensor? q_exclude, Tensor? k_exclude, float value, bool inverse, SymInt? offset, bool exclude_self, bool two_sided, bool normalize, "
    "bool frozen, bool by_place, bool by_row, bool mean, str formula, str backend"
)
_TENSORS = 11  # of the arguments above, the first are tensors; the first seven take gradients
_WANTED = len(LossWanted._fields)


class _Arguments(NamedTuple):
    """A LossProblem as the flat arguments of the operators."""

    q: Tensor
    second: Tensor | None
    k: Tensor | None
    partners: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    weight: Tensor | None
    q_label: Tensor | None
    k_label: Tensor | None
    q_exclude: Tensor | None
    k_exclude: Tensor | None
    value: float
    inverse: bool
    offset: int | None
    exclude_self: bool
    two_sided: bool
    normalize: bool
    frozen: bool
    by_place: bool
    by_row: bool
    mean: bool
    formula: str
    backend: str

    @staticmethod
    def of(ask: LossProblem, backend: str) -> _Arguments:
        p, rules = ask.problem, ask.problem.pairs
        ids = (rules.q_label, rules.k_label, rules.q_exclude, rules.k_exclude)
        flags = (rules.exclude_self, p.two_sided, p.normalize, p.frozen, ask.by_place, ask.by_row, ask.mean)
        tensors = (p.q, ask.second, p.k, ask.partners, ask.scale, p.bias, ask.weight, *ids)
        return _Arguments(*tensors, ask.value, ask.inverse, rules.offset, *flags, ask.formula, backend)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that take gradients, in the order of LossWanted."""
        return self.q, self.second, self.k, self.partners, self.scale, self.bias, self.weight

    def problem(self) -> LossProblem:
        rules = Pairs(self.exclude_self, self.offset, self.q_label, self.k_label, self.q_exclude, self.k_exclude)
        problem = Problem(self.q, self.k, self.q, self.bias, rules, self.two_sided, self.normalize, frozen=self.frozen)
        more = (self.second, self.partners, self.scale, self.value, self.inverse, self.weight, self.by_place, self.by_row)
        return LossProblem(problem, self.formula, self.mean, *more)


def serves(backend: str, like: Tensor) -> bool:
    """Whether a backend of this name may have the pair of functions."""
    return backends.may_have_loss(backend, like.device.type)


def ask(
    where: str,
    q: Tensor,
    k: Tensor | None,
    pairs: Pairs,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    normalize: bool,
    formula: str,
    reduction: str,
    *,
    called: str = "scale",
    second: Tensor | None = None,
    partners: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    two_sided: bool = False,
    by_place: bool = False,
) -> LossProblem:
    """The question, from the arguments of a public function. A scale that is a float stays one, which is a launch less."""
    tensor, value, inverse = arguments.scale_given(where, temperature, scale, q, called)
    problem = Problem(q, k, q, bias, pairs, two_sided, normalize)
    mean, by_row = reduction == "mean", reduction == "none"
    return LossProblem(problem, formula, mean, second, partners, tensor, value, inverse, weight, by_place, by_row)


def enough(one: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a loss by one operator is all that is asked for. Debug mode makes the statistics too, and looks at them."""
    return one is not None and not arguments.debugging()


def loss(where: str, ask: LossProblem, backend: str) -> Tensor | None:
    """The loss, or None where the backend that is picked makes it from its statistics."""
    q, k = ask.problem.q, ask.problem.k
    if q.numel() == 0 or (k is not None and k.numel() == 0):
        return None
    name = backends.pick_loss(where, backend, ask)
    if not name:
        return None
    frozen = torch.is_grad_enabled()  # as in autograd.statistics: the operator finds out whether keys have a gradient
    flat = _Arguments.of(ask._replace(problem=ask.problem._replace(frozen=frozen)), name)
    found: Tensor = autograd.call("loss", *flat)[0]
    return found


def _module(name: str) -> ModuleType:
    return backends.BACKENDS[name]


def _loss(*flat: Any) -> tuple[Tensor, Tensor]:
    args = _Arguments(*flat)
    with no_autocast(args.q):
        found: tuple[Tensor, Tensor] = _module(args.backend).loss(args.problem())
    return found


def _fake_loss(*flat: Any) -> tuple[Tensor, Tensor]:
    args = _Arguments(*flat)
    found: tuple[Tensor, Tensor] = _module(args.backend).fake_loss(args.problem())
    return found


def _some_gradients(upstream: Tensor, kept: Tensor, wanted: list[bool], *flat: Any) -> list[Tensor | None]:
    args = _Arguments(*flat)
    with no_autocast(args.q):
        found: list[Tensor | None] = _module(args.backend).gradients(args.problem(), kept, upstream, LossWanted(*wanted))
    return found


def _gradients(upstream: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(upstream.new_empty(0) if g is None else g for g in _some_gradients(upstream, *given))


def _fake_gradients(upstream: Tensor, kept: Tensor, wanted: list[bool], *flat: Any) -> tuple[Tensor, ...]:
    args = _Arguments(*flat)
    like = args.differentiable
    return tuple(t.new_empty(t.shape) if want and t is not None else upstream.new_empty(0) for t, want in zip(like, wanted, strict=True))


class _Loss(autograd.Derivative):
    @staticmethod
    def forward(ctx: Any, below: autograd.Below | autograd.Directly, *flat: Any) -> tuple[Tensor, Tensor]:
        args = _Arguments(*flat)
        if below.backward_mode:
            # Under a transform a level below may ask for the gradient of k, which this level does not see.
            alone = args.k is not None and not args.k.requires_grad and not torch._C._are_functorch_transforms_active()
            asked = any(t is not None and t.requires_grad for t in args.differentiable)
            args = args._replace(frozen=args.frozen and alone and asked)
        found, kept = below(*args)
        ctx.set_materialize_grads(False)
        ctx.flags = args[_TENSORS:]
        autograd.Derivative.keep(ctx, *flat[:_TENSORS], kept)
        ctx.mark_non_differentiable(kept)
        return found, kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[1 : 1 + _WANTED])
        nothing = [None] * (len(ctx.needs_input_grad) - 1 - _WANTED)
        if grads[0] is None:
            return None, *[None] * _WANTED, *nothing
        *tensors, kept = autograd.Derivative.kept(ctx)
        found = autograd.call("loss_gradients", grads[0], kept, wanted, *tensors, *ctx.flags)
        return None, *(g if want else None for g, want in zip(found, wanted, strict=True)), *nothing


autograd.register("loss", f"({_PROBLEM}) -> (Tensor, Tensor)", _loss, _fake_loss, _Loss)
autograd.register(
    "loss_gradients",
    f"(Tensor upstream, Tensor kept, bool[{_WANTED}] wanted, {_PROBLEM}) -> ({', '.join(['Tensor'] * _WANTED)})",
    _gradients,
    _fake_gradients,
    autograd.Gradients,
    without_gradient=_some_gradients,
)
