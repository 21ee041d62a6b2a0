"""Chunks of bytes: where a byte-level model cuts a text, and which symbols may come next.

A text is a sequence of chunks, and a chunk a sequence of symbols: its bytes, then the end of the chunk or of
the text. A *rule* is a set of symbols that may come next. It follows from the bytes of the chunk so far; the
rule of a chunk's first symbol follows from the previous chunk. If only the end of the chunk can come, it is
certain and no symbol is written. With `words`, `spaces` and strides each text has one spelling in symbols
that follow the rules, so that no probability is lost. With byte-pair tokens some is lost to other
segmentations, as in any model over them.

Shapes: V chunks, R rules, S the number of symbols, T bytes or symbols of many chunks, one after the other.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stlm.errors import UserError, nearest, shortened

# Symbols: the bytes, and two that end a chunk.
END, END_OF_TEXT, SYMBOLS = 256, 257, 258
# Bytes of the longest chunk of `words` and `spaces`; longer ones are split.
LONGEST = 16
# The rules that all chunkers have: a byte or the end of the text; only the end of the text.
ANYTHING, NOTHING = 0, 1
# Instead of a rule: the chunk ends here.
CERTAIN = 255

_BYTES = np.arange(SYMBOLS) < 256


class Chunker(ABC):
    """Cuts bytes into chunks of at most `longest` bytes, and gives the rules."""

    name: str
    longest: int
    # The symbols that each rule allows, bool [R, S]; and for each rule that follows the last byte of a chunk,
    # the rule of the next chunk's first symbol, [R].
    allowed_RS: np.ndarray
    following_R: np.ndarray

    @abstractmethod
    def split(self, content: bytes) -> list[bytes]:
        """The chunks of a whole text; concatenated they are the text."""

    def rule_after(self, before: bytes, begun: bytes) -> int:
        """The rule of the next symbol in a chunk that starts with `begun`, after the chunk `before`.

        CERTAIN if the chunk ends there.
        """
        if not begun:
            return int(chunk_table(self, [before]).following_V[0])
        content = np.frombuffer(begun, np.uint8)
        return int(self.rules(content, np.arange(len(content)), np.zeros(1, np.int64))[-1])

    @abstractmethod
    def rules(self, bytes_T: np.ndarray, places_T: np.ndarray, begins_V: np.ndarray) -> np.ndarray:
        """The rule [T], uint8, of the symbol after each byte of consecutive chunks.

        `places_T` are the positions of bytes in their chunks, from 0; `begins_V` the starts of chunks. The
        rule after a chunk's last byte is CERTAIN if its end is.
        """


class Stride(Chunker):
    """Every N bytes (MegaByte, Yu et al. 2023). The last chunk of a text may be shorter."""

    def __init__(self, stride: int) -> None:
        self.name, self.longest = f"stride-{stride}", stride
        self.allowed_RS, self.following_R = _rules([])

    def split(self, content: bytes) -> list[bytes]:
        return [content[i : i + self.longest] for i in range(0, len(content), self.longest)]

    def rules(self, bytes_T: np.ndarray, places_T: np.ndarray, begins_V: np.ndarray) -> np.ndarray:
        return np.where(places_T == self.longest - 1, CERTAIN, ANYTHING).astype(np.uint8)


class Spaces(Chunker):
    """After the first space-like byte that follows another (SpaceByte, Slagle 2024).

    Space-like are all bytes but letters, digits and continuation bytes of UTF-8. "hello, world! " is
    "hello,", " world!" and " ".
    """

    def __init__(self, longest: int = LONGEST) -> None:
        self.name, self.longest = "spaces", longest
        self.allowed_RS, self.following_R = _rules([])
        word, other = rb"[0-9A-Za-z\x80-\xbf]", rb"[^0-9A-Za-z\x80-\xbf]"
        # One alternative for each number of space-like bytes at the beginning, so that the whole chunk has at
        # most `longest` bytes.
        ends = [
            b"%b{%d}%b{1,%d}%b" % (other, before, word, longest - 1 - before, other)
            for before in range(longest - 1)
        ]
        self._pattern = re.compile(b"|".join([*ends, b".{1,%d}" % longest]), re.DOTALL)
        self._is_word = np.array([re.match(word, bytes([byte])) is not None for byte in range(256)])

    def split(self, content: bytes) -> list[bytes]:
        return self._pattern.findall(content)

    def rules(self, bytes_T: np.ndarray, places_T: np.ndarray, begins_V: np.ndarray) -> np.ndarray:
        word_T = self._is_word[bytes_T]
        ends_T = ~word_T & (places_T > 0) & np.concatenate([[False], word_T[:-1]])
        return np.where(ends_T | (places_T == self.longest - 1), CERTAIN, ANYTHING).astype(np.uint8)


class Words(Chunker):
    """At the ends of words (Learn Your Tokens, Thawani et al. 2023), with the white space before each.

    A word is letters, digits and bytes above ASCII, with apostrophes inside or at its end, or a run of other
    characters: "  it's 'so'." is "  it's", " '", "so'" and ".". Only the next byte
    tells whether a word has ended, so its end is a symbol; a byte that would have made the word longer cannot
    begin the next chunk.
    """

    IN_WORD, IN_OTHER, AFTER_WORD, AFTER_OTHER = 2, 3, 4, 5

    def __init__(self, longest: int = LONGEST) -> None:
        self.name, self.longest = "words", longest
        space, word, other = rb"[\t-\r ]", rb"[0-9A-Za-z\x80-\xff]", rb"[^\t-\r 0-9A-Za-z\x80-\xff]"
        alternatives = [
            b"%b{%d}(?:%b[0-9A-Za-z\x80-\xff']{0,%d}|%b{1,%d})"
            % (space, before, word, longest - 1 - before, other, longest - before)
            for before in range(longest)
        ]
        self._pattern = re.compile(b"|".join([*alternatives, b"%b{1,%d}" % (space, longest)]))
        self._is_word, self._is_space = (
            np.array([re.match(kind, bytes([byte])) is not None for byte in range(256)])
            for kind in (word, space)
        )
        in_word_S, in_other_S = np.zeros((2, SYMBOLS), bool)
        in_word_S[:256] = self._is_word
        in_word_S[ord("'")] = True
        in_other_S[:256] = ~self._is_word & ~self._is_space
        anything_S = _BYTES | (np.arange(SYMBOLS) == END_OF_TEXT)
        end_S = np.arange(SYMBOLS) == END
        self.allowed_RS, self.following_R = _rules(
            [
                (in_word_S | end_S, self.AFTER_WORD),
                (in_other_S | end_S, self.AFTER_OTHER),
                (anything_S & ~in_word_S, ANYTHING),
                (anything_S & ~in_other_S, ANYTHING),
            ]
        )

    def split(self, content: bytes) -> list[bytes]:
        return self._pattern.findall(content)

    def rules(self, bytes_T: np.ndarray, places_T: np.ndarray, begins_V: np.ndarray) -> np.ndarray:
        T = len(bytes_T)
        # The first byte that is not white space determines the kind of the chunk.
        first_V = np.minimum.reduceat(np.where(self._is_space[bytes_T], T, np.arange(T)), begins_V)
        inside_V = np.where(self._is_word[bytes_T[np.minimum(first_V, T - 1)]], self.IN_WORD, self.IN_OTHER)
        lengths_V = np.diff(begins_V, append=T)
        started_T = np.arange(T) >= np.repeat(first_V, lengths_V)
        rules_T = np.where(started_T, np.repeat(inside_V, lengths_V), ANYTHING)
        return np.where(places_T == self.longest - 1, CERTAIN, rules_T).astype(np.uint8)


class Pieces(Chunker):
    """At the ends of byte-pair tokens of at most `longest` bytes; each end is a symbol."""

    INSIDE = 2

    def __init__(self, name: str, tokens: Callable[[bytes], list[bytes]], longest: int) -> None:
        """`tokens` maps the UTF-8 of a text to the bytes of its tokens."""
        self.name, self.longest, self._tokens = name, longest, tokens
        self.allowed_RS, self.following_R = _rules([(np.arange(SYMBOLS) <= END, ANYTHING)])

    def split(self, content: bytes) -> list[bytes]:
        return self._tokens(content)

    def rules(self, bytes_T: np.ndarray, places_T: np.ndarray, begins_V: np.ndarray) -> np.ndarray:
        return np.where(places_T == self.longest - 1, CERTAIN, self.INSIDE).astype(np.uint8)


def _rules(rules: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """`allowed_RS` and `following_R` of the two common rules and of further `rules`."""
    end_of_text_S = np.arange(SYMBOLS) == END_OF_TEXT
    # A chunk that ends where any symbol might come is the last of its text.
    common = [(_BYTES | end_of_text_S, NOTHING), (end_of_text_S, NOTHING)]
    allowed, following = zip(*[*common, *rules], strict=True)
    return np.stack(allowed), np.array(following, np.uint8)


class ChunkTable(NamedTuple):
    """Chunks as a model reads and writes them; chunk v is `symbols[begins[v] : begins[v + 1]]`.

    These are its bytes and, unless it is certain, the symbol that ends it; the empty chunk stands for the end
    of a text. The model reads the first `n_inputs` of them. `rules` has the rule of each symbol, except a
    chunk's first one, whose rule is `following` of the previous chunk. The first `skips` symbols are given,
    not scored. `longest` is the chunker's limit on the bytes of a chunk.
    """

    symbols_T: np.ndarray
    rules_T: np.ndarray
    begins_V: np.ndarray  # [V + 1]
    n_inputs_V: np.ndarray
    following_V: np.ndarray
    skips_V: np.ndarray
    allowed_RS: np.ndarray
    longest: int


def chunk_table(chunker: Chunker, chunks: Sequence[bytes], skips: Sequence[int] | None = None) -> ChunkTable:
    """The table of `chunks`, none longer than `chunker.longest`; an empty one is the end of a text."""
    sizes_V = np.fromiter(map(len, chunks), np.int64, len(chunks))
    full = np.flatnonzero(sizes_V)
    bytes_T = np.frombuffer(b"".join(chunks), np.uint8)
    # For chunks of text: their bytes, each with the rule of the symbol after it.
    begins = np.cumsum(sizes_V[full]) - sizes_V[full]
    places_T = np.arange(len(bytes_T)) - np.repeat(begins, sizes_V[full])
    after_T = chunker.rules(bytes_T, places_T, begins) if len(bytes_T) else np.empty(0, np.uint8)
    last = after_T[begins + sizes_V[full] - 1]
    rule_V = np.full(len(chunks), CERTAIN, np.uint8)
    rule_V[full] = last
    # Each chunk ends with a symbol, unless its end is certain.
    open_V = rule_V != CERTAIN
    inside_V = np.where(open_V, rule_V, 0)
    ends_V = np.where(chunker.allowed_RS[inside_V, END], END, END_OF_TEXT)
    following_V = np.where(open_V, chunker.following_R[inside_V], ANYTHING).astype(np.uint8)
    counts_V = np.maximum(sizes_V + open_V, 1)
    begins_V = np.concatenate([[0], np.cumsum(counts_V)])
    symbols_T = np.full(begins_V[-1], END_OF_TEXT, np.int16)
    rules_T = np.full(begins_V[-1], ANYTHING, np.uint8)
    to_T = np.repeat(begins_V[:-1][full], sizes_V[full]) + places_T
    symbols_T[to_T] = bytes_T
    # The rule after a byte belongs to the next symbol; a certain end has none.
    inner_T = after_T != CERTAIN
    rules_T[to_T[inner_T] + 1] = after_T[inner_T]
    symbols_T[begins_V[1:][open_V] - 1] = ends_V[open_V]
    skips_V = np.zeros(len(chunks), np.int64) if skips is None else np.asarray(skips, np.int64)
    n_inputs_V = np.maximum(sizes_V, 1)
    return ChunkTable(
        symbols_T,
        rules_T,
        begins_V,
        n_inputs_V,
        following_V,
        skips_V,
        chunker.allowed_RS,
        chunker.longest,
    )


def make_chunker(name: str) -> Chunker:
    """The chunker `words`, `spaces` or `stride-N`; any other name is a `UserError`."""
    if name in ("words", "spaces"):
        return Words() if name == "words" else Spaces()
    match = re.fullmatch(r"stride-([1-9][0-9]*)", name)
    if not match:
        hint = nearest(name, ["words", "spaces", "stride-4"])
        raise UserError(f"unknown chunks {shortened(name)!r}: expected words, spaces or stride-N{hint}")
    if len(match[1]) > 2 or int(match[1]) > LONGEST:
        raise UserError(f"tokenizer {shortened(name)!r}: N must be at most {LONGEST}")
    return Stride(int(match[1]))


def cuts_chunks(name: str) -> bool:
    """Whether a tokenizer's name has the form that :func:`make_chunker` accepts."""
    return name in ("words", "spaces") or name.startswith("stride-")
