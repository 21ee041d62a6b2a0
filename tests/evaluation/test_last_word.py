"""Last words of held-out passages: which passages are taken, and what is asked of the model."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.evaluation.benchmarks import LAST_WORD
from stlm.evaluation.interface import Request
from stlm.evaluation.texts import SplitTexts
from stlm.files import sha256, write_json
from stlm.tokens.tokenize import tokenize_corpus

NOUNS = ["lantern", "river", "Margaret", "kettle", "meadow", "letter", "garden", "thunder", "über"]
VERBS = ["found", "carried", "remembered", "painted", "followed"]


def story(rng: random.Random, sentences: int) -> str:
    """Sentences of 7 to 9 words, most ending in a noun; quotes, paragraphs, abbreviations between them."""
    told = []
    for _ in range(sentences):
        a, b, c = rng.choices(NOUNS, k=3)
        sentence = f"Then Mr. Brown {rng.choice(VERBS)} the {a} near our {b}, and the {c}"
        if rng.random() < 0.2:
            sentence = f'"{sentence}!" said {a}'
        ending = rng.choice([".", ".", ".", "?", "!", " of it.", ".)"])
        told.append(sentence + ending + rng.choice([" ", " ", " ", "\n\n"]))
    return "".join(told).strip()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return [story(rng, rng.randrange(1, 120)) for _ in range(60)]


def words(text: str) -> list[str]:
    return [word.casefold() for word in re.findall(r"[^\W\d_]+", text)]


def made(texts: list[str], limit: int = 10**6, seed: int = 0) -> list[Request]:
    items = LAST_WORD.make(texts, limit, seed)
    assert len({item.id for item in items}) == len(items)
    assert all(item.gold == 0 and len(item.options) == 1 for item in items)
    return [item.options[0].request("harness") for item in items]


def test_a_passage_is_verbatim_and_its_word_stands_earlier_but_not_in_its_last_sentence(texts):
    requests = made(texts)
    assert len(requests) > 100
    for context, continuation, *_ in requests:
        word = continuation[1:]
        assert continuation == " " + word and word.isalpha() and len(word) >= 4
        (text,) = {text for text in texts if context + continuation in text}
        # Punctuation alone is dropped after the word; whole sentences stand before.
        after = text[text.index(context + continuation) + len(context + continuation) :]
        assert re.match(r"[.!?]", after)
        begin = text.index(context)
        assert begin == 0 or re.search(r"[.!?][\"')]?\s+\Z", text[:begin])
        # Sentences begin with "Then" or a quote: no other mark ends one (as after Mr).
        before, last = re.fullmatch(r"(.*\s)(\S*Then\b.*)", context, re.DOTALL).groups()
        assert word.casefold() in words(before) and word.casefold() not in words(last)
        assert len(words(before)) >= 40 and len(words(context)) < 120
        # As few sentences as the 40 words take: without the first there would be fewer.
        shorter = re.split(r"(?<=[.!?])[\"')]?\s+(?=\"?Then)", before, maxsplit=1)[1]
        assert len(words(shorter)) < 40


def test_places_are_drawn_all_over_and_do_not_overlap(texts):
    for text in texts:
        spans = sorted((text.index(r.context), len(r.context) + len(r.continuation)) for r in made([text]))
        assert len(spans) <= len(text) // 1500 + 1
        for (begin, size), (following, _) in itertools.pairwise(spans):
            assert begin + size <= following
    assert sum(len(made([text])) > 1 for text in texts) > 10


def test_a_limit_takes_some_of_the_same_items_and_the_seed_decides(texts):
    everything, few = made(texts), made(texts, limit=20)
    assert len(few) == 20
    assert set(few) < set(everything)
    assert [r for r in everything if r in set(few)] == few
    assert made(texts, limit=20) == few
    assert set(made(texts, limit=20, seed=1)) != set(few)
    assert len({text for text in texts for r in few if r.context in text}) > 3


SENTENCE = "The children of the village went down to the water with a basket and a small dog. "


@pytest.mark.parametrize(
    ("last", "word"),
    [
        ("It was full of water.", " water"),
        ('"It is full of water!" said her father, and showed them the basket.', " basket"),
        ("She asked Mr. Brown whether he had lost a basket.", " basket"),
        ("She never came back to the Village.", " Village"),
        ("It was full of sand.", None),  # occurs nowhere before
        ("It came from the water to the water.", None),  # stands in the last sentence already
        ("They all went down with them.", None),  # a function word
        ("It was a dog.", None),  # three letters
        ("It had the number 12water.", None),  # not letters alone
        ("It was an under-water.", None),  # no word of its own
        ("He gave his name as\nwater.", None),  # no space before it
        ("It was full of water", None),  # no sentence
        ("It was full\n\nof water.", None),  # two paragraphs
    ],
)
def test_which_last_sentences_make_an_item(last, word):
    found = made([SENTENCE * 3 + last])
    assert [request.continuation for request in found] == ([word] if word else [])
    if word:
        assert (
            found[0].context + word + last[last.rindex(word.strip()) + len(word) - 1 :] == SENTENCE * 3 + last
        )


def test_too_little_before_the_last_sentence_or_too_much_makes_none():
    assert not made([SENTENCE * 2 + "It was full of water."])
    assert not made([SENTENCE * 3 + "It was " + "very " * 80 + "full of water."])


def test_the_same_passage_in_two_documents_is_one_item():
    text = SENTENCE * 3 + "It was full of water."
    assert len(made([text, "Here. " + text])) == 1


def test_every_tokenizer_gives_the_same_items(tmp_path: Path, texts):
    corpus = tmp_path / "raw"
    corpus.mkdir()
    path = corpus / "train.parquet"
    # So many that the test split has its share.
    pq.write_table(
        pa.table({"text": [*texts, *(f"{text} – \t {i}" for i, text in enumerate(texts * 9))]}), path
    )
    entry = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "rows": 600}
    source = {"name": "tiny", "kind": "corpus", "files": [entry], "text": "text", "group": None}
    write_json(corpus / "source.json", source)
    items = []
    for tokenizer in ("bytes", "bpe-400"):
        tokenize_corpus(corpus, tmp_path / tokenizer, tokenizer, tmp_path, progress=False)
        items.append(LAST_WORD.make(SplitTexts(tmp_path / tokenizer, "test"), 30, 0))
    assert items[0] == items[1]
    assert 10 < len(items[0]) <= 30
