"""Generated questions that need several steps: read and computed by other code, and held out by content."""

from __future__ import annotations

import collections
import random
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stlm.corpora import steps, synthetic
from stlm.corpora.config import BenchmarkEntry, CorpusEntry
from stlm.corpora.fetch import fetch
from stlm.corpora.steps import MARKER, Item

TRAINING = list(steps.training_items(seed=3, count=1600))
ARITHMETIC = list(steps.arithmetic_items(seed=4, count=80))
ENTITIES = list(steps.entity_items(seed=5, count=80))
ALL = [*TRAINING, *ARITHMETIC, *ENTITIES]


def is_story(item: Item) -> bool:
    return len(item.options) == 4


def chain(question: str) -> list[int]:
    """The start and the changes of a chain, read from its words."""
    signs = {"+": 1, "-": -1, "up": 1, "down": -1, "on": 1, "back": -1}
    start = re.match(r"(\d) |.*? shows (\d)\.|.*? on stone (\d) ", question)
    changes = re.findall(r"([+-]) (\d)|goes (up|down) by (\d)|walks (on|back) by (\d)", question)
    found = [[part for part in each if part] for each in changes]
    return [int(next(filter(None, start.groups()))), *(signs[sign] * int(number) for sign, number in found)]


def values(question: str) -> list[int]:
    """What a chain has after its start and after each change."""
    first, *changes = chain(question)
    found = [first]
    for change in changes:
        found.append((found[-1] + change) % 10)
    return found


def story(question: str) -> tuple[dict[str, str], list[tuple[str, str]], str]:
    """Who has what, the exchanges, and what is asked about."""
    opening, *rest = re.split(r"(?<=[.?]) ", question)
    has = {
        value: name for name, value in re.findall(r"(\w+)(?: has| is in| in)? the (\w+)[,. ]", opening + " ")
    }
    pairs = [re.fullmatch(r"(\w+) and (\w+) (?:swap|change places)\.", one).groups() for one in rest[:-1]]
    return has, pairs, re.fullmatch(r"Who (?:has|is in) the (\w+)\?", rest[-1])[1]


def holders(question: str) -> list[str]:
    """Who has what is asked about, at first and after each exchange that moves it."""
    has, pairs, asked = story(question)
    assert len(has) == len(set(has.values())) == 4
    found = [has[asked]]
    for first, second in pairs:
        swap = {first: second, second: first}
        has = {value: swap.get(name, name) for value, name in has.items()}
        if has[asked] != found[-1]:
            found.append(has[asked])
    return found


def test_the_same_seed_gives_the_same_items_and_another_others():
    assert list(steps.training_items(3, 40)) == TRAINING[:40]
    assert list(steps.arithmetic_items(4, 40)) == ARITHMETIC[:40]
    assert list(steps.entity_items(5, 40)) == ENTITIES[:40]
    assert {item.question for item in steps.training_items(4, 40)}.isdisjoint(
        item.question for item in TRAINING[:40] if len(item.steps) > 1
    )


def test_answers_and_steps_are_what_the_text_says():
    for item in ALL:
        if is_story(item):
            first, *rest = holders(item.question)
            assert [line.split()[0] for line in item.steps] == rest and item.answer == rest[-1]
            assert all(line.endswith(f" the {story(item.question)[2]}") for line in item.steps)
            assert first in item.options and set(item.options) == set(story(item.question)[0].values())
        else:
            found = values(item.question)
            assert item.answer == str(found[-1])
            for before, after, line in zip(found[:-1], found[1:], item.steps, strict=True):
                left, sign, number, result = re.fullmatch(r"(\d) ([+-]) (\d) = (\d)", line).groups()
                change = int(number) if sign == "+" else -int(number)
                assert (int(left), int(result)) == (before, after) and (before + change) % 10 == after


def test_the_texts_have_the_same_questions_and_each_step_on_a_line():
    plain, written = (synthetic.documents_of_steps(3, 60, written) for written in (False, True))
    assert plain.keys() == written.keys() >= {"train"}
    for split in plain:
        assert plain[split]["id"] == written[split]["id"]
        for text, longer in zip(plain[split]["text"], written[split]["text"], strict=True):
            question, *lines, answer = longer.split("\n")
            assert text == f"{question}\n{answer}" and answer.startswith("Answer: ")
            assert 1 <= len(lines) <= 4 and lines[-1].split()[0] != "Answer:"
    assert MARKER not in TRAINING[0].question


def test_both_kinds_and_all_numbers_of_steps_are_about_equally_frequent():
    counts = collections.Counter((is_story(item), len(item.steps)) for item in TRAINING)
    assert set(counts) == {(story, number) for story in (False, True) for number in (1, 2, 3, 4)}
    assert min(counts.values()) > 0.7 * len(TRAINING) / 8


def test_nothing_that_is_asked_is_trained_on():
    sides = collections.defaultdict(set)
    for item in ALL:
        # Of several steps not even in other words.
        content = str(chain(item.question)) if not is_story(item) and len(item.steps) > 1 else item.question
        if is_story(item):
            has, pairs, asked = story(item.question)
            content = f"{list(has.values())} {has[asked]} {[sorted(pair) for pair in pairs]}"
        sides[item.side].add(content)
    assert sides.keys() == {"train", "val", "test", "benchmark"}
    assert len(sides["benchmark"]) > 150
    for side, contents in sides.items():
        assert not any(contents & other for name, other in sides.items() if name != side)
    assert {item.side for item in [*ARITHMETIC, *ENTITIES]} == {"benchmark"}
    assert {item.side for item in TRAINING} == {"train", "val", "test"}


def test_every_single_step_is_trained_on():
    """Its sum is a fact, which no other would tell."""
    rng = random.Random(0)
    items = [steps.arithmetic(rng, 1) for _ in range(3000)]
    assert len({tuple(chain(item.question)) for item in items if item.side == "train"}) == 10 * 18


def test_every_word_that_is_asked_is_in_the_corpus():
    known = set(re.findall(r"\w+", " ".join(item.text(True) for item in steps.training_items(7, 3000))))
    assert set(re.findall(r"\w+", " ".join(item.question for item in [*ARITHMETIC, *ENTITIES]))) <= known


@pytest.mark.parametrize(
    ("items", "count"), [(ARITHMETIC, 10), (ENTITIES, 4)], ids=["arithmetic", "entities"]
)
def test_each_candidate_is_there_once_and_right_equally_often(items, count):
    assert all(len(set(item.options)) == len(item.options) == count for item in items)
    assert all(item.options.count(item.answer) == 1 for item in items)
    by_steps = collections.defaultdict(collections.Counter)
    offered = collections.Counter(option for item in items for option in item.options)
    right = collections.Counter(item.answer for item in items)
    for item in items:
        by_steps[len(item.steps)][item.answer] += 1
    assert all(count * right[option] == number for option, number in offered.items())
    assert {number: sum(counter.values()) for number, counter in by_steps.items()} == dict.fromkeys(
        (1, 2, 3, 4), len(items) / 4
    )
    if items is ARITHMETIC:
        assert all(set(counter.values()) == {2} for counter in by_steps.values())


def test_shortcuts_do_not_solve_stories():
    """Who is named last, first, or most often; and who held it at first, or before the last step."""
    found = collections.Counter()
    stories = [item for item in TRAINING if is_story(item)]
    for item in stories:
        held, question = holders(item.question), item.question
        guesses = {
            "last": max(item.options, key=question.rfind),
            "first": min(item.options, key=question.find),
            "most": max(item.options, key=question.count),
            "start": held[0],
            "before": held[-2],
        }
        found.update(name for name, guess in guesses.items() if guess == item.answer)
    assert found["before"] == 0
    assert max(found.values()) < 0.45 * len(stories)


def test_every_intermediate_result_is_a_candidate():
    for item in TRAINING:
        results = holders(item.question) if is_story(item) else map(str, values(item.question))
        assert set(results) <= set(item.options)


def test_without_one_of_its_numbers_a_chain_has_any_answer():
    chains = [item for item in TRAINING if not is_story(item) and len(item.steps) == 3]
    left_out = collections.Counter(
        (int(item.answer) - sum(chain(item.question)) + chain(item.question)[2]) % 10 for item in chains
    )
    assert len(left_out) >= 9 and max(left_out.values()) < 0.2 * len(chains)


def test_fetch_writes_the_splits_and_the_benchmarks(tmp_path: Path) -> None:
    common = {"description": "", "licence": "Apache-2.0"}
    source = {"kind": "synthetic", "part": "steps_written", "seed": 3, "size": 100}
    corpus = CorpusEntry.model_validate({"name": "steps_written", **common, "sources": [source]})
    record = fetch(corpus, tmp_path / "steps_written")
    assert record["rows"] == 100
    assert {one["path"]: one["split"] for one in record["files"]} == {
        f"{split}.parquet": split for split in ("test", "train", "val")
    }
    texts = pq.read_table(tmp_path / "steps_written" / "train.parquet")["text"].to_pylist()
    assert texts == [item.text(True) for item in TRAINING[:100] if item.side == "train"]
    columns = ["question", "options", "label", "steps"]
    for part in ("steps_arithmetic", "steps_entities"):
        entry = {"name": part, **common, "columns": columns, "sources": [{**source, "part": part, "size": 8}]}
        fetch(BenchmarkEntry.model_validate(entry), tmp_path / part)
        rows = pq.read_table(tmp_path / part / "test.parquet").to_pylist()
        assert [row["steps"] for row in rows[::2]] == (
            [1, 3, 1, 3] if part == "steps_arithmetic" else [1, 1, 2, 2]
        )
