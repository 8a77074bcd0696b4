"""torch.library operators and their derivatives. No arithmetic.

The operators themselves are differentiable: whoever calls one, in a traced graph or by hand, gets its gradient or an error, never a silent
zero. The construction refuses every derivative it cannot give: a second derivative raises instead of dropping terms (which a plain
autograd.Function, or once_differentiable, would do) and forward mode raises instead of returning zeros (which custom_op with
register_autograd would do).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, _SingleLevelFunction

from fastnce import backends, listed
from fastnce.backends._gpu import rows
from fastnce.listed import Listed
from fastnce.norms import compute_dtype, no_autocast, vector_dtype
from fastnce.pairs import Pairs
from fastnce.problem import DIFFERENTIABLE, FIELDS, WITHOUT_METRICS, Problem, Side, SideGrad, Wanted, sides

_PROBLEM = (
    "Tensor q, Tensor? k, Tensor scale, Tensor? bias, Tensor? q_label, Tensor? k_label, Tensor? q_exclude, Tensor? k_exclude, "
    "Tensor? mask, Tensor? threshold, Tensor? q_wide, Tensor? k_wide, SymInt? offset, bool exclude_self, bool two_sided, bool normalize, "
    "bool metrics, bool frozen, str backend"
)
_TENSORS = 12  # of the arguments above, the first are tensors
_WIDE = (10, 11)  # q_wide and k_wide, which take the gradients of q and k
_LISTED = "Tensor q, Tensor keys, Tensor? rows, Tensor scale, Tensor? q_wide, Tensor? keys_wide, bool normalize"
# One argument per vector, not lists of them: for the batched gradients of torch.autograd (is_grads_batched), torch repeats an operator by
# itself where no argument is a list of tensors.
_GRADS, _STATS = (
    ", ".join(f"Tensor? {side}_{field}" for side in ("rows", "columns") for field in fields)
    for fields in (SideGrad._fields, Side._fields[:WITHOUT_METRICS])
)

_library = torch.library.Library("fastnce", "DEF")
_library.define(f"forward({_PROBLEM}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"backward({_GRADS}, {_STATS}, bool[4] wanted, {_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("wide(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"listed({_LISTED}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"listed_backward(Tensor grad, Tensor s, Tensor r, bool[3] wanted, {_LISTED}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("second_derivative(Tensor asked, Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
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
    q_wide: Tensor | None
    k_wide: Tensor | None
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
        return Arguments(p.q, p.k, p.scale, p.bias, *ids, p.threshold, p.q_wide, p.k_wide, rules.offset, *flags, backend)

    def problem(self) -> Problem:
        rules = Pairs(self.exclude_self, self.offset, self.q_label, self.k_label, self.q_exclude, self.k_exclude, self.mask)
        flags = (self.two_sided, self.normalize, self.metrics, self.threshold, self.frozen, self.q_wide, self.k_wide)
        return Problem(self.q, self.k, self.scale, self.bias, rules, *flags)

    @property
    def differentiable(self) -> tuple[Tensor, Tensor | None]:
        """What the gradients of the features are of: their stand-ins, where there are any."""
        return self.q if self.q_wide is None else self.q_wide, self.k if self.k_wide is None else self.k_wide


class Request(NamedTuple):
    """What backward is asked: vectors of the rows, then of the columns, which are None where not two_sided."""

    grads: Sequence[Tensor]
    stats: Sequence[Tensor]
    wanted: Sequence[bool]
    of: Arguments

    @staticmethod
    def read(flat: Sequence[Any]) -> Request:
        grads, stats = 2 * DIFFERENTIABLE, 2 * WITHOUT_METRICS
        return Request(flat[:grads], flat[grads : grads + stats], flat[grads + stats], Arguments(*flat[grads + stats + 1 :]))

    def flat(self) -> list[Any]:
        def two(vectors: Sequence[Tensor], per_side: int) -> list[Tensor | None]:
            return [*vectors, *[None] * (2 * per_side - len(vectors))]

        return [*two(self.grads, DIFFERENTIABLE), *two(self.stats, WITHOUT_METRICS), self.wanted, *self.of]


def statistics(problem: Problem, backend: str) -> list[Side]:
    """The differentiable statistics of a problem on a named backend: rows, then columns where two_sided."""
    # Where no gradient is recorded nobody will ask for one; elsewhere the operator finds out who will.
    arguments = Arguments.of(problem._replace(frozen=torch.is_grad_enabled()), backend)
    flat = torch.ops.fastnce.forward(*arguments)
    return [Side(*run) for run in sides(flat, problem, len(flat) // (2 if problem.two_sided else 1))]


def wide(x: Tensor) -> Tensor:
    """A number expanded to the shape of x, in the inner precision. Its gradient, cast to the dtype of x, is that of x: see wide.py."""
    found: Tensor = torch.ops.fastnce.wide(x)
    return found


def listed_logits(arguments: Listed) -> Tensor:
    """The differentiable logits of listed.forward."""
    s: Tensor = torch.ops.fastnce.listed(*arguments)[0]
    return s


# Derivatives ----------------------------------------------------------------------------------------------------------------------------
#
# An operator's Autograd kernel runs wherever the operator runs: in eager mode, in each level of torch.func's transforms, and where AOT
# autograd traces what Dynamo has left alone. It applies a Function, whose forward hands the call to the next level below. (Called by
# Dynamo, a Function would have to trust requires_grad, which is False there for tensors of a torch.func transform.)


class _Below(NamedTuple):
    """The rest of a dispatch: the operator's kernels under this one, with the modes that this level was called in. A Function turns those
    off for its own level, and the levels below would lose their derivatives."""

    operator: Any
    keys: Any
    backward_mode: bool
    forward_mode: bool

    def __call__(self, *args: Any) -> Any:
        with (
            torch.set_grad_enabled(self.backward_mode),
            torch.autograd.forward_ad._set_fwd_grad_enabled(self.forward_mode),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return self.operator.redispatch(self.keys & torch._C._after_autograd_keyset, *args)


class _Derivative(_SingleLevelFunction):
    """A Function of one level, below the torch.func transforms that autograd.Function.apply would look for. forward mode raises."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("fastnce: forward-mode derivatives (jvp) are not implemented; use reverse mode (backward, func.grad)")

    @staticmethod
    def keep(ctx: Any, *tensors: Tensor | None) -> None:
        """Save tensors for backward. save_for_backward watches for changes by their version; tensors of inference mode have none, and it
        refuses them: the context holds those as they are."""
        ctx.unwatched = [t if t is not None and t.is_inference() else None for t in tensors]
        ctx.save_for_backward(*(None if u is not None else t for t, u in zip(tensors, ctx.unwatched, strict=True)))

    @staticmethod
    def kept(ctx: Any) -> list[Any]:
        return [t if u is None else u for t, u in zip(ctx.saved_tensors, ctx.unwatched, strict=True)]


class _Statistics(_Derivative):
    @staticmethod
    def forward(ctx: Any, below: _Below, *flat: Any) -> tuple[Tensor, ...]:
        args = Arguments(*flat)
        if below.backward_mode:
            # Under a transform the levels below may ask for the gradient of k too.
            alone = args.k is not None and args.q.requires_grad and not args.k.requires_grad
            args = args._replace(frozen=args.frozen and alone and not torch._C._are_functorch_transforms_active())
        output = tuple(below(*args))
        per_side = FIELDS if args.metrics else WITHOUT_METRICS
        ctx.per_side, ctx.flags = per_side, args[_TENSORS:]
        vectors = [v for start in range(0, len(output), per_side) for v in output[start : start + WITHOUT_METRICS]]
        _Derivative.keep(ctx, *flat[:_TENSORS], *vectors)
        ctx.mark_non_differentiable(*[v for i, v in enumerate(output) if i % per_side >= DIFFERENTIABLE])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Derivative.kept(ctx)
        tensors, vectors = saved[:_TENSORS], saved[_TENSORS:]
        differentiable = [g for i, g in enumerate(grads) if i % ctx.per_side < DIFFERENTIABLE]
        wanted = list(ctx.needs_input_grad[1:5])
        request = Request(differentiable, vectors, wanted, Arguments(*tensors, *ctx.flags))
        found = torch.ops.fastnce.backward(*request.flat())
        given = [g if wanted[i] else None for i, g in enumerate(found)] + [None] * (len(ctx.needs_input_grad) - 1 - len(found))
        for feature, wide in enumerate(_WIDE):
            if tensors[wide] is not None:
                given[wide], given[feature] = given[feature], None
        return None, *given


class _Wide(_Derivative):
    @staticmethod
    def forward(ctx: Any, below: _Below, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return below(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


class _Listed(_Derivative):
    @staticmethod
    def forward(ctx: Any, below: _Below, *flat: Any) -> tuple[Tensor, Tensor]:
        s, r = below(*flat)
        ctx.normalize = flat[-1]
        _Derivative.keep(ctx, s, r, *flat[:-1])
        ctx.mark_non_differentiable(r)
        return s, r

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        s, r, *tensors = _Derivative.kept(ctx)
        arguments = Listed(*tensors, ctx.normalize)  # type: ignore[call-arg]
        wanted = [ctx.needs_input_grad[n] for n in (1, 2, 4)]
        found = torch.ops.fastnce.listed_backward(grad, s, r, wanted, *arguments)
        dq, dkeys, dscale = (g if want else None for g, want in zip(found, wanted, strict=True))
        dq, dq_wide = (dq, None) if arguments.q_wide is None else (None, dq)
        dkeys, dkeys_wide = (dkeys, None) if arguments.keys_wide is None else (None, dkeys)
        return None, dq, dkeys, None, dscale, dq_wide, dkeys_wide, None


class _Log1pLoss(_Derivative):
    """log(1 + exp(lse_neg - pos)) of every row, by one launch each way instead of three."""

    @staticmethod
    def forward(ctx: Any, below: _Below, lse_neg: Tensor, pos: Tensor) -> Tensor:
        _Derivative.keep(ctx, lse_neg, pos)
        return below(lse_neg, pos)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        found = torch.ops.fastnce.log1p_loss_backward(*_Derivative.kept(ctx), grad)
        return None, found, -found


class _Gradients(_Derivative):
    """What an operator for a gradient returns; differentiating it once more raises."""

    @staticmethod
    def forward(ctx: Any, below: _Below, *args: Any) -> Any:
        _Derivative.keep(ctx, *(x if isinstance(x, Tensor) else None for x in args))
        return below(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Raised by an operator, which a traced graph meets when it runs: AOT autograd traces the second derivative of every gradient that
        # leaves the graph, whether or not somebody will ask for it.
        asked = torch.stack([(g != 0).any() for g in grads]).any()
        wanted = zip(_Derivative.kept(ctx), ctx.needs_input_grad[1:], strict=True)
        return (None, *(torch.ops.fastnce.second_derivative(asked, x) if want else None for x, want in wanted))


def _autograd_kernel(operator: Any, derivative: type[_Derivative]) -> Callable[..., Any]:
    def kernel(keys: Any, *args: Any) -> Any:
        below = _Below(operator, keys, torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
        if not torch._C._are_functorch_transforms_active():
            return derivative.apply(below, *args)  # type: ignore[attr-defined]
        # Under a transform torch wants to hear that somebody knows what a Function of a single level is.
        from torch._functorch.autograd_function import enable_single_level_autograd_function

        with enable_single_level_autograd_function():
            return derivative.apply(below, *args)  # type: ignore[attr-defined]

    return kernel


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on a gradient; differentiating it once more raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise _no_second_derivative()


def first_order_only(grad: Tensor) -> Tensor:
    """A gradient as it is; differentiating it once more raises."""
    return _FirstOrderOnly.apply(grad) if torch.is_grad_enabled() else grad


def log1p_loss(lse_neg: Tensor, pos: Tensor) -> Tensor | None:
    """log(1 + exp(lse_neg - pos)) (N,) from the compiled library, or None where that does not serve: the formula is the caller's."""
    served = not torch.compiler.is_compiling() and rows.compiled(lse_neg)
    return torch.ops.fastnce.log1p_loss(lse_neg, pos) if served else None


def _forward(*flat: Any) -> list[Tensor]:
    args = Arguments(*flat)
    with no_autocast(args.q):
        found = backends.BACKENDS[args.backend].forward(args.problem())
    return [vector for side in found for vector in side if vector is not None]


def _backward(*given: Any) -> tuple[Tensor, ...]:
    grads, stats, wanted, args = Request.read(given)
    problem = args.problem()
    with no_autocast(args.q):
        found = backends.BACKENDS[args.backend].backward(
            problem,
            [SideGrad(*run) for run in sides(grads, problem, DIFFERENTIABLE)],
            [Side(*run) for run in sides(stats, problem, WITHOUT_METRICS)],
            Wanted(*wanted),
        )
    return tuple(args.q.new_empty(0) if g is None else g for g in found)


def _second_derivative(asked: Tensor, x: Tensor) -> Tensor:
    """0 for x unless asked: what came down for a gradient that was not differentiated is 0, and so is what goes on. Otherwise it raises."""
    if not asked.is_meta and bool(asked):
        raise _no_second_derivative()
    return torch.zeros_like(x)


def _no_second_derivative() -> RuntimeError:
    return RuntimeError(
        "fastnce: the second derivative of this loss is not implemented (create_graph=True, gradient penalties); "
        "write the loss as dense torch operations where you need it"
    )


def _fake_forward(*flat: Any) -> list[Tensor]:
    args = Arguments(*flat)
    problem, out = args.problem(), []
    output = backends.keeps_output(args.backend, problem)
    for x in (args.q, args.q if args.k is None else args.k)[: 2 if args.two_sided else 1]:
        real = x.new_empty(x.shape[0], dtype=vector_dtype(x))
        count = x.new_empty(x.shape[0], dtype=torch.int64)
        own_pos = x.new_empty((x.shape[0], x.shape[1] + 1), dtype=torch.float32) if output else real
        kinds = (real, real, real, count, real, own_pos) + ((count, count, real, real) if args.metrics else ())
        out += [torch.empty_like(kind) for kind in kinds]
    return out


def _fake_backward(*given: Any) -> tuple[Tensor, ...]:
    _, _, wanted, args = Request.read(given)
    like = (*args.differentiable, args.scale, args.scale)
    return tuple(t.new_empty(t.shape) if want and t is not None else args.q.new_empty(0) for t, want in zip(like, wanted, strict=True))


def _wide(x: Tensor) -> Tensor:
    return x.new_zeros((), dtype=compute_dtype(x.dtype)).expand(x.shape)


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """vmap rule: the batch is a loop. A batched problem is no faster than its parts: each already fills the device."""

    def pick(arg: Any, dim: Any, n: int) -> Any:
        if isinstance(arg, list | tuple):
            return [pick(a, d, n) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, n)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        runs = [operator(*(pick(a, d, n) for a, d in zip(args, in_dims, strict=True))) for n in range(info.batch_size)]
        if isinstance(runs[0], Tensor):
            return torch.stack(runs), 0
        stacked = [torch.stack(parts) for parts in zip(*runs, strict=True)]
        kind = type(runs[0])
        return kind(stacked), kind([0] * len(stacked))

    return rule


for _name, _run, _fake, _derivative in (
    ("forward", _forward, _fake_forward, _Statistics),
    ("backward", _backward, _fake_backward, _Gradients),
    ("second_derivative", _second_derivative, lambda asked, x: torch.empty_like(x), _Gradients),
    ("wide", _wide, _wide, _Wide),
    ("listed", listed.forward, listed.fake, _Listed),
    ("listed_backward", listed.backward, listed.fake_backward, _Gradients),
    ("log1p_loss", rows.log1p_loss, lambda lse_neg, pos: torch.empty_like(lse_neg), _Log1pLoss),
    ("log1p_loss_backward", rows.log1p_loss_backward, lambda lse_neg, pos, grad: torch.empty_like(lse_neg), _Gradients),
):
    _operator = getattr(torch.ops.fastnce, _name)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd_kernel(_operator.default, _derivative), "Autograd", with_keyset=True)
    torch.library.register_fake(f"fastnce::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"fastnce::{_name}", _one_by_one(_operator), lib=_library)
