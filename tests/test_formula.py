"""Each backend has one named pair, term and weight: what a logit adds to the sum of its row, and the derivative of that. Another formula
of the logits changes the pair, and neither the walk over the tiles nor the rules of the pairs."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import oracle
import problems
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import contrastive_stats

ROOT = Path(__file__).parent.parent
PAIR = ("term", "weight")
# The sources of the tiles of each backend, first the file of its pair. Left out are the files that define the exponentials themselves, and
# CUDA's arithmetic in float64 with one number a row.
SOURCES = {
    "reference": ["fastnce/backends/reference.py"],
    "torch": ["fastnce/backends/torch_tiles.py", "fastnce/backends/_tiled/*.py"],
    "cpu": ["csrc/cpu/tile.h", "csrc/cpu/[!tv]*"],
    "triton": ["fastnce/backends/triton/kernels.py", "fastnce/backends/triton/kernels_backward.py"],
    "cuda": ["csrc/cuda/tile.cuh", "csrc/cuda/[!dtv]*.cuh"],
}
# Exponentials outside of the pair are of no logit: each line with its reason.
RESCALED = "a sum so far, brought to a new running maximum"
MERGED = "two sums that have running maxima of their own"
INSIDE = "the base of a row or column inside of its factor"
EXPONENTIALS = {
    "fastnce/backends/torch_tiles.py": {
        "waiting = (total * torch.exp2(top - base)).masked_fill_(top == -torch.inf, 0.0)": MERGED,
        "sum_.mul_(torch.exp2(old - base)).add_(waiting.sum(0, dtype=sum_.dtype)).masked_fill_(new == torch.inf, torch.inf)": RESCALED,
    },
    "fastnce/backends/_tiled/gradients.py": {
        "return torch.exp2(-peak.log2().ceil().nan_to_num(0.0, 0.0, 0.0).clamp(-most, most))": "the power of two that lifts all weights",
        "return torch.exp2((base - own).masked_fill(own.isinf(), 0.0))": "the rounding of a base",
    },
    "csrc/cpu/forward.h": {
        "total *= exp2(top - base);": RESCALED,
        "const double old = *highest == NONE ? 0.0 : *sum * std::exp2(*highest - base);": MERGED,
        "*sum = old + total * std::exp2(top - base);": MERGED,
    },
    "fastnce/backends/triton/kernels.py": {"shrink = tl.exp2(top - base)": RESCALED},
    "fastnce/backends/triton/kernels_backward.py": {"return factor * tl.exp2(-base)": INSIDE},
    "csrc/cuda/tile.cuh": {
        "total *= exp2_fast(top - from);": RESCALED,
        "total = quad_sum(total * exp2_fast(mine - base(top)));": MERGED,
        "of.factor *= exp2_fast(-of.base);": INSIDE,
        "of.factor_pos *= exp2_fast(-of.base_pos);": INSIDE,
    },
    "csrc/cuda/backward.cuh": {
        "columns.field(FACTOR)[column] *= exp2_fast(-columns.field(BASE)[column]);": INSIDE,
        "if (weigher.in_tile) columns.field(FACTOR_POS)[column] *= exp2_fast(-columns.field(BASE_POS)[column]);": INSIDE,
    },
    "csrc/cuda/wgmma_walk.cuh": {
        "if ((f == FACTOR || f == FACTOR_POS) && one_exponential) "
        "value *= exp2_fast(-static_cast<const float*>(from.of[f - 1])[j]);": INSIDE,
    },
}
EXPONENTIAL = r"(log(sum|add))?exp(2|m1)?f?_?(_fast)?|softmax|softplus|(log)?sigmoid"


# ---------------------------------------------------------------- the sources


class Source(NamedTuple):
    """What a file says of the pair: its lines with an exponential outside of the pair, and which of the pair it defines and calls."""

    exponentials: list[str]
    defined: list[str]
    called: list[str]

    @staticmethod
    def of(path: Path) -> Source:
        return Source.of_python(path.read_text()) if path.suffix == ".py" else Source.of_cpp(path.read_text())

    @staticmethod
    def of_python(text: str) -> Source:
        found, lines = Source([], [], []), text.splitlines()

        def see(node: ast.AST, in_pair: bool) -> None:
            if isinstance(node, ast.FunctionDef) and node.name in PAIR:
                found.defined.append(node.name)
                in_pair = True
            # Every use of a name, so that one which is handed over and not called counts too.
            if isinstance(node, ast.Attribute | ast.Name) and not in_pair:
                name = node.attr if isinstance(node, ast.Attribute) else node.id
                if re.fullmatch(EXPONENTIAL, name):
                    found.exponentials.append(lines[node.lineno - 1].strip())
                if name in PAIR:
                    found.called.append(name)
            for child in ast.iter_child_nodes(node):
                see(child, in_pair)

        see(ast.parse(text), False)
        return found

    @staticmethod
    def of_cpp(text: str) -> Source:
        found = Source([], [], [])
        for line in text.splitlines():
            line = line.partition("//")[0].strip()
            if definition := re.match(r"FASTNCE_\w+ \w+ (term|weight)\(\w+ t\b.*\}$", line):
                found.defined.append(definition[1])
                continue
            found.called.extend(re.findall(r"(?<![\w.])(term|weight)\(", line))
            if re.search(rf"\b_*({EXPONENTIAL})\s*\(|\bex2\.", line):
                found.exponentials.append(line)
        return found


def sources(name: str) -> Iterator[tuple[str, Source]]:
    paths = [path for pattern in SOURCES[name] for path in sorted(ROOT.glob(pattern))]
    assert len(set(paths)) == len(paths) >= len(SOURCES[name])
    return ((str(path.relative_to(ROOT)), Source.of(path)) for path in paths)


@pytest.mark.parametrize("name", SOURCES)
def test_the_pair_is_in_one_place_and_in_use(name: str) -> None:
    (first, pair), *others = sources(name)
    assert first == SOURCES[name][0] and set(pair.defined) == set(PAIR)
    assert not [other for other, source in others if source.defined]
    assert {called for source in (pair, *(source for _, source in others)) for called in source.called} == set(PAIR)


@pytest.mark.parametrize("name", SOURCES)
def test_only_the_pair_takes_the_exponential_of_a_logit(name: str) -> None:
    for path, source in sources(name):
        assert sorted(source.exponentials) == sorted(EXPONENTIALS.get(path, {})), path


def test_the_table_names_no_file_that_is_gone() -> None:
    assert EXPONENTIALS.keys() <= {path for name in SOURCES for path, _ in sources(name)}


def test_an_exponential_elsewhere_is_found() -> None:
    python = '''
def term(t, base):
    return torch.exp2(t - base)

def walk(t):
    """torch.exp2(t) is in words alone."""
    total = term(t, 0).sum() + tl.exp2(t)  # exp2(t)
    return total + apply(t, torch.sigmoid), t.exp2_(), t.logsumexp(1), t.expand(3)
'''
    found, lines = Source.of_python(python), [line.strip() for line in python.splitlines()]
    assert found.defined == found.called == ["term"]
    assert found.exponentials == [lines[6], *[lines[7]] * 3]
    cpp = """
// exp2(t)
FASTNCE_INLINE Vec term(Vec t) { return exp2(t); }
FASTNCE_INLINE Vec weight(Vec t, Vec base) { return term(t, base); }
  total += term(t) + x.weight(t) + std::exp2(t) + wgmma_expect(t);
  w = weight(t) * __expf (t);
"""
    found, lines = Source.of_cpp(cpp), [line.strip() for line in cpp.splitlines()]
    assert found.defined == found.called == list(PAIR)
    assert found.exponentials == lines[4:]


# ---------------------------------------------------------------- another formula

LN2 = torch.tensor(2.0, dtype=torch.float64).log()


def softplus(s: Tensor) -> Tensor:
    return F.softplus(s, threshold=50)  # beyond the default of 20 it is s itself, and the gradient 1, 2e-9 off


def based(formula: Callable[[Tensor], Tensor], of_base: Callable[[Tensor], Tensor], unit: Tensor) -> Callable[..., Tensor]:
    """A function of the pair: formula(s), divided by the base's exponential where there is a base. Logits are in units of `unit` nats."""

    def function(t: Tensor, base: Tensor | None = None) -> Tensor:
        value = formula(t * unit)
        return value if base is None else value / of_base(base)

    return function


@pytest.mark.parametrize("scale", [10.0, 400.0], ids=["unshifted", "running maximum"])
@pytest.mark.parametrize("why", ["queue", "simclr:", "supcon: labels", "clip captions:", "excluded symmetric"])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_another_formula_changes_the_pair_alone(
    name: str, why: str, scale: float, small_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With softplus and sigmoid in the pair, a log-sum is log sum softplus(s), bias included, and its gradient is that of autograd."""
    module = importlib.import_module("fastnce.backends." + {"reference": "reference", "torch": "torch_tiles"}[name])
    unit, of_base = {"reference": (torch.ones_like(LN2), torch.exp), "torch": (LN2, torch.exp2)}[name]
    monkeypatch.setattr(module, "term", based(softplus, of_base, unit))
    monkeypatch.setattr(module, "weight", based(torch.sigmoid, of_base, unit))
    p = problems.of(why, scale=scale, bias=-3.0)
    q, k, factor, bias = p.tensors()
    leaves = [leaf.requires_grad_() for leaf in (q, k) if leaf is not None]
    s, kinds = oracle.logits(q, q if k is None else k, factor, bias, p.normalize), oracle.classes(p)

    def expected(s: Tensor, kinds: Tensor, kind: int) -> Tensor:
        return softplus(s).masked_fill(kinds != kind, 0.0).sum(1).log()

    found = contrastive_stats(q, k, scale=factor, bias=bias, **p.call(), backend=name)
    pairs = [(found.lse_neg, expected(s, kinds, oracle.NEGATIVE))]
    several = found.n_pos > 1  # one positive alone is no sum: its logit is its log-sum
    pairs.append((found.lse_pos[several], expected(s, kinds, oracle.POSITIVE)[several]))
    if found.columns is not None:
        pairs.append((found.columns.lse_neg, expected(s.T, kinds.T, oracle.NEGATIVE)))
    total, truth = torch.zeros_like(LN2), torch.zeros_like(LN2)
    for got, wanted in pairs:
        some = wanted > -torch.inf
        assert torch.equal(some, got > -torch.inf)
        torch.testing.assert_close(got[some], wanted[some], rtol=1e-12, atol=1e-12)
        upstream = torch.linspace(-1.0, 1.0, len(some), dtype=torch.float64)[some]
        total, truth = total + (got[some] * upstream).sum(), truth + (wanted[some] * upstream).sum()
    for got, wanted in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
