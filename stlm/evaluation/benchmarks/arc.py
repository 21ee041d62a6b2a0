"""ARC (Clark et al. 2018): science questions, scored by the answer's text. As lm_eval 0.4's `arc_easy` and
`arc_challenge` (version 1.0)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stlm.evaluation.benchmarks.items import FileBenchmark, Item, Option, Row, gold_index


def read(rows: Iterable[Row]) -> Iterator[Item]:
    for row in rows:
        context = f"Question: {row['question']}\nAnswer:"
        options = tuple(Option(context, " " + text, text) for text in row["choices"]["text"])
        # Some items label their choices 1, 2, ..., and so does their key.
        gold = gold_index(row["answerKey"], row["choices"]["label"])
        yield Item(str(row["id"]), options, gold, text=f"{row['question']} {options[gold].words}")


def _arc(name: str) -> FileBenchmark:
    return FileBenchmark(
        name=name,
        version="1.0",
        # One of the packaged sources has the validation split only; the results name the split used.
        splits=("test", "validation"),
        columns=("id", "question", "choices", "answerKey"),
        read=read,
        normalized=True,
    )


ARC_EASY, ARC_CHALLENGE = _arc("arc_easy"), _arc("arc_challenge")
