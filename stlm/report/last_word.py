"""What a reader must know of the benchmark last_word, and the figure that its accuracy leaves out."""

from __future__ import annotations

from collections.abc import Mapping

from stlm.evaluation.benchmarks import LAST_WORD
from stlm.report.names import benchmark_label
from stlm.report.results import RunResult


def word_perplexity(result: RunResult, benchmark: str, mode: str) -> float | None:
    """The perplexity of a word at the run's last checkpoint; None where the benchmark has none."""
    scored = result.last.benchmarks.get(benchmark)
    return scored.modes[mode].word_perplexity if scored and mode in scored.modes else None


def last_word_note(results: Mapping[str, RunResult], labels: Mapping[str, str], mode: str) -> str | None:
    """How last_word is to be read, with each run's perplexity of a word; None where no run was asked.

    `labels` is what the table calls the runs.
    """
    name = LAST_WORD.name
    found = {run: word_perplexity(result, name, mode) for run, result in results.items()}
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
