"""Sentences below tables: how figures are to be read, and what they assume."""

from __future__ import annotations

from collections.abc import Mapping

from stlm.evaluation.benchmarks import LAST_WORD
from stlm.evaluation.statistics import SeedNoise
from stlm.report.comparison import FEWEST_SEEDS, SIGN, SIGN_ITEMS, Comparisons
from stlm.report.names import benchmark_label, percent, some
from stlm.report.results import PublishedResult, RunResult, run_label
from stlm.study.runs import Study

_LARGEST_SHARES = 2
# Notes mention clustered intervals that are this many times as wide as Wilson's.
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
    """The numbers of items of the benchmark that the runs were scored on, fewest to most."""
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
    """The notes below a table of accuracies; `references`: it includes rows from the literature."""
    several = len({result.train.variant for result in results.values()}) < len(results)
    baseline = results[study.baseline].train.label + (" of the same seed" if several else "")
    tests = comparisons.tests.get((mode, metric), 0)
    notes = [
        f"{_MODES.get(mode, f'{mode} mode')}; {_METRICS.get(metric, metric)}; k options tied for the best "
        "count 1/k. After each accuracy: its 95% Wilson interval."
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
    """The start token of each published model, which can change its scores by points."""
    named = {model.label: model.prefix for model in published.values() if model.prefix is not None}
    if not named:
        return []
    listed = "; ".join(f"{label} {prefix}" for label, prefix in named.items())
    return [f"published models: a text starts with a token, as params/ or else lm_eval has it: {listed}"]


def _group_notes(
    baseline: RunResult, comparisons: Comparisons, benchmarks: list[str], mode: str, metric: str
) -> list[str]:
    """Benchmarks for which the Wilson interval is much too narrow for other groups of items."""
    wider = []
    for benchmark in benchmarks:
        point = comparisons.last(baseline.name, (benchmark, mode, metric))
        if point is None or point.accuracy.clustered is None:
            continue
        accuracy = point.accuracy
        if accuracy.clustered.half_width > _MUCH_WIDER * accuracy.interval.half_width:
            wider.append(
                f"{benchmark_label(benchmark)} ±{percent(accuracy.clustered.half_width)} over "
                f"{accuracy.groups} groups instead of ±{percent(accuracy.interval.half_width)}"
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
    """Notes about limits on items, and items that do not fit the context."""
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


def last_word_note(results: Mapping[str, RunResult], labels: Mapping[str, str], mode: str) -> str | None:
    """How to read last_word, with each run's perplexity of the word; None where no run was scored on it.

    `labels`: the runs' names in the table.
    """
    name = LAST_WORD.name
    found = {run: result.word_perplexity(name, mode) for run, result in results.items()}
    shown = [
        f"{labels[run]} {perplexity:,.{0 if perplexity > 100 else 1}f}"
        for run, perplexity in found.items()
        if perplexity is not None
    ]
    if not shown:
        return None
    return (
        f"{benchmark_label(name)}: passages of the test split of each run's own corpus; right where every "
        "token of the word is the model's first choice, so that chance is 0. Other corpora give other "
        f"passages: compare runs of one corpus only. Perplexity of the word: {'; '.join(shown)}."
    )


def noise_note(noise: SeedNoise, labels: Mapping[str, str], of: str = "") -> str:
    """The assumption that all variants have equal seed noise, its test, and the largest shares of variance.

    `labels` are the variants' names in tables; `of` names the figure where a table has several.
    """
    of = f" {of}" if of else ""
    if len(noise.shares) <= _LARGEST_SHARES:
        return f"The noise{of} is assumed to be equal in both variants."
    shares = [f"{labels[name]} {share:.0%}" for name, share in list(noise.shares.items())[:_LARGEST_SHARES]]
    p = "p < 0.001" if noise.p < 0.001 else f"p = {noise.p:.3f}"
    test = f"{p}; largest shares of the variance, of {len(noise.shares)} variants: {'; '.join(shares)}"
    if not noise.unequal:
        return f"The noise{of} is assumed to be equal in all variants (test: {test})."
    return (
        f"A test rejects that the noise{of} is equal in all variants ({test}). Differences with "
        f"{some([labels[name] for name in noise.unequal])} have the wider of the pooled interval and the "
        "paired t interval of their own seeds; all others assume equal noise."
    )
