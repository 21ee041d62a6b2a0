"""Benchmarks of the synthetic grammar: minimal pairs like BLiMP's, and stories with several endings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stlm.evaluation.benchmarks.blimp import COLUMNS, minimal_pairs
from stlm.evaluation.benchmarks.items import FileBenchmark, Item, Option, Row, gold_index


def read_choice(rows: Iterable[Row]) -> Iterator[Item]:
    for number, row in enumerate(rows):
        context, endings = row["ctx"].strip(), [ending.strip() for ending in row["endings"]]
        gold = gold_index(row["label"], [str(i) for i in range(len(endings))])
        options = tuple(Option(context, " " + ending, ending) for ending in endings)
        yield Item(str(number), options, gold, (row["kind"],))


SYNTHETIC_PAIRS = FileBenchmark(
    name="synthetic_pairs",
    version="1",
    splits=("train",),
    columns=COLUMNS,
    read=minimal_pairs,
    group_kinds=("phenomenon", "paradigm"),
)
SYNTHETIC_CHOICE = FileBenchmark(
    name="synthetic_choice",
    version="1",
    splits=("validation",),
    columns=("ctx", "endings", "label", "kind"),
    lists=("endings",),
    read=read_choice,
    group_kinds=("kind",),
    normalized=True,
)
