"""MMLU (Hendrycks et al. 2021): 57 subjects, the answer's letter scored, no examples. As lm_eval 0.4's `mmlu`
(task version 1.0, group version 2: every item counts the same)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from stlm.evaluation.benchmarks.items import BadRow, Benchmark, Item, Option, Row, gold_index

_LETTERS = ("A", "B", "C", "D")


def read(rows: Iterable[Row]) -> Iterator[Item]:
    seen: Counter[str] = Counter()
    for row in rows:
        subject, choices = row["subject"], row["choices"]
        if len(choices) != 4:
            raise BadRow(f"{len(choices)} choices, expected 4")
        about = subject.replace("_", " ")
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))
        context = (
            f"The following are multiple choice questions (with answers) about {about}.\n\n"
            f"{row['question'].strip()}\n{listed}\nAnswer:"
        )
        options = tuple(Option(context, " " + letter, letter) for letter in _LETTERS)
        gold = gold_index(row["answer"], ("0", "1", "2", "3"))
        text = f"{row['question']} {choices[gold]}"
        yield Item(f"{subject}-{seen[subject]}", options, gold, (subject,), text)
        seen[subject] += 1


MMLU = Benchmark(
    name="mmlu",
    version="1.0",
    splits=("test",),
    columns=("question", "subject", "choices", "answer"),
    read=read,
    group_kinds=("subject",),
)
