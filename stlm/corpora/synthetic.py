"""The synthetic corpus and its benchmarks as parquet; the same seed and size give the same rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.corpora import grammar, stories
from stlm.corpora.config import SyntheticSource


def corpus(seed: int, size: int) -> dict[str, list[Any]]:
    """``size`` stories: columns text and id."""
    rng = random.Random(f"stories {seed}")
    return {"text": [stories.story(rng) for _ in range(size)], "id": list(range(size))}


def pairs(seed: int, size: int) -> dict[str, list[Any]]:
    """``size`` minimal pairs of each paradigm, in BLiMP's columns."""
    rng = random.Random(f"pairs {seed}")
    columns: dict[str, list[Any]] = {
        "sentence_good": [], "sentence_bad": [], "UID": [], "linguistics_term": [], "pair_id": [],
    }  # fmt: skip
    for paradigm, (phenomenon, _) in grammar.CONSTRUCTIONS.items():
        for number, (good, bad) in enumerate(grammar.pairs(rng, paradigm, size)):
            for column, value in zip(columns, (good, bad, paradigm, phenomenon, number), strict=True):
                columns[column].append(value)
    return columns


def choice(seed: int, size: int) -> dict[str, list[Any]]:
    """``size`` items of a story, a question and four answers: columns ctx, endings, label, kind."""
    items = list(stories.choice_items(random.Random(f"choice {seed}"), size))
    return {column: [item[column] for item in items] for column in ("ctx", "endings", "label", "kind")}


_PARTS = {"corpus": (corpus, "train"), "pairs": (pairs, "train"), "choice": (choice, "validation")}


def write(source: SyntheticSource, folder: Path) -> None:
    """Write the part that ``source`` names into ``folder``, as one parquet file named by its split."""
    part, split = _PARTS[source.part]
    pq.write_table(pa.table(part(source.seed, source.size)), folder / f"{split}.parquet", compression="zstd")
