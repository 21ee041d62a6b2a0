"""n-grams found by rolling hashes, against sets of tuples, and words against the reference harness's."""

from __future__ import annotations

import random
import string
import tracemalloc
import unicodedata

import numpy as np
import pytest

from stlm.evaluation import ngrams
from stlm.evaluation.ngrams import NOT_FOUND, NGrams, pieces
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.tokens.words import normalize, words

TOKENIZER = ByteTokenizer()


def scan(texts, documents, sizes=(8, 13)) -> NGrams:
    looked_for = NGrams(texts, sizes)
    looked_for.scan((number, text.encode()) for number, text in enumerate(documents))
    return looked_for


def grams(own: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(own[i : i + n]) for i in range(len(own) - n + 1)}


def first(documents: list[list[str]], wanted: set[tuple[str, ...]], n: int) -> int:
    """The first document with an n-gram of `wanted`."""
    return next((i for i, own in enumerate(documents) if grams(own, n) & wanted), NOT_FOUND)


def random_texts(rng: random.Random, count: int, longest: int) -> list[str]:
    """Few different words, so that n-grams are shared by chance; some commas and capitals."""
    return [
        " ".join(
            rng.choice(["a", "B", "c,", "d", "E!"]) + rng.choice(["", "", "x"])
            for _ in range(rng.randrange(longest + 1))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("sizes", "longest"), [((8, 13), 40), ((3, 5), 12), ((2, 3, 6), 9), ((4,), 7)])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_as_sets_of_tuples(sizes, longest, seed):
    rng = random.Random(seed)
    texts = random_texts(rng, 60, longest)
    # Parts of the texts between other words: long n-grams do not come by chance.
    documents = random_texts(rng, 20, 60)
    for text in texts[::2]:
        own = text.split()
        low = rng.choice([0, rng.randrange(len(own) + 1)])
        documents.append(f"begin {' '.join(own[low : low + rng.randrange(2 * longest)])} end")
    rng.shuffle(documents)
    looked_for = scan(texts, documents, sizes)
    documents = [words(document) for document in documents]
    for n in sizes:
        expected = [first(documents, grams(words(text), n), n) for text in texts]
        assert looked_for.found(n).tolist() == expected
        assert NOT_FOUND in expected and len(set(expected)) > 3, "too many found, or too few"
        for text in np.flatnonzero(looked_for.found(n) != NOT_FOUND).tolist():
            example, document = looked_for.example(n, text)
            assert tuple(example.split()) in grams(words(texts[text]), n) & grams(documents[document], n)
    whole = [first(documents, {tuple(words(t))}, len(words(t))) if words(t) else NOT_FOUND for t in texts]
    assert looked_for.found_whole.tolist() == whole
    assert NOT_FOUND in whole and len(set(whole)) > 3


def test_words_of_ascii_are_those_of_the_reference_harness():
    reference = pytest.importorskip("lm_eval.decontamination.janitor")
    rng = random.Random(0)
    janitor = reference.Janitor()
    for _ in range(500):
        text = "".join(rng.choices(string.printable + " " * 20, k=200)).replace("--", "- -")
        assert " ".join(words(text)) == " ".join(reference.word_ngrams(janitor.normalize_string(text), 1))


def test_words_of_unicode_character_by_character():
    def slow(text: str) -> list[str]:
        result = ""
        for character in text.replace("--", " "):
            category = unicodedata.category(character)
            dash = category == "Pd" and character not in "-\u2010\u2011"
            word = f" {character} " if character == "字" else character.lower()
            result += " " if dash else "" if category[0] in "PS" else word
        return result.replace("\0", " ").split()

    rng = random.Random(0)
    alphabet = "aÉßΣİǅ“”’—–‐-€№\u00a0\u3000\u2028 \n字١é\U0001d54f\0"
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=30))
        assert words(text) == slow(text), ascii(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don’t — DON'T!", "dont dont"),
        ("said--and then", "said and then"),
        ("well-known  naïve\ttext", "wellknown naïve text"),
        ("1,000.5 %", "10005"),
        ("... -- !", ""),
        ("\ud800 x", "x"),
    ],
)
def test_words(text, expected):
    assert " ".join(words(text)) == expected


def test_case_punctuation_and_white_space_do_not_hide_a_match():
    item = "The quick brown fox, naïve as ever, jumps over the lazy dogs."
    looked_for = scan([item], ["no", "Yes. «THE QUICK\n\nBROWN» fox naïve as\u00a0ever jumps\tover?"])
    assert looked_for.found(8).tolist() == [1]
    assert looked_for.found(13).tolist() == looked_for.found_whole.tolist() == [NOT_FOUND]


def test_no_match_crosses_documents():
    own = [f"w{i}" for i in range(8)]
    halves = [" ".join(own[:4]), " ".join(own[4:])]
    looked_for = scan([" ".join(own)], halves)
    assert looked_for.found(8).tolist() == looked_for.found_whole.tolist() == [NOT_FOUND]
    assert scan([" ".join(own)], [" ".join(halves)]).found(8).tolist() == [0]


def test_an_unknown_word_is_no_words_equal():
    """Two words that no text has are not the same word as a word of a text, nor is the end of a document."""
    assert scan(["a b c"], ["a x c", "a", "b", "c"], (2,)).found(2).tolist() == [NOT_FOUND]
    assert scan(["\0 \0 \0", "a \0 a"], ["", "", "", "a", "a"], (2,)).found(2).tolist() == [NOT_FOUND] * 2


def test_texts_shorter_than_n_and_empty_ones():
    looked_for = scan(["", "?!", "hen", "the hen ran", "the hen sat"], ["So the hen ran home."])
    assert looked_for.lengths.tolist() == [0, 0, 1, 3, 3]
    assert looked_for.found(8).tolist() == [NOT_FOUND] * 5
    assert looked_for.found_whole.tolist() == [NOT_FOUND, NOT_FOUND, 0, 0, NOT_FOUND]


@pytest.mark.parametrize(("texts", "documents"), [([], ["a b"]), (["a b c"], []), ([], []), ([""], [""])])
def test_nothing_to_look_for_or_nowhere(texts, documents):
    looked_for = scan(texts, documents, (2, 3))
    assert looked_for.found(2).tolist() == looked_for.found_whole.tolist() == [NOT_FOUND] * len(texts)


def test_texts_of_one_begin_are_told_apart():
    begin = "one two three four five six seven eight"
    texts = [begin, f"{begin} nine", f"{begin} ten", f"{begin} nine ten"]
    looked_for = scan(texts, [f"{begin} ten.", f"and {begin} nine; ten"])
    assert looked_for.found_whole.tolist() == [0, 1, 0, 1]
    assert looked_for.found(8).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [1, 7, 50])
def test_a_document_in_pieces_is_found_as_one(monkeypatch, size):
    """Whatever the pieces' length, in characters of several bytes too."""
    rng = random.Random(1)
    texts = [text.replace("d", "é") for text in random_texts(rng, 40, 12)]
    document = " ".join(text.replace("c", "ü, ") for text in random_texts(rng, 1, 60) + texts[::2])
    expected = scan(texts, [document], (3, 5))
    monkeypatch.setattr(ngrams, "_PIECE_TOKENS", size)
    looked_for = NGrams(texts, (3, 5))
    tokens = TOKENIZER.encode_array(document)
    parts = list(pieces(tokens, TOKENIZER.decode_bytes, looked_for.overlap))
    assert len(parts) > len(document) // 60
    looked_for.scan((0, part) for part in parts)
    for n in (3, 5):
        assert looked_for.found(n).tolist() == expected.found(n).tolist()
    assert looked_for.found_whole.tolist() == expected.found_whole.tolist()
    assert {0, NOT_FOUND} == set(expected.found_whole.tolist())


def test_pieces_of_a_short_document_are_its_text():
    tokens = TOKENIZER.encode_array("Größe — 12.")
    assert [part.decode() for part in pieces(tokens, TOKENIZER.decode_bytes, 5)] == ["Größe — 12."]
    assert list(pieces(tokens[:0], TOKENIZER.decode_bytes, 5)) == []


def test_normalizing_twice_changes_nothing():
    text = "It's — a WELL-known “Fact”… İ -™-".encode()
    assert normalize(normalize(text)) == normalize(text)


def test_a_false_candidate_is_not_reported(monkeypatch):
    """With hashes that all agree, the comparison word by word alone decides."""
    monkeypatch.setattr(ngrams, "_MULTIPLIER", np.uint64(0))  # the last word alone makes the hash
    looked_for = scan(["a b c d"], ["x b c d e", "a b c d"], (2, 4))
    assert looked_for.found(4).tolist() == [1]
    assert scan(["a b"], ["x b", "b b"], (2,)).found(2).tolist() == [NOT_FOUND]


def peak(documents: int, one_document: bool) -> int:
    """The most memory, in bytes, that looking through so many documents of new words takes."""
    looked_for = NGrams(random_texts(random.Random(0), 200, 40), (8, 13))

    def tokens(i: int) -> np.ndarray:
        return TOKENIZER.encode_array(" ".join(f"w{i}x{k} a b c d e a b" for k in range(1200)))

    if one_document:
        parts = pieces(
            np.concatenate([tokens(i) for i in range(documents)]), TOKENIZER.decode_bytes, looked_for.overlap
        )
        stream = ((0, part) for part in parts)
    else:
        stream = ((i, TOKENIZER.decode_bytes(tokens(i).tolist())) for i in range(documents))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        looked_for.scan(stream)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("one_document", [False, True])
def test_memory_does_not_grow_with_the_stream(monkeypatch, one_document):
    monkeypatch.setattr(ngrams, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(ngrams, "_PIECE_TOKENS", 1 << 16)
    # Five and fifty times the chunk; the same peak, but for a little.
    assert peak(120, one_document) < 1.2 * peak(12, one_document)
