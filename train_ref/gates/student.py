"""Quantiles of Student's t distribution for whole degrees of freedom, without a statistics library."""

from __future__ import annotations

import math


def t_central(t: float, degrees: int) -> float:
    """P(|T| <= t), t >= 0: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.

    With theta = atan(t / sqrt(n)), the finite sums  sin(theta) (1 + cos^2 / 2 + 1*3 cos^4 / (2*4) + ...)  for even n and
    2/pi (theta + sin(theta) (cos + 2/3 cos^3 + 2*4 cos^5 / (3*5) + ...))  for odd n, up to cos^(n-2).
    """
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def t_quantile(p: float, degrees: int) -> float:
    """The t with P(T <= t) = p, 0.5 <= p < 1, found by halving an interval. Raises ValueError outside of that range."""
    if not 0.5 <= p < 1 or degrees < 1:
        raise ValueError(f"t_quantile: p is {p} and degrees is {degrees}; they must be in [0.5, 1) and at least 1")
    low, high = 0.0, 1.0
    while t_central(high, degrees) < 2 * p - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if t_central(middle, degrees) < 2 * p - 1:
            low = middle
        else:
            high = middle
    return high
