"""Accuracies with intervals, from the scores of the items' options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

from stlm.evaluation.statistics import wilson


def credit(scores: Sequence[float], gold: int) -> float:
    """1 if only the gold option has the best score, 1/k if it shares it with k - 1 others, else 0."""
    best = max(scores)
    return 1 / list(scores).count(best) if scores[gold] == best else 0.0


def is_tie(scores: Sequence[float]) -> bool:
    """Whether several options share the best score."""
    return list(scores).count(max(scores)) > 1


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean, from the sample standard deviation (n - 1), as lm_eval reports it.

    None for a single value, which has no deviation.
    """
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def proportion(credits: Sequence[float]) -> dict[str, float | int | None]:
    """The mean of the items' credits with its 95% Wilson interval and its standard error.

    Keys: value, low, high, stderr (None for a single item), n.
    """
    n, correct = len(credits), sum(credits)
    low, high = wilson(min(correct, n), n)
    return {"value": correct / n, "low": low, "high": high, "stderr": standard_error(credits), "n": n}
