"""The Triton kernels in the checked interpreter: every problem forward and backward, every address, every race, every output written."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gpu_promises
import oracle
import pytest
import rank_promises
import test_statistics as whole_suite
import test_wide
import torch
from interpreter import Checked
from problems import PROBLEMS, Call, of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastnce
from fastnce import contrastive_stats, precision
from fastnce.backends import triton as backend
from fastnce.backends._gpu import host, tiles
from fastnce.backends.triton import kernels_retrieval, kernels_rows, launches
from fastnce.backends.triton import tiles as triton_tiles
from fastnce.pairs import Pairs
from fastnce.problem import TIE, Problem, SideGrad, Wanted
from train_ref.truth import contract

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("fits", "long")


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tiles of 16 x 16, blocks of 32 x 32, several splits: problems of 70 rows then have every kind of tile. "long" rows fit into none."""
    name = getattr(request, "param", "fits")
    depth_of = (lambda depth: 16) if name == "long" else (lambda depth: depth)
    monkeypatch.setattr(
        triton_tiles, "tile", lambda kernel, rules, architecture, parts, depth: triton_tiles.TileShape(16, 16, depth_of(depth), 1, 1)
    )
    monkeypatch.setattr(triton_tiles, "PRODUCTS", dict.fromkeys((1, 2), triton_tiles.TileShape(16, 16, 16, 1, 1)))
    monkeypatch.setattr(tiles, "DEPTHS", () if name == "long" else (16, 32, 64))
    monkeypatch.setattr(tiles, "LONGEST_HELD", 0 if name == "long" else 256)
    monkeypatch.setattr(tiles, "STEP", 16)
    monkeypatch.setattr(tiles, "PADDED", 16)
    monkeypatch.setattr(tiles, "BLOCK", 32)
    monkeypatch.setattr(triton_tiles, "ROWS", (16, 16))
    monkeypatch.setattr(triton_tiles, "FINISH", dict.fromkeys((False, True), (16, 16)))
    monkeypatch.setattr(host, "multiprocessors", lambda device: 4)
    return str(name)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    names: list[str] = []
    start = launches.Launch.start

    def spy(one: launches.Launch) -> None:
        if hasattr(one.kernel, "fn"):  # not a fill
            names.append(one.kernel.fn.__name__)
        start(one)

    monkeypatch.setattr(launches.Launch, "start", spy)
    return names


def check(p: Call, dtype: torch.dtype) -> None:
    with Checked(arguments=True) as checked:
        whole_suite.check(p, dtype, "triton")
    assert not checked.races


@pytest.mark.parametrize("family", ["fits", pytest.param("long", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_values_and_gradients(p: Call, dtype: torch.dtype, family: str) -> None:
    check(p, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_float16(p: Call, family: str) -> None:
    """In the tiles the same as bfloat16, whose numbers fit into float16 exactly: it differs in the passes over single rows."""
    check(p, torch.float16)


# The cases in which tiles or the walk differ: all three shapes, positives by index and by content, both sides of the limit of the range.
KINDS = ("in-batch", "clip:", "clip captions:", "simclr:", "supcon:", "mask and", "low temperature:")
SOME = [p for p in PROBLEMS if p.why.startswith(KINDS)]


@pytest.mark.slow
@pytest.mark.parametrize("p", SOME, ids=str)
def test_deterministic_mode_adds_in_one_order(p: Call, family: str, deterministic: None, launched: list[str]) -> None:
    """No kernel adds to a number of another program; the second run has the same bits."""
    check(p, torch.float32)
    assert "forward_rows" in launched and "forward_both" not in launched
    first, second = whole_suite.run(p, torch.float32, "triton"), whole_suite.run(p, torch.float32, "triton")
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [False, True], ids=["tiles", "blocks"])
@pytest.mark.parametrize("p", [of("queue", m=50, n_keys=2000, d=64), of("cone", d=1024)], ids=["columns", "depth"])
def test_long_sums_keep_their_last_bits(p: Call, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores round every sum towards zero, here too: 375 times in a row that is twice the budget of a gradient, and along 1,024
    columns of rows that are alike twice that of a logit."""
    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    if blocks:
        monkeypatch.setattr(tiles, "LONGEST_HELD", 0)
        monkeypatch.setattr(tiles, "DEPTHS", ())
    whole_suite.check(p, torch.float32, "triton")


@pytest.mark.parametrize("family", ["long"], indirect=True)
def test_tiles_of_a_block_are_taken_in_groups(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of tiles than one group has, and some left for the last."""
    monkeypatch.setattr(tiles, "BLOCK", 256)
    assert 16 * launches.GROUP < 180 < 256
    check(of("queue", m=180, n_keys=40, d=24), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("p", SOME, ids=str)
def test_shipped_tiles(p: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that a GPU runs, where a problem is smaller than one of them, and where it ends in the middle of the second."""
    monkeypatch.setattr(host, "multiprocessors", lambda device: 1)
    check(p, torch.bfloat16)
    grown = p._replace(m=150, n_keys=0 if p.symmetric else 140, offset=None if p.offset is None else 75, labels=p.labels * 5)
    check(grown._replace(mask=(75, 140)) if p.mask else grown, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("p", [p for p in PROBLEMS if p.m > 9 and "low" not in p.why and "cone" not in p.why], ids=str)
def test_metrics(p: Call, family: str) -> None:
    """Rank, ties, hardest negative and best positive equal a dense sort of the float64 logits, up to their rounding."""
    q, k, scale, bias = p.tensors(torch.float32)
    with Checked(arguments=True) as checked:
        found = contrastive_stats(q, k, scale=scale, bias=bias, metrics=True, backend="triton", **p.call())
    assert not checked.races
    q, k, scale, bias = (None if t is None else t.double() for t in (q, k, scale, bias))
    s = oracle.logits(q, q if k is None else k, scale, bias, p.normalize)
    kinds = oracle.classes(p)
    tolerance = 32 * contract.U * max(1.0, s.abs().max().item())
    for side, t, c in [(found, s, kinds), (found.columns, s.T, kinds.T)][: 2 if p.two_sided else 1]:
        negatives = t.masked_fill(c != oracle.NEGATIVE, -torch.inf)
        best = t.masked_fill(c != oracle.POSITIVE, -torch.inf).amax(1)
        least = (negatives > best[:, None] + 2 * tolerance).sum(1)
        most = (negatives > best[:, None] - 2 * tolerance).sum(1)
        assert ((least <= side.rank) & (side.rank + side.ties <= most)).all()
        torch.testing.assert_close(side.pos_max.double(), best, rtol=0, atol=tolerance)
        torch.testing.assert_close(side.hardest_logit.double(), negatives.amax(1), rtol=0, atol=tolerance)
        some = (c == oracle.NEGATIVE).any(1)
        assert torch.equal(side.hardest >= 0, some)
        chosen = negatives.gather(1, side.hardest.clamp(min=0)[:, None])[some, 0]
        torch.testing.assert_close(chosen, side.hardest_logit[some].double(), rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("promise", rank_promises.PROMISES, ids=lambda promise: promise.__name__)
def test_ranks(promise: Callable[[str], None], family: str) -> None:
    promise("triton")


def checked() -> Checked:
    return Checked(arguments=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("p", SOME, ids=str)
def test_nothing_beside_a_view_is_read(p: Call, family: str) -> None:
    # Sums of the unshifted kernel are added in the order in which its programs run, and here they run one after the other.
    gpu_promises.nothing_beside_a_view_is_read(p, torch.bfloat16, "triton", checked)


def check_kept_output(p: Call, dtypes: tuple[torch.dtype, ...], launched: list[str]) -> None:
    """MoCo: backward has nothing to do over the tiles, and gives the gradients that keys with a gradient give."""
    upstream = torch.randn(p.m, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    for dtype in dtypes:
        exact = [t if t is None else t.double().requires_grad_() for t in p.tensors(dtype)]
        negatives = contrastive_stats(exact[0], exact[1], scale=exact[2], bias=exact[3], backend="reference", **p.call()).lse_neg
        dq, dscale = torch.autograd.grad(negatives, (exact[0], exact[2]), upstream.double())
        dense = [t if t is None else t.requires_grad_() for t in p.tensors(dtype)]
        dense_lse = oracle.statistics(oracle.logits(dense[0], dense[1], dense[2], dense[3], True), oracle.classes(p)).lse_neg
        dense_dq, dense_dscale = torch.autograd.grad(dense_lse, (dense[0], dense[2]), upstream)
        q, k, scale, bias = p.tensors(dtype)
        q.requires_grad_()
        scale.requires_grad_()
        with Checked(arguments=True) as checked:
            found = contrastive_stats(q, k, scale=scale, bias=bias, backend="triton", **p.call())
            launched.clear()
            grads = torch.autograd.grad(found.lse_neg, (q, scale), upstream)
        assert not checked.races and launched == ["prepare", "coefficients", "finish"]
        assert contract.relative(grads[0], dq) <= contract.gradient(dtype, contract.relative(dense_dq, dq))
        assert contract.relative(grads[1], dscale) <= contract.scalar(dtype, contract.relative(dense_dscale, dscale))


QUEUE = of("queue", scale=20.0)
KEPT = {
    "plain": QUEUE,
    "exclude ids": QUEUE._replace(excludes=5),
    "bias": QUEUE._replace(bias=-30.0),
    "rows without keys": QUEUE._replace(n_keys=1, excludes=1),
    # The shortest key, whose factor is the largest, has all the weight of a row.
    "solved": QUEUE._replace(regime="aligned"),
}


@pytest.mark.parametrize("name", KEPT)
def test_keys_without_gradient_need_no_second_pass(name: str, family: str, launched: list[str]) -> None:
    check_kept_output(KEPT[name], DTYPES, launched)


@pytest.mark.slow
def test_long_sums_of_a_kept_output_keep_their_last_bits(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    check_kept_output(QUEUE._replace(m=50, n_keys=2000, d=64), (torch.float32,), launched)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize(("two_sided", "subsets"), [(True, (1, 2, 4, 6, 8, 13)), (False, (1, 2, 4, 9, 14))], ids=["both sides", "rows"])
def test_only_what_is_asked_for_gets_a_gradient(two_sided: bool, subsets: tuple[int, ...], family: str) -> None:
    p = of("clip captions:", two_sided=two_sided)
    gpu_promises.only_what_is_asked_for_gets_a_gradient(p, subsets, torch.float32, "triton")


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("p", [QUEUE, of("simclr:"), of("clip captions:")], ids=str)
def test_a_gradient_that_is_added_to_is_not_rounded(p: Call, family: str) -> None:
    with Checked(arguments=True) as checked:
        test_wide.a_gradient_that_is_added_to_is_not_rounded(p, torch.bfloat16, "triton")
    assert not checked.races


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e19], ids=["nan", "inf", "too long"])
def test_a_bad_row_makes_nan_of_what_it_meets_and_of_nothing_else(bad: float, family: str) -> None:
    gpu_promises.a_bad_row_makes_nan_of_what_it_meets_and_of_nothing_else(bad, torch.float32, "triton")


@pytest.mark.parametrize("length", [1e-13, 1e-12, 1e-6, 1.0, 1e6, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_length(length: float, dtype: torch.dtype, family: str) -> None:
    gpu_promises.rows_may_be_of_any_length(length, dtype, "triton")


def test_float32_in_one_part_where_tf32_is_allowed(family: str) -> None:
    """The error then is that of float16's 11 bits: above that of two parts, within what TF32 may cost."""
    p = of("in-batch")
    exact, _, _ = whole_suite.exact_run(p, torch.float32)
    errors = {}
    for allowed in ("highest", "high"):
        torch.set_float32_matmul_precision(allowed)
        try:
            found, grads = whole_suite.run(p, torch.float32, "triton")
        finally:
            torch.set_float32_matmul_precision("highest")
        errors[allowed] = contract.row_error(found[0], exact[0])
        assert all(torch.isfinite(g).all() for g in grads if g is not None)
    assert errors["highest"] < 1e-5 < errors["high"] <= 2.0**-12 * p.scale


def test_elements_beyond_two_to_the_31(family: str) -> None:
    gpu_promises.elements_may_lie_beyond_two_to_the_31("triton", checked)


def test_every_loss_through_the_public_functions(family: str) -> None:
    """backend="triton" takes CPU tensors here."""
    gpu_promises.losses_are_within_the_budget("triton")


def test_one_row_and_none(family: str) -> None:
    one = torch.ones(1, 4, requires_grad=True)
    loss = fastnce.info_nce(one, one.detach(), temperature=0.1, backend="triton")
    loss.backward()
    assert loss == 0 and not one.grad.any()
    none = torch.ones(0, 4, requires_grad=True)
    assert contrastive_stats(none, torch.ones(3, 4), scale=1.0, backend="triton").lse_neg.shape == (0,)
    assert contrastive_stats(none, torch.ones(0, 4), scale=1.0, backend="triton").lse_neg.shape == (0,)
    fastnce.info_nce(none, torch.ones(0, 4), temperature=0.1, reduction="sum", backend="triton").backward()
    assert none.grad.shape == (0, 4)


# What the host does: kernels are left out ----------------------------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Every operator by name, and the largest sum of the bytes that were allocated at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name().removeprefix("aten::").partition(".")[0])
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.seen | given:
                self._follow(t.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def asked(n: int, d: int, **how: Any) -> Problem:
    q, k = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    pairs = how.pop("pairs", Pairs(offset=0))
    symmetric = how.pop("symmetric", False)
    return Problem(q, None if symmetric else k, torch.tensor(10.0), None, pairs, how.pop("two_sided", False), True, **how)


ASKED = {
    "in-batch": {},
    "clip": {"two_sided": True},
    "simclr": {"symmetric": True, "pairs": Pairs(True, 1024)},
    "supcon": {"symmetric": True, "pairs": Pairs(True, q_label=torch.arange(2048) % 7)},
    "moco": {"pairs": Pairs(), "frozen": True},
    "metrics": {"metrics": True},
}
# Each of them would wait for the device, or make a size depend on a value.
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount", "_to_cpu"}


@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("name", ASKED)
def test_the_host_reads_no_value_and_keeps_to_its_memory(name: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most three times the inputs while a row fits into a tile, and the fixed workspace above that; vectors are counted in."""
    monkeypatch.setattr(launches, "launch", lambda *args, **kwargs: None)
    monkeypatch.setattr(tiles, "BLOCK", 256)
    problem = asked(2048, d, **ASKED[name])
    wanted = Wanted(True, problem.k is not None and not problem.frozen, True, True)
    stats = backend.forward(problem)
    grads = [SideGrad(*torch.ones(3, 2048, dtype=torch.float64)) for _ in stats]
    with Watched() as forward:
        backend.forward(problem)
    with Watched() as backward:
        found = backend.backward(problem, grads, stats, wanted)
    assert forward.names and backward.names and not WAITS & (forward.names | backward.names)
    inputs = problem.q.nbytes * (1 if problem.k is None else 2)
    vectors = 2048 * 8 * 80
    workspace = 2 * 256 * 256 * 2 + 256 * d * 4 if d > tiles.LONGEST_HELD else 0
    gradients_themselves = sum(g.nbytes for g in (found.dq, found.dk) if g is not None)
    assert max(forward.peak, backward.peak - gradients_themselves) <= 3 * inputs + vectors + workspace


def test_constants_that_device_code_cannot_import() -> None:
    assert kernels_rows.EPS.value == precision.EPS and kernels_rows.LARGEST.value == precision.LARGEST
    assert kernels_retrieval.TIE.value == TIE[torch.float32]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
def test_every_tile_of_the_table_fits_the_padding(architecture: str) -> None:
    """Rows are padded to a multiple of every tile, a block is one too, and where k is q a tile is its own mirror image."""
    for rules in ("index", "ids", "mask"):
        for parts, depth in ((1, 64), (1, 128), (1, 256), (1, 512), (2, 64), (2, 128), (2, 256), (2, 8192)):
            short = depth * parts <= tiles.LONGEST_HELD
            with_output = ("output",) if short and rules != "mask" else ()
            for kernel in ("rows", "both", "gradient" if short else "block", "retrieval", *with_output):
                tile = triton_tiles.tile(kernel, rules, architecture, parts, depth)
                assert tiles.PADDED % tile.rows == tiles.PADDED % tile.columns == 0
                assert tiles.BLOCK % tile.rows == tiles.BLOCK % tile.columns == 0
                assert kernel != "both" or tile.rows == tile.columns
                assert tile.depth == (depth if short else tiles.STEP)


def test_gradients_of_keys_are_as_exact_as_those_of_queries_at_a_low_temperature(family: str) -> None:
    """Both divide by sums of the very same logits. Whole numbers, so that every product is exact: only norms and scale are multiplied
    to it in two ways, and in another order a logit of 200 is off by 1e-5."""
    for seed in range(3):
        values = torch.randint(-3, 4, (2, 40, 24), generator=torch.Generator().manual_seed(seed)).double()

        def gradients_in(dtype: torch.dtype, backend: str, values: Tensor = values) -> tuple[Tensor, ...]:
            leaves = [side.to(dtype).requires_grad_() for side in values]
            rows: Any = fastnce.info_nce(*leaves, temperature=0.005, reduction="none", backend=backend)
            upstream = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            return torch.autograd.grad(rows, leaves, upstream.to(rows.dtype))

        pairs = zip(gradients_in(torch.float32, "triton"), gradients_in(torch.float64, "reference"), strict=True)
        of_queries, of_keys = (contract.relative(found, exact) for found, exact in pairs)
        assert of_keys <= 2 * of_queries
