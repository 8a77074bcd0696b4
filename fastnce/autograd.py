"""The operators of torch.library, with their fakes, vmap rules and derivatives. No arithmetic.

The operators themselves are differentiable. A call of one, in a traced graph or by hand, gives a gradient or an error, never a silent zero:

    second derivative   raises. A plain autograd.Function, or once_differentiable, would drop terms
    forward mode        raises. custom_op with register_autograd would return zeros

The table at the end registers every operator: its implementation, its fake, its derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, _SingleLevelFunction

from fastnce import backends, listed
from fastnce import hardest as hardest_negatives
from fastnce.listed import Listed
from fastnce.precision import compute_dtype, no_autocast, vector_dtype
from fastnce.problem import DIFFERENTIABLE, FIELDS, WITHOUT_METRICS, Problem, Side, SideGrad, Wanted, sides
from fastnce.schemas import GRADS, PROBLEM, STATS, TENSORS, WIDE, Arguments, Request

_library = torch.library.Library("fastnce", "DEF")


def statistics(problem: Problem, backend: str) -> list[Side]:
    """The differentiable statistics of a problem on a named backend: rows, then columns where two_sided."""
    # `frozen` here: a gradient may be asked for. The operator finds out whether it is that of q alone.
    arguments = Arguments.of(problem._replace(frozen=torch.is_grad_enabled()), backend)
    flat = call("forward", *arguments)
    return [Side(*run) for run in sides(flat, problem, len(flat) // (2 if problem.two_sided else 1))]


def hardest(problem: Problem, count: int) -> list[tuple[Tensor, Tensor]]:
    """Indices and similarities of the hardest negatives, see hardest.py: rows, then columns where two_sided. They have no gradient.

    Every problem has the name of a backend among its arguments; this operator does not read it.
    """
    flat = call("hardest", count, *Arguments.of(problem, "torch"))
    return list(zip(flat[::2], flat[1::2], strict=True))


def wide(x: Tensor) -> Tensor:
    """A stand-in for x (wide.py): a number expanded to its shape, in the inner precision. Its gradient, cast to the dtype of x, is x's."""
    found: Tensor = call("wide", x)
    return found


def listed_logits(arguments: Listed) -> Tensor:
    """The differentiable logits of listed.forward."""
    s: Tensor = call("listed", *arguments)[0]
    return s


# The way to an operator ------------------------------------------------------------------------------------------------------------------


class _Registered(NamedTuple):
    run: Callable[..., Any]
    derivative: type[Derivative]
    without_gradient: Callable[..., Any]  # the same as run, but for None where a schema wants an empty tensor


_REGISTERED: dict[str, _Registered] = {}


def call(name: str, *args: Any) -> Any:
    """An operator's results. Where nothing would see the operator it is left out: torch's dispatcher takes as much of the host's time for
    so many arguments as several launches do."""
    if torch.compiler.is_compiling() or not _unseen(args):
        return getattr(torch.ops.fastnce, name)(*args)
    run, derivative, without_gradient = _REGISTERED[name]
    return derivative.apply(Directly(run), *args) if torch.is_grad_enabled() else without_gradient(*args)  # type: ignore[attr-defined]


# Batched gradients, and tracers of what comes before autograd. A key takes microseconds to be looked up by its name.
_SEEING = tuple(map(torch._C._dispatch_key_parse, ("VmapMode", "PreDispatch")))
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list))


def _unseen(args: tuple[Any, ...]) -> bool:
    """Whether the arguments would go straight to the implementation: no tracer, transform, mode or kind of tensor wants the dispatcher."""
    return (
        not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not any(map(torch._C._dispatch_tls_is_dispatch_key_included, _SEEING))
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
        and _PLAIN.issuperset(map(type, args))
        and not any(map(Tensor.is_neg, [x for x in args if type(x) is Tensor]))  # the dispatcher negates its numbers
    )


# Derivatives ----------------------------------------------------------------------------------------------------------------------------
#
# An operator's Autograd kernel runs wherever the operator runs: in eager mode, in each level of torch.func's transforms, and where AOT
# autograd traces the graph that Dynamo left. It applies a Function, whose forward hands the call to the next level below. Dynamo itself
# never calls a Function here: that one would have to trust requires_grad, which Dynamo reports as False under a torch.func transform.


class Below(NamedTuple):
    """The rest of a dispatch: the operator's kernels below this one, called in the modes of this level. A Function turns its own modes off;
    without them the levels below would lose their derivatives."""

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


class Directly(NamedTuple):
    """The rest of a call without dispatch: the implementation."""

    run: Callable[..., Any]
    backward_mode: bool = True

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


class Derivative(_SingleLevelFunction):
    """A Function of one level: it does not look for torch.func transforms, as autograd.Function.apply does. Forward mode raises."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("fastnce: forward-mode derivatives (jvp) are not implemented; use reverse mode (backward, func.grad)")

    @staticmethod
    def keep(ctx: Any, *tensors: Tensor | None) -> None:
        """Save tensors for backward.

        save_for_backward watches for changes by a tensor's version. Tensors of inference mode have no version, and it refuses them: the
        context holds these as they are.
        """
        ctx.unwatched = [t if t is not None and t.is_inference() else None for t in tensors]
        ctx.save_for_backward(*(None if u is not None else t for t, u in zip(tensors, ctx.unwatched, strict=True)))

    @staticmethod
    def kept(ctx: Any) -> list[Any]:
        """The tensors of keep."""
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "fastnce: the features or the queue of this loss were written between its forward and its backward. Call "
                f"NegativeQueue.enqueue after backward, or use MoCoLoss, which keeps a copy. torch says: {error}"
            ) from error
        return [t if u is None else u for t, u in zip(saved, ctx.unwatched, strict=True)]


class _Statistics(Derivative):
    @staticmethod
    def forward(ctx: Any, below: Below | Directly, *flat: Any) -> tuple[Tensor, ...]:
        args = Arguments(*flat)
        if below.backward_mode:
            # Under a transform a level below may ask for the gradient of k, which this level does not see.
            alone = args.k is not None and args.q.requires_grad and not args.k.requires_grad
            args = args._replace(frozen=args.frozen and alone and not torch._C._are_functorch_transforms_active())
        output = tuple(below(*args))
        per_side = FIELDS if args.metrics else WITHOUT_METRICS
        ctx.per_side, ctx.flags = per_side, args[TENSORS:]
        vectors = [v for start in range(0, len(output), per_side) for v in output[start : start + WITHOUT_METRICS]]
        Derivative.keep(ctx, *flat[:TENSORS], *vectors)
        ctx.set_materialize_grads(False)  # zeros for every vector that no gradient came down for would be launches
        ctx.mark_non_differentiable(*[v for i, v in enumerate(output) if i % per_side >= DIFFERENTIABLE])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = Derivative.kept(ctx)
        tensors, vectors = saved[:TENSORS], saved[TENSORS:]
        differentiable = [g for i, g in enumerate(grads) if i % ctx.per_side < DIFFERENTIABLE]
        wanted = list(ctx.needs_input_grad[1:5])
        request = Request(differentiable, vectors, wanted, Arguments(*tensors, *ctx.flags))
        found = call("backward", *request.flat())
        given = [g if wanted[i] else None for i, g in enumerate(found)] + [None] * (len(ctx.needs_input_grad) - 1 - len(found))
        for feature, wide in enumerate(WIDE):
            if tensors[wide] is not None:
                given[wide], given[feature] = given[feature], None
        return None, *given


class _Wide(Derivative):
    """Derivative of an operator that returns x, or a stand-in for it: the gradient is passed on in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, below: Below | Directly, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return below(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


class _Listed(Derivative):
    @staticmethod
    def forward(ctx: Any, below: Below | Directly, *flat: Any) -> tuple[Tensor, Tensor]:
        s, r = below(*flat)
        ctx.flags = flat[-1:]
        Derivative.keep(ctx, s, r, *flat[:-1])
        ctx.mark_non_differentiable(r)
        return s, r

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        s, r, *tensors = Derivative.kept(ctx)
        arguments = Listed(*tensors, *ctx.flags)
        wanted = [ctx.needs_input_grad[n] for n in (1, 2, 4)]
        found = call("listed_backward", grad, s, r, wanted, *arguments)
        dq, dkeys, dscale = (g if want else None for g, want in zip(found, wanted, strict=True))
        dq, dq_wide = (dq, None) if arguments.q_wide is None else (None, dq)
        dkeys, dkeys_wide = (dkeys, None) if arguments.keys_wide is None else (None, dkeys)
        return None, dq, dkeys, None, dscale, dq_wide, dkeys_wide, None


class _Undifferentiated(Derivative):
    """Derivative of an operator whose results have no gradient: indices, and numbers that are looked up by them."""

    @staticmethod
    def forward(ctx: Any, below: Below | Directly, *args: Any) -> tuple[Tensor, ...]:
        found = tuple(below(*args))
        ctx.mark_non_differentiable(*found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class Gradients(Derivative):
    """Derivative of an operator that returns gradients: it raises."""

    @staticmethod
    def forward(ctx: Any, below: Below | Directly, *args: Any) -> Any:
        Derivative.keep(ctx, *(x if isinstance(x, Tensor) else None for x in args))
        return below(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # An operator raises, and not this line: AOT autograd traces the second derivative of every gradient that leaves the graph, whether
        # or not it is asked for. The operator is only met when the graph runs, and then knows.
        asked = torch.stack([(g != 0).any() for g in grads]).any()
        wanted = zip(Derivative.kept(ctx), ctx.needs_input_grad[1:], strict=True)
        return (None, *(torch.ops.fastnce.second_derivative(asked, x) if want else None for x, want in wanted))


def _autograd_kernel(operator: Any, derivative: type[Derivative]) -> Callable[..., Any]:
    def kernel(keys: Any, *args: Any) -> Any:
        below = Below(operator, keys, torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
        if not torch._C._are_functorch_transforms_active():
            return derivative.apply(below, *args)  # type: ignore[attr-defined]
        # Under a transform torch refuses a Function of a single level unless it is told that one is meant.
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


def copy_of_queue(keys: Tensor) -> Tensor:
    """keys as they are now, for a loss whose queue is written before its backward."""
    return torch.ops.fastnce.copy_of_queue(keys) if torch.compiler.is_compiling() else keys.clone()


def first_order_only(grad: Tensor) -> Tensor:
    """A gradient as it is; differentiating it once more raises."""
    return _FirstOrderOnly.apply(grad) if torch.is_grad_enabled() else grad


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


def _hardest(count: int, *flat: Any) -> list[Tensor]:
    return hardest_negatives.forward(Arguments(*flat).problem(), count)


def _fake_hardest(count: int, *flat: Any) -> list[Tensor]:
    return hardest_negatives.fake(Arguments(*flat).problem(), count)


def _copy_of_queue(keys: Tensor) -> Tensor:
    # An operator and not clone(): a compiler may move a clone into the backward, and the queue has been written by then.
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "MoCoLoss: a compiled call runs again inside backward (activation checkpointing), where its queue has been written; leave the "
            "loss out of the checkpoint"
        )
    return keys.clone()


def _second_derivative(asked: Tensor, x: Tensor) -> Tensor:
    """0 for x where no second derivative was asked for: then only zeros came down, and zeros go on. Otherwise it raises."""
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
        own = vector = x.new_empty(x.shape[0], dtype=vector_dtype(x))
        if backends.rounds(args.backend, problem):
            vector = vector.to(compute_dtype(x.dtype))
        count = x.new_empty(x.shape[0], dtype=torch.int64)
        own_pos = x.new_empty((x.shape[0], x.shape[1] + 1), dtype=torch.float32) if output else own
        kinds = (vector, vector, vector, count, own, own_pos) + ((count, count, count, vector, vector) if args.metrics else ())
        out += [torch.empty_like(kind) for kind in kinds]
    return out


def _fake_backward(*given: Any) -> tuple[Tensor, ...]:
    _, _, wanted, args = Request.read(given)
    like = (*args.differentiable, args.scale, args.scale)
    return tuple(t.new_empty(t.shape) if want and t is not None else args.q.new_empty(0) for t, want in zip(like, wanted, strict=True))


def _wide(x: Tensor) -> Tensor:
    return x.new_zeros((), dtype=compute_dtype(x.dtype)).expand(x.shape)


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule that runs the problems of a batch one by one. Each fills the device already, so a batch would be no faster."""

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


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    derivative: type[Derivative],
    without_gradient: Callable[..., Any] | None = None,
) -> None:
    """A new operator fastnce::name: its implementation, its fake, its derivative. without_gradient: see _Registered."""
    _REGISTERED[name] = _Registered(run, derivative, without_gradient or run)
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.fastnce, name)
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, _autograd_kernel(operator.default, derivative), "Autograd", with_keyset=True)
    torch.library.register_fake(f"fastnce::{name}", fake, lib=_library)
    torch.library.register_vmap(f"fastnce::{name}", _one_by_one(operator), lib=_library)


_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
_LISTED_BACKWARD = f"(Tensor grad, Tensor s, Tensor r, bool[3] wanted, {listed.SCHEMA}) -> (Tensor, Tensor, Tensor)"
for _given in (
    ("forward", f"({PROBLEM}) -> Tensor[]", _forward, _fake_forward, _Statistics),
    ("backward", f"({GRADS}, {STATS}, bool[4] wanted, {PROBLEM}) -> {_FOUR}", _backward, _fake_backward, Gradients),
    ("second_derivative", "(Tensor asked, Tensor x) -> Tensor", _second_derivative, lambda asked, x: torch.empty_like(x), Gradients),
    ("wide", "(Tensor x) -> Tensor", _wide, _wide, _Wide),
    ("copy_of_queue", "(Tensor keys) -> Tensor", _copy_of_queue, torch.empty_like, _Wide),
    ("listed", f"({listed.SCHEMA}) -> (Tensor, Tensor)", listed.forward, listed.fake, _Listed),
    ("listed_backward", _LISTED_BACKWARD, listed.backward, listed.fake_backward, Gradients),
    ("hardest", f"(int count, {PROBLEM}) -> Tensor[]", _hardest, _fake_hardest, _Undifferentiated),
):
    register(*_given)
