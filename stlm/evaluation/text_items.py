"""Items of benchmarks that are made from the test text of a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stlm.errors import UserError
from stlm.evaluation.benchmarks import Item, TextBenchmark, benchmark
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.texts import SplitTexts


def items_from_text(
    chosen: TextBenchmark, tokens_folder: Path, config: EvaluationConfig, limit: int | None = None
) -> list[Item]:
    """Items made from the test split, equal for all tokenizers; at most `limit`, by default as configured.

    Raises UserError if there are none.
    """
    texts = SplitTexts(tokens_folder, "test")
    items = chosen.make(texts, limit or text_item_limit(chosen, config), config.limit_seed)
    if not items:
        raise UserError(
            f"{tokens_folder}: {chosen.name} found no item in the {len(texts)} documents of the test split: "
            "it needs sentences that end in a mark before a capital letter, and spaces between words; leave "
            "it out of evaluation.benchmarks"
        )
    return items


def text_item_limit(chosen: TextBenchmark, config: EvaluationConfig) -> int:
    """The maximal number of items to make."""
    return config.limit_of(chosen.name, last=True) or chosen.default_limit


def text_item_settings(config: EvaluationConfig) -> dict[str, Any]:
    """The settings of a study that decide which items are made, for records that count them."""
    made = [chosen for chosen in map(benchmark, config.benchmarks) if isinstance(chosen, TextBenchmark)]
    return {
        "limit_seed": config.limit_seed,
        "limits": {chosen.name: text_item_limit(chosen, config) for chosen in made},
    }


def check_text_items(config: EvaluationConfig, tokens_folder: Path) -> None:
    """Refuse, before training, a benchmark for which the test split yields no item.

    The search stops at the first item, so it is fast on suitable text.
    """
    for name in config.benchmarks:
        chosen = benchmark(name)
        if isinstance(chosen, TextBenchmark):
            items_from_text(chosen, tokens_folder, config, limit=1)
