"""Accuracies with their intervals, and comparisons with the baseline: over items and over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev

import pandas as pd

from stlm.errors import UserError
from stlm.evaluation.predictions import Facts, unlike_items
from stlm.evaluation.statistics import (
    Interval,
    bootstrap,
    clustered,
    clustered_bootstrap,
    holm,
    mcnemar_exact,
    paired_t,
    wilson,
)
from stlm.report.results import Results, RunResult, ScoredModel
from stlm.report.schema import Score

Items = Mapping[tuple[str, str], pd.DataFrame]
# With two seeds a standard deviation says next to nothing, and a t interval is 6 times as wide as with three.
FEWEST_SEEDS = 3
SIGNIFICANT = 0.05
# Follows a significant difference; the second, one that is significant over items but not over groups.
SIGN, SIGN_ITEMS = "*", "†"


@dataclass(frozen=True)
class Accuracy:
    """An accuracy of `n` items, as a fraction, with its 95% Wilson interval."""

    value: float
    n: int
    interval: Interval
    groups: int  # of items (BLiMP's paradigms, MMLU's subjects); 0 for fewer than two
    clustered: Interval | None  # the cluster-robust interval over groups


@dataclass
class Paired:
    """A difference from the baseline (a fraction, positive: better than it), paired over items or seeds."""

    n: int  # items or seeds
    difference: float
    interval: Interval  # 95%: bootstrap over items, or Student's t over seeds
    p: float  # two-sided: exact McNemar test of `better` and `worse`, or paired t-test
    clustered: Interval | None = None  # over groups of items, if there are any
    better: int = 0  # items on which the run's credit was higher
    worse: int = 0
    adjusted: float | None = None  # p after Holm's correction for the table's tests

    @property
    def sign(self) -> str:
        """What follows the difference in tables and plots; empty where it is not significant."""
        if not significant(self.adjusted):
            return ""
        return SIGN_ITEMS if self.clustered and self.clustered.low <= 0 <= self.clustered.high else SIGN


@dataclass(frozen=True)
class OverSeeds:
    """A variant's accuracies over its `seeds`: mean and standard deviation."""

    seeds: list[int]
    mean: float
    sd: float
    test: Paired | None  # over the seeds that the baseline has too; None for fewer than three, or itself


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

    def over_seeds(self, variant: str, score: Score) -> Paired | None:
        """The variant's test over seeds, in place of which its runs have none of their own."""
        scored = self.seeds.get(variant, {}).get(score)
        return scored and scored.test


def significant(adjusted: float | None) -> bool:
    """Whether a test, adjusted for their number, rejects at 5%."""
    return adjusted is not None and adjusted < SIGNIFICANT


def accuracy(outcomes: pd.DataFrame, metric: str) -> Accuracy:
    """The accuracy of items (see `read_outcomes`) that are all of one benchmark and mode."""
    n, correct = len(outcomes), float(outcomes[metric].sum())
    groups = _codes(outcomes["group"])
    over_groups = None if groups is None else clustered(outcomes[metric], groups)
    if over_groups is not None:
        over_groups = Interval(max(0.0, over_groups.low), min(1.0, over_groups.high))
    number = 0 if groups is None else groups.nunique()
    return Accuracy(correct / n, n, wilson(min(correct, n), n), number, over_groups)


def paired(baseline: pd.DataFrame, run: pd.DataFrame, metric: str) -> Paired | None:
    """Compare two tables of items of one benchmark and mode by the items' names; None if they share none."""
    both = baseline.join(run[metric].rename("compared"), how="inner")
    if both.empty:
        return None
    difference = both["compared"] - both[metric]
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    groups = _codes(both["group"])
    interval, p = bootstrap(difference), mcnemar_exact(better, worse)
    over_groups = None if groups is None else clustered_bootstrap(difference, groups)
    return Paired(len(both), float(difference.mean()), interval, p, over_groups, better, worse)


def _codes(group: pd.Series) -> pd.Series | None:
    """Groups as numbers; None where there are fewer than two."""
    categorical = isinstance(group.dtype, pd.CategoricalDtype)
    codes = group.cat.codes if categorical else pd.Series(pd.factorize(group)[0])
    return codes if codes.nunique() > 1 else None


def by_mode(outcomes: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Outcomes of each (benchmark, mode), indexed by item."""
    return {
        (str(benchmark), str(mode)): items.droplevel(["benchmark", "mode"])
        for (benchmark, mode), items in outcomes.groupby(["benchmark", "mode"], sort=False, observed=True)
    }


def adjust(tests: Iterable[Paired]) -> None:
    """Set the p-values adjusted by Holm's method for the number of `tests`."""
    tests = list(tests)
    for test, p in zip(tests, holm([test.p for test in tests]), strict=True):
        test.adjusted = p


def compare_all(results: Results) -> Comparisons:
    """Compare every run with the run of the baseline's variant that has its seed, where there is one.

    Last checkpoints are compared with each other, the others with the baseline's of the same step. At most
    two checkpoints' items are in memory at a time. Raises UserError where two runs were scored by different
    rules or files, or where items.parquet and evaluation.json disagree.
    """
    baselines = {run.train.seed: run for run in results.variants[results.base.train.variant]}
    disturbing = _scored_alike(results, baselines)
    points: dict[str, dict] = {name: dict.fromkeys(run.checkpoints) for name, run in results.items()}
    chance: dict[str, float] = {}

    def add(
        run: RunResult, checkpoint: str, base: str | None = None, base_items: Items | None = None
    ) -> Items:
        items = _read(run, checkpoint)
        points[run.name][checkpoint] = {
            score: _point(items, base_items or {}, base, score)
            for score in run.checkpoints[checkpoint].scores
        }
        _check_recorded(run, checkpoint, points[run.name][checkpoint])
        for (benchmark, _), outcomes in items.items():
            chance.setdefault(benchmark, float(outcomes["chance"].mean()))
        return items

    for seed, base in baselines.items():
        others = [run for run in results.values() if run.train.seed == seed and run is not base]
        for base_checkpoint in base.checkpoints:
            base_items = add(base, base_checkpoint)
            for run in others:
                for checkpoint in run.checkpoints:
                    if _partner(run, checkpoint, base) == base_checkpoint:
                        add(run, checkpoint, base.name, base_items)
    for name, of_run in points.items():
        for checkpoint in [checkpoint for checkpoint, scored in of_run.items() if scored is None]:
            add(results[name], checkpoint)
    seeds = _over_seeds(results, points)
    return Comparisons(points, seeds, chance, _adjust(results, points, seeds), disturbing)


def _partner(run: RunResult, checkpoint: str, base: RunResult) -> str | None:
    """The baseline's checkpoint with which one is compared."""
    if run.checkpoints[checkpoint] is run.last:
        return list(base.checkpoints)[-1]
    step = run.checkpoints[checkpoint].step
    return next((name for name, scored in base.checkpoints.items() if scored.step == step), None)


def _read(result: RunResult, checkpoint: str) -> Items:
    """The items of each (benchmark, mode) that evaluation.json lists of the checkpoint."""
    items = by_mode(result.outcomes(checkpoint))
    for benchmark, mode, _ in result.checkpoints[checkpoint].scores:
        if (benchmark, mode) not in items:
            raise _broken(result, f"has no items of {benchmark} in {mode} mode at {checkpoint}")
    return items


def _broken(result: RunResult, problem: str) -> UserError:
    return UserError(f"{result.items_path} {problem}: run `{result.evaluate_command}`")


def _point(items: Items, base_items: Items, base: str | None, score: Score) -> Point:
    benchmark, mode, metric = score
    outcomes, base_outcomes = items[benchmark, mode], base_items.get((benchmark, mode))
    difference = None if base_outcomes is None else paired(base_outcomes, outcomes, metric)
    return Point(accuracy(outcomes, metric), difference, None if difference is None else base)


def _scored_alike(results: Results, baselines: Mapping[int, RunResult]) -> list[str]:
    """Differences in scoring that may affect comparisons; UserError where rules or files differ."""
    facts = {name: run.facts() for name, run in results.items()}
    for name, run in results.items():
        _check_one_evaluation(run, facts[name])
    pairs = [(baselines.get(run.train.seed, run), run, facts[name]) for name, run in results.items()]
    pairs += [(results.base, model, model.facts()) for model in results.published.values()]
    disturbing = []
    if silent := [model.name for _, model, model_facts in pairs if model_facts is None]:
        disturbing.append(
            f"{', '.join(silent)}: written by an earlier version of STLM, whose predictions do not say how "
            "they were scored"
        )
    for base, model, model_facts in pairs:
        if base is not model and model_facts is not None and facts[base.name] is not None:
            disturbing += _differences(base, facts[base.name], model, model_facts)
    return disturbing


def _differences(base: RunResult, base_facts: Facts, other: ScoredModel, facts: Facts) -> list[str]:
    refusals, warnings = unlike_items(base_facts, facts)
    if refusals:
        raise UserError(
            f"{other.items_path} was not scored as {base.items_path} was ({'; '.join(refusals)}): run "
            f"`{base.evaluate_command}` and `{other.evaluate_command}`"
        )
    return [f"{base.name} and {other.name}: {warning}" for warning in warnings]


def _check_one_evaluation(result: RunResult, facts: Facts | None) -> None:
    """Refuse an items.parquet that was not written together with its evaluation.json."""
    for key in ("device", "processor", "precision", "code", "settings") if facts else ():
        found, expected = getattr(facts, key), getattr(result.evaluation, key)
        if found != expected:
            raise _broken(result, f"says {key}: {found}, evaluation.json beside it {expected}")


def _check_recorded(result: RunResult, checkpoint: str, points: Mapping[Score, Point]) -> None:
    for (benchmark, mode, metric), point in points.items():
        accuracy = point.accuracy
        recorded = result.checkpoints[checkpoint].accuracy(benchmark, mode, metric)
        if abs(recorded.value - accuracy.value) > 1e-6 or recorded.n != accuracy.n:
            raise _broken(
                result,
                f"gives {benchmark} ({mode} mode, {metric}) of {checkpoint} {accuracy.value:.6f} on "
                f"{accuracy.n} items, evaluation.json beside it {recorded.value:.6f} on {recorded.n}",
            )


def _over_seeds(results: Results, points: Mapping) -> dict[str, dict[Score, OverSeeds]]:
    """By variant, of the scores that two of its runs or more have."""
    values: dict[str, dict[Score, dict[int, float]]] = {variant: {} for variant in results.variants}
    for name, result in results.items():
        for score, point in list(points[name].values())[-1].items():
            by_seed = values[result.train.variant].setdefault(score, {})
            by_seed[result.train.seed] = point.accuracy.value
    baseline = results.base.train.variant
    by_variant: dict[str, dict[Score, OverSeeds]] = {}
    for variant, scores in values.items():
        for score, by_seed in scores.items():
            if len(by_seed) < 2:
                continue
            base = {} if variant == baseline else values[baseline].get(score, {})
            differences = [value - base[seed] for seed, value in by_seed.items() if seed in base]
            test = None
            if len(differences) >= FEWEST_SEEDS:
                test = Paired(len(differences), *paired_t(differences))
            spread = OverSeeds(list(by_seed), mean(by_seed.values()), stdev(by_seed.values()), test)
            by_variant.setdefault(variant, {})[score] = spread
    return by_variant


def _adjust(results: Results, points: Mapping, seeds: Mapping) -> dict[tuple[str, str], int]:
    """Adjust the p-values of each table's tests for their number, which is returned."""
    families: dict[tuple[str, str], list[Paired]] = {}
    for over_seeds in seeds.values():
        for score, scored in over_seeds.items():
            if scored.test is not None:
                families.setdefault(score[1:], []).append(scored.test)
    for name, of_run in points.items():
        over_seeds = seeds.get(results[name].train.variant, {})
        for score, point in list(of_run.values())[-1].items():
            tested = score in over_seeds and over_seeds[score].test is not None
            if point.paired is not None and not tested:
                families.setdefault(score[1:], []).append(point.paired)
    for tests in families.values():
        adjust(tests)
    return {family: len(tests) for family, tests in families.items()}
