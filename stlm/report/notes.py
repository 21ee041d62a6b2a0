"""Sentences below tables: how figures are to be read, and what they assume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stlm.evaluation.benchmarks import LAST_WORD
from stlm.evaluation.statistics import SeedNoise
from stlm.report.curves import Variant
from stlm.report.documents import amount_note
from stlm.report.names import benchmark_label, listing, plural, some
from stlm.report.results import Results
from stlm.report.schema import TrainRecord

_LARGEST_SHARES = 2


def last_word_note(results: Results, mode: str) -> str | None:
    """How to read last_word, with each run's perplexity of the word; None where no run was scored on it."""
    words = [(run.label, run.word_perplexity(LAST_WORD.name, mode)) for run in results.values()]
    shown = [f"{label} {value:,.{0 if value > 100 else 1}f}" for label, value in words if value is not None]
    return listing(
        f"{benchmark_label(LAST_WORD.name)}: passages of the test split of each run's own corpus; right "
        "where every token of the word is the model's first choice, so that chance is 0. Other corpora give "
        "other passages: compare runs of one corpus only. Perplexity of the word",
        shown,
    )


def noise_in_words(noise: SeedNoise) -> str:
    """The standard deviation and the degrees of freedom of seed noise."""
    return f"standard deviation {noise.sd:.4f}, {plural(noise.dof, 'degree')} of freedom"


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


def curve_notes(variants: Sequence[Variant]) -> list[str]:
    """Limits of comparing these validation curves, of which the first is the baseline's."""
    base, trains = variants[0].train, [variant.train for variant in variants]
    aligned = [variant for variant in variants if variant.aligned is not None]
    elsewhere = [variant.train for variant in variants if not variant.same_machine]
    notes = []
    if base.validation is not None:
        texts = [(train.label, train.validation) for train in trains if train.validation is not None]
        notes.append(amount_note(texts, "Validation bits per byte"))
    if any(variant.seeds > 1 for variant in variants):
        notes.append("Where a variant has several seeds: the mean of their curves.")
    named = {
        "Of another tokenizer, or in chunks of bytes, and compared at the tokens of the baseline's tokenizer "
        "that hold as much text": [v.train for v in aligned if not v.same_tokens],
        "Validated on other text than the baseline, and compared by test text: both curves are shifted to "
        "end at their values on it": [v.train for v in aligned if v.shifted],
        "Costs include those of the run whose weights it started from": [t for t in trains if t.start],
        "Costs include the training of other runs that it depends on": [
            train for train in trains if train.depends.keys() - {"start"}
        ],
        "On other text than the baseline (another corpus, or another part of it), and not compared": [
            variant.train for variant in variants if variant.aligned is None
        ],
        "Trained with attention within documents, but validated, as all are, on rows that run across them, "
        "which they never saw; compare these by test text": [
            variant.train for variant in aligned if variant.train.data.attention == "within"
        ],
    }
    notes += [f"{text}: {', '.join(t.label for t in chosen)}." for text, chosen in named.items() if chosen]
    notes.append(
        "FLOPs are counted from the shapes, and for chunks of bytes with their mean length; times are of "
        "training alone, without validation, and compare where nothing else kept the machine busy."
    )
    if elsewhere:
        notes.append(
            f"Times do not compare with those of the baseline ({_machine(base)}), the device, the processor, "
            "the number of threads or processes or the kernels being others: "
            f"{'; '.join(f'{train.label} ({_machine(train)})' for train in elsewhere)}."
        )
    return notes


def _machine(train: TrainRecord) -> str:
    """What trained it, in words."""
    words = [train.device, train.processor, train.threads and plural(train.threads, "thread")]
    words.append(f"{train.processes} processes" if train.processes > 1 else None)
    return ", ".join(filter(None, [*words, "kernels in C" if train.kernels else None]))
