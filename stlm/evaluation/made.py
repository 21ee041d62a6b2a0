"""Items that a benchmark makes of the test split of the run's own corpus."""

from __future__ import annotations

from pathlib import Path

from stlm.errors import UserError
from stlm.evaluation.benchmarks import Item, TextBenchmark, benchmark
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.texts import SplitTexts


def made_items(chosen: TextBenchmark, tokens_folder: Path, limit: int, seed: int) -> list[Item]:
    """At most `limit` items of the test text; a ``UserError`` where it gives none."""
    texts = SplitTexts(tokens_folder, "test")
    items = chosen.make(texts, limit, seed)
    if not items:
        raise UserError(
            f"{tokens_folder}: {chosen.name} found no item in the {len(texts)} documents of the test split: "
            "it needs sentences that end in a mark before a capital letter, and spaces between words; "
            "leave it out of evaluation.benchmarks"
        )
    return items


def check_made(config: EvaluationConfig, tokens_folder: Path) -> None:
    """Before training: refuse a benchmark of which evaluation would find no item in the test split."""
    for name in config.benchmarks:
        chosen = benchmark(name)
        if isinstance(chosen, TextBenchmark):
            made_items(chosen, tokens_folder, 1, config.limit_seed)
