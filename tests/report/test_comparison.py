"""Comparisons with the baseline over items and over seeds, against scipy and statsmodels."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, ttest_rel
from statsmodels.stats.multitest import multipletests

from stlm.errors import UserError
from stlm.evaluation.statistics import Interval, bootstrap, clustered, clustered_bootstrap, wilson
from stlm.report.accuracies import accuracy_tables
from stlm.report.comparison import (
    SIGN,
    SIGN_ITEMS,
    Paired,
    accuracy,
    by_mode,
    compare_all,
    paired,
)
from stlm.report.results import read_results

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}
THREE = TWO | {"learned": ("Learned PE", {"positions": "learned"})}
LAST = "step-000200"


def outcomes(scores: dict[str, float], groups: list[str] | None = None) -> pd.DataFrame:
    """Items of one benchmark and mode, all of one group unless `groups` are given."""
    values = list(scores.values())
    columns = {"acc": values, "acc_norm": values, "chance": 0.5, "group": groups or [""] * len(values)}
    return pd.DataFrame(columns, index=list(scores))


def test_difference_and_p_count_discordant_items_alone():
    baseline = {str(i): float(i < 50) for i in range(100)}
    # Better on 12 items, worse on 3, the same on the other 85.
    run = baseline | {str(i): 1.0 for i in range(50, 62)} | {str(i): 0.0 for i in range(3)}
    found = paired(outcomes(baseline), outcomes(run), "acc")
    assert found.difference == pytest.approx(0.09)
    assert (found.better, found.worse, found.n) == (12, 3, 100)
    assert found.p == pytest.approx(binomtest(3, 15, 0.5).pvalue)
    assert found.interval == bootstrap([1.0] * 12 + [-1.0] * 3 + [0.0] * 85)
    assert found.clustered is None


def test_a_tie_against_right_or_wrong_counts_by_its_sign():
    found = paired(outcomes({"a": 0.5, "b": 0.5, "c": 1.0}), outcomes({"a": 1.0, "b": 0.0, "c": 0.25}), "acc")
    assert (found.better, found.worse) == (1, 2)
    assert found.difference == pytest.approx((0.5 - 0.5 - 0.75) / 3)


def test_items_are_paired_by_name_not_by_place():
    baseline = outcomes({"a": 1.0, "b": 0.0, "c": 1.0})
    found = paired(baseline, outcomes({"c": 1.0, "b": 0.0, "a": 1.0, "d": 1.0}), "acc")
    assert (found.difference, found.p, found.n) == (0.0, 1.0, 3)


def test_runs_with_no_items_in_common_have_no_comparison():
    assert paired(outcomes({"a": 1.0}), outcomes({"b": 1.0}), "acc") is None


def test_groups_give_clustered_intervals():
    rng = np.random.default_rng(0)
    groups = [f"paradigm {i // 20}" for i in range(200)]
    one, other = ({str(i): float(rng.random() < 0.6) for i in range(200)} for _ in range(2))
    own = accuracy(outcomes(one, groups), "acc")
    assert (own.n, own.groups) == (200, 10)
    assert own.interval == wilson(200 * own.value, 200)
    assert own.clustered == pytest.approx(clustered(list(one.values()), groups))
    found = paired(outcomes(one, groups), outcomes(other, groups), "acc")
    differences = np.subtract(list(other.values()), list(one.values()))
    assert found.clustered == pytest.approx(clustered_bootstrap(differences, groups))


def test_accuracies_leave_no_interval_beyond_0_and_1():
    groups = ["a"] * 9 + ["b"]
    own = accuracy(outcomes({str(i): float(i < 9) for i in range(10)}, groups), "acc")
    assert own.clustered.high == 1
    assert own.clustered.low >= 0


@pytest.mark.parametrize(
    ("adjusted", "over_groups", "sign"),
    [
        (None, None, ""),
        (0.2, None, ""),
        (0.01, None, SIGN),
        (0.01, (0.01, 0.2), SIGN),
        (0.01, (-0.01, 0.2), SIGN_ITEMS),
        (0.2, (0.01, 0.2), ""),
    ],
)
def test_sign_in_tables(adjusted, over_groups, sign):
    over_groups = over_groups and Interval(*over_groups)
    assert Paired(9, 0.1, Interval(0.05, 0.15), 0.001, over_groups, 5, 1, adjusted).sign == sign


def test_every_checkpoint_is_compared_and_the_last_ones_are_adjusted(make_study):
    study = make_study(THREE, benchmarks={"blimp": 60, "hellaswag": 40})
    results = read_results(study)
    comparisons = compare_all(results)
    assert comparisons.chance == pytest.approx({"blimp": 0.5, "hellaswag": 0.25})
    for name, result in results.items():
        assert list(comparisons.points[name]) == list(result.checkpoints)
        for checkpoint, scores in comparisons.points[name].items():
            for (benchmark, mode, metric), point in scores.items():
                own, base = (
                    getattr(results[run].checkpoints[checkpoint].benchmarks[benchmark].modes[mode], metric)
                    for run in (name, "baseline")
                )
                assert (point.accuracy.value, point.accuracy.n) == (pytest.approx(own.value), own.n)
                if name == "baseline":
                    assert point.paired is None
                    continue
                assert point.baseline == "baseline"
                assert point.paired.difference == pytest.approx(own.value - base.value)
                assert (point.paired.adjusted is not None) == (checkpoint == LAST)
    assert comparisons.tests == {("harness", "acc"): 4, ("harness", "acc_norm"): 2, ("paper", "acc"): 4}
    family = [
        comparisons.last(run, (benchmark, "harness", "acc")).paired
        for run in ("sincos", "learned")
        for benchmark in ("blimp", "hellaswag")
    ]
    expected = multipletests([own.p for own in family], method="holm")[1]
    assert [own.adjusted for own in family] == pytest.approx(expected)


def test_runs_are_compared_with_the_baseline_of_their_own_seed(make_study):
    skills = {"baseline-s0": 0.9, "baseline-s1": 0.5, "sincos-s0": 0.6, "sincos-s1": 0.8}
    study = make_study(TWO, seeds=(0, 1), benchmarks={"blimp": 100}, skills=skills)
    results = read_results(study)
    comparisons = compare_all(results)
    for seed in (0, 1):
        own, base = (
            results[f"{variant}-s{seed}"].last.benchmarks["blimp"].modes["paper"].acc.value
            for variant in ("sincos", "baseline")
        )
        found = comparisons.last(f"sincos-s{seed}", ("blimp", "paper", "acc"))
        assert found.baseline == f"baseline-s{seed}"
        assert found.paired.difference == pytest.approx(own - base)
    # Two seeds are too few for a test over them: each run has its own.
    assert comparisons.seeds["sincos"]["blimp", "paper", "acc"].test is None
    assert comparisons.tests["paper", "acc"] == 2


def test_with_three_seeds_the_test_is_over_them(make_study):
    study = make_study(THREE, seeds=(3, 4, 5), benchmarks={"blimp": 100, "hellaswag": 60})
    results = read_results(study)
    comparisons = compare_all(results)
    p = []
    for variant in ("sincos", "learned"):
        for benchmark in ("blimp", "hellaswag"):
            own, base = (
                [
                    results[f"{v}-s{seed}"].last.benchmarks[benchmark].modes["harness"].acc.value
                    for seed in (3, 4, 5)
                ]
                for v in (variant, "baseline")
            )
            found = comparisons.seeds[variant][benchmark, "harness", "acc"]
            expected = ttest_rel(own, base)
            assert (found.seeds, found.test.n) == ([3, 4, 5], 3)
            assert (found.mean, found.sd) == pytest.approx((np.mean(own), np.std(own, ddof=1)))
            assert found.test.p == pytest.approx(expected.pvalue)
            assert found.test.interval == pytest.approx(expected.confidence_interval(0.95))
            assert comparisons.last(f"{variant}-s3", (benchmark, "harness", "acc")).paired.adjusted is None
            p.append(found.test.p)
    assert comparisons.tests["harness", "acc"] == 4
    adjusted = [
        comparisons.seeds[v][b, "harness", "acc"].test.adjusted
        for v in ("sincos", "learned")
        for b in ("blimp", "hellaswag")
    ]
    assert adjusted == pytest.approx(multipletests(p, method="holm")[1])
    assert comparisons.seeds["baseline"]["blimp", "harness", "acc"].test is None


def test_last_checkpoints_are_compared_whatever_their_steps(make_study):
    """A variant may train for more steps: the tables hold the ends of both trainings against each other."""
    study = make_study(TWO, benchmarks={"blimp": 50})
    for file, key in (("train.json", "checkpoints"), ("evaluation.json", "checkpoints")):
        path = study.runs["sincos"].folder / file
        content = json.loads(path.read_text())
        last = content[key][-1] if file == "train.json" else content[key][LAST]
        last["step"] = 400
        path.write_text(json.dumps(content))
    comparisons = compare_all(read_results(study))
    steps = comparisons.points["sincos"]
    assert all(point.baseline == "baseline" for scores in steps.values() for point in scores.values())


def test_checkpoint_without_a_partner_has_accuracies_alone(make_study):
    study = make_study(TWO, benchmarks={"blimp": 50})
    path = study.runs["baseline"].folder / "evaluation.json"
    content = json.loads(path.read_text())
    del content["checkpoints"]["step-000050"]
    path.write_text(json.dumps(content))
    points = compare_all(read_results(study)).points["sincos"]
    assert [own["blimp", "paper", "acc"].paired is None for own in points.values()] == [True, False, False]


def test_runs_scored_by_other_rules_are_refused(make_study, change_facts):
    study = make_study(TWO, benchmarks={"blimp": 50})
    change_facts(study.runs["sincos"].folder / "items.parquet", scoring_version=1)
    with pytest.raises(UserError, match=r"scoring version 2 against 1.*stlm evaluate toy sincos"):
        compare_all(read_results(study))


def test_files_that_say_nothing_of_themselves_are_still_reported(make_study, change_facts):
    study = make_study(TWO, benchmarks={"blimp": 50})
    change_facts(study.runs["sincos"].folder / "items.parquet")
    comparisons = compare_all(read_results(study))
    assert comparisons.last("sincos", ("blimp", "paper", "acc")).paired.n == 50
    assert [text.split(":")[0] for text in comparisons.disturbing] == ["sincos"]


def test_another_harness_is_told(make_study, change_facts):
    study = make_study(TWO, benchmarks={"blimp": 50})
    assert compare_all(read_results(study)).disturbing == []
    harness = {"package": "lm_eval", "version": "0.5"}
    change_facts(study.runs["sincos"].folder / "items.parquet", harness=harness)
    comparisons = compare_all(read_results(study))
    told = "baseline and sincos: harness lm_eval 0.4.13 against lm_eval 0.5"
    assert comparisons.disturbing == [told]
    (table, *_) = accuracy_tables(read_results(study), comparisons)
    assert f"Not scored alike: {told}." in table.notes


def test_items_that_disagree_with_the_record_are_refused(make_study):
    study = make_study(TWO, benchmarks={"blimp": 50})
    path = study.runs["sincos"].folder / "evaluation.json"
    content = json.loads(path.read_text())
    content["checkpoints"][LAST]["benchmarks"]["blimp"]["modes"]["paper"]["acc"]["value"] += 0.02
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"items\.parquet gives blimp \(paper mode, acc\).*toy sincos"):
        compare_all(read_results(study))


def test_benchmark_missing_from_the_items_is_named(make_study):
    study = make_study(TWO, benchmarks={"blimp": 50})
    path = study.runs["sincos"].folder / "evaluation.json"
    content = json.loads(path.read_text())
    scored = content["checkpoints"][LAST]["benchmarks"]
    scored["mmlu"] = scored["blimp"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no items of mmlu in harness mode at step-000200: run"):
        compare_all(read_results(study))


def test_outcomes_are_split_by_benchmark_and_mode(make_study):
    result = read_results(make_study(TWO, benchmarks={"blimp": 20, "hellaswag": 10}))["baseline"]
    parts = by_mode(result.outcomes())
    assert {key: len(own) for key, own in parts.items()} == {
        (b, m): n for b, n in (("blimp", 20), ("hellaswag", 10)) for m in ("harness", "paper")
    }
