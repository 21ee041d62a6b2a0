"""The synthetic corpora and their benchmarks as parquet; the same seed and size give the same rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.corpora import grammar, steps, stories
from stlm.corpora.config import SyntheticSource

Columns = dict[str, list[Any]]


def corpus(seed: int, size: int) -> Columns:
    """``size`` stories: columns text and id."""
    rng = random.Random(f"stories {seed}")
    return {"text": [stories.story(rng) for _ in range(size)], "id": list(range(size))}


def pairs(seed: int, size: int) -> Columns:
    """``size`` minimal pairs of each paradigm, in BLiMP's columns."""
    rng = random.Random(f"pairs {seed}")
    columns: Columns = {
        "sentence_good": [], "sentence_bad": [], "UID": [], "linguistics_term": [], "pair_id": [],
    }  # fmt: skip
    for paradigm, (phenomenon, _) in grammar.CONSTRUCTIONS.items():
        for number, (good, bad) in enumerate(grammar.pairs(rng, paradigm, size)):
            for column, value in zip(columns, (good, bad, paradigm, phenomenon, number), strict=True):
                columns[column].append(value)
    return columns


def choice(seed: int, size: int) -> Columns:
    """``size`` items of a story, a question and four answers: columns ctx, endings, label, kind."""
    items = list(stories.choice_items(random.Random(f"choice {seed}"), size))
    return {column: [item[column] for item in items] for column in ("ctx", "endings", "label", "kind")}


def documents_of_steps(seed: int, size: int, written: bool) -> dict[str, Columns]:
    """``size`` questions with their answers, by split; `written`: with the steps, too."""
    found: dict[str, Columns] = {}
    for number, item in enumerate(steps.training_items(seed, size)):
        columns = found.setdefault(item.side, {"text": [], "id": []})
        columns["text"].append(item.text(written))
        columns["id"].append(number)
    return found


def questions(items: Iterator[steps.Item]) -> Columns:
    """Questions with their candidates: columns question, options, label, steps."""
    columns: Columns = {"question": [], "options": [], "label": [], "steps": []}
    for item in items:
        columns["question"].append(item.question)
        columns["options"].append(list(item.options))
        columns["label"].append(item.options.index(item.answer))
        columns["steps"].append(len(item.steps))
    return columns


# Each part's columns by split, for a seed and a size.
_PARTS: dict[str, Callable[[int, int], dict[str, Columns]]] = {
    "corpus": lambda seed, size: {"train": corpus(seed, size)},
    "pairs": lambda seed, size: {"train": pairs(seed, size)},
    "choice": lambda seed, size: {"validation": choice(seed, size)},
    "steps_plain": lambda seed, size: documents_of_steps(seed, size, written=False),
    "steps_written": lambda seed, size: documents_of_steps(seed, size, written=True),
    "steps_arithmetic": lambda seed, size: {"test": questions(steps.arithmetic_items(seed, size))},
    "steps_entities": lambda seed, size: {"test": questions(steps.entity_items(seed, size))},
}


def write(source: SyntheticSource, folder: Path) -> None:
    """Write the part that ``source`` names into ``folder``, a parquet file for each of its splits."""
    for split, columns in _PARTS[source.part](source.seed, source.size).items():
        pq.write_table(pa.table(columns), folder / f"{split}.parquet", compression="zstd")
