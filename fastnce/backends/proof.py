"""The proof of a GPU backend: one problem, and how far the backend's answer may be from that of torch's own operations on the same device.

The problem is as small as it may be without hiding a fault: 641 rows fill several tiles and a ragged last one, and are cut into several
splits. It is solved three times: by torch's tiles in float64, which counts as exact; by torch's tiles in float32, whose error is the
measure; by the backend, whose error may be twice as large (train_ref/truth/contract.py has the same limits for the tests). verdicts.py
says when a backend is put to the proof, and remembers how it went.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce.backends import torch_tiles
from fastnce.backends._gpu import limits, tiles
from fastnce.formulas import l_out
from fastnce.pairs import Pairs
from fastnce.precision import inverse_norms
from fastnce.problem import WITHOUT_METRICS, LossProblem, LossWanted, Problem, Side, SideGrad, Wanted

ROWS = 641
# Kernels keep no running maximum up to a scale of 40 (UNSHIFTED of triton/kernels.py), and above it they do: one scale for either.
SCALES = (10.0, 60.0)
FORMATS = {"float32": 2, "float16": 1, "bfloat16": 1}  # dtype -> parts of its operands, see _gpu/limits.py
SHAPES = ("rows", "two_sided", "symmetric")
# How pairs are told apart: by index alone, or by the tensors of these names. Two partners of one row are looked for in the tiles too.
RULES = ("index", "partners", "labels", "ids", "mask")

U = 2.0**-24  # half of float32's relative spacing at 1
TF32 = 2.0**-11  # the same of TF32, of both factors of a product together
STORED = {"bfloat16": 2.0**-8, "float16": 2.0**-10}  # the cost of rounding a half-precision gradient once


class Variant(NamedTuple):
    """All that decides which kernels run. Keys that get no gradient are proven as well wherever the backend treats them apart."""

    dtype: str
    parts: int  # 1 where operands are one float16 number, also float32 where TF32 is allowed
    depth: int  # padded D of a tile that holds whole rows; 0: rows are longer
    shape: str  # of SHAPES
    rules: str  # of RULES, several joined by "+"
    aligned: bool  # positives by place
    normalize: bool = True
    bias: bool = False
    metrics: bool = False
    deterministic: bool = False

    def __str__(self) -> str:
        tf32 = " (TF32)" if self.dtype == "float32" and self.parts == 1 else ""
        columns = f"D <= {self.depth}" if self.depth else "long rows"
        flags = ["aligned"] * self.aligned + ["dot products"] * (not self.normalize)
        flags += [name for name in ("bias", "metrics", "deterministic") if getattr(self, name)]
        return ", ".join([self.dtype + tf32, columns, self.shape, self.rules, *flags])


def variant(problem: Problem) -> tuple[int, tuple[str, str, str, bool, bool, bool, bool]]:
    """D, and the fields of a Variant that follow from a problem: dtype, shape, rules, ... as plain values, also while torch traces."""
    q, pairs = problem.q, problem.pairs
    shape = "symmetric" if problem.symmetric else "two_sided" if problem.two_sided else "rows"
    one = pairs.one_positive_at_most(q.shape[0], problem.symmetric)
    named = (("labels", pairs.q_label), ("ids", pairs.q_exclude), ("mask", pairs.mask))
    rules = [name for name, given in named if given is not None]
    if not (one or pairs.positives_by_content()):
        rules.append("partners")
    flags = (pairs.offset is not None, problem.normalize, problem.bias is not None, problem.metrics)
    # A traced size may be a symbol; the length of a range is a number.
    return len(range(q.shape[1])), (str(q.dtype)[6:], shape, "+".join(rules) or "index", *flags)


def completed(columns: int, dtype: str, shape: str, rules: str, aligned: bool, normalize: bool, bias: bool, metrics: bool) -> Variant:
    """The Variant of these fields under torch's settings of this moment."""
    parts = limits.parts(getattr(torch, dtype))
    depth = tiles.held_depth(parts, tiles.padded_depth(columns))
    return Variant(dtype, parts, depth, shape, rules, aligned, normalize, bias, metrics, torch.are_deterministic_algorithms_enabled())


def ahead() -> Iterator[tuple[Variant, int]]:
    """The variants that `python -m fastnce check` goes through, each with its D: every format, class of D, shape and rule; then every flag
    beside each format, class and shape."""
    formats = [*FORMATS.items(), ("float32", 1)]
    for (dtype, parts), columns, shape in product(formats, (*tiles.DEPTHS, 2 * tiles.DEPTHS[-1]), SHAPES):
        depth = tiles.held_depth(parts, columns)
        if not depth and columns in tiles.DEPTHS:
            continue  # the rows of this format are long already
        start = Variant(dtype, parts, depth, shape, "index", True)
        for rules in RULES:
            if not (shape == "symmetric" and rules == "mask") and not (shape != "symmetric" and rules == "partners"):
                # Labels and masks name the positives; ids leave pairs out beside those on a diagonal.
                yield start._replace(rules=rules, aligned=rules in ("index", "partners", "ids")), columns
        if shape == "rows":
            yield start._replace(aligned=False), columns
        for one in (
            start._replace(normalize=False), start._replace(bias=True), start._replace(metrics=True), start._replace(deterministic=True)
        ):  # fmt: skip
            yield one, columns


def check(backend: ModuleType, of: Variant, columns: int, device: torch.device, rows: int = ROWS) -> str:
    """Solve the problem of a variant. "" where the backend is right, otherwise what differs and by how much, or its exception.

    Raises what torch's own operations raise, and OutOfMemoryError: these say nothing about the backend.
    """
    with torch.no_grad(), _settings(of), _apart(device):
        # A mask is no matter of the pair for a loss, and without positives a loss is 0.
        plain = not of.metrics and "mask" not in of.rules and (of.aligned or "labels" in of.rules)
        makes_loss, cases = plain and hasattr(backend, "loss"), []
        for scale in SCALES:
            problem, upstream = make(of, columns, scale, device, rows)
            forms = [problem]
            if getattr(backend, "keeps_output", lambda _: False)(problem._replace(frozen=True)):
                forms.append(problem._replace(frozen=True))
            for form in forms:
                exact, single = (_answers(torch_tiles, _in(dtype, form), upstream) for dtype in (torch.float64, torch.float32))
                if makes_loss:
                    exact, single = (
                        known | _loss_from_statistics(_in(dtype, form))
                        for known, dtype in ((exact, torch.float64), (single, torch.float32))
                    )
                cases.append((f" at scale {scale:g}" + ", keys without gradient" * form.frozen, form, upstream, exact, single))
        judged: list[_Judged] = []
        try:
            for where, form, upstream, exact, single in cases:
                with Canaries() as canaries:
                    found = _answers(backend, form, upstream) | (_loss(backend, form) if makes_loss else {})
                judged += _judge(of, form, found, exact, single, where)
                judged.append(_Judged("bytes written beside a tensor" + where, canaries.dead(device), 0.0))
            # One read of the device, which also waits for the faults that a GPU reports late.
            numbers = [[torch.as_tensor(x, dtype=torch.float64, device=device) for x in one[1:]] for one in judged]
            errors, bounds = torch.stack([torch.stack(pair) for pair in numbers], 1).tolist()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return _told([one.name for one in judged], errors, bounds)


class _Judged(NamedTuple):
    name: str
    error: Tensor
    limit: Tensor | float


def _told(names: list[str], errors: list[float], bounds: list[float]) -> str:
    # `not <=` and no `>`: an error may be nan.
    wrong = [n for n, (error, bound) in enumerate(zip(errors, bounds, strict=True)) if not error <= bound]
    if not wrong:
        return ""
    worst = max(wrong, key=lambda n: math.inf if math.isnan(errors[n]) else errors[n] / (bounds[n] or U))
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{names[worst]}: error {errors[worst]:.1e}, limit {bounds[worst]:.1e}{more}"


# The problem ----------------------------------------------------------------------------------------------------------------------------


def make(of: Variant, columns: int, scale: float, device: torch.device, rows: int) -> tuple[Problem, list[SideGrad]]:
    """The problem of a variant and the upstream gradients of its sides. Equal arguments give equal numbers; torch's own generator rests."""
    generator = torch.Generator().manual_seed(0)
    symmetric, keys = of.shape == "symmetric", rows if of.shape == "symmetric" else rows + rows // 8

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    def ids(count: int, kinds: int) -> Tensor:
        """One in nine is negative, and matches nothing."""
        return torch.randint(-kinds // 8, kinds, (count,), generator=generator).to(device)

    def features(count: int, reach: float) -> Tensor:
        x = torch.randn(count, max(columns, 48 if columns % 16 == 0 else 33), generator=generator, dtype=torch.float64)
        lengths = torch.logspace(-reach, reach, count, dtype=torch.float64)[:, None]
        return (x / torch.linalg.vector_norm(x, dim=1, keepdim=True) * lengths).to(device, getattr(torch, of.dtype))

    # Dot products of long rows would leave nothing but the largest.
    reach = 3.0 if of.normalize else 0.3
    q, k = features(rows, reach), None if symmetric else features(keys, -reach)
    content: dict[str, Tensor] = {}
    for rule, name, kinds in (("labels", "label", rows // 8), ("ids", "exclude", rows // 4)):
        if rule in of.rules:
            content |= {f"q_{name}": ids(rows, kinds)} | ({} if symmetric else {f"k_{name}": ids(keys, kinds)})
    if "mask" in of.rules:
        content["mask"] = (uniform(rows // 3, keys) < 0.1).to(device)
    offset = (rows // 3 if "partners" in of.rules else -(-rows // 2)) if symmetric else rows // 16
    pairs = Pairs(symmetric, offset if of.aligned else None, **content)
    number = torch.tensor(scale, dtype=torch.float32, device=device)
    bias = torch.tensor(-3.0, dtype=torch.float32, device=device) if of.bias else None
    problem = Problem(q, k, number, bias, pairs, of.shape == "two_sided", of.normalize, of.metrics)
    # Another gradient for every row, so that a backward that mixes rows up shows; of one sign, so that little cancels in the derivative by
    # the scale; small, so that float16 holds the gradient of the shortest row.
    ends = [rows, keys] if problem.two_sided else [rows]
    ranges = ((0.5, 1.5), (0.2, 0.6), (-1.5, -0.5))
    upstream = [SideGrad(*(uniform(count, low=low / 16, high=high / 16).to(device) for low, high in ranges)) for count in ends]
    return problem, upstream


def _in(dtype: torch.dtype, problem: Problem) -> Problem:
    """The same stored numbers in a wider dtype."""
    bias = None if problem.bias is None else problem.bias.to(dtype)
    k = None if problem.k is None else problem.k.to(dtype)
    return problem._replace(q=problem.q.to(dtype), k=k, scale=problem.scale.to(dtype), bias=bias)


# The upstream gradient of a loss.
UPSTREAM = 0.37


def _loss(backend: ModuleType, problem: Problem) -> dict[str, Tensor]:
    """InfoNCE's mean and its gradients, by the backend's pair of functions for a loss: with a scale that is a tensor, and with a number."""
    k, found = not (problem.symmetric or problem.frozen), dict[str, Tensor | None]()
    upstream = torch.tensor(UPSTREAM, device=problem.q.device)
    a_tensor = LossProblem(problem, "out", True, scale=problem.scale)
    for how, ask in (
        (" of the loss", a_tensor),
        (" of the loss, scale a number", a_tensor._replace(scale=None, value=float(problem.scale))),
    ):
        loss, kept = backend.loss(ask)
        wanted = LossWanted(True, False, k, False, ask.scale is not None, False, False)
        dq, _, dk, _, dscale, *_ = backend.gradients(ask, kept, upstream, wanted)
        found |= {"value" + how: loss, "dq" + how: dq, "dk" + how: dk, "dscale" + how: dscale}
    return {name: v for name, v in found.items() if v is not None}


def _loss_from_statistics(problem: Problem) -> dict[str, Tensor]:
    """The same by torch's tiles, formulas.py and autograd."""
    sides = torch_tiles.forward(problem)
    k = not (problem.symmetric or problem.frozen)
    with torch.enable_grad():
        leaves = [[v.detach().requires_grad_() for v in side[:3]] for side in sides]
        values = [l_out(side._replace(lse_neg=a, lse_pos=b, pos=c)).mean() for side, (a, b, c) in zip(sides, leaves, strict=True)]
        loss = torch.stack(values).mean()
        grads = torch.autograd.grad(loss * UPSTREAM, [v for side in leaves for v in side], materialize_grads=True)
    given = [SideGrad(*grads[n : n + 3]) for n in range(0, len(grads), 3)]
    dq, dk, dscale, _ = torch_tiles.backward(problem, given, sides, Wanted(True, k, True, False))
    found = {"value": loss.detach(), "dq": dq, "dk": dk, "dscale": dscale}
    both = {name + how: v for how in (" of the loss", " of the loss, scale a number") for name, v in found.items()}
    return {name: v for name, v in both.items() if v is not None and name != "dscale of the loss, scale a number"}


def _answers(backend: ModuleType, problem: Problem, upstream: list[SideGrad]) -> dict[str, Tensor]:
    """All that a backend says of a problem through its statistics, by name."""
    sides = backend.forward(problem)
    found = {f"{name} of the {end}": v for end, side in zip(("rows", "columns"), sides, strict=False) for name, v in side._asdict().items()}
    k = not (problem.symmetric or problem.frozen)
    # Without the derivatives by scale and bias, as with a temperature that is a number, other kernels run.
    for how, wanted in (("", Wanted(True, k, True, problem.bias is not None)), (" alone", Wanted(True, k, False, False))):
        gradients = backend.backward(problem, upstream, [Side(*side[:WITHOUT_METRICS]) for side in sides], wanted)
        found |= {name + how: v for name, v in gradients._asdict().items()}
    return {name: v for name, v in found.items() if v is not None and not name.startswith("own_")}


# The judgement --------------------------------------------------------------------------------------------------------------------------


def relative(found: Tensor, exact: Tensor) -> Tensor:
    """Relative error of a vector or matrix, by the root of the sum of squares."""
    return (found.double() - exact).norm() / exact.norm()


def _judge(
    of: Variant, problem: Problem, found: dict[str, Tensor], exact: dict[str, Tensor], single: dict[str, Tensor], where: str
) -> list[_Judged]:
    """Every answer's error and limit. exact, single: the answers of torch's tiles in float64 and in float32."""
    q, k = problem.q.double(), problem.keys.double()
    lengths = {"dq": torch.linalg.vector_norm(q, dim=1, keepdim=True), "dk": torch.linalg.vector_norm(k, dim=1, keepdim=True)}
    largest = problem.scale if of.normalize else problem.scale * lengths["dq"].amax() * lengths["dk"].amax()
    largest = largest.clamp(min=1.0).double()
    # Where TF32 is allowed no logit is more exact than its two rounded factors.
    coarse = largest * TF32 if of.dtype == "float32" and of.parts == 1 else 0.0
    of_row, half, judged = 32 * U * largest + coarse, of.dtype in STORED, []
    for name, right in exact.items():
        if name.startswith(("rank", "ties", "hardest", "pos_max")):
            continue
        if name.startswith("n_pos"):
            judged.append(_Judged(name + where, (found[name] != right).sum(), 0.0))
        elif (feature := name.split()[0]) in lengths:
            # Times the length of the row: the short rows' gradients, which are as much longer, would hide those of the others.
            one, other, true = (g[name].double() * lengths[feature] for g in (found, single, exact))
            bound = 2 * relative(other, true) + 16 * U * (largest / 50).clamp(min=1.0) + coarse
            if half:  # float16 holds the long rows' gradients in few digits
                stored = right.to(getattr(torch, of.dtype)).double() * lengths[feature]
                bound = (bound + relative(stored, true)).clamp(min=STORED[of.dtype])
            judged.append(_Judged(name + where, relative(one, true), bound))
        elif feature in ("dscale", "dbias"):
            error, float32 = relative(found[name], right), 2 * relative(single[name], right) + 1e-5 + coarse
            judged.append(_Judged(name + where, error, float32.clamp(min=1e-3) if half else float32))
        else:
            judged.append(_Judged(name + where, row_error(found[name], right), 2 * row_error(single[name], right) + of_row))
    if of.metrics:
        judged += _judge_metrics(problem, found, of_row, where)
    return judged


def row_error(found: Tensor, exact: Tensor) -> Tensor:
    """Largest absolute error over the rows; inf where an infinite one is not the same in both."""
    error = (found.double() - exact).abs()
    return torch.where(found.double() == exact, 0.0, error.nan_to_num(torch.inf)).amax()


def _judge_metrics(problem: Problem, found: dict[str, Tensor], of_row: Tensor, where: str) -> list[_Judged]:
    """Ranks and hardest negatives against all logits in float64: logits that float32 cannot tell apart may change their places."""
    q, k, judged = problem.q.double(), problem.keys.double(), []
    units = [x * inverse_norms(x)[:, None] if problem.normalize else x for x in (q, k)]
    s = problem.scale.double() * (units[0] @ units[1].T)
    s = s if problem.bias is None else s + problem.bias.double()
    positive, excluded = problem.pairs.dense(len(q), len(k), problem.symmetric, q.device)
    for end in ("rows", "columns") if problem.two_sided else ("rows",):
        rank, ties, hardest, logit, most = (
            found[f"{name} of the {end}"] for name in ("rank", "ties", "hardest", "hardest_logit", "pos_max")
        )
        negatives, best = s.masked_fill(positive | excluded, -torch.inf), s.masked_fill(~positive, -torch.inf).amax(1)
        above, reached = ((negatives > best[:, None] + sign * of_row).sum(1) for sign in (1, -1))
        judged.append(_Judged(f"ranks of the {end}{where}", ((rank < above) | (rank + ties > reached)).sum(), 0.0))
        judged.append(_Judged(f"best positives of the {end}{where}", row_error(most, best), of_row))
        judged.append(_Judged(f"hardest logits of the {end}{where}", row_error(logit, negatives.amax(1)), of_row))
        chosen = negatives.gather(1, hardest.clamp(min=0)[:, None])[:, 0]
        judged.append(_Judged(f"hardest negatives of the {end}{where}", row_error(chosen, negatives.amax(1)), of_row))
        s, positive, excluded = s.T, positive.T, excluded.T
    return judged


# The surroundings -----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _settings(of: Variant) -> Iterator[None]:
    """torch's settings as the variant has them. They belong to the whole process: none is touched that is right already."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    change = limits.parts(getattr(torch, of.dtype)) != of.parts
    try:
        if change:
            matmul.fp32_precision = "tf32" if of.parts == 1 else "ieee"
        if deterministic != of.deterministic:
            torch.use_deterministic_algorithms(of.deterministic)
        yield
    finally:
        if change:
            matmul.fp32_precision = before
        if deterministic != of.deterministic:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """On this GPU, on a stream of its own: the work that waits on the caller's is not waited for."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


class Canaries(TorchDispatchMode):
    """Memory that is allocated lies between two strips of known bytes, and holds nan, or -1, until it is written."""

    STRIP = 1024  # bytes; a multiple of every alignment that kernels count on
    BYTE = 0xFF
    EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default}
    ZEROS = {torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default}

    def __init__(self) -> None:
        super().__init__()
        self.strips: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (func not in self.EMPTY and func not in self.ZEROS) or out.numel() == 0:
            return out
        size = out.untyped_storage().nbytes()
        padded = size + -size % self.STRIP
        memory = torch.full((padded + 2 * self.STRIP,), self.BYTE, dtype=torch.uint8, device=out.device)
        self.strips += [memory[: self.STRIP], memory[self.STRIP + size :]]
        held = memory[self.STRIP : self.STRIP + size].view(out.dtype).as_strided(out.shape, out.stride())
        return held.zero_() if func in self.ZEROS else held

    def dead(self, device: torch.device) -> Tensor:
        """How many bytes of the strips were written."""
        written = [(strip != self.BYTE).sum() for strip in self.strips if strip.device == device]
        return torch.stack(written).sum() if written else torch.zeros((), device=device)
