"""The checked interpreter itself: small kernels with one mistake each, which it must find, and without it, which it must let pass."""

from __future__ import annotations

import runpy

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from interpreter import Checked, Race
from torch import Tensor
from triton.runtime.errors import InterpreterError

ZERO, ONE, TWO = (0, 0, 0), (1, 0, 0), (2, 0, 0)


@triton.jit
def copy_rows(x, y, x_stride, y_stride, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Program i copies BLOCK columns of row i, or n of them."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = (column < n) if MASKED else (column >= 0)
    tl.store(y + row * y_stride + column, tl.load(x + row * x_stride + column, mask=inside), mask=inside)


def copy(x: Tensor, y: Tensor, n: int, block: int = 8, masked: bool = True) -> None:
    copy_rows[(x.shape[0],)](x, y, x.stride(0), y.stride(0), n, block, masked)


@triton.jit
def do(x, KIND: tl.constexpr):
    if KIND == "load":
        tl.load(x)
    elif KIND == "store":
        tl.store(x, 1)
    elif KIND == "add":
        tl.atomic_add(x, 1)
    else:
        tl.atomic_cas(x, 0, 1)


@triton.jit
def touch(x, KIND: tl.constexpr):
    """Every program touches the first element."""
    do(x, KIND)


@triton.jit
def touch_two(x, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Program i touches element i, then element i - 1 of those before: programs 0 and 1 meet at 0, 1 and 2 at 1."""
    i = tl.program_id(0)
    do(x + i, OWN)
    if i > 0:
        do(x + i - 1, OTHER)


# Bounds


def test_a_masked_tail_is_inside_and_an_unmasked_one_is_not() -> None:
    x, y = torch.randn(3, 5), torch.zeros(3, 5)
    with Checked(y, readonly=(x,)) as c:
        copy(x, y, n=5)
    assert torch.equal(y, x) and not c.races
    message = r"load out of bounds: 3 of 8 active lanes of 4 bytes, program \(2, 0, 0\),.* \+60 bytes"
    with pytest.raises(IndexError, match=message), Checked(y, readonly=(x,)):
        copy(x, y, n=5, masked=False)


def test_a_store_past_the_end_is_found_before_it_happens() -> None:
    memory = torch.zeros(16)
    y = memory[:5].unsqueeze(0)
    with pytest.raises(IndexError, match=r"store out of bounds: 3 of 8 active lanes"), Checked(y, readonly=(x := torch.ones(1, 8),)):
        copy(x, y, n=8)
    assert not memory.any()


@pytest.mark.parametrize("which", ["load", "store"])
def test_the_gap_between_rows_of_a_view_is_out_of_bounds(which: str) -> None:
    wide, tight = torch.randn(4, 8), torch.zeros(4, 8)
    view = wide[:, :5]
    x, y = (view, tight) if which == "load" else (tight, view)
    with Checked(y, readonly=(x,)):
        copy(x, y, n=5)
    # Inside of the view's span from the first to its last element, thus of memory that it shares, yet not its own.
    message = rf"{which} out of bounds: 1 of 6 active lanes of 4 bytes, program \(0, 0, 0\)"
    with pytest.raises(IndexError, match=message), Checked(y, readonly=(x,)):
        copy(x, y, n=6)


@pytest.mark.parametrize("kind", ["store", "add", "cas"])
def test_every_kind_of_write_to_a_readonly_tensor_raises(kind: str) -> None:
    x = torch.zeros(3, dtype=torch.int32)
    message = r"(store|atomic) into readonly tensor 0: 1 of 1 lanes, program \(0, 0, 0\)"
    with pytest.raises(IndexError, match=message), Checked(x[1:], readonly=(x,)):  # readonly also where another view of it is not
        touch[(1,)](x, kind)
    assert not x.any()
    with Checked(readonly=(x,)):
        touch[(1,)](x, "load")
    with pytest.raises(IndexError, match=r"(store|atomic) out of bounds"), Checked(x[1:]):
        touch[(1,)](x, kind)


def test_code_that_catches_the_error_does_not_hide_it() -> None:
    x, y = torch.ones(1, 8), torch.zeros(1, 5)
    with pytest.raises(IndexError, match="store out of bounds"), Checked(x, y), pytest.raises(InterpreterError):
        copy(x, y, n=8)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_elements_of_every_width(dtype: torch.dtype) -> None:
    x, y = torch.ones(2, 5, dtype=dtype), torch.zeros(2, 5, dtype=dtype)
    with Checked(y, readonly=(x,)) as c:
        copy(x, y, n=5)
    assert torch.equal(x, y) and c.unwritten(y) == 0
    message = rf"load out of bounds: 1 of 6 active lanes of {x.element_size()} bytes, program \(1, 0, 0\)"
    with pytest.raises(IndexError, match=message), Checked(y, readonly=(x,)):
        copy(x, y, n=6)


def test_an_access_of_another_width_is_out_of_bounds() -> None:
    x, y = torch.ones(1, 8), torch.zeros(1, 8)
    with pytest.raises(IndexError, match="load out of bounds: 4 of 4 active lanes of 2 bytes"), Checked(y, readonly=(x,)):
        copy(x.view(torch.int16)[:, ::2], y, n=4)


def test_addresses_between_elements_and_far_away() -> None:
    x = torch.zeros(4)
    shifts = torch.tensor([0, 2, 12, 16, -4, -(2**62), 2**62]).numpy()
    _, _, inside = interpreter.Elements([x]).find(x.data_ptr() + shifts, 4)
    assert inside.tolist() == [True, False, True, False, False, False, False]


def test_neighbours_in_memory_keep_their_own_rights() -> None:
    x, y = torch.ones(1, 8), torch.zeros(2, 8)
    with Checked(y[1], readonly=(x, y[0])):
        copy(x, y[1:], n=8)
    with pytest.raises(IndexError, match="store into readonly tensor 1: 8 of 8 lanes"), Checked(y[1], readonly=(x, y[0])):
        copy(x, y, n=8)


@pytest.mark.parametrize(("strides", "elements"), [((0, 1), 5), ((1, 1), 7), ((0, 0), 1)])
def test_an_element_that_a_view_shows_often_is_one(strides: tuple[int, int], elements: int) -> None:
    x, y = torch.arange(7.0).as_strided((3, 5), strides), torch.zeros(3, 5)
    with Checked(y, readonly=(x,)) as c:
        copy(x[:, :1], y[:, :1], n=1)
    assert c.unwritten(x) == elements and c.unwritten(y) == 12 and not c.races
    with pytest.raises(IndexError, match=r"1 of \d active lanes"), Checked(y, readonly=(x,)):
        copy_rows[(1,)](x[-1], y, 0, 5, elements - 2 * strides[0] + 1, 8, True)


def test_a_tensor_without_elements_admits_nothing() -> None:
    x, y = torch.ones(3, 8), torch.zeros(3, 8)
    with Checked(y, x[:, :0], readonly=(x[:0], torch.zeros(0, 4))) as c:
        copy(x, y, n=0)
    assert c.unwritten(x[:0]) == 0 and c.unwritten(y) == 24
    with pytest.raises(IndexError, match="load out of bounds: 1 of 1 active lanes"), Checked(y, x[:, :0], readonly=(x[:0],)):
        copy(x, y, n=1)


@triton.jit
def copy_far(x, y, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    offset = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(y + row * BLOCK + column, tl.load(x + offset + column))


def test_an_offset_that_leaves_int32_is_found() -> None:
    rows, stride = 12, 2**28
    # 5.9 GB of addresses, of which 12 pages are ever touched. Row 8 begins at element 2^31, in int32 at -2^31.
    x = torch.empty((rows - 1) * stride + 16, dtype=torch.bfloat16).as_strided((rows, 16), (stride, 1))
    x.copy_(torch.randn(rows, 16))
    y = torch.zeros(rows, 16, dtype=torch.bfloat16)
    with Checked(y, readonly=(x,)):
        copy_far[(rows,)](x, y, stride, 16, True)
    assert torch.equal(x, y)
    message = r"load out of bounds: 16 of 16 active lanes of 2 bytes, program \(8, 0, 0\)"
    with pytest.raises(IndexError, match=message), Checked(y, readonly=(x,)):
        copy_far[(rows,)](x, y, stride, 16, False)


# Races


@pytest.mark.parametrize(
    ("own", "other", "what"),
    [
        ("store", "load", "read after write"),
        ("add", "load", "read after write"),
        ("load", "store", "write after read"),
        ("load", "add", "write after read"),
        ("load", "cas", "write after read"),
        ("store", "store", "write after write"),
        ("store", "add", "write after write"),
        ("add", "store", "write after write"),
        ("cas", "store", "write after write"),
        ("load", "load", None),
        ("add", "add", None),
        ("add", "cas", None),
    ],
)
def test_every_pair_of_accesses_by_two_programs(own: str, other: str, what: str | None) -> None:
    x = torch.zeros(3, dtype=torch.int32)
    with Checked(x, readonly=(torch.zeros(5),)) as c:
        touch_two[(3,)](x, own, other)
    assert c.races == ({Race(what, 1, ZERO, ONE), Race(what, 1, ONE, TWO)} if what else set())


def test_programs_have_three_coordinates() -> None:
    x = torch.zeros(1, dtype=torch.int32)
    with Checked(x) as c:
        touch[(1, 2, 2)](x, "store")
    assert c.races == {("write after write", 0, (0, 0, 0), program) for program in [(0, 0, 1), (0, 1, 0), (0, 1, 1)]}


def test_two_views_of_one_storage_race() -> None:
    x = torch.zeros(2, 8)
    with Checked(x[0], x[:, ::2]) as c:
        copy(x[:1].expand(2, 8), x[:1].expand(2, 8), n=1)
    assert c.races == {(what, 0, ZERO, ONE) for what in ("write after write", "write after read", "read after write")}


def test_disjoint_writes_and_launches_one_after_the_other_do_not_race() -> None:
    x, y, z = torch.randn(4, 8), torch.zeros(4, 8), torch.zeros(4, 8)
    with Checked(x, y, z) as c:
        copy(x, y, n=8)
        copy(y, z, n=8)
        copy_rows[(1,)](y[3], x, 8, 8, 8, 8, True)
        touch[(1,)](y, "store")
    assert not c.races and c.launches == 4


# Written, admitted, started


def test_elements_that_no_program_wrote_are_counted() -> None:
    x, y = torch.randn(4, 8), torch.full((4, 8), float("nan"))
    with Checked(y, readonly=(x,)) as c:
        copy(x, y, n=5)
        assert c.unwritten(y) == 12
        copy(x[:2], y, n=8)
    assert c.unwritten(y) == y.isnan().sum() == 6
    assert (c.unwritten(y[:, 5]), c.unwritten(y[2:]), c.unwritten(x), c.unwritten(torch.zeros(0))) == (2, 6, 32, 0)
    with pytest.raises(ValueError, match=r"not checked, shape \(4,\), dtype torch.float64"):
        c.unwritten(torch.zeros(4, dtype=torch.float64))


def test_arguments_of_launches_are_admitted_on_request() -> None:
    x, y, z = torch.randn(4, 8), torch.zeros(4, 8), torch.zeros(4, 8)
    with Checked(readonly=(x,), arguments=True) as c:
        copy(x, y, n=8)
        copy(y, z[:, :4], n=4)
        copy(y, z[:, :4], n=4)
    assert (c.unwritten(y), c.unwritten(z[:, :4]), c.launches) == (0, 0, 3) and not c.races
    assert len(c.tensors) == 3  # however often they are passed
    for bad in [lambda: copy(y, z[:, :4], n=5), lambda: copy(y, x, n=4)]:
        with pytest.raises(IndexError, match=r"store (out of bounds|into readonly)"), Checked(readonly=(x,), arguments=True):
            bad()
    with pytest.raises(IndexError, match="store out of bounds"), Checked(readonly=(x,)):
        copy(x, y, n=8)


def test_a_block_that_checks_nothing_raises() -> None:
    with pytest.raises(RuntimeError, match="no kernel was started"), Checked(torch.zeros(1)):
        pass
    with pytest.raises(KeyError), Checked(torch.zeros(1)):
        raise KeyError
    with pytest.raises(RuntimeError, match="one Checked at a time"), Checked(torch.zeros(1)), Checked(torch.zeros(1)):
        pass
    assert Checked.active is None
    with pytest.raises(ValueError, match="on meta"):
        Checked(torch.zeros(1, device="meta"))


def test_importing_it_too_late_or_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    path = interpreter.__file__
    with monkeypatch.context() as patch:
        patch.setattr(tl, "zeros", tl.zeros.fn)
        with pytest.raises(ImportError, match="before TRITON_INTERPRET=1 was set"):
            runpy.run_path(path)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(pytest.skip.Exception, match="kernels are compiled"):
        runpy.run_path(path)


def test_a_name_that_triton_moved_is_an_error() -> None:
    with pytest.raises(AttributeError, match="create_dott"):
        interpreter.replace(interpreter.Builder, "create_dott", None)


# Arithmetic


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    at = row * 16 + column
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


def product(a: Tensor, b: Tensor, precision: str | None = None) -> Tensor:
    c = torch.full((16, 16), float("nan"))
    with Checked(c, readonly=(a, b)):
        dot[(1,)](a, b, c, precision)
    return c


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 255), (torch.float16, 1023)])
def test_products_of_half_precision_are_exact_and_summed_in_float32(dtype: torch.dtype, largest: int) -> None:
    g = torch.Generator().manual_seed(0)
    # Integers that the dtype holds, 16 products of which sum to less than 2^24: float32 has no error to make. Sums need more than 11 bits.
    a, b = (torch.randint(-largest, largest + 1, (16, 16), generator=g).to(dtype) / 64 for _ in range(2))
    exact = a.double() @ b.double()
    assert torch.equal(product(a, b).double(), exact)
    assert not torch.equal(exact.to(dtype).double(), exact)


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_products_are_rounded_towards_zero(sign: int) -> None:
    a = torch.full((16, 16), 2.0**-13, dtype=torch.float16)
    a[:, 0] = 1
    # 1 + 15 2^-26 lies between 1 + 2^-23 and 1 + 2^-22, nearer to the latter.
    assert torch.equal(product(a * sign, a.T.contiguous()), torch.full((16, 16), sign * (1 + 2.0**-23)))


def test_float32_operands_are_truncated_split_or_whole() -> None:
    eye = torch.eye(16)
    x = torch.full((16, 16), 1 + 2.0**-11 + 2.0**-23)  # to 10 bits: truncated 1, rounded 1 + 2^-10
    assert torch.equal(product(x, eye, "tf32"), torch.ones(16, 16))
    assert torch.equal(product(eye, -x), -torch.ones(16, 16))  # tf32 is the default
    assert 0 < (product(x, eye, "tf32x3") - x).abs().max() <= 2.0**-22
    assert torch.equal(product(x, eye, "ieee"), x)


def test_an_infinite_operand_gives_infinity_when_split() -> None:
    x = torch.ones(16, 16)
    x[3, 5] = float("inf")
    assert torch.equal(product(x, torch.ones(16, 16), "tf32x3")[2:4, 0], torch.tensor([16.0, float("inf")]))


@triton.jit
def elementwise(x, y, out, N: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    if OP == "exp2":
        c = tl.exp2(a)
    elif OP == "rsqrt":
        c = tl.rsqrt(a)
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "minimum":
        c = tl.minimum(a, b)
    elif OP == "add":
        c = a + b
    elif OP == "minus":
        c = -a
    else:
        c = a
    tl.store(out + at, c.to(out.dtype.element_ty))


def apply(op: str, x: Tensor, y: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(x.shape, 7, dtype=dtype)
    y = x if y is None else y
    with Checked(out, readonly=(x, y)):
        elementwise[(1,)](x, y, out, x.numel(), op)
    return out


def test_exp2_and_rsqrt_flush_denormal_numbers() -> None:
    x = torch.tensor([-126.0, -126.5, -149.0, 3.0])
    assert apply("exp2", x).tolist() == [2.0**-126, 0.0, 0.0, 8.0]
    assert apply("exp2", x.double(), dtype=torch.float64)[1] == 2.0**-126.5
    assert apply("rsqrt", torch.tensor([2.0**-126, 2.0**-128, 0.0, 4.0])).tolist() == [2.0**63, float("inf"), float("inf"), 0.5]


def test_maximum_and_minimum_drop_nan() -> None:
    nan = float("nan")
    x, y = torch.tensor([nan, 1.0, 2.0, nan]), torch.tensor([3.0, nan, 1.0, nan])
    assert str(apply("maximum", x, y).tolist()) == "[3.0, 1.0, 2.0, nan]"
    assert str(apply("minimum", x, y).tolist()) == "[3.0, 1.0, 1.0, nan]"


def test_casts_between_float32_and_bfloat16_are_those_of_torch() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(apply("cast", every).nan_to_num(1e9), every.float().nan_to_num(1e9))
    # Halfway to the next bfloat16, one float32 below and above it, and the values themselves.
    bits = every.float().view(torch.int32)
    for step in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (bits + step).view(torch.float32)
        assert torch.equal(apply("cast", x, dtype=torch.bfloat16).nan_to_num(1e9), x.bfloat16().nan_to_num(1e9))
    whole = torch.arange(-512, 512, dtype=torch.int32)
    assert torch.equal(apply("cast", whole, dtype=torch.bfloat16), whole.bfloat16())


@pytest.mark.parametrize("op", ["add", "minus"])
def test_arithmetic_on_bit_patterns_is_refused(op: str) -> None:
    with pytest.raises(InterpreterError, match="arithmetic on bfloat16"):
        apply(op, torch.ones(16, dtype=torch.bfloat16))
