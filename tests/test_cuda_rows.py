"""The CUDA library's passes over rows and vectors, emulated, against what they mean."""

from __future__ import annotations

import math
from typing import Any

import gpu_promises
import pytest
import row_oracle
import torch
from torch import Tensor

from fastnce.backends._gpu import host, limits, tiles
from fastnce.precision import EPS, LARGEST
from fastnce.problem import Side, SideGrad
from train_ref.truth import contract

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poisoned")

U, LOG2E = contract.U, math.log2(math.e)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# A lane takes four neighbours at once, a warp 128; gradients keep 256 in registers and read the others again.
each_width = pytest.mark.parametrize("columns", [1, 3, 64, 130, 300, 700])
NONE = host.NONE


def kernels() -> Any:
    return torch.ops.fastnce_cuda


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unaligned(x: Tensor) -> Tensor:
    """A view with an odd stride, from an odd element on, in a storage that is nan everywhere else."""
    around = torch.full((x.shape[0] * (x.shape[1] + 3 + x.shape[1] % 2) + 1,), torch.nan, dtype=x.dtype)
    view = around.as_strided(x.shape, (x.shape[1] + 3 + x.shape[1] % 2 - 1, 1), 1)
    view.copy_(x)
    return view


# Rows -----------------------------------------------------------------------------------------------------------------------------------


def prepared(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    count, columns = x.shape
    padded = host.up(count, tiles.PADDED)
    operand = x.new_empty((padded, limits.parts(x.dtype), tiles.padded_depth(columns)), dtype=torch.float16)
    factor, r = x.new_empty(padded, dtype=torch.float32), x.new_empty(count, dtype=torch.float32)
    kernels().prepare(x, operand, factor, r, normalize)
    return operand, factor, r


@each_dtype
@each_width
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as they are"])
def test_prepare(normalize: bool, columns: int, dtype: torch.dtype) -> None:
    """Operand times factor is the row; half input fits exactly, and of float32 two parts lose nothing that it holds."""
    reach = 4 if dtype == torch.float16 else 30
    x = unaligned((random(9, columns) * torch.logspace(-reach, reach, 9, base=2, dtype=torch.float64)[:, None]).to(dtype))
    operand, factor, r = prepared(x, normalize)
    whole = operand.double().sum(1)
    assert not whole[9:].any() and not whole[:, columns:].any() and torch.isfinite(factor).all()
    assert ((whole.abs().amax(1)[:9] >= 2**8) & (whole.abs().amax(1)[:9] <= 2**9)).all()
    norm = x.double().norm(dim=1) if normalize else torch.ones(9, dtype=torch.float64)
    error = (whole[:9, :columns] * factor[:9, None].double() - x.double() / norm[:, None]).norm(dim=1)
    # The high part leaves 12 bits and a sign, of which the low one holds 11.
    assert (error <= (4 * U if normalize else 2 * U if dtype == torch.float32 else 0) * x.double().norm(dim=1) / norm).all()
    torch.testing.assert_close(r.double(), 1 / norm, rtol=4 * U if normalize else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_rows_that_are_no_direction(dtype: torch.dtype) -> None:
    """Zero and shorter than EPS: the similarities are 0, and the gradient. Not finite, or longer than LARGEST: nan, also where only the
    length says so."""
    x = torch.ones(8, 40, dtype=dtype)
    x[1] = 0
    x[2] *= EPS / 7
    x[3, 33], x[4, 0], x[5, 39] = torch.nan, torch.inf, -torch.inf
    x[6] *= LARGEST / 5
    operand, factor, r = prepared(x, True)
    assert torch.equal(factor[:8].isnan(), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)) and torch.equal(
        r.isnan(), factor[:8].isnan()
    )
    assert torch.isfinite(operand).all() and not operand[3:6].any() and not r[1:3].any() and (factor[1:3] < 1e-29).all()
    operand, factor, r = prepared(x, False)
    assert torch.equal(factor[:8].isnan(), torch.tensor([0, 0, 0, 1, 1, 1, 0, 0], dtype=torch.bool)) and r[7] == 1


@each_dtype
@each_width
def test_aligned(columns: int, dtype: torch.dtype) -> None:
    x, y = unaligned(random(20, columns, dtype=dtype)), unaligned(random(30, columns, dtype=dtype, seed=1))
    r_x, r_y = (1 / t.double().norm(dim=1) for t in (x, y))
    t = torch.empty(12)
    kernels().aligned(x, y, r_x.float(), r_y.float(), torch.tensor(10.0), 5, 17, t)
    exact = LOG2E * 10 * (x.double()[5:17] * y.double()[17:29]).sum(1) * r_x[5:17] * r_y[17:29]
    torch.testing.assert_close(t.double(), exact, rtol=0, atol=LOG2E * 10 * 8 * U)


@each_dtype
@each_width
@pytest.mark.parametrize("how", ["two diagonals", "a diagonal, as they are", "no pairs"])
def test_finish(how: str, columns: int, dtype: torch.dtype) -> None:
    """g = scale (sum of the splits / lift + pair r_y y of the aligned row), then dL/dx = r (g - x^ <x^, g>)."""
    normalize, splits = how != "a diagonal, as they are", 3 if columns < 300 else 1
    up, down = {"two diagonals": (4, -4), "no pairs": (NONE, NONE)}.get(how, (-4, NONE))
    x, y = unaligned(random(8, columns, dtype=dtype)), unaligned(random(8, columns, dtype=dtype, seed=1))
    dx, pair = random(splits, 128, columns + 5, dtype=torch.float32, seed=2) * 2**20, random(8, dtype=torch.float32, seed=3)
    r_x, r_y = ((1 / t.double().norm(dim=1)).float() if normalize else torch.ones(8) for t in (x, y))
    out = torch.empty(8, columns, dtype=dtype)
    kernels().finish(dx, x, y, r_x, r_y, pair, torch.tensor(3.0), torch.tensor(2.0**20), up, down, normalize, out)
    partner = torch.zeros(8, 8, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            partner[i, j] = pair[i] * r_y[j] if j - i in (up, down) else 0.0
    g = 3 * (dx[:, :8, :columns].double().sum(0) / 2**20 + partner @ y.double())
    hat = x.double() * r_x[:, None]
    exact = r_x[:, None] * (g - hat * (hat * g).sum(1, keepdim=True)) if normalize else g
    # In one column all terms cancel: the rest is judged by the size of the terms.
    size = (r_x[:, None] * g).norm() if normalize else g.norm()
    assert (out.double() - exact).norm() <= contract.gradient(dtype, 0.0) * size


# Vectors --------------------------------------------------------------------------------------------------------------------------------


def statistics(sums: Tensor, *given: Any) -> Side:
    """The library's."""
    rows = sums.shape[2]
    lse_neg, lse_pos, pos, own_neg, own_pos = (torch.empty(rows, dtype=torch.float64) for _ in range(5))
    n_pos = torch.empty(rows, dtype=torch.int64)
    *more, ends, bias = given
    kernels().statistics(sums, *more, [end.start for end in ends], bias, lse_neg, lse_pos, pos, n_pos, own_neg, own_pos)
    return Side(lse_neg, lse_pos, pos, n_pos, own_neg, own_pos)


def coefficients(
    grads: list[SideGrad],
    stats: list[Side],
    factors: list[Tensor],
    bias: Tensor,
    pairs: tuple[slice, slice],
    in_tile: bool,
    symmetric: bool,
) -> row_oracle.Coefficients:
    """The library's."""
    i, j = pairs
    some = i.stop > i.start
    vectors = [torch.empty(5 if in_tile else 2, len(factor)) for factor, _ in zip(factors, stats, strict=False)]
    pair, scalars = torch.empty(i.stop - i.start) if some else None, torch.empty(4, dtype=torch.float64)
    kernels().coefficients(
        [g for grad in grads for g in grad], [t for side in stats for t in side[:6]], factors, bias,
        stats[0].own_pos[i] if some else None, [i.start, j.start], in_tile, symmetric, vectors, pair, scalars,
    )  # fmt: skip
    return row_oracle.Coefficients(vectors, pair, scalars)


def agree(found: Any, expected: Any, rtol: float = 1e-13, atol: float = 1e-13) -> None:
    assert (found is None) == (expected is None)
    if found is not None:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("unshifted", [False, True], ids=["shifted", "both"])
@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("positives", ["in the tiles", "one end", "two ends", "none"])
def test_statistics(positives: str, bias: float | None, unshifted: bool) -> None:
    """Splits without a pair of a kind, rows without any, and one that is nan."""
    n, in_tile = 300, positives == "in the tiles"
    fields = 5 if in_tile else 2
    real = random(fields, 3, n, dtype=torch.float32) * 20
    count = torch.randint(0, 3, (3, n), generator=torch.Generator().manual_seed(1), dtype=torch.int32) if in_tile else None
    sums = random(3 if in_tile else 1, n, dtype=torch.float32, seed=2).exp2() if unshifted else None
    for which in range(fields // 2):
        real[2 * which + 1].abs_()
        empty = random(3, n, seed=3 + which) > 0.3
        empty[:, :5] = True
        real[2 * which][empty] = -torch.inf
        real[2 * which + 1][empty] = 0.0
        if sums is not None:
            sums[which, ::4] = 0.0
    real[1, 2, 70] = torch.nan
    more = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(5), dtype=torch.int32) if in_tile and unshifted else None
    pairs = None if in_tile else random(0 if positives == "none" else 120, dtype=torch.float32, seed=6)
    ends = [slice(7, 127), slice(170, 290)][: 2 if positives == "two ends" else 1] if positives != "none" else [slice(0, 0)]
    given = (real, count, sums, more, pairs, ends, None if bias is None else torch.tensor(bias))
    found, expected = statistics(*given), row_oracle.close(*given)
    for a, b in zip(found, expected, strict=True):
        agree(a, b)


@pytest.mark.parametrize("n", [70, 5000], ids=["one block", "several blocks"])
@pytest.mark.parametrize("shape", ["rows", "two-sided", "symmetric"])
@pytest.mark.parametrize("in_tile", [False, True], ids=["pairs", "in the tiles"])
@pytest.mark.parametrize("bad", [None, torch.nan, 0.0], ids=["", "one nan", "all zero"])
def test_coefficients(bad: float | None, in_tile: bool, shape: str, n: int) -> None:
    sides = 2 if shape == "two-sided" else 1
    lengths = (n, n if shape == "symmetric" else n - 13)
    grads, stats, factors = [], [], [random(host.up(length, 128), dtype=torch.float32, seed=20).abs() for length in lengths]
    for side in range(sides):
        length = lengths[side]
        grad = [random(length, seed=7 * side + field) * 1e-3 for field in range(3)]
        real = [random(length, seed=7 * side + 3 + field) * 30 for field in range(5)]
        n_pos = torch.randint(0, 4, (length,), generator=torch.Generator().manual_seed(side))
        real[1][n_pos == 0] = real[4][n_pos == 0] = -torch.inf
        real[0][:3] = real[3][:3] = -torch.inf
        if bad is not None:
            grad = [g * bad if bad == 0.0 else g.index_fill(0, torch.tensor([n // 2]), bad) for g in grad]
            factors[side][n // 3] = torch.nan
        grads.append(SideGrad(*grad))
        stats.append(Side(*real[:3], n_pos, *real[3:]))
    pairs = (slice(0, 0), slice(0, 0)) if in_tile else (slice(5, 25), slice(12, 32))
    given = (grads, stats, factors, torch.tensor(2.5), pairs, in_tile, shape == "symmetric")
    found, expected = coefficients(*given), row_oracle.coefficients(*given)
    for a, b in zip(found.vectors, expected.vectors, strict=True):
        agree(a, b, rtol=2 * U, atol=0.0)
    agree(found.pair, expected.pair, rtol=2 * U, atol=0.0)
    agree(found.scalars, expected.scalars, rtol=1e-11)
    assert found.scalars[0].log2().frac() == 0


@pytest.mark.parametrize("parts", [[], [(3, 700)], [(1, 5), (2, 2000), (1, 1), (4, 0)]], ids=["none", "one", "several"])
def test_scale_gradient(parts: list[tuple[int, int]]) -> None:
    scalars, scale = torch.tensor([2.0**12, 3.5, -0.25, 0.125], dtype=torch.float64), torch.tensor(7.0)
    about = [random(*shape, dtype=torch.float32) for shape in parts]
    found = torch.empty(()), torch.empty(())
    kernels().scale_gradient(scalars, about, 2.0, scale, *found)
    for a, b in zip(found, row_oracle.scalar_gradients(scalars, about, 2.0, scale), strict=True):
        agree(a, b, rtol=U, atol=0.0)


# In a loss ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1e-13, 1e-12, 1e-6, 1.0, 1e6, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_length(length: float, dtype: torch.dtype) -> None:
    gpu_promises.rows_may_be_of_any_length(length, dtype, "cuda")


def test_elements_beyond_two_to_the_31() -> None:
    gpu_promises.elements_may_lie_beyond_two_to_the_31("cuda")
