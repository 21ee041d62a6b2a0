"""What stands below the tables of accuracies."""

from __future__ import annotations

from collections.abc import Mapping

from stlm.report.comparison import FEWEST_SEEDS, SIGN, SIGN_ITEMS, Comparisons
from stlm.report.last_word import last_word_note
from stlm.report.names import benchmark_label, percent
from stlm.report.results import PublishedResult, RunResult, run_label
from stlm.study.runs import Study

# A clustered interval so many times as wide as Wilson's is told in the notes.
_MUCH_WIDER = 1.25
_METRICS = {
    "acc": "acc: the option of highest log-probability is the answer",
    "acc_norm": "acc_norm: log-probabilities are divided by the option's length in characters",
}
_MODES = {
    "harness": "harness mode: prompts and scored continuations of the reference evaluation harness",
    "paper": "paper mode: the summed log-probability of the whole string, context and option, not normalized",
}


def items_scored(results: Mapping[str, RunResult], benchmark: str) -> str:
    """How many items of the benchmark the runs were scored on, from the fewest to the most."""
    found = [r.last.benchmarks[benchmark] for r in results.values() if benchmark in r.last.benchmarks]
    sizes = sorted({b.items for b in found})
    return "–".join(f"{size:,}" for size in (sizes if len(sizes) < 3 else [sizes[0], sizes[-1]]))


def accuracy_notes(
    study: Study,
    results: Mapping[str, RunResult],
    comparisons: Comparisons,
    benchmarks: list[str],
    mode: str,
    metric: str,
    references: bool,
) -> list[str]:
    """What stands below a table of accuracies; `references`: whether it has the literature's rows."""
    several = len({result.train.variant for result in results.values()}) < len(results)
    baseline = results[study.baseline].train.label + (" of the same seed" if several else "")
    tests = comparisons.tests.get((mode, metric), 0)
    notes = [
        f"{_MODES[mode]}; {_METRICS[metric]}; k options tied for the best count 1/k. After each "
        "accuracy: its 95% Wilson interval."
    ]
    if tests:
        notes[0] += (
            f" Below it: the difference in points from {baseline} on the same items, its 95% bootstrap "
            f"interval, and the exact McNemar p-value, adjusted by Holm's method for the {tests} tests "
            f"of this table. Bold and {SIGN}: p < 0.05 after the adjustment. {SIGN_ITEMS}: so too, but "
            "with an interval that includes zero when whole groups of items (paradigms, subjects) are "
            "resampled: a difference on these groups, not shown for others like them. This is over "
            "items: it does not say how much another seed would change a run."
        )
    if several:
        notes.append(
            "Mean rows: mean ± standard deviation over seeds. Where a variant shares "
            f"{FEWEST_SEEDS} seeds or more with the baseline, below it: the mean difference over those "
            "seeds, its 95% t interval, and the p-value of the paired t-test with seeds as units, "
            "adjusted alike; the variant's single runs then have no test of their own."
        )
    notes += _group_notes(results[study.baseline], comparisons, benchmarks, mode, metric)
    notes.append(
        "Bits per byte and character perplexity: test split of the run's corpus; they compare runs on "
        "one corpus, whatever their tokenizers."
    )
    labels = {run: run_label(result, results) for run, result in results.items()}
    notes += filter(None, [last_word_note(results, labels, mode)])
    notes += _subset_notes(study, results, benchmarks, mode)
    if comparisons.disturbing:
        notes.append(f"Not scored alike: {'; '.join(comparisons.disturbing)}.")
    if references:
        notes.append(
            "The paper's and the literature's rows are whole percents as printed in the paper, which "
            "scores whole strings without length normalization: compare them with acc, first in paper "
            f"mode ({'table2-paper-mode' if mode == 'harness' else 'this table'})."
        )
    return notes


def prefix_notes(published: Mapping[str, PublishedResult]) -> list[str]:
    """The token that starts a text of each published model, by which its scores may differ by points."""
    named = {model.label: model.prefix for model in published.values() if model.prefix is not None}
    if not named:
        return []
    listed = "; ".join(f"{label} {prefix}" for label, prefix in named.items())
    return [f"published models: a text starts with a token, as params/ or else lm_eval has it: {listed}"]


def _group_notes(
    baseline: RunResult, comparisons: Comparisons, benchmarks: list[str], mode: str, metric: str
) -> list[str]:
    """Where the Wilson interval is much too narrow for other groups of items than these."""
    wider = []
    for benchmark in benchmarks:
        point = comparisons.last(baseline.name, (benchmark, mode, metric))
        if point is None or point.accuracy.clustered is None:
            continue
        own = point.accuracy
        if own.clustered.half_width > _MUCH_WIDER * own.interval.half_width:
            wider.append(
                f"{benchmark_label(benchmark)} ±{percent(own.clustered.half_width)} over {own.groups} "
                f"groups instead of ±{percent(own.interval.half_width)}"
            )
    if not wider:
        return []
    label = baseline.train.label
    return [
        "Wilson's interval is right for these groups of items; for others like them the cluster-robust "
        f"interval (statistics.csv) is much wider, for {label}: {'; '.join(wider)}."
    ]


def _subset_notes(
    study: Study, results: Mapping[str, RunResult], benchmarks: list[str], mode: str
) -> list[str]:
    """Limits, and items that do not fit the context."""
    limited, truncated = [], []
    for benchmark in benchmarks:
        found = [r.last.benchmarks[benchmark] for r in results.values() if benchmark in r.last.benchmarks]
        total = max(b.items_total for b in found)
        if any(b.items < b.items_total for b in found):
            limited.append(f"{benchmark_label(benchmark)} {items_scored(results, benchmark)} of {total:,}")
        cut = max((b.modes[mode].truncated for b in found if mode in b.modes), default=0)
        if cut:
            truncated.append(f"{benchmark_label(benchmark)} {cut:,}")
    notes = []
    if limited:
        seed = study.evaluation.limit_seed
        notes.append(f"Limited to a random subset of the items (seed {seed}): {'; '.join(limited)}.")
    elif benchmarks:
        notes.append("All items of every benchmark are scored (no limit on those that there are).")
    if truncated:
        notes.append(
            "Items with an option longer than the context, cut from the left (most of any run): "
            f"{'; '.join(truncated)}."
        )
    return notes
