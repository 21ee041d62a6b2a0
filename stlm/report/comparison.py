"""Paired comparisons with the baseline, item by item, and the chance level that the items imply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from stlm.evaluation.statistics import mcnemar_exact
from stlm.report.results import RunResult

# (benchmark, mode, metric): metric is "acc" or "acc_norm".
Score = tuple[str, str, str]


@dataclass(frozen=True)
class Paired:
    """A run against the baseline on the items that both answered.

    `difference` is the mean of the item-wise differences (a fraction, positive: the run is better), `p` the
    two-sided exact McNemar test of it (McNemar 1947), `n` the number of items.
    """

    difference: float
    p: float
    n: int


@dataclass(frozen=True)
class Comparisons:
    """`paired[run][score]` for every run but the baseline's; `chance[benchmark]` as a fraction."""

    paired: Mapping[str, Mapping[Score, Paired]]
    chance: Mapping[str, float]


def compare(baseline: pd.DataFrame, run: pd.DataFrame) -> dict[Score, Paired]:
    """Compare two tables of outcomes (see RunResult.outcomes) wherever they share items."""
    both = baseline.join(run, how="inner", suffixes=("_base", "_run"))
    paired: dict[Score, Paired] = {}
    for (benchmark, mode), items in both.groupby(["benchmark", "mode"], sort=False, observed=True):
        for metric in ("acc", "acc_norm"):
            difference = items[f"{metric}_run"] - items[f"{metric}_base"]
            p = mcnemar_exact(int((difference > 0).sum()), int((difference < 0).sum()))
            paired[benchmark, mode, metric] = Paired(float(difference.mean()), p, len(items))
    return paired


def compare_all(results: Mapping[str, RunResult], baseline: str) -> Comparisons:
    """Compare every run with the run of `baseline`'s variant that has its seed, where there is one.

    At most two runs' items are in memory at a time.
    """
    variant = results[baseline].train.variant
    baselines = {
        result.train.seed: name for name, result in results.items() if result.train.variant == variant
    }
    paired: dict[str, Mapping[Score, Paired]] = {}
    chance: dict[str, float] = {}
    for seed, name in baselines.items():
        outcomes = results[name].outcomes()
        chance = _chance(outcomes) | chance
        for other, result in results.items():
            if result.train.seed == seed and result.train.variant != variant:
                own = result.outcomes()
                paired[other] = compare(outcomes, own)
                chance = _chance(own) | chance
    return Comparisons(paired, chance)


def _chance(outcomes: pd.DataFrame) -> dict[str, float]:
    levels = outcomes.groupby("benchmark", sort=False, observed=True)["chance"].mean()
    return {str(benchmark): float(level) for benchmark, level in levels.items()}
