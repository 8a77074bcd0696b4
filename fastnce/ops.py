"""torch.library operators and the autograd.Function over them. No arithmetic.

The construction is the one that refuses every derivative it cannot give: a second derivative raises instead of silently dropping terms
(which a plain autograd.Function, or once_differentiable, would do) and forward-mode raises instead of returning zeros (which custom_op with
register_autograd would do).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastnce import backends
from fastnce.backends._gpu import rows
from fastnce.norms import no_autocast, vector_dtype
from fastnce.pairs import Pairs
from fastnce.problem import DIFFERENTIABLE, FIELDS, WITHOUT_METRICS, Problem, Side, SideGrad, Wanted, sides

_PROBLEM = (
    "Tensor q, Tensor? k, Tensor scale, Tensor? bias, Tensor? q_label, Tensor? k_label, Tensor? q_exclude, Tensor? k_exclude, "
    "Tensor? mask, Tensor? threshold, SymInt? offset, bool exclude_self, bool two_sided, bool normalize, bool metrics, "
    "bool frozen, str backend"
)
_TENSORS = 10  # of the arguments above, the first are tensors

_library = torch.library.Library("fastnce", "DEF")
_library.define(f"forward({_PROBLEM}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"backward(Tensor[] grads, Tensor[] stats, bool[4] wanted, {_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("log1p_loss(Tensor lse_neg, Tensor pos) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("log1p_loss_backward(Tensor lse_neg, Tensor pos, Tensor grad) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


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
    offset: int | None
    exclude_self: bool
    two_sided: bool
    normalize: bool
    metrics: bool
    frozen: bool
    backend: str

    @staticmethod
    def of(problem: Problem, backend: str) -> Arguments:
        p, rules = problem, problem.pairs
        ids = (rules.q_label, rules.k_label, rules.q_exclude, rules.k_exclude, rules.mask)
        flags = (rules.exclude_self, p.two_sided, p.normalize, p.metrics, p.frozen)
        return Arguments(p.q, p.k, p.scale, p.bias, *ids, p.threshold, rules.offset, *flags, backend)

    def problem(self) -> Problem:
        rules = Pairs(self.exclude_self, self.offset, self.q_label, self.k_label, self.q_exclude, self.k_exclude, self.mask)
        flags = (self.two_sided, self.normalize, self.metrics, self.threshold, self.frozen)
        return Problem(self.q, self.k, self.scale, self.bias, rules, *flags)


def statistics(problem: Problem, backend: str) -> list[Side]:
    """The differentiable statistics of a problem on a named backend: rows, then columns where two_sided."""
    learning = torch.is_grad_enabled() and problem.q.requires_grad
    problem = problem._replace(frozen=learning and problem.k is not None and not problem.k.requires_grad)
    arguments = Arguments.of(problem, backend)
    if torch.compiler.is_compiling():
        # Dynamo traces neither a Function that defines jvp nor one whose inputs need no gradient.
        tensors = (problem.q, problem.k, problem.scale, problem.bias)
        differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        flat = _Statistics.apply(*arguments) if differentiable else torch.ops.fastnce.forward(*arguments)
    else:
        flat = _RefusesForwardMode.apply(*arguments)
    return [Side(*run) for run in sides(flat, problem, len(flat) // (2 if problem.two_sided else 1))]


class _Statistics(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fastnce.forward(*flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        args = Arguments(*inputs)
        per_side = FIELDS if args.metrics else WITHOUT_METRICS
        ctx.per_side, ctx.flags = per_side, inputs[_TENSORS:]
        vectors = [v for start in range(0, len(output), per_side) for v in output[start : start + WITHOUT_METRICS]]
        ctx.save_for_backward(*inputs[:_TENSORS], *vectors)
        ctx.mark_non_differentiable(*[v for i, v in enumerate(output) if i % per_side >= DIFFERENTIABLE])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, vectors = saved[:_TENSORS], saved[_TENSORS:]
        differentiable = [g for i, g in enumerate(grads) if i % ctx.per_side < DIFFERENTIABLE]
        wanted = list(ctx.needs_input_grad[:4])
        found = torch.ops.fastnce.backward(differentiable, list(vectors), wanted, *tensors, *ctx.flags)
        if torch.is_grad_enabled():
            found = _FirstOrderOnly.apply(*found, *tensors[:4])
        given = tuple(g if wanted[i] else None for i, g in enumerate(found))
        return given + (None,) * (len(ctx.needs_input_grad) - len(given))


class _RefusesForwardMode(_Statistics):
    """The same with a message of our own for forward mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("fastnce: forward-mode derivatives (jvp) are not implemented; use reverse mode (backward, func.grad)")


# Function.apply binds its arguments through inspect.signature at every call: 20 us, unless the answer is stored where it looks first.
_Statistics.forward.__signature__ = inspect.signature(_Statistics.forward)  # type: ignore[attr-defined]


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on the gradients; differentiating it once more raises. The inputs are arguments so that it is part of their graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dq: Tensor, dk: Tensor, dscale: Tensor, dbias: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in (dq, dk, dscale, dbias))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "fastnce: the second derivative of this loss is not implemented (create_graph=True, gradient penalties); "
            "write the loss as dense torch operations where you need it"
        )


class _Log1pLoss(torch.autograd.Function):
    """log(1 + exp(lse_neg - pos)) of every row, by one launch each way instead of three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lse_neg: Tensor, pos: Tensor) -> Tensor:
        return torch.ops.fastnce.log1p_loss(lse_neg, pos)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        found = first_order_only(torch.ops.fastnce.log1p_loss_backward(*ctx.saved_tensors, grad))
        return found, -found


def log1p_loss(lse_neg: Tensor, pos: Tensor) -> Tensor | None:
    """log(1 + exp(lse_neg - pos)) (N,) from the compiled library, or None where that does not serve: the formula is the caller's."""
    served = not torch.compiler.is_compiling() and rows.compiled(lse_neg)
    return _Log1pLoss.apply(lse_neg, pos) if served else None


def first_order_only(grad: Tensor) -> Tensor:
    """A gradient as it is; differentiating it once more raises."""
    if not torch.is_grad_enabled():
        return grad
    nothing = grad.new_empty(0)
    return _FirstOrderOnly.apply(grad, nothing, nothing, nothing)[0]


def _forward(*flat: Any) -> list[Tensor]:
    args = Arguments(*flat)
    with no_autocast(args.q):
        found = backends.BACKENDS[args.backend].forward(args.problem())
    return [vector for side in found for vector in side if vector is not None]


def _backward(grads: Sequence[Tensor], stats: Sequence[Tensor], wanted: Sequence[bool], *flat: Any) -> tuple[Tensor, ...]:
    args = Arguments(*flat)
    problem = args.problem()
    with no_autocast(args.q):
        found = backends.BACKENDS[args.backend].backward(
            problem,
            [SideGrad(*run) for run in sides(grads, problem, DIFFERENTIABLE)],
            [Side(*run) for run in sides(stats, problem, WITHOUT_METRICS)],
            Wanted(*wanted),
        )
    return tuple(args.q.new_empty(0) if g is None else g for g in found)


def _fake_forward(*flat: Any) -> list[Tensor]:
    args = Arguments(*flat)
    problem, out = args.problem(), []
    output = backends.keeps_output(args.backend, problem)
    for x in (args.q, args.q if args.k is None else args.k)[: 2 if args.two_sided else 1]:
        real = x.new_empty(x.shape[0], dtype=vector_dtype(x))
        count = x.new_empty(x.shape[0], dtype=torch.int64)
        own_pos = x.new_empty((x.shape[0], x.shape[1] + 1), dtype=torch.float32) if output else real
        kinds = (real, real, real, count, real, own_pos) + ((count, count, count, real, real) if args.metrics else ())
        out += [torch.empty_like(kind) for kind in kinds]
    return out


def _fake_backward(grads: Sequence[Tensor], stats: Sequence[Tensor], wanted: Sequence[bool], *flat: Any) -> tuple[Tensor, ...]:
    args = Arguments(*flat)
    like = (args.q, args.k, args.scale, args.scale)
    return tuple(t.new_empty(t.shape) if want and t is not None else args.q.new_empty(0) for t, want in zip(like, wanted, strict=True))


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """vmap rule: the batch is a loop. A batched problem is no faster than its parts: each already fills the device."""

    def pick(arg: Any, dim: Any, n: int) -> Any:
        if isinstance(arg, list | tuple):
            return [pick(a, d, n) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, n)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        runs = [operator(*(pick(a, d, n) for a, d in zip(args, in_dims, strict=True))) for n in range(info.batch_size)]
        stacked = [torch.stack(parts) for parts in zip(*runs, strict=True)]
        kind = type(runs[0])
        return kind(stacked), kind([0] * len(stacked))

    return rule


for _name, _run, _fake in (
    ("forward", _forward, _fake_forward),
    ("backward", _backward, _fake_backward),
    ("log1p_loss", rows.log1p_loss, lambda lse_neg, pos: torch.empty_like(lse_neg)),
    ("log1p_loss_backward", rows.log1p_loss_backward, lambda lse_neg, pos, grad: torch.empty_like(lse_neg)),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnce::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"fastnce::{_name}", _one_by_one(getattr(torch.ops.fastnce, _name)), lib=_library)
