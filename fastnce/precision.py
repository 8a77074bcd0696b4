"""The precision that fastnce computes in.

Dtypes: products are float32 (float64 for float64 features), statistics of rows are float64. Norms of rows: a zero row has similarity 0, a
row longer than 1e18 gives nan. Then the two functions by which log-sums are added: softplus and logaddexp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
EPS = 1e-12  # torch.nn.functional.normalize's threshold: a shorter row counts as zero
LARGEST = 1e18  # the square of a longer row may leave float32


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Products and results are float64 for float64 input and float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def vector_dtype(x: Tensor) -> torch.dtype:
    """Vectors of statistics are float64 between the tiles and the loss: O(N), and at a temperature of 0.005 a float32 log-sum of 200
    nats is off by 1e-5, which is the relative error of every weight of its row. Apple's GPUs have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off for products of float32 tensors on x's device: it would compute them in half precision, also inside an operator."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device; there are types, such as meta, that torch refuses to ask about."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@contextmanager
def float32_sums() -> Iterator[None]:
    """torch.backends.cuda.matmul.allow_fp16_accumulation off: under it, torch.mm of float16 numbers refuses out_dtype=torch.float32.

    Its neighbours change nothing of such a product. allow_fp16_reduced_precision_reduction and its bfloat16 twin round partial sums to the
    dtype of the result, which is float32; fp32_precision is about float32 factors.
    """
    matmul = torch.backends.cuda.matmul
    if not matmul.allow_fp16_accumulation:
        yield
        return
    matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation = True


def valid_scale(scale: Tensor) -> Tensor:
    """A scale that is no positive number is nan, and so is everything computed with it: only the device knows its value."""
    return scale.where((scale > 0) & (scale < math.inf), math.nan)


def inverse_norms(x: Tensor, exact: bool = False) -> Tensor:
    """r = 1 / |x| of every row (last dimension of x), in compute_dtype, differentiable; exact: in vector_dtype, so that the logits of rows
    which differ in length alone differ by fewer roundings.

    0 for a zero row: its similarities and its gradient are then 0, where torch's x / max(|x|, eps) has a gradient of 1e12.
    NaN for a row longer than 1e18: torch silently returns similarity 0 there.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=vector_dtype(x) if exact else compute_dtype(x.dtype))
    return inverse(norm, x.dtype)


def inverse(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """inverse_norms from the norms of rows of this dtype."""
    short = norm < EPS
    r = norm.masked_fill(short, 1.0).reciprocal().masked_fill(short, 0.0)
    return r if dtype == torch.float64 else r.masked_fill(norm > LARGEST, math.nan)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x). The loss of a row with one positive is softplus(lse_neg - pos).

    torch takes x itself above a threshold. Its own, 20, is off by 2e-9, which float64 sees. At 80 the difference is below float64's
    rounding, and exp(80) is still a float32 number.
    """
    return F.softplus(x, threshold=80.0)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b). Where both are -inf it is -inf, and its gradient is finite; the gradient of torch.logaddexp is nan there."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return high + softplus((low - high).masked_fill(high == -torch.inf, -torch.inf))
