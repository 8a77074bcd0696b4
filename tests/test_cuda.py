"""The CUDA kernels on an emulated GPU: every problem forward and backward by both families of kernels, every kind of tile, every walk.

Each block runs its threads in another order, what is under way is spoiled until it is waited for, and threads that disagree end the
program: tests/native/emulator.h. The passes over rows and vectors are in test_cuda_rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gpu_promises
import pytest
import rank_promises
import test_statistics as whole_suite
import test_wide
import torch
from problems import PROBLEMS, Call, of
from torch import Tensor
from torch._subclasses.schema_check_mode import SchemaCheckMode

import fastnce
from fastnce import contrastive_stats
from fastnce.backends._gpu import host, tiles
from fastnce.backends.cuda import launches
from train_ref.truth import contract

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
# mma.sync and wgmma, with whole rows in shared memory, and rows that fit into none: of those there is one family.
FAMILIES = ("mma", "wgmma", "long")
# The wgmma kernels serve float16 operands of one part.
WGMMA_KERNELS = {"forward_rows", "forward_both", "backward_rows"}


class Launch(NamedTuple):
    """One launch over tiles."""

    kernel: str
    family: int
    parts: int
    depth: int
    blocks: int
    splits: int
    per_split: int


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    seen: list[Launch] = []
    launch = launches.launch

    def spy(name: str, view: Any, walk: Any, *rest: Any) -> None:
        seen.append(Launch(name, walk.tile.family, view.parts, view.depth, *walk[1:]))
        launch(name, view, walk, *rest)

    monkeypatch.setattr(launches, "launch", spy)
    return seen


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, emulated_cuda: None, poisoned: None) -> str:
    """Several splits. Long rows are read in three chunks: a depth that no kernel holds whole."""
    name = str(getattr(request, "param", "mma"))
    use(name, monkeypatch)
    monkeypatch.setattr(host, "multiprocessors", lambda device: 4)
    return name


def use(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "architecture", lambda device: 80 if family == "mma" else 90)
    if family == "long":
        monkeypatch.setattr(tiles, "DEPTHS", ())
        monkeypatch.setattr(tiles, "STEP", 192)
        monkeypatch.setattr(tiles, "LONGEST_HELD", 0)
        monkeypatch.setattr(tiles, "BLOCK", 128)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(p: Call, dtype: torch.dtype, family: str, launched: list[Launch]) -> None:
    """Within the budget, by the kernels that were meant."""
    launched.clear()
    whole_suite.check(p, dtype, "cuda")
    assert launched
    for launch in launched:
        assert launch.family == (family == "wgmma" and launch.parts == 1 and launch.kernel in WGMMA_KERNELS)
    assert ("weights_block" in {launch.kernel for launch in launched}) == (family == "long")


def cases(*chosen: tuple[str, torch.dtype]) -> Any:
    ids = [f"{family} {str(dtype)[6:]}" for family, dtype in chosen]
    return pytest.mark.parametrize(("family", "dtype"), chosen, ids=ids, indirect=["family"])


@cases(("mma", FLOAT), ("mma", BFLOAT), ("wgmma", HALF), ("long", FLOAT), ("long", HALF))
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_values_and_gradients(p: Call, dtype: torch.dtype, family: str, launched: list[Launch]) -> None:
    check(p, dtype, family, launched)


# Larger than a tile ---------------------------------------------------------------------------------------------------------------------


# (problem, multiprocessors, who solves it). One multiprocessor makes two programs per launch, so few and long walks: tiles before, on and
# behind the diagonals, plain ones before the others, odd and even numbers of them, rings that are filled again. Four make several splits.
LARGE = {
    "odd circle": (of("simclr:", m=300, offset=150, d=64), 4, [("mma", FLOAT), ("wgmma", HALF)]),
    "even circle": (of("simclr:", m=390, offset=195, d=128), 1, [("mma", BFLOAT), ("wgmma", BFLOAT)]),
    "deepest circle": (of("two partners", m=250, offset=60, d=256), 4, [("mma", HALF), ("wgmma", BFLOAT)]),
    "circle of ids": (of("supcon:", m=260, d=64, labels=40), 1, [("mma", BFLOAT), ("wgmma", HALF)]),
    "circle of ids, two parts": (of("excluded symmetric", m=260, offset=130, d=128, excludes=40), 4, [("mma", FLOAT)]),
    "low temperature": (of("low temperature:", m=390, offset=195, d=64), 1, [("mma", FLOAT), ("wgmma", HALF)]),
    "low temperature, columns": (
        of("low temperature, labels", m=150, n_keys=270, d=128, labels=30),
        1,
        [("mma", FLOAT), ("wgmma", BFLOAT)],
    ),
    "both directions": (of("clip offset", m=200, n_keys=333, offset=130, d=256), 1, [("mma", BFLOAT), ("wgmma", HALF)]),
    "both directions, cone": (of("cone", m=300, n_keys=300, d=64), 1, [("mma", FLOAT), ("wgmma", HALF)]),
    "mask": (of("mask:", m=180, d=256, mask=(90, 90)), 4, [("mma", BFLOAT), ("wgmma", HALF)]),
    "excluded": (of("excluded documents", m=150, n_keys=260, d=128, excludes=30), 1, [("mma", FLOAT), ("wgmma", BFLOAT)]),
    "seven plain tiles": (of("queue", m=130, n_keys=1000, d=64), 1, [("wgmma", HALF)]),
    "plain and masked": (of("in-batch", m=140, n_keys=890, d=128), 1, [("mma", HALF), ("wgmma", BFLOAT)]),
    "negative offset": (of("negative", m=300, n_keys=290, offset=-131, d=64), 1, [("mma", HALF), ("wgmma", BFLOAT)]),
    "not normalized": (of("not normalized, large", m=150, n_keys=260, d=64), 4, [("mma", FLOAT), ("wgmma", HALF)]),
    "long circle": (of("simclr:", m=300, offset=150, d=300), 4, [("long", BFLOAT)]),
    "long, both directions": (of("clip captions:", m=150, n_keys=270, d=150, labels=60), 4, [("long", FLOAT)]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "dtype"),
    [pytest.param(name, *how, id=f"{name}, {how[0]} {str(how[1])[6:]}") for name, (_, _, hows) in LARGE.items() for how in hows],
    indirect=["family"],
)
def test_more_than_one_tile(name: str, dtype: torch.dtype, family: str, launched: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    p, multiprocessors, _ = LARGE[name]
    monkeypatch.setattr(host, "multiprocessors", lambda device: multiprocessors)
    check(p, dtype, family, launched)
    walks = [launch for launch in launched if launch.kernel != "weights_block"]
    assert all(launch.blocks > 1 for launch in walks)
    assert all(launch.per_split > 1 for launch in walks) if multiprocessors == 1 else any(launch.splits > 1 for launch in walks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "dtype"),
    [(of("queue", m=50, n_keys=2000, d=64), FLOAT), (of("cone", d=1024), FLOAT), (of("cone", d=2048), BFLOAT)],
    ids=["columns", "two parts", "one part"],
)
def test_long_sums_keep_their_last_bits(p: Call, dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores round every sum towards zero, here too: 375 times in a row that is twice the budget of a gradient, and along 1,024
    columns of rows that are alike twice that of a logit."""
    monkeypatch.setattr(host, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    whole_suite.check(p, dtype, "cuda")


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("p", [of("in-batch"), of("simclr:", m=150, offset=75, d=64), of("clip captions:")], ids=str)
def test_float32_in_one_part_where_tf32_is_allowed(p: Call, family: str, launched: list[Launch]) -> None:
    """The error then is that of float16's 11 bits: above that of two parts, within what TF32 may cost."""
    exact, exact_grads, largest = whole_suite.exact_run(p, FLOAT)
    torch.set_float32_matmul_precision("high")
    try:
        found, grads = whole_suite.run(p, FLOAT, "cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {launch.parts for launch in launched} == {1} and {launch.family for launch in launched} == {int(family == "wgmma")}
    assert 1e-6 * p.scale < contract.row_error(found[0], exact[0]) <= 2.0**-12 * p.scale
    for grad, e in zip(grads[:2], exact_grads[:2], strict=True):
        assert e is None or contract.relative(grad, e) <= 2.0**-9 * largest


@pytest.mark.parametrize("p", [of("simclr:"), of("clip:"), of("clip captions:"), of("supcon:"), of("low temperature:")], ids=str)
@cases(("mma", FLOAT), ("wgmma", BFLOAT), ("long", BFLOAT))
def test_deterministic_mode_adds_in_one_order(
    p: Call, dtype: torch.dtype, family: str, launched: list[Launch], deterministic: None
) -> None:
    """No kernel adds to a number of another program; a second run, in which threads take turns in another order, has the same bits."""
    check(p, dtype, family, launched)
    assert "forward_rows" in {launch.kernel for launch in launched} and "forward_both" not in {launch.kernel for launch in launched}
    first, second = whole_suite.run(p, dtype, "cuda"), whole_suite.run(p, dtype, "cuda")
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert a is b is None or torch.equal(a, b)


# Ranks ----------------------------------------------------------------------------------------------------------------------------------


@cases(("mma", FLOAT), ("mma", HALF), ("long", BFLOAT))
@pytest.mark.parametrize("p", [p for p in PROBLEMS if p.m > 9 and "large" not in p.why], ids=str)
def test_metrics_are_exact_where_logits_are(p: Call, dtype: torch.dtype, family: str) -> None:
    """Small whole numbers and a power of two as scale: no logit is rounded, many are equal, and every count is that of a dense sort. Of
    equal columns the first is the hardest."""
    sides = torch.randint(-2, 3, (2, max(p.m, p.n), p.d), generator=torch.Generator().manual_seed(0))
    q, k = sides[0, : p.m], None if p.symmetric else sides[1, : p.n]
    call = p.call() | {"normalize": False, "scale": 0.5, "metrics": True}
    found = contrastive_stats(q.to(dtype), None if k is None else k.to(dtype), backend="cuda", **call)
    dense = contrastive_stats(q.double(), None if k is None else k.double(), backend="reference", **call)
    for mine, exact in [(found, dense), (found.columns, dense.columns)][: 2 if p.two_sided else 1]:
        for name in ("rank", "ties", "hardest"):
            assert torch.equal(getattr(mine, name), getattr(exact, name)), name
        for name in ("hardest_logit", "pos_max"):
            torch.testing.assert_close(getattr(mine, name).double(), getattr(exact, name), rtol=4 * contract.U, atol=0, msg=name)


@pytest.mark.parametrize("promise", rank_promises.PROMISES, ids=lambda promise: promise.__name__)
def test_ranks(promise: Callable[[str], None], family: str) -> None:
    promise("cuda")


@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_the_first_of_equal_columns_is_the_hardest(multiprocessors: int, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is there 60 times, in every tile and every split."""
    monkeypatch.setattr(host, "multiprocessors", lambda device: multiprocessors)
    q, k = torch.eye(5).repeat(30, 1), torch.eye(5).repeat(60, 1)
    found = contrastive_stats(q, k, scale=4.0, offset=2, metrics=True, backend="cuda")
    own = torch.arange(150) % 5
    assert torch.equal(found.hardest, own)
    # Row i's positive is column i + 2, which is at similarity 0: the 60 at similarity 1 are above it.
    assert torch.equal(found.rank, torch.full_like(own, 60))
    # Of the other 240 at similarity 0 one is the positive itself.
    assert torch.equal(found.ties, torch.full_like(own, 239))


# What is read and what is written -------------------------------------------------------------------------------------------------------


@cases(("mma", FLOAT), ("wgmma", BFLOAT), ("long", HALF))
@pytest.mark.parametrize("p", [of("in-batch"), of("simclr:"), of("clip captions:"), of("mask and ids"), of("one column")], ids=str)
def test_nothing_beside_a_view_is_read(p: Call, dtype: torch.dtype, family: str) -> None:
    # Blocks run one after the other here, but in a circle its two kinds of sums meet in any order.
    gpu_promises.nothing_beside_a_view_is_read(p, dtype, "cuda", rtol=contract.gradient(dtype, 0.0) if p.symmetric else 0.0)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("p", [of("simclr:"), of("clip captions:"), of("mask and ids")], ids=str)
def test_kernels_write_what_their_schema_says_and_nothing_else(p: Call, family: str) -> None:
    q, k, scale, bias = (None if t is None else t.requires_grad_() for t in p.tensors(BFLOAT))
    with SchemaCheckMode():
        found = contrastive_stats(q, k, scale=scale, bias=bias, metrics=True, backend="cuda", **p.call())
        torch.autograd.grad(found.lse_neg.sum() + found.lse_pos.sum(), [t for t in (q, k, scale, bias) if t is not None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e19], ids=["nan", "inf", "too long"])
@cases(("mma", FLOAT), ("wgmma", BFLOAT), ("long", FLOAT))
def test_a_bad_row_makes_nan_of_what_it_meets_and_of_nothing_else(bad: float, dtype: torch.dtype, family: str) -> None:
    gpu_promises.a_bad_row_makes_nan_of_what_it_meets_and_of_nothing_else(bad, dtype, "cuda")


@cases(("mma", FLOAT), ("wgmma", HALF))
@pytest.mark.parametrize("p", [of("clip captions:"), of("clip:"), of("clip:", two_sided=False)], ids=["ids", "columns", "rows"])
def test_only_what_is_asked_for_gets_a_gradient(p: Call, dtype: torch.dtype, family: str) -> None:
    gpu_promises.only_what_is_asked_for_gets_a_gradient(p, (1, 2, 4, 8, 13), dtype, "cuda")


@cases(("mma", HALF), ("wgmma", BFLOAT), ("long", BFLOAT))
@pytest.mark.parametrize("p", [of("queue"), of("clip captions:"), of("clip:")], ids=str)
def test_a_gradient_that_is_added_to_is_not_rounded(p: Call, dtype: torch.dtype, family: str) -> None:
    test_wide.a_gradient_that_is_added_to_is_not_rounded(p, dtype, "cuda")


# The package ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mma", "long"], indirect=True)
def test_every_loss_through_the_public_functions(family: str) -> None:
    gpu_promises.losses_are_within_the_budget("cuda")


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_one_row_and_none(family: str) -> None:
    one = torch.ones(1, 4, dtype=BFLOAT, requires_grad=True)
    loss = fastnce.info_nce(one, one.detach(), temperature=0.1, backend="cuda")
    loss.backward()
    assert loss == 0 and not one.grad.any()
    none = torch.ones(0, 4, dtype=BFLOAT, requires_grad=True)
    for keys in (3, 0):
        for both in (False, True):
            found = contrastive_stats(none, torch.ones(keys, 4, dtype=BFLOAT), scale=1.0, two_sided=both, backend="cuda")
            assert found.lse_neg.shape == (0,) and (not both or torch.equal(found.columns.lse_neg, torch.full((keys,), -math.inf)))
    fastnce.info_nce(none, torch.ones(0, 4, dtype=BFLOAT), temperature=0.1, reduction="sum", backend="cuda").backward()
    assert none.grad.shape == (0, 4)


def test_compile_is_one_graph(emulated_cuda: None) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return fastnce.clip_loss(x, y, scale, backend="cuda")

    q, k = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    leaves = [q.requires_grad_(), k.requires_grad_(), torch.tensor(10.0, requires_grad=True)]
    found, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
def test_every_tile_fits_the_padding(architecture: int, emulated_cuda: None) -> None:
    """Rows are padded to a multiple of every tile, a block is one too, where k is q a tile is its own mirror image, and wgmma serves
    float16 operands of whole rows on compute capability 9.0."""
    for rules in ("index", "ids", "mask"):
        for parts, depth in ((1, 64), (1, 128), (1, 256), (1, 0), (2, 64), (2, 128), (2, 0)):
            for kernel in launches.NAMES.values():
                if kernel == ("backward_rows" if depth == 0 else "weights_block"):
                    continue
                rows, columns, family = torch.ops.fastnce_cuda.tile(kernel, rules, parts, depth, architecture)
                assert tiles.PADDED % rows == tiles.PADDED % columns == tiles.BLOCK % rows == tiles.BLOCK % columns == 0
                assert kernel != "forward_both" or rows == columns
                assert family == (architecture == 90 and parts == 1 and depth > 0 and kernel in WGMMA_KERNELS)
