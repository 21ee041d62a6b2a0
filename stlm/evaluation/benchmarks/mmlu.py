"""MMLU (Hendrycks et al. 2021): exam questions of 57 subjects, without examples, asked in two ways.

`mmlu` scores the answer's letter, as lm_eval 0.4's `mmlu` (task version 1.0, group version 2: all items weigh
the same). `mmlu_cloze` scores the answer's text after the bare question, as lm_eval's `mmlu_continuation`
(the same versions): small models cannot yet choose letters from a list, but may find an answer likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from stlm.evaluation.benchmarks.items import BadRow, FileBenchmark, Item, Option, Row, gold_index

_LETTERS = ("A", "B", "C", "D")


def _letters(row: Row, about: str) -> tuple[Option, ...]:
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, row["choices"], strict=True))
    context = (
        f"The following are multiple choice questions (with answers) about {about}.\n\n"
        f"{row['question'].strip()}\n{listed}\nAnswer:"
    )
    return tuple(Option(context, " " + letter, letter) for letter in _LETTERS)


def _texts(row: Row, about: str) -> tuple[Option, ...]:
    context = (
        f"The following are questions (with answers) about {about}.\n\n"
        f"Question: {row['question'].strip()}\nAnswer:"
    )
    return tuple(Option(context, " " + text, text) for text in row["choices"])


def _reader(
    options: Callable[[Row, str], tuple[Option, ...]],
) -> Callable[[Iterable[Row]], Iterator[Item]]:
    def read(rows: Iterable[Row]) -> Iterator[Item]:
        seen: Counter[str] = Counter()
        for row in rows:
            subject, choices = row["subject"], row["choices"]
            if len(choices) != len(_LETTERS):
                raise BadRow(f"{len(choices)} choices, expected {len(_LETTERS)}")
            gold = gold_index(row["answer"], ("0", "1", "2", "3"))
            about = subject.replace("_", " ")
            text = f"{row['question']} {choices[gold]}"
            yield Item(f"{subject}-{seen[subject]}", options(row, about), gold, (subject,), text)
            seen[subject] += 1

    return read


_COLUMNS = ("question", "subject", "choices", "answer")
MMLU = FileBenchmark(
    name="mmlu",
    version="1.0",
    splits=("test",),
    columns=_COLUMNS,
    lists=("choices",),
    read=_reader(_letters),
    group_kinds=("subject",),
)
MMLU_CLOZE = FileBenchmark(
    name="mmlu_cloze",
    version="1.0",
    data="mmlu",
    splits=("test",),
    columns=_COLUMNS,
    lists=("choices",),
    read=_reader(_texts),
    group_kinds=("subject",),
    normalized=True,
)
