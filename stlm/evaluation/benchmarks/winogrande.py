"""WinoGrande (Sakaguchi et al. 2020): which of two names fills the blank. As lm_eval 0.4's `winogrande`
(version 1.0): partial evaluation scores the rest of the sentence after each name (Trinh and Le 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stlm.evaluation.benchmarks.items import BadRow, FileBenchmark, Item, Option, Row, gold_index


def read(rows: Iterable[Row]) -> Iterator[Item]:
    for number, row in enumerate(rows):
        before, blank, after = row["sentence"].partition("_")
        if not blank:
            raise BadRow(f"no blank (_) in {row['sentence']!r}")
        rest = after.strip()
        options = tuple(Option(before + row[key], " " + rest, rest) for key in ("option1", "option2"))
        yield Item(str(number), options, gold_index(row["answer"], ("1", "2")))


WINOGRANDE = FileBenchmark(
    name="winogrande",
    version="1.0",
    splits=("validation",),
    columns=("sentence", "option1", "option2", "answer"),
    read=read,
)
