"""Accuracies with their intervals, and comparisons with the baseline: over items and over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import mean, stdev

import pandas as pd

from stlm.errors import UserError
from stlm.evaluation.predictions import Facts, read_facts, unlike_items
from stlm.evaluation.statistics import (
    Interval,
    SeedTest,
    bootstrap,
    clustered,
    clustered_bootstrap,
    holm,
    mcnemar_exact,
    paired_t,
    wilson,
)
from stlm.report.results import CheckpointResult, PublishedResult, RunResult

# (benchmark, mode, metric): metric is "acc" or "acc_norm".
Score = tuple[str, str, str]
# With two seeds a standard deviation says next to nothing, and a t interval is 6 times as wide as with three.
FEWEST_SEEDS = 3
SIGNIFICANT = 0.05
# Follows a significant difference; the second, one that is significant over items but not over groups.
SIGN, SIGN_ITEMS = "*", "†"


@dataclass(frozen=True)
class Accuracy:
    """An accuracy of `n` items, as a fraction, with its 95% Wilson interval.

    Where the items come in two or more groups (BLiMP's paradigms, MMLU's subjects), `groups` is their number
    and `clustered` the cluster-robust interval; else 0 and None.
    """

    value: float
    n: int
    interval: Interval
    groups: int
    clustered: Interval | None


@dataclass(frozen=True)
class Paired:
    """A run compared with the baseline on the `n` items that both answered.

    `difference` is the mean of the item-wise differences (a fraction, positive: the run is better) with its
    95% bootstrap `interval` over items and, where there are groups, over groups (`clustered`). `better` and
    `worse` count the items on which the run's credit was higher and lower; `p` is that of the two-sided
    exact McNemar test of these counts, `adjusted` the same after Holm's correction for the table's tests.
    """

    n: int
    difference: float
    interval: Interval
    clustered: Interval | None
    better: int
    worse: int
    p: float
    adjusted: float | None = None


@dataclass(frozen=True)
class OverSeeds:
    """A variant's accuracies over its `seeds`: mean and standard deviation.

    `test` is the paired t-test with the baseline over the seeds that both have (`shared`), None below three
    or for the baseline itself; `adjusted` its p-value after Holm's correction.
    """

    seeds: list[int]
    mean: float
    sd: float
    shared: list[int]
    test: SeedTest | None
    adjusted: float | None = None


@dataclass(frozen=True)
class Point:
    """One score of one checkpoint: its accuracy, and how it compares with the run `baseline` at that step."""

    accuracy: Accuracy
    paired: Paired | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Comparisons:
    """`points[run][checkpoint][score]`, `seeds[variant][score]`, and `chance[benchmark]` as a fraction.

    The tests that tables show, those of the last checkpoints, are adjusted for their number, `tests[mode,
    metric]`: one for each benchmark and run, or variant where there are enough seeds for a test over them.
    `disturbing` lists differences in scoring that should not change the figures, but may.
    """

    points: Mapping[str, Mapping[str, Mapping[Score, Point]]]
    seeds: Mapping[str, Mapping[Score, OverSeeds]]
    chance: Mapping[str, float]
    tests: Mapping[tuple[str, str], int]
    disturbing: list[str]

    def last(self, run: str, score: Score) -> Point | None:
        """The score at the run's last checkpoint, which the tables quote; None where it has none."""
        return list(self.points[run].values())[-1].get(score)


def significant(adjusted: float | None) -> bool:
    """Whether a test, adjusted for their number, rejects at 5%."""
    return adjusted is not None and adjusted < SIGNIFICANT


def mark(paired: Paired) -> str:
    """The sign after a run's difference in tables and plots; empty where it is not significant."""
    if not significant(paired.adjusted):
        return ""
    over_groups = paired.clustered
    return SIGN_ITEMS if over_groups is not None and over_groups.low <= 0 <= over_groups.high else SIGN


def accuracy(outcomes: pd.DataFrame, metric: str) -> Accuracy:
    """The accuracy of items (see `read_outcomes`) that are all of one benchmark and mode."""
    n, correct = len(outcomes), float(outcomes[metric].sum())
    groups = _codes(outcomes["group"])
    return Accuracy(
        value=correct / n,
        n=n,
        interval=wilson(min(correct, n), n),
        groups=0 if groups is None else groups.nunique(),
        clustered=None if groups is None else _within(clustered(outcomes[metric], groups)),
    )


def paired(baseline: pd.DataFrame, run: pd.DataFrame, metric: str) -> Paired | None:
    """Compare two tables of items of one benchmark and mode by the items' names; None if they share none."""
    both = baseline.join(run[metric].rename("compared"), how="inner")
    if both.empty:
        return None
    difference = both["compared"] - both[metric]
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    groups = _codes(both["group"])
    return Paired(
        n=len(both),
        difference=float(difference.mean()),
        interval=bootstrap(difference),
        clustered=None if groups is None else clustered_bootstrap(difference, groups),
        better=better,
        worse=worse,
        p=mcnemar_exact(better, worse),
    )


def by_mode(outcomes: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Outcomes of each (benchmark, mode), indexed by item."""
    return {
        (str(benchmark), str(mode)): items.droplevel(["benchmark", "mode"])
        for (benchmark, mode), items in outcomes.groupby(["benchmark", "mode"], sort=False, observed=True)
    }


def compare_all(results: Mapping[str, RunResult], baseline: str) -> Comparisons:
    """Compare every run with the run of `baseline`'s variant that has its seed, where there is one.

    Last checkpoints are compared with each other, the others with the baseline's of the same step. At most
    two checkpoints' items are in memory at a time. Raises UserError where two runs were scored by different
    rules or files, or where items.parquet and evaluation.json disagree.
    """
    variant = results[baseline].train.variant
    baselines = {
        result.train.seed: name for name, result in results.items() if result.train.variant == variant
    }
    disturbing = _scored_alike(results, baselines)
    points: dict[str, dict[str, dict[Score, Point]]] = {
        name: {checkpoint: {} for checkpoint in result.checkpoints} for name, result in results.items()
    }
    chance: dict[str, float] = {}
    for (base, base_checkpoint), members in _partners(results, baselines).items():
        base_items = None if base is None else _read(results[base], base_checkpoint)
        for name, checkpoint in members:
            if name == base:
                items, against = base_items, None
            else:
                items, against = _read(results[name], checkpoint), base
            points[name][checkpoint] = {
                key: _point(items, base_items if against else None, against, key)
                for key in scores(results[name].checkpoints[checkpoint])
            }
            _check_recorded(results[name], checkpoint, points[name][checkpoint])
            chance = {b: float(outcomes["chance"].mean()) for (b, _), outcomes in items.items()} | chance
    seeds = _over_seeds(results, variant, points)
    return Comparisons(points, seeds, chance, _adjust(points, seeds, results), disturbing)


def _partners(
    results: Mapping[str, RunResult], baselines: Mapping[int, str]
) -> dict[tuple[str | None, str], list[tuple[str, str]]]:
    """(Baseline run, checkpoint) -> the (run, checkpoint) pairs compared with it, itself first.

    A checkpoint without a partner is listed alone, under None and its name.
    """
    found: dict[tuple[str | None, str], list[tuple[str, str]]] = {
        (name, checkpoint): [(name, checkpoint)]
        for name in baselines.values()
        for checkpoint in results[name].checkpoints
    }
    for name, result in results.items():
        base = baselines.get(result.train.seed)
        if name == base:
            continue
        steps = {} if base is None else {c.step: n for n, c in results[base].checkpoints.items()}
        for checkpoint, scored in result.checkpoints.items():
            partner = list(steps.values())[-1] if steps and scored is result.last else steps.get(scored.step)
            key = (None, f"{name} {checkpoint}") if partner is None else (base, partner)
            found.setdefault(key, []).append((name, checkpoint))
    return found


def _read(result: RunResult, checkpoint: str) -> dict[tuple[str, str], pd.DataFrame]:
    """The items of each (benchmark, mode) that evaluation.json lists of the checkpoint."""
    items = by_mode(result.outcomes(checkpoint))
    for benchmark, mode, _ in scores(result.checkpoints[checkpoint]):
        if (benchmark, mode) not in items:
            raise UserError(
                f"{result.items_path} has no items of {benchmark} in {mode} mode at {checkpoint}: "
                f"run `{result.evaluate_command}`"
            )
    return items


def _codes(group: pd.Series) -> pd.Series | None:
    """Groups as numbers; None where there are fewer than two."""
    codes = (
        group.cat.codes if isinstance(group.dtype, pd.CategoricalDtype) else pd.Series(pd.factorize(group)[0])
    )
    return codes if codes.nunique() > 1 else None


def _within(interval: Interval | None) -> Interval | None:
    """An accuracy's interval, clipped to 0..1."""
    return None if interval is None else Interval(max(0.0, interval.low), min(1.0, interval.high))


def scores(checkpoint: CheckpointResult) -> Iterable[Score]:
    """The scores that evaluation.json lists of a checkpoint."""
    for benchmark, scored in checkpoint.benchmarks.items():
        for mode, outcome in scored.modes.items():
            yield benchmark, mode, "acc"
            if outcome.acc_norm is not None:
                yield benchmark, mode, "acc_norm"


def _point(items, base_items, base: str | None, key: Score) -> Point:
    benchmark, mode, metric = key
    outcomes = items[benchmark, mode]
    if base_items is None or (benchmark, mode) not in base_items:
        return Point(accuracy(outcomes, metric))
    found = paired(base_items[benchmark, mode], outcomes, metric)
    return Point(accuracy(outcomes, metric), found, None if found is None else base)


def _scored_alike(results: Mapping[str, RunResult], baselines: Mapping[int, str]) -> list[str]:
    """Differences in scoring that may affect comparisons; UserError where rules or files differ."""
    facts = {name: result.facts() for name, result in results.items()}
    for name, result in results.items():
        _check_one_evaluation(result, facts[name])
    disturbing = []
    silent = [name for name, known in facts.items() if known is None]
    if silent:
        disturbing.append(
            f"{', '.join(silent)}: written by an earlier version of STLM, whose predictions do not say how "
            "they were scored"
        )
    for name, result in results.items():
        base = baselines.get(result.train.seed, name)
        if name != base and facts[name] is not None and facts[base] is not None:
            disturbing += _differences(results[base], facts[base], result, facts[name])
    return disturbing


def published_alike(base: RunResult, published: Mapping[str, PublishedResult]) -> list[str]:
    """Differences in scoring between runs and published models; UserError where rules or files differ."""
    base_facts, disturbing = base.facts(), []
    for name, model in published.items():
        facts = read_facts(model.items_path)
        if base_facts is None or facts is None:
            disturbing.append(f"{name}: not said how it, or {base.name}, was scored")
        else:
            disturbing += _differences(base, base_facts, model, facts)
    return disturbing


def _differences(
    base: RunResult, base_facts: Facts, other: RunResult | PublishedResult, facts: Facts
) -> list[str]:
    refusals, warnings = unlike_items(base_facts, facts)
    if refusals:
        raise UserError(
            f"{other.items_path} was not scored as {base.items_path} was ({'; '.join(refusals)}): run "
            f"`{base.evaluate_command}` and `{other.evaluate_command}`"
        )
    return [f"{base.name} and {other.name}: {warning}" for warning in warnings]


def _check_one_evaluation(result: RunResult, facts: Facts | None) -> None:
    """Refuse an items.parquet that was not written together with its evaluation.json."""
    if facts is None:
        return
    for key in ("device", "processor", "precision", "code", "settings"):
        found, expected = getattr(facts, key), getattr(result.evaluation, key)
        if found != expected:
            raise UserError(
                f"{result.items_path} says {key}: {found}, evaluation.json beside it {expected}: run "
                f"`{result.evaluate_command}`"
            )


def _check_recorded(result: RunResult, checkpoint: str, found: Mapping[Score, Point]) -> None:
    for (benchmark, mode, metric), point in found.items():
        recorded = getattr(result.checkpoints[checkpoint].benchmarks[benchmark].modes[mode], metric)
        if abs(recorded.value - point.accuracy.value) > 1e-6 or recorded.n != point.accuracy.n:
            raise UserError(
                f"{result.items_path} gives {benchmark} ({mode} mode, {metric}) of {checkpoint} "
                f"{point.accuracy.value:.6f} on {point.accuracy.n} items, evaluation.json beside it "
                f"{recorded.value:.6f} on {recorded.n}: run `{result.evaluate_command}`"
            )


def _over_seeds(results, baseline: str, points) -> dict[str, dict[Score, OverSeeds]]:
    """By variant with two runs or more; `baseline` is the baseline's variant."""
    values: dict[str, dict[Score, dict[int, float]]] = {}
    for name, result in results.items():
        of_variant = values.setdefault(result.train.variant, {})
        for key, point in list(points[name].values())[-1].items():
            of_variant.setdefault(key, {})[result.train.seed] = point.accuracy.value
    found: dict[str, dict[Score, OverSeeds]] = {}
    for variant, scores in values.items():
        for key, by_seed in scores.items():
            if len(by_seed) < 2:
                continue
            base = {} if variant == baseline else values[baseline].get(key, {})
            shared = [seed for seed in by_seed if seed in base]
            test = paired_t([by_seed[s] - base[s] for s in shared]) if len(shared) >= FEWEST_SEEDS else None
            found.setdefault(variant, {})[key] = OverSeeds(
                list(by_seed), mean(by_seed.values()), stdev(by_seed.values()), shared, test
            )
    return found


def _adjust(points, seeds, results: Mapping[str, RunResult]) -> dict[tuple[str, str], int]:
    """Adjust the p-values of each table's tests, in place, for their number, which is returned."""
    # A table's tests: the mapping that holds one, its key there, and its p-value.
    families: dict[tuple[str, str], list[tuple[dict, Score, float]]] = {}
    for of_variant in seeds.values():
        for key, scored in of_variant.items():
            if scored.test is not None:
                families.setdefault(key[1:], []).append((of_variant, key, scored.test.p))
    for name, of_run in points.items():
        last = list(of_run.values())[-1]
        over_seeds = seeds.get(results[name].train.variant, {})
        for key, point in last.items():
            tested = key in over_seeds and over_seeds[key].test is not None
            if point.paired is not None and not tested:
                families.setdefault(key[1:], []).append((last, key, point.paired.p))
    for tests in families.values():
        for (place, key, _), p in zip(tests, holm([p for _, _, p in tests]), strict=True):
            if isinstance(place[key], Point):
                place[key] = replace(place[key], paired=replace(place[key].paired, adjusted=p))
            else:
                place[key] = replace(place[key], adjusted=p)
    return {family: len(tests) for family, tests in families.items()}
