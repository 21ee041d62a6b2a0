"""Intervals, tests and credits against scipy, statsmodels and exact counting; error rates by simulation."""

from fractions import Fraction
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from stlm.evaluation.accuracy import credit, is_tie, proportion
from stlm.evaluation.statistics import (
    bootstrap,
    clustered,
    clustered_bootstrap,
    expanded_tail,
    few_units,
    holm,
    mcnemar_exact,
    paired_t,
    ratio_bootstrap,
    seed_noise,
    wilson,
)

SIMULATIONS = 1000


def clusters(rng: np.random.Generator, groups: int, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Values that depend on their group, and the groups, of unequal size."""
    codes = np.repeat(np.arange(groups), rng.integers(5, 40, size=groups))
    return spread * rng.standard_normal(groups)[codes] + rng.standard_normal(len(codes)), codes


def misses_zero(interval: tuple[float, float]) -> bool:
    return not interval[0] <= 0 <= interval[1]


def assert_rate(rejections: int, rate: float = 0.05) -> None:
    """Rejections among SIMULATIONS as a test that keeps its level gives them, but for 1 run in 1,000."""
    low, high = stats.binom.ppf([0.0005, 0.9995], SIMULATIONS, rate)
    assert low <= rejections <= high


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (13, 50), (37_000, 67_000)])
def test_wilson_equals_statsmodels(correct, n):
    expected = proportion_confint(correct, n, method="wilson")
    assert wilson(correct, n) == pytest.approx(expected, abs=1e-12)


def test_wilson_lies_between_its_neighbours_for_fractions_of_ties():
    low, high = wilson(12.5, 50)
    assert wilson(12, 50).low < low < wilson(13, 50).low
    assert wilson(12, 50).high < high < wilson(13, 50).high


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(correct, n):
    with pytest.raises(ValueError, match="wilson needs"):
        wilson(correct, n)


@pytest.mark.parametrize("groups", [2, 5, 67])
def test_clustered_interval_equals_statsmodels(groups):
    values, codes = clusters(np.random.default_rng(groups), groups)
    fitted = OLS(values, np.ones(len(values))).fit(
        cov_type="cluster",
        cov_kwds={"groups": codes, "use_correction": True, "df_correction": True},
        use_t=True,
    )
    assert clustered(values, codes) == pytest.approx(fitted.conf_int()[0], rel=1e-9)
    names = np.array([f"group {code}" for code in codes])
    order = np.random.default_rng(0).permutation(len(values))
    assert clustered(values[order], names[order]) == pytest.approx(clustered(values, codes))


def test_one_group_has_no_clustered_interval():
    assert clustered([0.0, 1.0], ["a", "a"]) is None
    assert clustered_bootstrap([0.0, 1.0], ["a", "a"]) is None


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (2, 9), (40, 71), (0, 500), (1510, 1640)])
def test_mcnemar_equals_exact_counting_and_statsmodels(b, c):
    n = b + c
    counted = Fraction(2 * sum(comb(n, k) for k in range(min(b, c) + 1)), 2**n)
    assert mcnemar_exact(b, c) == pytest.approx(float(min(counted, Fraction(1))), rel=1e-9)
    assert mcnemar_exact(b, c) == pytest.approx(mcnemar([[7, b], [c, 9]], exact=True).pvalue, rel=1e-9)
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


def test_mcnemar_of_arrays_is_elementwise():
    b, c = np.array([0, 2, 40]), np.array([1, 9, 71])
    assert mcnemar_exact(b, c).tolist() == [mcnemar_exact(*pair) for pair in zip(b, c, strict=True)]
    with pytest.raises(ValueError, match="mcnemar_exact needs"):
        mcnemar_exact(-1, 2)


def test_bootstrap_equals_scipys_resampling_of_items():
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, -0.5, 0.0, 0.25, 1.0], size=400, p=[0.1, 0.05, 0.6, 0.1, 0.15])
    expected = stats.bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=rng
    ).confidence_interval
    assert bootstrap(differences) == pytest.approx(expected, abs=0.004)  # 3 standard errors of a percentile
    assert bootstrap(differences) == bootstrap(differences[::-1])


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_bootstrap_of_equal_differences_has_no_width(value):
    assert bootstrap([value] * 10) == (value, value)


def test_clustered_bootstrap_equals_scipys_resampling_of_groups():
    values, codes = clusters(np.random.default_rng(5), 30)
    sums, sizes = np.bincount(codes, weights=values), np.bincount(codes)
    expected = stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        n_resamples=10_000,
        confidence_level=1 - 2 * expanded_tail(30),
        method="percentile",
        rng=np.random.default_rng(6),
    ).confidence_interval
    assert clustered_bootstrap(values, codes) == pytest.approx(expected, abs=0.012)


def test_expanded_percentiles_reach_as_far_as_the_t_interval():
    tails = [expanded_tail(n) for n in (5, 10, 20, 100, 10_000)]
    assert tails == sorted(tails)
    for n, tail in zip((5, 10, 20, 100), tails, strict=False):
        # Of normal data, resampled means vary by s^2 (n - 1) / n / n: the bounds become the t interval's.
        reach = stats.norm.ppf(1 - tail) * np.sqrt((n - 1) / n)
        assert reach == pytest.approx(stats.t.ppf(0.975, n - 1))
    assert tails[-1] == pytest.approx(0.025, abs=2e-5)


@pytest.mark.parametrize("p", [[0.03], [0.01, 0.04, 0.03, 0.005], [0.5, 0.9, 1.0], [0.02, 0.02, 0.02], []])
def test_holm_equals_statsmodels(p):
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1] if p else [])


@pytest.mark.parametrize("differences", [[0.01, 0.03, 0.02], [-0.1, 0.1, 0.0, 0.05], [0.2, 0.1]])
def test_paired_t_equals_scipy(differences):
    baseline = np.linspace(0.3, 0.5, len(differences))
    expected = stats.ttest_rel(baseline + differences, baseline)
    found = paired_t(differences)
    assert found.difference == pytest.approx(np.mean(differences))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(expected.confidence_interval(0.95))


def test_paired_t_of_equal_differences_and_of_one():
    assert paired_t([0.0, 0.0, 0.0]).p == 1
    assert paired_t([0.25, 0.25, 0.25]).p == 0
    with pytest.raises(ValueError, match="two differences"):
        paired_t([0.1])


@pytest.mark.parametrize("missing", [0, 3])
def test_the_noise_of_seeds_equals_a_least_squares_fit_of_models_and_seeds(missing):
    """With all cells, the interval of a difference is that of the fit's contrast, too."""
    rng = np.random.default_rng(missing)
    cells = [(model, seed) for model in "abcd" for seed in range(3)]
    cells = [cells[place] for place in sorted(rng.permutation(len(cells))[missing:])]
    figures = rng.standard_normal(len(cells)) + 5 * np.array([seed for _, seed in cells])
    design = [[model == own for own in "abcd"] + [seed == own for own in (1, 2)] for model, seed in cells]
    fit = OLS(figures, np.array(design, float)).fit()
    values: dict[str, dict[int, float]] = {}
    for (model, seed), figure in zip(cells, figures, strict=True):
        values.setdefault(model, {})[seed] = figure
    noise = seed_noise(values)
    assert (noise.sd, noise.dof) == pytest.approx((fit.mse_resid**0.5, fit.df_resid))
    of_model = pd.Series(np.asarray(fit.resid) ** 2).groupby([model for model, _ in cells]).sum()
    assert dict(noise.shares) == pytest.approx(dict(of_model / of_model.sum()), abs=1e-9)
    assert list(noise.shares.values()) == sorted(noise.shares.values(), reverse=True)
    if not missing:
        low, high = fit.t_test([-1, 1, 0, 0, 0, 0]).conf_int()[0]
        assert 2 * noise.half_width([0.0] * 3, "ab") == pytest.approx(high - low)


def test_the_noise_of_seeds_is_unknown_from_one_seed_or_one_model():
    assert seed_noise({"a": {0: 1.0}, "b": {0: 2.0}}) is None
    assert seed_noise({"a": {0: 1.0, 1: 2.0}}) is None, "what the seeds do to all is not noise"
    assert seed_noise({}) is None
    none = seed_noise({"a": {0: 1.0, 1: 3.0}, "b": {0: 2.0, 1: 4.0}})
    assert (none.sd, none.dof, none.p) == pytest.approx((0.0, 1, 1.0))


def of_models(figures: np.ndarray) -> dict[str, dict[int, float]]:
    """By name and seed, from [models, seeds]."""
    return {f"m{place}": dict(enumerate(own.tolist())) for place, own in enumerate(figures)}


def misses(deviations: np.ndarray, simulations: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """How often the pooled interval and ours of each difference from the first model miss zero, [models - 1].

    In studies of models of equal mean with such noise, two seeds each; and how often noise is called unequal.
    """
    rng = np.random.default_rng(seed)
    pooled, ours, called = np.zeros(len(deviations) - 1), np.zeros(len(deviations) - 1), 0
    for _ in range(simulations):
        figures = rng.standard_normal((len(deviations), 2)) * deviations[:, None] + rng.standard_normal(2)
        noise = seed_noise(of_models(figures))
        called += bool(noise.unequal)
        for place, differences in enumerate((figures - figures[0])[1:]):
            found = abs(differences.mean())
            pooled[place] += found > noise.half_width(differences, ())
            ours[place] += found > noise.half_width(differences, ("m0", f"m{place + 1}"))
    return pooled / simulations, ours / simulations, called


@pytest.fixture
def fewer_draws(monkeypatch):
    """Simulations within simulations: fewer of the inner ones."""
    monkeypatch.setattr("stlm.evaluation.statistics.RESAMPLES", 500)


def test_equal_noise_is_seldom_called_unequal_and_intervals_keep_their_level(fewer_draws):
    pooled, ours, called = misses(np.ones(10), 400, 0)
    low, high = stats.binom.ppf([0.0005, 0.9995], 400, 0.05)
    assert low <= called <= high
    assert (ours <= pooled).all(), "never narrower than the pooled interval"
    assert ours.mean() < 0.06


def test_models_of_much_noise_get_wider_intervals_and_the_others_keep_theirs(fewer_draws):
    """Two of 19 models carry most of the variance: the pooled interval misses a quarter for them, or more."""
    deviations = np.ones(19)
    deviations[[3, 7]] = 6.0
    pooled, ours, called = misses(deviations, 250, 1)
    noisy, calm = [2, 6], [place for place in range(18) if place not in (2, 6)]
    assert called > 150
    assert pooled[noisy].mean() > 0.25
    assert ours[noisy].mean() < 0.75 * pooled[noisy].mean()
    assert ours[calm].mean() < 0.05


def test_a_noisy_baseline_widens_every_difference(fewer_draws):
    deviations = np.ones(19)
    deviations[0] = 8.0
    pooled, ours, _ = misses(deviations, 150, 2)
    assert pooled.mean() > 0.4
    assert ours.mean() < 0.75 * pooled.mean()


def test_two_large_shares_do_not_hide_each_other():
    """The largest share alone (Cochran's C) would be no sign: 0.39 is critical for 20 models of two seeds."""
    figures = np.random.default_rng(5).standard_normal((19, 2))
    figures[[3, 7]] = [[0, 9.0], [9.0, 0]]
    noise = seed_noise(of_models(figures))
    assert set(noise.unequal) == {"m3", "m7"}
    quiet = [0.5, 0.7]
    assert noise.half_width(quiet, ("m0", "m1")) == noise.half_width(quiet, ())
    wide = [0.5, 9.0]
    assert noise.half_width(wide, ("m0", "m3")) == paired_t(wide).interval.half_width
    assert noise.half_width([0.5], ("m0", "m3")) > noise.half_width([0.5], ())


def equal_models(rng: np.random.Generator, items: int) -> np.ndarray:
    """Differences [SIMULATIONS, items] of two models of the same skill on each item, answering by chance."""
    skill = rng.beta(2, 2, size=items)
    answers = rng.random((2, SIMULATIONS, items), dtype=np.float32) < skill
    return answers[0].astype(np.int8) - answers[1].astype(np.int8)


def test_tests_over_items_keep_their_level_for_equal_models():
    # So many items that the exact test's conservatism (its p-values are discrete) is below the margin.
    differences = equal_models(np.random.default_rng(0), 2000)
    better, worse = (differences > 0).sum(axis=1), (differences < 0).sum(axis=1)
    assert_rate(int((mcnemar_exact(better, worse) < 0.05).sum()))
    intervals = [bootstrap(own) for own in differences]
    assert_rate(sum(map(misses_zero, intervals)))


def test_clustered_interval_keeps_its_level_where_the_one_over_items_does_not():
    """Models that are equally good over all groups, but not on each: these groups are a sample."""
    rng = np.random.default_rng(1)
    groups, size = 40, 25
    codes = np.repeat(np.arange(groups), size)
    naive = robust = resampled = 0
    for _ in range(SIMULATIONS):
        skill = 0.5 + 0.1 * rng.standard_normal((2, groups))[:, codes]
        answers = rng.random((2, groups * size)) < skill
        differences = answers[0].astype(float) - answers[1]
        naive += misses_zero(bootstrap(differences))
        robust += misses_zero(clustered(differences, codes))
        resampled += misses_zero(clustered_bootstrap(differences, codes))
    assert_rate(robust)
    assert_rate(resampled)
    assert naive > 0.1 * SIMULATIONS


def documents(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes of documents of skewed length; longer ones are easier."""
    lengths = np.exp(rng.normal(9.0, 0.7, n))
    return lengths * (2.0 + 0.15 * rng.standard_normal(n) - 0.05 * (np.log(lengths) - 9.0)), lengths


def test_the_interval_of_a_ratio_is_that_of_scipys_bootstrap():
    """Of many units and one stratum it is Efron's: the factor n / (n - 1) and t's tail are nearly 1."""
    bits, lengths = documents(np.random.default_rng(3), 400)
    found = ratio_bootstrap(bits, lengths)
    expected = stats.bootstrap(
        (bits, lengths),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)
    assert ratio_bootstrap(bits, lengths) == found, "seeded"
    # Differences of two models on the same units: what they share cancels.
    paired = ratio_bootstrap(bits - 0.99 * bits, lengths)
    assert paired.low == pytest.approx(0.01 * found.low) and paired.half_width < 0.02 * found.half_width


def test_the_variance_of_a_ratio_within_strata_is_linearizations():
    """Rao and Wu's, against Taylor's: sum over strata of n / (n - 1) times the squared deviations."""
    rng = np.random.default_rng(4)
    strata = np.repeat(["books", "speech", "web"], [30, 60, 90])
    bits, lengths = documents(rng, 180)
    bits = bits * np.repeat([1.0, 1.5, 1.2], [30, 60, 90])
    residuals = bits - bits.sum() / lengths.sum() * lengths
    variance = 0.0
    for name in np.unique(strata):
        own = residuals[strata == name]
        variance += len(own) / (len(own) - 1) * ((own - own.mean()) ** 2).sum()
    half = 1.96 * variance**0.5 / lengths.sum()
    assert ratio_bootstrap(bits, lengths, strata).half_width == pytest.approx(half, rel=0.08)
    # What tells the strata apart is no noise: they always have their parts of the text.
    assert ratio_bootstrap(bits, lengths).half_width > 1.3 * half


@pytest.mark.parametrize(("units", "least"), [(5, 0.85), (20, 0.90), (60, 0.92)])
def test_intervals_over_documents_hold_the_true_value_about_as_often_as_they_say(units, least):
    truth = np.divide(*(part.sum() for part in documents(np.random.default_rng(6), 1_000_000)))
    rng = np.random.default_rng(7)
    holds = 0
    for _ in range(400):
        interval = ratio_bootstrap(*documents(rng, units))
        holds += interval.low <= truth <= interval.high
    assert least <= holds / 400 <= 0.98


def test_one_unit_has_no_interval():
    assert ratio_bootstrap([3.0], [2.0]) is None
    assert ratio_bootstrap([], []) is None
    assert ratio_bootstrap([3.0, 4.0, 5.0], [2.0, 2.0, 2.0], ["a", "a", "b"]) is None
    low, high = ratio_bootstrap([3.0, 4.0], [2.0, 2.0])
    assert (low, high) == (1.5, 2.0), "both units alone: no interval can be wider"
    assert few_units(["a"] * 9) and not few_units(["a"] * 10)
    assert few_units(["a"] * 20 + ["b"] * 9)


def test_ties_count_one_kth():
    assert credit([-1.0, -2.0, -3.0], 0) == 1
    assert credit([-1.0, -2.0, -3.0], 1) == 0
    assert credit([-1.0, -1.0, -3.0], 1) == 0.5
    assert credit([-1.0, -1.0, -3.0], 2) == 0
    assert credit([-1.0] * 4, 3) == 0.25
    assert is_tie([-1.0, -1.0, -3.0])
    assert not is_tie([-1.0, -3.0, -3.0])
    result = proportion([1, 0, 0.5, 0.5])
    assert (result["value"], result["n"]) == (0.5, 4)
    assert (result["low"], result["high"]) == wilson(2, 4)
