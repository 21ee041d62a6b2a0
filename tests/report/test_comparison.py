"""Paired comparisons with the baseline, against scipy's binomial test."""

import pandas as pd
import pytest
from scipy.stats import binomtest

from stlm.report.accuracies import accuracy_tables
from stlm.report.comparison import compare, compare_all
from stlm.report.results import read_results


def outcomes(scores: dict[str, float], benchmark: str = "blimp") -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(
        [(benchmark, "harness", item) for item in scores], names=["benchmark", "mode", "item"]
    )
    values = list(scores.values())
    return pd.DataFrame({"acc": values, "acc_norm": values, "chance": 0.5}, index=index)


def test_difference_and_p_count_discordant_items_alone():
    baseline = {str(i): float(i < 50) for i in range(100)}
    # Better on 12 items, worse on 3, the same on the other 85.
    run = baseline | {str(i): 1.0 for i in range(50, 62)} | {str(i): 0.0 for i in range(3)}
    paired = compare(outcomes(baseline), outcomes(run))["blimp", "harness", "acc"]
    assert paired.difference == pytest.approx(0.09)
    assert paired.p == pytest.approx(binomtest(3, 15, 0.5).pvalue)
    assert paired.n == 100


def test_items_are_paired_by_name_not_by_place():
    baseline = outcomes({"a": 1.0, "b": 0.0, "c": 1.0})
    run = outcomes({"c": 1.0, "b": 0.0, "a": 1.0, "d": 1.0})
    paired = compare(baseline, run)["blimp", "harness", "acc"]
    assert (paired.difference, paired.p, paired.n) == (0.0, 1.0, 3)


def test_runs_with_no_items_in_common_have_no_comparison():
    assert compare(outcomes({"a": 1.0}), outcomes({"a": 1.0}, "mmlu")) == {}


def test_difference_equals_that_of_the_accuracies_and_chance_the_options(make_study):
    study = make_study(benchmarks={"blimp": 60, "hellaswag": 40})
    results = read_results(study)
    comparisons = compare_all(results, "baseline")
    assert comparisons.chance == pytest.approx({"blimp": 0.5, "hellaswag": 0.25})
    assert "baseline" not in comparisons.paired
    for name, paired in comparisons.paired.items():
        for (benchmark, mode, metric), found in paired.items():
            if metric == "acc":
                own, base = (
                    results[run].last.benchmarks[benchmark].modes[mode] for run in (name, "baseline")
                )
                assert found.difference == pytest.approx(own.acc.value - base.acc.value)


def test_runs_are_compared_with_the_baseline_of_their_own_seed(make_study):
    variants = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}
    skills = {"baseline-s0": 0.9, "baseline-s1": 0.5, "sincos-s0": 0.6, "sincos-s1": 0.8}
    study = make_study(variants, seeds=(0, 1), benchmarks={"blimp": 100}, skills=skills)
    results = read_results(study)
    comparisons = compare_all(results, study.baseline)
    assert set(comparisons.paired) == {"sincos-s0", "sincos-s1"}
    scored = {
        name: result.last.benchmarks["blimp"].modes["paper"].acc.value for name, result in results.items()
    }
    for seed in (0, 1):
        found = comparisons.paired[f"sincos-s{seed}"]["blimp", "paper", "acc"].difference
        assert found == pytest.approx(scored[f"sincos-s{seed}"] - scored[f"baseline-s{seed}"])
    (table, *_) = accuracy_tables(study, results, comparisons)
    assert "difference in points from Baseline of the same seed on the same items" in table.notes[0]
