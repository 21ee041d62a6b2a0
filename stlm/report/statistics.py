"""statistics.csv and groups.csv: every accuracy, interval, difference and test of a study, for programs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from stlm.report.comparison import Comparisons, OverSeeds, Point, Score
from stlm.report.names import bounds_record, p_record
from stlm.report.results import RunResult

# Accuracies are in percent here.
_bounds = partial(bounds_record, digits=3, scale=100)


def statistics_records(results: Mapping[str, RunResult], comparisons: Comparisons) -> list[dict[str, Any]]:
    """One record a run (then a variant with several seeds), checkpoint, benchmark, mode and metric.

    Accuracies, differences and their bounds are in percent and points. `p` is McNemar's for a run and the
    paired t-test's over seeds for a variant (`test` says which); `p_holm` is there for the tests that the
    tables show, those of the last checkpoints.
    """
    records = []
    for name, result in results.items():
        for checkpoint, scores in comparisons.points[name].items():
            scored = result.checkpoints[checkpoint]
            for key, point in scores.items():
                version = scored.benchmarks[key[0]].version
                records.append(
                    {"kind": "run", "run": name, "variant": result.train.variant, "seeds": result.train.seed}
                    | {"checkpoint": checkpoint, "step": scored.step, "tokens": scored.tokens}
                    | _score(key, version)
                    | _of_point(point)
                )
    for variant, of_variant in comparisons.seeds.items():
        run = next(result for result in results.values() if result.train.variant == variant)
        for key, over_seeds in of_variant.items():
            version = run.last.benchmarks[key[0]].version
            records.append(
                {"kind": "variant", "variant": variant, "seeds": " ".join(map(str, over_seeds.seeds))}
                | {"step": run.last.step, "tokens": run.last.tokens}
                | _score(key, version)
                | _of_seeds(over_seeds)
            )
    return records


def _score(key: Score, version: str | int | float) -> dict[str, Any]:
    benchmark, mode, metric = key
    return {"benchmark": benchmark, "version": version, "mode": mode, "metric": metric}


def _of_point(point: Point) -> dict[str, Any]:
    accuracy, paired = point.accuracy, point.paired
    record = {"n": accuracy.n, "percent": _percent(accuracy.value), **_bounds(accuracy.interval, "")}
    record |= {"groups": accuracy.groups or None, **_bounds(accuracy.clustered, "clustered_")}
    if paired is None:
        return record
    return record | {
        "baseline": point.baseline,
        "common_items": paired.n,
        "difference": _percent(paired.difference),
        **_bounds(paired.interval, "difference_"),
        **_bounds(paired.clustered, "difference_clustered_"),
        "better": paired.better,
        "worse": paired.worse,
        "test": "mcnemar",
        "p": p_record(paired.p),
        "p_holm": p_record(paired.adjusted),
    }


def _of_seeds(over_seeds: OverSeeds) -> dict[str, Any]:
    record: dict[str, Any] = {"percent": _percent(over_seeds.mean), "sd": _percent(over_seeds.sd)}
    if over_seeds.test is None:
        return record
    return record | {
        "shared_seeds": len(over_seeds.shared),
        "difference": _percent(over_seeds.test.difference),
        **_bounds(over_seeds.test.interval, "difference_"),
        "test": "t over seeds",
        "p": p_record(over_seeds.test.p),
        "p_holm": p_record(over_seeds.adjusted),
    }


def _percent(fraction: float) -> float:
    return round(100 * fraction, 3)


def group_records(results: Mapping[str, RunResult]) -> list[dict[str, Any]]:
    """Accuracies by group (BLiMP's phenomena, MMLU's subjects ...) at each run's last checkpoint."""
    return [
        {"run": name, "benchmark": benchmark, "version": scored.version, "mode": mode}
        | {"grouping": grouping, "group": group}
        | {"percent": _percent(a.value), **_bounds((a.low, a.high)), "n": a.n}
        for name, result in results.items()
        for benchmark, scored in result.last.benchmarks.items()
        for mode, outcome in scored.modes.items()
        for grouping, groups in outcome.groups.items()
        for group, a in groups.items()
    ]
