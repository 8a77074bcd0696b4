"""float32, bfloat16 and tf32 as the hardware rounds and adds them, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TINY = np.finfo(np.float32).tiny


def widen_bf16(bits: Array) -> Array:
    """float32 values of bfloat16 bit patterns (uint16): exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_bf16(x: Array) -> Array:
    """Bit patterns (uint16) of the bfloat16 nearest to float32 x, ties to even; NaN is 0x7fff, as from cvt.rn.bf16."""
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def truncate_tf32(x: Array) -> Array:
    """float32 without its last 13 bits, as an mma reads a float32 operand."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_tf32(x: Array) -> Array:
    """float32 with a mantissa of 10 bits, ties away from zero (cvt.rna.tf32)."""
    return np.where(np.isfinite(x), ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32), x)


# Products that a tensor core adds in one instruction; in float64 their sum is as good as exact.
STEP = 16


def add_products(total: Array, a: Array, b: Array) -> Array:
    """total + a b in float32, from float32 operands whose products are exact."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], STEP):
        exact = total + np.matmul(a[..., k : k + STEP], b[..., k : k + STEP, :])
        total = exact.astype(np.float32)
        total = np.where(np.abs(total) > np.abs(exact), np.nextafter(total, np.float32(0)), total)
    return total
