"""From the scores of an item's options to accuracies with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from stlm.evaluation.statistics import wilson


def credit(scores: Sequence[float], gold: int) -> float:
    """1 if the gold option alone scores best, 1/k if it ties with k - 1 others for the best, else 0."""
    best = max(scores)
    return 1 / list(scores).count(best) if scores[gold] == best else 0.0


def is_tie(scores: Sequence[float]) -> bool:
    """Whether several options share the best score."""
    return list(scores).count(max(scores)) > 1


def proportion(credits: Sequence[float]) -> dict[str, float | int]:
    """The mean of the items' credits with its 95% Wilson interval: {value, low, high, n}."""
    n, correct = len(credits), sum(credits)
    low, high = wilson(min(correct, n), n)
    return {"value": correct / n, "low": low, "high": high, "n": n}
