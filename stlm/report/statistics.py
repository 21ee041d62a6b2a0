"""statistics.csv and groups.csv: every accuracy, interval, difference and test of a study, for programs."""

from __future__ import annotations

from functools import partial
from typing import Any

from stlm.report.comparison import Comparisons, OverSeeds, Paired, Point
from stlm.report.names import bounds_record, p_record
from stlm.report.results import Results
from stlm.report.schema import CheckpointResult, Score

# Accuracies are in percent here.
_bounds = partial(bounds_record, digits=3, scale=100)


def statistics_records(results: Results, comparisons: Comparisons) -> list[dict[str, Any]]:
    """One record a run (then a variant with several seeds), checkpoint, benchmark, mode and metric.

    Accuracies, differences and their bounds are in percent and points. `p` is McNemar's for a run and the
    paired t-test's over seeds for a variant (`test` says which); `p_holm` is there for the tests that the
    tables show, those of the last checkpoints.
    """
    records = [
        {"kind": "run", "run": name, "variant": result.train.variant, "seeds": result.train.seed}
        | {"checkpoint": checkpoint, **_score(result.checkpoints[checkpoint], score), **_of_point(point)}
        for name, result in results.items()
        for checkpoint, points in comparisons.points[name].items()
        for score, point in points.items()
    ]
    return records + [
        {"kind": "variant", "variant": variant, "seeds": " ".join(map(str, over_seeds.seeds))}
        | {**_score(results.variants[variant][0].last, score), **_of_seeds(over_seeds)}
        for variant, scores in comparisons.seeds.items()
        for score, over_seeds in scores.items()
    ]


def _score(checkpoint: CheckpointResult, score: Score) -> dict[str, Any]:
    benchmark, mode, metric = score
    record = {"step": checkpoint.step, "tokens": checkpoint.tokens, "benchmark": benchmark}
    return record | {"version": checkpoint.benchmarks[benchmark].version, "mode": mode, "metric": metric}


def _of_point(point: Point) -> dict[str, Any]:
    accuracy, paired = point.accuracy, point.paired
    record = {"n": accuracy.n, "percent": _percent(accuracy.value), **_bounds(accuracy.interval)}
    record |= {"groups": accuracy.groups or None, **_bounds(accuracy.clustered, "clustered_")}
    if paired is None:
        return record
    clustered = _bounds(paired.clustered, "difference_clustered_")
    more = clustered | {"better": paired.better, "worse": paired.worse}
    return record | {"baseline": point.baseline, "common_items": paired.n} | _tested(paired, "mcnemar", more)


def _of_seeds(over_seeds: OverSeeds) -> dict[str, Any]:
    record: dict[str, Any] = {"percent": _percent(over_seeds.mean), "sd": _percent(over_seeds.sd)}
    test = over_seeds.test
    return record | ({} if test is None else {"shared_seeds": test.n, **_tested(test, "t over seeds", {})})


def _tested(paired: Paired, test: str, more: dict[str, Any]) -> dict[str, Any]:
    record = {"difference": _percent(paired.difference), **_bounds(paired.interval, "difference_"), **more}
    return record | {"test": test, "p": p_record(paired.p), "p_holm": p_record(paired.adjusted)}


def _percent(fraction: float) -> float:
    return round(100 * fraction, 3)


def group_records(results: Results) -> list[dict[str, Any]]:
    """Accuracies by group (BLiMP's phenomena, MMLU's subjects ...) at each run's last checkpoint."""
    return [
        {"run": name, "benchmark": benchmark, "version": scored.version, "mode": mode}
        | {"grouping": grouping, "group": group}
        | {"percent": _percent(accuracy.value), **_bounds(accuracy.interval), "n": accuracy.n}
        for name, result in results.items()
        for benchmark, scored in result.last.benchmarks.items()
        for mode, outcome in scored.modes.items()
        for grouping, groups in outcome.groups.items()
        for group, accuracy in groups.items()
    ]
