"""Intervals, tests and credits against scipy and by hand."""

import pytest
from scipy.stats import binomtest

from stlm.evaluation.accuracy import credit, is_tie, proportion
from stlm.evaluation.statistics import mcnemar_exact, wilson


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (13, 50), (37_000, 67_000)])
def test_wilson_equals_scipy(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_lies_between_its_neighbours_for_fractions_of_ties():
    low, high = wilson(12.5, 50)
    assert wilson(12, 50).low < low < wilson(13, 50).low
    assert wilson(12, 50).high < high < wilson(13, 50).high


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(correct, n):
    with pytest.raises(ValueError, match="wilson needs"):
        wilson(correct, n)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (2, 9), (40, 71), (0, 500), (5100, 5400)])
def test_mcnemar_equals_scipys_binomial_test(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


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
