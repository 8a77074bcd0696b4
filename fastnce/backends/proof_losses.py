"""The proof of a backend's pair of functions for a loss: see proof.py for how it goes, and fused.py for the pair.

The exact answer is that of statistics: torch's tiles, the formula through torch's autograd, torch's tiles once more for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from fastnce.backends import torch_tiles
from fastnce.backends.trial import GIVEN, SCALES, Case, Draw, Judged, Limits, Variant
from fastnce.formulas import Statistics, decoupled, l_in, l_out
from fastnce.pairs import Pairs
from fastnce.problem import LossProblem, LossWanted, Problem, Side, SideGrad, Wanted

FORMULAS = {"out": l_out, "in": l_in, "decoupled": decoupled}
NAMES = tuple("d" + name for name in LossWanted._fields)
# The public losses without options: shape, rules, aligned, formula, given. A temperature is a number by default, CLIP's scale a tensor.
PLAIN = (
    ("rows", "index", True, "out", "number"),  # info_nce
    ("rows", "index", False, "out", "number+partners"),  # moco_loss
    ("two_sided", "index", True, "out", ""),  # clip_loss
    ("symmetric", "index", True, "out", "number+second"),  # nt_xent
    ("symmetric", "index", True, "decoupled", "number+second"),  # dcl_loss
    ("symmetric", "labels", False, "out", "number"),  # sup_con
    ("symmetric", "place", False, "out", "number"),  # sup_con without labels
)
# The same of losses with options, each of which has kernels of its own.
OPTIONS = (
    ("symmetric", "index", True, "out", "number"),  # nt_xent of one tensor
    ("symmetric", "labels", False, "in", "number"),
    ("two_sided", "labels", False, "out", ""),  # clip_loss with captions
    ("two_sided", "labels+ids", True, "out", ""),
    ("rows", "labels+ids", True, "out", "number"),
    ("rows", "ids", False, "out", "number+partners"),
)


def forms(like: Variant, of_format: bool, of_all: bool) -> Iterator[Variant]:
    """The losses to prove ahead in the format and class of D of a variant.

    The plain ones are proven in all of them. Kernels over single rows hardly depend on the class of D, so options are proven once in a
    format; those that make a loss of the sums do not depend on the format either, so weights are proven once. Each of the latter forms has
    a kernel that none before it has. All other combinations are proven at their first use.
    """

    def of(forms: Iterable[tuple[str, str, bool, str, str]]) -> list[Variant]:
        return [like._replace(shape=s, rules=r, aligned=a, loss=formula, given=given) for s, r, a, formula, given in forms]

    plain = of(PLAIN)
    yield from plain
    # Those that differ from each other by their sides, and not by what makes a loss of the same sums.
    sides = [one for one in plain if one.loss == "out" and one.rules != "place"]
    if of_format:
        yield from (_given(one, "number") for one in plain)
        yield from of(OPTIONS)
        yield from (one._replace(normalize=False) for one in sides)
        for one in sides:
            if one.shape == "two_sided":
                yield one._replace(bias=True)
            elif "second" in one.given:
                yield _given(one, "number")._replace(deterministic=True)
    if of_all:
        yield from (_given(one, how) for one in sides for how in ("weight", "weighted sum", "values"))
        yield from (_given(_given(one, "weighted sum"), "values") for one in sides[:1])


def _given(one: Variant, name: str) -> Variant:
    """The form with this argument, or without it where it has it."""
    names = set(one.given.split("+")) ^ {name}
    return one._replace(given="+".join(known for known in GIVEN if known in names))


def cases(backend: ModuleType, of: Variant, columns: int, device: torch.device, rows: int) -> Iterator[Case]:
    """Every scale, also with keys that get no gradient where the backend treats them apart. A scale that is a tensor is 1 / scale once."""
    for inverse, scale in zip((True, False), SCALES, strict=True):
        ask, upstream = make(of, columns, scale, inverse, device, rows)
        exact, single = (by_statistics(ask, upstream, dtype) for dtype in (torch.float64, torch.float32))
        forms, frozen = [ask], ask.problem._replace(frozen=True)
        if getattr(backend, "keeps_output", lambda _: False)(frozen):
            forms.append(ask._replace(problem=frozen))
        for form in forms:
            where = f" at scale {scale:g}" + ", keys without gradient" * form.problem.frozen
            yield Case(where, partial(_answers, form, upstream), partial(_judge, of, form, upstream, exact, single, where))


def make(of: Variant, columns: int, scale: float, inverse: bool, device: torch.device, rows: int) -> tuple[LossProblem, Tensor]:
    """The problem of a variant and its upstream gradient. Equal arguments give equal numbers.

    Rows of labels, or by place, come as two views in one tensor of three dimensions.
    """
    draw, given, symmetric = Draw(of, columns, device), of.given.split("+"), of.shape == "symmetric"
    weighted, views, by_row = bool({"weight", "weighted sum"} & set(given)), symmetric and not of.aligned, "values" in given
    half = -(-rows // 2)
    rows = 2 * half if symmetric else rows
    # One weight, or one value, serves a row and its column.
    keys = rows if symmetric or weighted or by_row else rows + rows // 8
    q, k = draw.features(rows, 1), None if symmetric else draw.features(keys, -1)
    partners = draw.features(rows, -1) if "partners" in given else None
    pairs = Pairs(symmetric, (half if symmetric else 0) if of.aligned else None, **draw.content(half if views else rows, keys))
    weight = draw.uniform(rows, low=0.5, high=1.5).to(device, torch.float32) if weighted else None
    number = None if "number" in given else torch.tensor(1.0 / scale if inverse else scale, dtype=torch.float32, device=device)
    bias = torch.tensor(-3.0, dtype=torch.float32, device=device) if of.bias else None
    second = q[half:] if "second" in given else None
    first = q.view(half, 2, -1) if views else q[:half] if second is not None else q
    problem = Problem(first, k, torch.empty((), device=device), bias, pairs, of.shape == "two_sided", of.normalize)
    mean = "weighted sum" not in given and not by_row
    more = (second, partners, number, scale, inverse and number is not None, weight, "place" in of.rules, by_row)
    # About 1/16 for every row, so that float16 holds the gradient of the shortest one.
    upstream = draw.uniform(*[rows] * by_row, low=0.5, high=1.5) * (rows / 16 if mean else 1 / 16)
    return LossProblem(problem, of.loss, mean, *more), upstream.to(device, torch.float32)


def by_statistics(ask: LossProblem, upstream: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss and all its gradients, by name, from the same stored numbers in this dtype."""
    given = tensors(ask)
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in zip(NAMES, given, strict=True) if x is not None}
    with torch.enable_grad():
        q, scale = _rows(leaves["dq"], leaves.get("dsecond")), leaves.get("dscale")
        if scale is None:
            scale = q.new_tensor(ask.value)
        elif ask.inverse:
            scale = 1.0 / scale
        problem, found = _statistics(ask, q.detach(), scale.detach(), leaves)
        variables = [_variable(side) for side in found]
        ends: list[Statistics] = list(variables)
        if "dpartners" in leaves:
            one, other = (_unit(x) if problem.normalize else x for x in (q, leaves["dpartners"]))
            pos = scale * (one * other).sum(1)
            ends[0] = variables[0]._replace(lse_pos=pos, pos=pos, n_pos=torch.ones_like(found[0].n_pos))
        values = [FORMULAS[ask.formula](end) for end in ends]
        weight = leaves.get("dweight")
        sums = [v if weight is None else v * weight for v in values]
        if not ask.by_row:
            sums = [one.sum() for one in sums]
        if ask.mean:
            sums = [one / (len(v) if weight is None else weight.sum()) for one, v in zip(sums, values, strict=True)]
        loss = sum(sums[1:], sums[0]) / len(sums)
        loss.backward(upstream.to(loss.dtype), retain_graph=True)  # rows and scale go on below
        grads = [SideGrad(*(x.grad for x in (end.lse_neg, end.lse_pos, end.pos))) for end in variables]
        with torch.no_grad():
            of_tiles = torch_tiles.backward(problem, grads, found, Wanted(True, "dk" in leaves, True, "dbias" in leaves))
        outputs = {q: of_tiles.dq, scale: of_tiles.dscale, leaves.get("dk"): of_tiles.dk, leaves.get("dbias"): of_tiles.dbias}
        some = {x: g.to(x.dtype) for x, g in outputs.items() if x is not None and g is not None and x.requires_grad}
        torch.autograd.backward(list(some), list(some.values()))
    return {"loss": loss.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def tensors(ask: LossProblem) -> tuple[Tensor | None, ...]:
    """In the order of LossWanted."""
    p = ask.problem
    return p.q, ask.second, p.k, ask.partners, ask.scale, p.bias, ask.weight


def _rows(q: Tensor, second: Tensor | None) -> Tensor:
    """The queries as a matrix."""
    q = q.transpose(0, 1).flatten(0, 1) if q.dim() == 3 else q
    return q if second is None else torch.cat([q, second])


def _statistics(ask: LossProblem, q: Tensor, scale: Tensor, leaves: dict[str, Tensor]) -> tuple[Problem, list[Side]]:
    """The plain form of a problem, and its statistics."""
    p, rules = ask.problem, ask.problem.pairs
    label, exclude = (None if x is None else x.repeat(len(q) // len(x)) for x in (rules.q_label, rules.q_exclude))
    if ask.by_place:
        label = torch.arange(len(p.q), device=q.device).repeat(len(q) // len(p.q))
    pairs = rules._replace(q_label=label, q_exclude=exclude)
    k, bias = (None if name not in leaves else leaves[name].detach() for name in ("dk", "dbias"))
    problem = Problem(q, k, scale, bias, pairs, p.two_sided, p.normalize)
    with torch.no_grad():
        return problem, torch_tiles.forward(problem)


def _variable(side: Side) -> Side:
    lse_neg, lse_pos, pos = (x.detach().clone().requires_grad_() for x in (side.lse_neg, side.lse_pos, side.pos))
    return side._replace(lse_neg=lse_neg, lse_pos=lse_pos, pos=pos)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def _answers(ask: LossProblem, upstream: Tensor, backend: ModuleType) -> dict[str, Tensor]:
    """All that a backend says of a loss, by name."""
    loss, kept = backend.loss(ask)
    has = LossWanted(*(x is not None for x in tensors(ask)))
    has = has._replace(k=has.k and not ask.problem.frozen)
    found = {"loss": loss}
    # Without the derivatives by numbers, and of a queue's own keys, other kernels run.
    partners = has.partners and not ask.problem.frozen
    for how, wanted in (("", has), (" alone", has._replace(partners=partners, scale=False, bias=False, weight=False))):
        given = zip(NAMES, backend.gradients(ask, kept, upstream, wanted), strict=True)
        found |= {name + how: g for name, g in given if g is not None}
        missing = [name for name, want in zip(NAMES, wanted, strict=True) if want and name + how not in found]
        if missing:
            raise RuntimeError(f"no {', '.join(missing)}{how} was returned")
    return found


Answers = dict[str, Tensor]


def _judge(of: Variant, ask: LossProblem, upstream: Tensor, exact: Answers, single: Answers, where: str, found: Answers) -> list[Judged]:
    """Every answer's error and limit. exact, single: the answers of statistics in float64 and in float32."""
    q = _rows(ask.problem.q, ask.second)
    others = [x for x in (ask.problem.k, ask.partners) if x is not None] or [q]
    scale = q.new_tensor(ask.value, dtype=torch.float64)
    limits, features = Limits.by(of, scale, q, torch.cat(others)), dict(zip(NAMES[:4], tensors(ask), strict=False))
    total = torch.ones_like(scale) if ask.mean else _total(ask, len(q))
    # The derivative by a weight is the value of a row, times this, and that by a bias a sum of shares that cancel each other.
    times = {"loss": total, "dbias": total * upstream, "dweight": upstream / (_total(ask, len(q)) if ask.mean else 1.0)}
    if ask.by_row:
        weight = torch.ones_like(upstream) if ask.weight is None else ask.weight
        times = {"loss": weight.amax(), "dbias": (weight * upstream).sum(), "dweight": upstream.amax()}
    judged = []
    for name, one in found.items():
        short = name.split()[0]
        given = (name + where, one, exact[short], single[short])
        if (x := features.get(short)) is not None:
            judged.append(limits.features(*given, x))
        else:
            judged.append(limits.rows(*given, times[short]) if short in times else limits.scalar(*given))
    return judged


def _total(ask: LossProblem, rows: int) -> Tensor:
    return torch.tensor(float(rows)) if ask.weight is None else ask.weight.sum()
