"""The story grammar: what it makes, and that what it is tested on is held out."""

from __future__ import annotations

import collections
import random
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stlm.corpora import grammar, lexicon, stories, synthetic
from stlm.corpora.config import BenchmarkEntry, CorpusEntry
from stlm.corpora.fetch import fetch

STORIES = synthetic.corpus(seed=0, size=3000)["text"]
PAIRS = synthetic.pairs(seed=1, size=60)
CHOICE = synthetic.choice(seed=2, size=480)


def words(texts: list[str]) -> collections.Counter[str]:
    return collections.Counter(re.findall(r"[\w']+", " ".join(texts)))


def sentences(texts: list[str]) -> set[str]:
    return {sentence for text in texts for sentence in re.split(r"(?<=[.?!]) ", text)}


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert synthetic.corpus(0, 50)["text"] == STORIES[:50]
    assert synthetic.corpus(1, 50)["text"] != STORIES[:50]
    assert synthetic.pairs(1, 60) == PAIRS
    assert synthetic.choice(2, 480) == CHOICE


def test_stories_are_short_different_and_of_few_words() -> None:
    assert len(set(STORIES)) == len(STORIES)
    assert 30 < sum(len(text.split()) for text in STORIES) / len(STORIES) < 90
    assert 400 < len(words(STORIES)) < 1000


def test_pairs_cover_paradigms_of_several_phenomena_evenly() -> None:
    assert set(collections.Counter(PAIRS["UID"]).values()) == {60}
    assert len(set(PAIRS["UID"])) >= 8
    assert len(set(PAIRS["linguistics_term"])) >= 4
    assert all(good != bad for good, bad in zip(PAIRS["sentence_good"], PAIRS["sentence_bad"], strict=True))


def test_no_sentence_of_a_pair_is_in_the_corpus() -> None:
    told = sentences(STORIES)
    assert not told & set(PAIRS["sentence_good"])
    assert not told & set(PAIRS["sentence_bad"])


def test_the_hold_out_is_by_construction_not_by_luck() -> None:
    """Subject and verb of the held-out side never meet in the corpus, though each is there often."""
    held = [
        (name, verb)
        for name in lexicon.WOMEN + lexicon.MEN
        for verb in lexicon.INTRANSITIVE
        if grammar.held_out(name, verb.base)
    ]
    assert len(held) > 50
    text = "\n".join(STORIES)
    met = [(name, verb.third) for name, verb in held if re.search(rf"\b{name} {verb.third}\b", text)]
    assert met == []
    assert re.search(r"\bAnna \w+s \w+", text)


def test_every_word_of_the_benchmarks_is_in_the_corpus() -> None:
    """But never as the benchmark's error: what is tested is the grammar, not an unknown word."""
    known = words(STORIES)
    asked = words(PAIRS["sentence_good"] + PAIRS["sentence_bad"] + CHOICE["ctx"])
    assert [word for word in asked if word not in known] == []


def items(kinds: dict[str, stories.FactKind]) -> list[tuple[str, list[str], int, str]]:
    rows = zip(CHOICE["ctx"], CHOICE["endings"], CHOICE["label"], CHOICE["kind"], strict=True)
    return [row for row in rows if row[3] in kinds]


def test_a_told_answer_is_stated_in_its_story_and_the_wrong_ones_are_not() -> None:
    told = items(stories.TOLD)
    assert len(told) == len(CHOICE["ctx"]) // 2
    for context, endings, label, _ in told:
        assert len(set(endings)) == 4
        assert [ending for ending in endings if said(context, ending)] == [endings[label]]


def said(context: str, ending: str) -> bool:
    """Whether the story says so: "The cup was in the box.", or "Anna put the cup in the box."."""
    match = re.fullmatch(r"The (\w+) was (.*)\.", ending)
    put = match is not None and re.search(rf"(put|painted) the {match[1]} {match[2]}\.", context)
    return bool(put) or ending[:-1] in context


def test_a_known_answer_follows_from_one_word_of_its_story_alone() -> None:
    for context, endings, label, kind in items(stories.KNOWN):
        causes = [cause for cause in stories.KNOWN[kind].values if re.search(rf"\b{cause}\b", context)]
        assert len(causes) == 1
        deeds = [ending.split(" ", 1)[1].rstrip(".") for ending in endings]
        assert deeds.index(stories.KNOWN[kind].deeds[causes[0]]) == label


def test_no_option_is_likelier_to_be_right_without_its_story() -> None:
    assert max(collections.Counter(CHOICE["label"]).values()) < 0.33 * len(CHOICE["label"])
    offered: collections.Counter[str] = collections.Counter()
    right: collections.Counter[str] = collections.Counter()
    for endings, label in zip(CHOICE["endings"], CHOICE["label"], strict=True):
        # What follows the subject, "Anna" or "The cup".
        values = [ending.split(maxsplit=2 if ending.startswith("The") else 1)[-1] for ending in endings]
        offered.update(values)
        right[values[label]] += 1
    assert all(4 * right[value] == count for value, count in offered.items())


def test_reading_half_the_story_is_not_enough() -> None:
    """Preferring what is said last, or at all, is right half of the time."""
    told = items(stories.TOLD)
    last = mentioned = 0.0
    for context, endings, label, _ in told:
        at = [context.rfind(ending.rstrip(".").split()[-1]) for ending in endings]
        last += at.index(max(at)) == label
        mentioned += (at[label] >= 0) / sum(place >= 0 for place in at)
    assert last / len(told) < 0.6
    assert mentioned / len(told) < 0.6


def test_a_story_asks_about_what_it_said() -> None:
    asked = [re.search(r"What colour was the (\w+)\? The \1 was (\w+)\.$", story) for story in STORIES]
    asked = [match for match in asked if match]
    assert len(asked) > 100
    for match in asked:
        assert re.search(rf"he {match[1]} (was )?{match[2]}\b", match.string[: match.start()])


def test_inflections() -> None:
    verbs = {verb.base: verb for verb in (*lexicon.TRANSITIVE, *lexicon.INTRANSITIVE)}
    assert verbs["carry"] == ("carry", "carries", "carried", "carried")
    assert verbs["push"] == ("push", "pushes", "pushed", "pushed")
    assert verbs["play"] == ("play", "plays", "played", "played")
    assert verbs["drop"] == ("drop", "drops", "dropped", "dropped")
    assert verbs["swim"] == ("swim", "swims", "swam", "swum")
    nouns = {noun.singular: noun.plural for noun in (*lexicon.BEINGS, *lexicon.THINGS)}
    assert (nouns["fox"], nouns["key"], nouns["princess"], nouns["mouse"]) == (
        "foxes",
        "keys",
        "princesses",
        "mice",
    )


def test_a_list_without_a_choice_on_this_side_says_so() -> None:
    rng = random.Random(0)
    verb = next(verb for verb in lexicon.REFLEXIVE if not grammar.held_out("Anna", verb.base))
    with pytest.raises(grammar.NoChoiceError):
        grammar.Speaker(rng, grammar.new_cast(rng), held=True).verb("Anna", [verb])


def test_fetch_writes_each_part(tmp_path: Path) -> None:
    common = {"description": "", "licence": "Apache-2.0"}
    source = {"kind": "synthetic", "part": "corpus", "seed": 0, "size": 20}
    corpus = CorpusEntry.model_validate({"name": "synthetic", **common, "sources": [source]})
    record = fetch(corpus, tmp_path / "synthetic")
    assert (record["kind"], record["rows"], record["source"]["seed"]) == ("corpus", 20, 0)
    assert pq.read_table(tmp_path / "synthetic" / "train.parquet")["text"].to_pylist() == STORIES[:20]
    choice = BenchmarkEntry.model_validate(
        {
            "name": "synthetic_choice",
            **common,
            "columns": ["ctx", "endings", "label", "kind"],
            "sources": [{**source, "part": "choice"}],
        }
    )
    fetch(choice, tmp_path / "synthetic_choice")
    assert (tmp_path / "synthetic_choice" / "validation.parquet").exists()
