"""Chunks: lossless, cut where the docs say, and spelled in exactly one way that keeps to the rules."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from stlm.errors import UserError
from stlm.tokens.chunks import (
    ANYTHING,
    CERTAIN,
    END,
    END_OF_TEXT,
    Chunker,
    Pieces,
    Spaces,
    Stride,
    Words,
    chunk_table,
    make_chunker,
)


def pairs(content: bytes) -> list[bytes]:
    """As a byte-pair vocabulary with one merge, of two a's, would cut."""
    return [content[i:j] for i, j in itertools.pairwise([*ends(content), len(content)])]


def ends(content: bytes) -> list[int]:
    places, at = [], 0
    while at < len(content):
        places.append(at)
        at += 2 if content[at : at + 2] == b"aa" else 1
    return places


KINDS = [Words(3), Spaces(3), Stride(2), Stride(1), Words(1), Spaces(1)]


@pytest.mark.parametrize(
    "chunker", [*KINDS, Words(), Spaces(), Stride(5)], ids=lambda c: f"{c.name} {c.longest}"
)
def test_any_bytes_come_back_in_chunks_that_are_not_too_long(chunker):
    rng = random.Random(0)
    for alphabet in (range(256), b"a1' .,\n\xc3\xa9"):
        for length in (0, 1, 2, 3, 17, 300):
            content = bytes(rng.choices(alphabet, k=length))
            chunks = chunker.split(content)
            assert b"".join(chunks) == content
            assert all(0 < len(chunk) <= chunker.longest for chunk in chunks)


def test_cuts_as_described():
    assert Words().split(b"  it's 'so'.") == [b"  it's", b" '", b"so'", b"."]
    assert Words().split("né—\n\tx_1".encode()) == ["né—".encode(), b"\n\tx", b"_", b"1"]
    assert Words().split(b"antidisestablishment") == [b"antidisestablish", b"ment"]
    assert Spaces().split(b"hello, world! ") == [b"hello,", b" world!", b" "]
    assert Spaces().split(b"a\n\n b c") == [b"a\n", b"\n b ", b"c"]
    assert Stride(3).split(b"abcdefgh") == [b"abc", b"def", b"gh"]


def spellings(chunker: Chunker, alphabet: bytes, longest: int) -> dict[bytes, list[list[bytes]]]:
    """Every way to write a text of at most so many bytes of an alphabet that keeps to the rules."""
    found: dict[bytes, list[list[bytes]]] = {}

    def write(chunks: list[bytes], begun: bytes) -> None:
        rule = chunker.rule_after(chunks[-1] if chunks else b"", begun)
        if rule == CERTAIN:
            write([*chunks, begun], b"")
            return
        text = b"".join(chunks) + begun
        if chunker.allowed_RS[rule, END_OF_TEXT]:
            found.setdefault(text, []).append([*chunks, begun] if begun else chunks)
        if chunker.allowed_RS[rule, END]:
            write([*chunks, begun], b"")
        if len(text) < longest:
            for byte in alphabet:
                if chunker.allowed_RS[rule, byte]:
                    write(chunks, begun + bytes([byte]))

    write([], b"")
    return found


@pytest.mark.parametrize("chunker", KINDS, ids=lambda c: f"{c.name} {c.longest}")
def test_each_text_has_one_spelling_and_it_is_the_chunkers(chunker):
    alphabet, longest = b"a'. ", 5
    found = spellings(chunker, alphabet, longest)
    for length in range(longest + 1):
        for letters in itertools.product(alphabet, repeat=length):
            text = bytes(letters)
            assert found.pop(text) == [chunker.split(text)], text
    assert not found


def test_byte_pair_pieces_have_other_spellings_too_as_tokens_do():
    chunker = Pieces("pairs", pairs, 2)
    found = spellings(chunker, b"ab", 3)
    assert sorted(found[b"aab"]) == [[b"a", b"a", b"b"], [b"a", b"ab"], [b"aa", b"b"]]
    assert chunker.split(b"aab") in found[b"aab"]


@pytest.mark.parametrize(
    "chunker", [*KINDS, Pieces("pairs", pairs, 2)], ids=lambda c: f"{c.name} {c.longest}"
)
def test_a_table_has_each_symbol_with_its_rule(chunker):
    texts = [bytes(letters) for letters in itertools.product(b"a'. \xff", repeat=4)]
    chunks = [b"", *sorted({chunk for text in texts for chunk in chunker.split(text)})]
    table = chunk_table(chunker, chunks)
    for number, chunk in enumerate(chunks):
        here = slice(*table.begins_V[number : number + 2])
        symbols, rules = table.symbols_T[here].tolist(), table.rules_T[here].tolist()
        if not chunk:
            assert (symbols, table.n_inputs_V[number], table.following_V[number]) == (
                [END_OF_TEXT],
                1,
                ANYTHING,
            )
            continue
        assert table.n_inputs_V[number] == len(chunk)
        after = [chunker.rule_after(b"", chunk[:n]) for n in range(1, len(chunk) + 1)]
        assert rules[1:] == [rule for rule in after if rule != CERTAIN]
        end = [] if after[-1] == CERTAIN else [END if chunker.allowed_RS[after[-1], END] else END_OF_TEXT]
        assert symbols == [*chunk, *end]
        assert table.following_V[number] == chunker.rule_after(chunk, b"")
    assert (table.skips_V == 0).all()
    assert chunk_table(chunker, chunks, np.arange(len(chunks))).skips_V[-1] == len(chunks) - 1


def test_names_of_chunkers():
    assert [make_chunker(name).longest for name in ("words", "spaces", "stride-4")] == [16, 16, 4]
    with pytest.raises(UserError, match="stride-N"):
        make_chunker("stride-0")
    with pytest.raises(UserError, match="at most 16"):
        make_chunker("stride-17")
