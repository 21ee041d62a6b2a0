"""Generated questions that need several steps (`stlm.corpora.steps`), with and without the model's own steps.

The question begins a document, as in the corpora. What is scored after it is the line of the answer. In the
benchmarks `..._written` the model first writes what it would write, up to that line: its chain of thought.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stlm.corpora.steps import MARKER
from stlm.evaluation.benchmarks.items import FileBenchmark, Item, Option, Row, Writing, gold_index

# Four steps of a story have about 90 bytes.
_WRITING = Writing(MARKER, most=160)


def read(rows: Iterable[Row]) -> Iterator[Item]:
    for number, row in enumerate(rows):
        question, answers = row["question"].strip(), row["options"]
        gold = gold_index(row["label"], [str(i) for i in range(len(answers))])
        options = tuple(Option(question, f"{MARKER} {answer}", answer, begins=True) for answer in answers)
        text = f"{question} {answers[gold]}"
        yield Item(str(number), options, gold, (f"{int(row['steps'])}",), text)


def _steps(name: str, data: str | None = None, writing: Writing | None = None) -> FileBenchmark:
    return FileBenchmark(
        name=name,
        version="1",
        splits=("test",),
        columns=("question", "options", "label", "steps"),
        lists=("options",),
        read=read,
        group_kinds=("steps",),
        modes=("harness",),
        data=data,
        writing=writing,
    )


STEPS_ARITHMETIC = _steps("steps_arithmetic")
STEPS_ARITHMETIC_WRITTEN = _steps("steps_arithmetic_written", "steps_arithmetic", _WRITING)
STEPS_ENTITIES = _steps("steps_entities")
STEPS_ENTITIES_WRITTEN = _steps("steps_entities_written", "steps_entities", _WRITING)
