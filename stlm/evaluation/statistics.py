"""Intervals and tests for accuracies."""

from __future__ import annotations

import math
from typing import NamedTuple

_Z95 = 1.959963984540054  # the standard normal's 97.5% quantile


class Interval(NamedTuple):
    """Bounds of a 95% interval, as fractions 0..1."""

    low: float
    high: float


def wilson(correct: float, n: int) -> Interval:
    """The 95% score interval of a proportion (Wilson 1927): `correct` of `n`, ties counting fractions.

    Raises ValueError unless 0 <= correct <= n and n >= 1.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"wilson needs 0 <= correct <= n and n >= 1; got correct={correct}, n={n}")
    share, z2 = correct / n, _Z95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the bounds are 0 and 1 exactly; rounding must not put them outside, nor past the share.
    return Interval(max(0.0, min(center - half, share)), min(1.0, max(center + half, share)))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value of McNemar's test (McNemar 1947, with the binomial distribution).

    `b` items went better for the one model, `c` for the other; items on which both did the same say nothing.
    Raises ValueError where a count is negative.
    """
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar_exact needs counts >= 0; got {b} and {c}")
    n = b + c
    if n == 0:
        return 1.0
    log_total = math.lgamma(n + 1) - n * math.log(2)
    terms = (math.exp(log_total - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(min(b, c) + 1))
    return min(1.0, 2 * math.fsum(terms))
