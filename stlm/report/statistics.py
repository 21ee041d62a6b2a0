"""tables/statistics.csv: every accuracy, interval, difference and test of a study, for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stlm.evaluation.statistics import Interval
from stlm.report.comparison import Comparisons, OverSeeds, Point, Score
from stlm.report.results import RunResult


def statistics_records(results: Mapping[str, RunResult], comparisons: Comparisons) -> list[dict[str, Any]]:
    """One record a run (then a variant with several seeds), checkpoint, benchmark, mode and metric.

    Accuracies, differences and their bounds are in percent and points. `p` is McNemar's for a run and the
    paired t-test's over seeds for a variant (`test` says which); `p_holm` is there for the tests that the
    tables show, those of the last checkpoints.
    """
    records = []
    for name, result in results.items():
        for checkpoint, scores in comparisons.points[name].items():
            own = result.checkpoints[checkpoint]
            for key, point in scores.items():
                version = own.benchmarks[key[0]].version
                records.append(
                    {"kind": "run", "run": name, "variant": result.train.variant, "seeds": result.train.seed}
                    | {"checkpoint": checkpoint, "step": own.step, "tokens": own.tokens}
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
    own, paired = point.accuracy, point.paired
    record = {"n": own.n, "percent": _percent(own.value), **_bounds("", own.interval)}
    record |= {"groups": own.groups or None, **_bounds("clustered_", own.clustered)}
    if paired is None:
        return record
    return record | {
        "baseline": point.baseline,
        "common_items": paired.n,
        "difference": _percent(paired.difference),
        **_bounds("difference_", paired.interval),
        **_bounds("difference_clustered_", paired.clustered),
        "better": paired.better,
        "worse": paired.worse,
        "test": "mcnemar",
        "p": _p(paired.p),
        "p_holm": _p(paired.adjusted),
    }


def _of_seeds(own: OverSeeds) -> dict[str, Any]:
    record: dict[str, Any] = {"percent": _percent(own.mean), "sd": _percent(own.sd)}
    if own.test is None:
        return record
    return record | {
        "shared_seeds": len(own.shared),
        "difference": _percent(own.test.difference),
        **_bounds("difference_", own.test.interval),
        "test": "t over seeds",
        "p": _p(own.test.p),
        "p_holm": _p(own.adjusted),
    }


def _bounds(prefix: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = (None, None) if interval is None else map(_percent, interval)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _percent(fraction: float) -> float:
    return round(100 * fraction, 3)


def _p(p: float | None) -> float | None:
    return None if p is None else float(f"{p:.4g}")
