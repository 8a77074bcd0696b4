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
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce.backends import proof_losses, torch_tiles
from fastnce.backends._gpu import limits, tiles
from fastnce.backends.trial import GIVEN, RULES, SCALES, SHAPES, Case, Draw, Judged, Limits, U, Variant, row_error
from fastnce.pairs import Pairs
from fastnce.precision import inverse_norms
from fastnce.problem import WITHOUT_METRICS, LossProblem, Problem, Side, SideGrad, Wanted

ROWS = 641
FORMATS = {"float32": 2, "float16": 1, "bfloat16": 1}  # dtype -> parts of its operands, see _gpu/limits.py
# What a call asks of the kernels: the arguments of `completed`, from the dtype on. Every call makes them, to look its backend up, so they
# are cheap; and they are plain values, which are constants where torch traces.
Asked = tuple[Any, ...]


def asked(problem: Problem) -> Asked:
    """What a call through statistics asks."""
    q, pairs = problem.q, problem.pairs
    # A traced size may be a symbol, and so is what is compared with it; a branch that was taken is none, nor is the length of a range.
    several = False
    if problem.symmetric and pairs.offset is not None and 2 * pairs.offset < q.shape[0]:
        several = True
    return (
        q.dtype, len(range(q.shape[-1])), problem.symmetric, problem.two_sided, several, pairs.q_label is not None,
        pairs.q_exclude is not None, pairs.mask is not None, pairs.offset is not None, problem.normalize, problem.bias is not None,
        problem.metrics,
    )  # fmt: skip


def asked_of_loss(ask: LossProblem) -> Asked:
    """The same of a loss."""
    weighted, given = ask.weight is not None, (ask.scale is None, ask.second is not None, ask.partners is not None)
    return (*asked(ask.problem), ask.formula, ask.by_place, *given, weighted and ask.mean, weighted and not ask.mean, ask.by_row)


def settings(dtype: torch.dtype) -> tuple[int, bool]:
    """What torch's settings of this moment ask: in how many parts an operand is held, and whether sums have one order."""
    return limits.parts(dtype), torch.are_deterministic_algorithms_enabled()


def completed(
    parts: int, deterministic: bool, dtype: torch.dtype, columns: int, symmetric: bool, two_sided: bool, several: bool, labels: bool,
    ids: bool, mask: bool, aligned: bool, normalize: bool, bias: bool, metrics: bool, loss: str = "", by_place: bool = False, *given: bool,
) -> Variant:  # fmt: skip
    """The Variant of a call under these settings."""
    depth = tiles.held_depth(parts, tiles.padded_depth(columns))
    shape = "symmetric" if symmetric else "two_sided" if two_sided else "rows"
    has = {"partners": several and not (labels or mask or by_place), "place": by_place, "labels": labels, "ids": ids, "mask": mask}
    rules = "+".join(name for name, one in has.items() if one) or "index"
    of_loss = "+".join(name for name, one in zip(GIVEN, given, strict=False) if one)
    return Variant(str(dtype)[6:], parts, depth, shape, rules, aligned, normalize, bias, metrics, deterministic, loss, of_loss)


def ahead(losses: bool) -> Iterator[tuple[Variant, int]]:
    """The variants that `python -m fastnce check` goes through, each with its D: every format, class of D, shape and rule; then every flag
    beside each format, class and shape. losses: then proof_losses.forms beside each format and class."""
    formats = [*FORMATS.items(), ("float32", 1)]
    for (dtype, parts), columns in product(formats, (*tiles.DEPTHS, 2 * tiles.DEPTHS[-1])):
        depth = tiles.held_depth(parts, columns)
        if not depth and columns in tiles.DEPTHS:
            continue  # the rows of this format are long already
        for shape in SHAPES:
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
        if losses:
            of_format = columns == tiles.DEPTHS[0]
            for one in proof_losses.forms(start, of_format, of_format and (dtype, parts) == formats[0]):
                yield one, columns


def check(backend: ModuleType, of: Variant, columns: int, device: torch.device, rows: int = ROWS) -> str:
    """Solve the problem of a variant. "" where the backend is right, otherwise what differs and by how much, or its exception.

    Raises what torch's own operations raise, and OutOfMemoryError: these say nothing about the backend.
    """
    with torch.no_grad(), _settings(of), _apart(device):
        cases = list((proof_losses.cases if of.loss else _cases)(backend, of, columns, device, rows))
        judged: list[Judged] = []
        try:
            for where, answers, judge in cases:
                with Canaries() as canaries:
                    found = answers(backend)
                judged += judge(found)
                judged.append(Judged("bytes written beside a tensor" + where, canaries.dead(device), 0.0))
            # One read of the device, which also waits for the faults that a GPU reports late.
            numbers = [[torch.as_tensor(x, dtype=torch.float64, device=device) for x in one[1:]] for one in judged]
            errors, bounds = torch.stack([torch.stack(pair) for pair in numbers], 1).tolist()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return _told([one.name for one in judged], errors, bounds)


def _told(names: list[str], errors: list[float], bounds: list[float]) -> str:
    # `not <=` and no `>`: an error may be nan.
    wrong = [n for n, (error, bound) in enumerate(zip(errors, bounds, strict=True)) if not error <= bound]
    if not wrong:
        return ""
    worst = max(wrong, key=lambda n: math.inf if math.isnan(errors[n]) else errors[n] / (bounds[n] or U))
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{names[worst]}: error {errors[worst]:.1e}, limit {bounds[worst]:.1e}{more}"


# The problem of statistics --------------------------------------------------------------------------------------------------------------


def make(of: Variant, columns: int, scale: float, device: torch.device, rows: int) -> tuple[Problem, list[SideGrad]]:
    """The problem of a variant and the upstream gradients of its sides. Equal arguments give equal numbers."""
    draw, symmetric = Draw(of, columns, device), of.shape == "symmetric"
    keys = rows if symmetric else rows + rows // 8
    q, k = draw.features(rows, 1), None if symmetric else draw.features(keys, -1)
    content = draw.content(rows, keys)
    if "mask" in of.rules:
        content["mask"] = (draw.uniform(rows // 3, keys) < 0.1).to(device)
    offset = (rows // 3 if "partners" in of.rules else -(-rows // 2)) if symmetric else rows // 16
    pairs = Pairs(symmetric, offset if of.aligned else None, **content)
    number = torch.tensor(scale, dtype=torch.float32, device=device)
    bias = torch.tensor(-3.0, dtype=torch.float32, device=device) if of.bias else None
    problem = Problem(q, k, number, bias, pairs, of.shape == "two_sided", of.normalize, of.metrics)
    # Another gradient for every row, so that a backward that mixes rows up shows; of one sign, so that little cancels in the derivative by
    # the scale; small, so that float16 holds the gradient of the shortest row.
    ends = [rows, keys] if problem.two_sided else [rows]
    ranges = ((0.5, 1.5), (0.2, 0.6), (-1.5, -0.5))
    upstream = [SideGrad(*(draw.uniform(count, low=low / 16, high=high / 16).to(device) for low, high in ranges)) for count in ends]
    return problem, upstream


def _cases(backend: ModuleType, of: Variant, columns: int, device: torch.device, rows: int) -> Iterator[Case]:
    for scale in SCALES:
        problem, upstream = make(of, columns, scale, device, rows)
        forms = [problem]
        if getattr(backend, "keeps_output", lambda _: False)(problem._replace(frozen=True)):
            forms.append(problem._replace(frozen=True))
        for form in forms:
            exact, single = (_answers(_in(dtype, form), upstream, torch_tiles) for dtype in (torch.float64, torch.float32))
            where = f" at scale {scale:g}" + ", keys without gradient" * form.frozen
            yield Case(where, partial(_answers, form, upstream), partial(_judge, of, form, exact=exact, single=single, where=where))


def _in(dtype: torch.dtype, problem: Problem) -> Problem:
    """The same stored numbers in a wider dtype."""
    bias = None if problem.bias is None else problem.bias.to(dtype)
    k = None if problem.k is None else problem.k.to(dtype)
    return problem._replace(q=problem.q.to(dtype), k=k, scale=problem.scale.to(dtype), bias=bias)


def _answers(problem: Problem, upstream: list[SideGrad], backend: ModuleType) -> dict[str, Tensor]:
    """All that a backend says of a problem, by name."""
    sides = backend.forward(problem)
    found = {f"{name} of the {end}": v for end, side in zip(("rows", "columns"), sides, strict=False) for name, v in side._asdict().items()}
    k = not (problem.symmetric or problem.frozen)
    # Without the derivatives by scale and bias, as with a temperature that is a number, other kernels run.
    for how, wanted in (("", Wanted(True, k, True, problem.bias is not None)), (" alone", Wanted(True, k, False, False))):
        gradients = backend.backward(problem, upstream, [Side(*side[:WITHOUT_METRICS]) for side in sides], wanted)
        found |= {name + how: v for name, v in gradients._asdict().items()}
    return {name: v for name, v in found.items() if v is not None and not name.startswith("own_")}


# The judgement --------------------------------------------------------------------------------------------------------------------------


def _judge(
    of: Variant, problem: Problem, found: dict[str, Tensor], exact: dict[str, Tensor], single: dict[str, Tensor], where: str
) -> list[Judged]:
    """Every answer's error and limit. exact, single: the answers of torch's tiles in float64 and in float32."""
    limits, judged = Limits.by(of, problem.scale, problem.q, problem.keys), []
    of_rows = {"dq": problem.q, "dk": problem.keys}
    for name, right in exact.items():
        given, short = (name + where, found[name], right, single[name]), name.split()[0]
        if name.startswith(("rank", "ties", "hardest", "pos_max")):
            continue
        if name.startswith("n_pos"):
            judged.append(Judged(name + where, (found[name] != right).sum(), 0.0))
        elif short in of_rows:
            judged.append(limits.features(*given, of_rows[short]))
        else:
            judged.append(limits.scalar(*given) if short in ("dscale", "dbias") else limits.rows(*given))
    if of.metrics:
        judged += _judge_metrics(problem, found, limits.of_row, where)
    return judged


def _judge_metrics(problem: Problem, found: dict[str, Tensor], of_row: Tensor, where: str) -> list[Judged]:
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
        judged.append(Judged(f"ranks of the {end}{where}", ((rank < above) | (rank + ties > reached)).sum(), 0.0))
        judged.append(Judged(f"best positives of the {end}{where}", row_error(most, best), of_row))
        judged.append(Judged(f"hardest logits of the {end}{where}", row_error(logit, negatives.amax(1)), of_row))
        chosen = negatives.gather(1, hardest.clamp(min=0)[:, None])[:, 0]
        judged.append(Judged(f"hardest negatives of the {end}{where}", row_error(chosen, negatives.amax(1)), of_row))
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
    EMPTY = {getattr(torch.ops.aten, name).default for name in ("empty_like", "new_empty", "empty_strided")} | {
        torch.ops.aten.empty.memory_format
    }
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
