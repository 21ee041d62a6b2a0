"""Before training: whether the test text has what benchmarks made of it ask for."""

from __future__ import annotations

from pathlib import Path

from stlm.errors import UserError
from stlm.evaluation.benchmarks import TextBenchmark, benchmark
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.texts import SplitTexts


def check_made(config: EvaluationConfig, tokens_folder: Path) -> None:
    """Refuse a benchmark of which evaluation would find no item in the test split of `tokens_folder`.

    It looks until it has found one: in a text that is fit for the benchmark, a moment.
    """
    for name in config.benchmarks:
        chosen = benchmark(name)
        if not isinstance(chosen, TextBenchmark):
            continue
        texts = SplitTexts(tokens_folder, "test")
        if not chosen.make(texts, 1, config.limit_seed):
            raise UserError(
                f"{tokens_folder}: {name} found no item in the {len(texts)} documents of the test split: it "
                "needs sentences that end in a mark before a capital letter, and spaces between words; leave "
                "it out of evaluation.benchmarks"
            )
