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
    """`paired[run][score]` for every run but the baseline; `chance[benchmark]` as a fraction."""

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
    """Compare every run with `baseline`; at most two runs' items are in memory at a time."""
    outcomes = results[baseline].outcomes()
    levels = [outcomes.groupby("benchmark", sort=False, observed=True)["chance"].mean()]
    paired = {}
    for name, result in results.items():
        if name != baseline:
            own = result.outcomes()
            paired[name] = compare(outcomes, own)
            levels.append(own.groupby("benchmark", sort=False, observed=True)["chance"].mean())
    chance = {}
    for level in levels:
        chance = {str(benchmark): float(value) for benchmark, value in level.items()} | chance
    return Comparisons(paired, chance)
