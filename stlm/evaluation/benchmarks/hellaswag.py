"""HellaSwag (Zellers et al. 2019): which of four endings follows.

As lm_eval 0.4's `hellaswag` (task version 1.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from stlm.evaluation.benchmarks.items import BadRow, FileBenchmark, Item, Option, Row, gold_index


def clean(text: str) -> str:
    """Remove the markup of the WikiHow part, as lm_eval does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read(rows: Iterable[Row]) -> Iterator[Item]:
    for number, row in enumerate(rows):
        scene = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        context = clean(f"{row['activity_label']}: {scene}")
        endings = [clean(ending) for ending in row["endings"]]
        if len(endings) != 4:
            raise BadRow(f"{len(endings)} endings, expected 4")
        gold = gold_index(row["label"], ("0", "1", "2", "3"))
        options = tuple(Option(context, " " + ending, ending) for ending in endings)
        yield Item(str(number), options, gold, text=f"{clean(scene)} {endings[gold]}")


HELLASWAG = FileBenchmark(
    name="hellaswag",
    version="1.0",
    splits=("validation",),
    columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    lists=("endings",),
    read=read,
    normalized=True,
)
