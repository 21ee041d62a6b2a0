"""Intervals and tests for accuracies and for differences between two models on the same items.

The level is 95% throughout. An item's credit is 1 (right), 0 (wrong), or 1/k if k options tie; a difference
is one model's credit on an item minus another's. All randomness is seeded: the same numbers give the same
interval.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, ndtr, stdtr, stdtrit

LEVEL = 0.95
RESAMPLES = 10_000
RATIO_RESAMPLES = 2_000
# Number of units below which a bootstrap interval is unreliable: with skewed units, it covers too seldom.
FEW_UNITS = 10
_DRAWN = 1 << 22  # units drawn at once
_TAIL = (1 - LEVEL) / 2
_Z95 = 1.959963984540054  # the standard normal's 97.5% quantile
_SEED = 0


class Interval(NamedTuple):
    """Bounds of a 95% interval, in the unit of the values: fractions 0..1 for accuracies."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the distance between the bounds."""
        return (self.high - self.low) / 2


class SeedTest(NamedTuple):
    """The mean of differences over training seeds, its 95% t interval, and the two-sided p-value."""

    difference: float
    interval: Interval
    p: float


@dataclass(frozen=True)
class SeedNoise:
    """How much a run's metric varies with its seed, pooled over models under the assumption of equal noise.

    `sd`: the standard deviation, with `dof` degrees of freedom. `shares[model]`: its share of the variance,
    the largest first. `p`: of the test that all models have equal noise (see `seed_noise`). `unequal`: the
    models that are too noisy for that, with their own standard deviations; empty if the test does not reject.
    """

    sd: float
    dof: int
    shares: Mapping[str, float]
    p: float
    unequal: Mapping[str, float]

    def half_width(self, differences: Sequence[float], models: Collection[str]) -> float:
        """Half the width of the mean's 95% interval; `differences` between `models`, one for each seed.

        If one of the models is `unequal`, the wider of the pooled interval and the pair's own: the paired t
        interval or, with one seed, the t interval from the noisiest model's own deviation.
        """
        seeds = len(differences)
        pooled = float(stdtrit(self.dof, 1 - _TAIL)) * self.sd * math.sqrt(2 / seeds)
        noisy = [sd for model, sd in self.unequal.items() if model in models]
        if not noisy:
            return pooled
        if seeds > 1:
            return max(pooled, paired_t(differences).interval.half_width)
        return max(pooled, float(stdtrit(1, 1 - _TAIL)) * max(noisy) * math.sqrt(2))


def wilson(correct: float, n: int) -> Interval:
    """The 95% score interval of a proportion (Wilson 1927): `correct` of `n`; ties may count as fractions.

    Raises ValueError unless 0 <= correct <= n and n >= 1.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"wilson needs 0 <= correct <= n and n >= 1; got correct={correct}, n={n}")
    share, z2 = correct / n, _Z95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends, the bounds are exactly 0 and 1; rounding must not move them outside, or past the share.
    return Interval(max(0.0, min(center - half, share)), min(1.0, max(center + half, share)))


def clustered(values: ArrayLike, groups: ArrayLike) -> Interval | None:
    """The 95% interval of the mean of `values` [n] with items in `groups` [n]; None below two groups.

    It uses the cluster-robust standard error of Miller (2024, "Adding Error Bars to Evals", section 2.2),
    which lets the items of a group depend on each other in any way, times the small-sample factor sqrt(G / (G
    - 1)) of statsmodels' OLS on a constant (`cov_type="cluster"`), with the t quantile at G - 1 degrees of
    freedom. It covers other groups than these; `wilson` covers other items of these groups.
    """
    values = np.asarray(values, dtype=float)
    sums, _ = _group_sums(values - values.mean(), groups)
    count = len(sums)
    if count < 2:
        return None
    error = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(values)
    half = float(stdtrit(count - 1, 1 - _TAIL)) * error
    return Interval(float(values.mean()) - half, float(values.mean()) + half)


def mcnemar_exact(b: ArrayLike, c: ArrayLike) -> np.ndarray | float:
    """Two-sided exact p-value of McNemar's test (McNemar 1947, with the binomial distribution).

    `b` items went better for one model, `c` for the other; items on which both did the same carry no
    information. Elementwise for arrays. Raises ValueError if a count is negative.
    """
    b, c = np.asarray(b), np.asarray(c)
    if (b < 0).any() or (c < 0).any():
        raise ValueError(f"mcnemar_exact needs counts >= 0; got {b} and {c}")
    p = np.minimum(1.0, 2 * bdtr(np.minimum(b, c).astype(float), b + c, 0.5))
    return float(p) if p.ndim == 0 else p


def bootstrap(differences: ArrayLike) -> Interval:
    """The 95% percentile bootstrap interval (Efron 1979) of the mean of `differences` [n] over items.

    The differences take few distinct values, so the counts of each in a resample are one multinomial draw.
    This is equivalent to drawing n items with replacement, at a cost independent of n.
    """
    differences = np.asarray(differences, dtype=float)
    values, counts = np.unique(differences, return_counts=True)
    if len(values) == 1:
        return Interval(float(values[0]), float(values[0]))
    n = len(differences)
    draws = np.random.default_rng(_SEED).multinomial(n, counts / n, size=RESAMPLES)
    low, high = np.quantile(draws @ values / n, [_TAIL, 1 - _TAIL])
    return Interval(float(low), float(high))


def clustered_bootstrap(differences: ArrayLike, groups: ArrayLike) -> Interval | None:
    """As `bootstrap`, but whole `groups` [n] of items are resampled; None below two groups.

    Percentiles over few groups are too narrow; they are expanded as in Hesterberg (2015, "What Teachers
    Should Know About the Bootstrap"): from 2.5% to the normal's tail beyond sqrt(G / (G - 1)) times the t
    quantile at G - 1 degrees of freedom.
    """
    sums, sizes = _group_sums(np.asarray(differences, dtype=float), groups)
    count = len(sums)
    if count < 2:
        return None
    weights = _group_draws(count)
    means = (weights @ sums) / (weights @ sizes)
    tail = expanded_tail(count)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def ratio_bootstrap(
    numerators: ArrayLike, denominators: ArrayLike, strata: ArrayLike | None = None
) -> Interval | None:
    """The 95% bootstrap interval of sum(`numerators`) / sum(`denominators`), both [n]; units are resampled.

    Bits per byte are such a ratio, with documents as units; so is the difference of two models on the same
    documents, with differences as numerators. Units are resampled within their `strata` [n], the components
    of a mix, as in Rao and Wu (1988, "Resampling Inference With Complex Survey Data"): from a stratum with n
    units, n - 1 are drawn, and each counts n / (n - 1), since n drawn ones would vary too little. As
    percentiles over few units are still too narrow, they are moved out to the normal's tail beyond the t
    quantile, with units minus strata as degrees of freedom. None if a stratum has one
    unit, whose variation is unknown.
    """
    pairs_2n = np.array([numerators, denominators], dtype=float)
    n = pairs_2n.shape[1]
    _, codes = np.unique(np.zeros(n) if strata is None else np.asarray(strata), return_inverse=True)
    counts = np.bincount(codes)
    if not n or counts.min() < 2:
        return None
    rng = np.random.default_rng(_SEED)
    sums_2R = np.zeros((2, RATIO_RESAMPLES))
    for code, count in enumerate(counts):
        stratum_2n = pairs_2n[:, codes == code] * (count / (count - 1))
        part = max(1, _DRAWN // count)  # resamples at once, in bounded memory
        for begin in range(0, RATIO_RESAMPLES, part):
            size = min(part, RATIO_RESAMPLES - begin)
            drawn = rng.integers(count, size=(size, count - 1))
            for place, values_n in enumerate(stratum_2n):
                sums_2R[place, begin : begin + size] += values_n[drawn].sum(axis=1)
    quantile = float(stdtrit(n - len(counts), 1 - _TAIL))
    tail = float(ndtr(-quantile))
    low, high = np.quantile(sums_2R[0] / sums_2R[1], [tail, 1 - tail])
    return Interval(float(low), float(high))


def few_units(strata: ArrayLike) -> bool:
    """Whether a stratum has so few units that the intervals of `ratio_bootstrap` are too narrow."""
    return int(np.unique(np.asarray(strata), return_counts=True)[1].min()) < FEW_UNITS


def expanded_tail(units: int) -> float:
    """The tail, at each end, of an expanded percentile interval over `units` >= 2 units."""
    quantile = float(stdtrit(units - 1, 1 - _TAIL))
    return float(ndtr(-math.sqrt(units / (units - 1)) * quantile))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, adjusted for their number by Holm's step-down method (Holm 1979), in the given order.

    Rejecting those below 5% bounds the probability of any false rejection by 5%, however the tests depend on
    each other.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()


def paired_t(differences: Sequence[float]) -> SeedTest:
    """The paired t-test (Student 1908) of `differences`, one for each seed that both models share.

    Seeds are the units: the test says how another training would come out, which a test over items cannot. If
    all differences are equal, p is 0, or 1 if all are zero. Raises ValueError for fewer than two.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n < 2:
        raise ValueError(f"paired_t needs two differences or more; got {n}")
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
    half = float(stdtrit(n - 1, 1 - _TAIL)) * error
    t = abs(mean) / error if error else (math.inf if mean else 0.0)
    p = 2 * float(stdtr(n - 1, -t))
    return SeedTest(mean, Interval(mean - half, mean + half), p)


def seed_noise(values: Mapping[str, Mapping[int, float]]) -> SeedNoise | None:
    """The noise of seeds in `values[model][seed]`; None if no two models have two seeds in common.

    Randomized blocks (Fisher 1935): a metric is its model's mean, plus the effect of its seed (the order of
    the data), which is common to all models, plus noise of equal size for all models. All models together
    determine that size from two seeds each; the differences of one pair would have a single degree of
    freedom.

    The equal size is tested: the statistic is the sum of the models' squared shares of the variance, compared
    with equal noise over as many seeds (10,000 draws from the normal distribution). Cochran's C, the largest
    share alone, would miss two large ones. If the test rejects at 5%, the model with the largest share is set
    aside and the others are tested again, until they pass; those set aside are `unequal`. With two seeds the
    test has little power, so intervals state what they assume.
    """
    fit = _blocks(values)
    if fit is None:
        return None
    sd, dof, sums, p = fit
    total = sum(sums.values())
    shares = {model: value / total if total else 0.0 for model, value in sums.items()}
    shares = dict(sorted(shares.items(), key=lambda item: -item[1]))
    unequal: dict[str, float] = {}
    left = dict(values)
    tested, squares = p, sums
    while tested < 1 - LEVEL:
        noisiest = max(squares, key=squares.__getitem__)
        several = len(left[noisiest]) - 1
        unequal[noisiest] = math.sqrt(squares[noisiest] / several) if several else sd
        del left[noisiest]
        rest = _blocks(left)
        if rest is None:
            break
        _, _, squares, tested = rest
    return SeedNoise(sd, dof, shares, p, unequal)


def _blocks(values: Mapping[str, Mapping[int, float]]) -> tuple[float, int, dict[str, float], float] | None:
    """Standard deviation, degrees of freedom, each model's sum of squares, and p of equal noise."""
    cells = [(model, seed, value) for model, by_seed in values.items() for seed, value in by_seed.items()]
    seeds = list(dict.fromkeys(seed for _, seed, _ in cells))
    members = np.array([[model == m for m in values] for model, _, _ in cells], float)
    blocks = np.array([[seed == s for s in seeds[1:]] for _, seed, _ in cells], float)
    figures = np.array([value for _, _, value in cells])
    if not cells:
        return None
    # The columns span the design; the residual of a vector outside of their span is noise.
    left, singular, _ = np.linalg.svd(np.hstack([members, blocks]), full_matrices=False)
    basis = left[:, singular > 1e-9 * singular[0]]
    dof = len(cells) - basis.shape[1]
    if not dof:
        return None

    def squares(noise: np.ndarray) -> np.ndarray:
        """For rows [..., cells]: each model's sum of squared residuals, [..., models]."""
        return (noise - (noise @ basis) @ basis.T) ** 2 @ members

    found = squares(figures - figures.mean())
    total = float(found.sum())
    drawn = squares(np.random.default_rng(_SEED).standard_normal((RESAMPLES, len(cells))))

    def concentration(sums: np.ndarray) -> np.ndarray:
        return (sums**2).sum(-1) / sums.sum(-1) ** 2

    # There is nothing to compare if only one model has noise, or if all noise is rounding.
    comparable = np.count_nonzero(drawn.mean(0) > 1e-9) > 1 and total > 1e-24 * float(figures @ figures)
    p = 1.0
    if comparable:
        # Two models have equal shares by construction, except for rounding.
        more = concentration(drawn) >= concentration(found) * (1 - 1e-9)
        p = (1 + int(more.sum())) / (1 + RESAMPLES)
    return math.sqrt(total / dof), dof, dict(zip(values, found.tolist(), strict=True)), p


def _group_sums(values: np.ndarray, groups: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The sum of `values` [n] in each group, and the size of each group, both [G]."""
    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(codes, weights=values), np.bincount(codes)


@lru_cache(maxsize=4)
def _group_draws(count: int) -> np.ndarray:
    """How often each resample contains each of `count` groups, [RESAMPLES, count]."""
    draws = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return draws.astype(np.float32)
