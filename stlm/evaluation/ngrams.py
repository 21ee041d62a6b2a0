"""Finds n-grams of given texts, and the texts as wholes, in a stream of documents.

`stlm.tokens.words` defines words.

Memory does not grow with the stream. All words that no given text has are mapped to one unknown word, and so
is the separator between documents; no searched n-gram contains it, so none crosses documents. The rolling
64-bit hashes only find candidates: each is compared word by word, so nothing is reported that is not there.
Two searched n-grams with the same hash would be taken for one; among the 1.2 million of the six benchmarks,
1.2e6**2 / 2**65, about 4e-8, such pairs are expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import repeat

import numpy as np

from stlm.tokens.words import normalize

# The separator between documents; `normalize` leaves no such byte in a text.
_END = b"\0"
_UNKNOWN, _END_ID = 0, 1
_CHUNK_BYTES = 1 << 20  # text held at a time, approximately
_PIECE_TOKENS = 1 << 18  # tokens of a document decoded at a time
# Odd, and its powers have a long period; this is Knuth's multiplier for 64 bits.
_MULTIPLIER = np.uint64(6364136223846793005)

# Brown et al.'s shortest and longest n-gram.
SIZES = (8, 13)
NOT_FOUND = np.iinfo(np.int64).max


class NGrams:
    """Finds `texts` in documents: each whole text, and its n-grams for each n of `sizes` (ascending).

    The caller numbers the documents; results give the lowest number, or `NOT_FOUND`.
    """

    def __init__(self, texts: Iterable[str], sizes: Sequence[int]) -> None:
        self._vocabulary: dict[bytes, int] = {b"": _UNKNOWN, _END: _END_ID}
        ids: list[np.ndarray] = []
        for text in texts:
            found = normalize(text.encode(errors="replace")).split()
            number = self._vocabulary.setdefault
            ids.append(np.array([number(word, len(self._vocabulary)) for word in found], np.uint32))
        #: The number of words of each text.
        self.lengths = np.array([len(found) for found in ids], np.int64)
        self.sizes = tuple(sizes)
        self._starts = np.cumsum([0, *self.lengths])
        self._flat = np.concatenate([*ids, np.empty(0, np.uint32)])
        self._values = np.random.default_rng(0).integers(2**64, size=len(self._vocabulary), dtype=np.uint64)
        hashes = self._hashes(self._flat, self.sizes)
        self._tables = {n: _Table(self._flat, self._places(n), n, hashes[n]) for n in self.sizes}
        # Whole texts that are shorter than the shortest n-gram are searched by tables of their lengths;
        # longer texts are compared wherever their first n-gram was found.
        short = [n for n in np.unique(self.lengths).tolist() if 0 < n < self.sizes[0]]
        hashes = self._hashes(self._flat, short)
        self._short = {
            n: _Table(self._flat, self._starts[:-1][self.lengths == n], n, hashes[n]) for n in short
        }
        self._whole = np.full(len(self.lengths), NOT_FOUND)
        # Maps a first n-gram to the texts that begin with it.
        self._begun: dict[int, list[int]] = {}
        shortest = self._tables[self.sizes[0]]
        for text in np.flatnonzero(self.lengths >= self.sizes[0]).tolist():
            self._begun.setdefault(shortest.at(int(self._starts[text])), []).append(text)
        self._begins = np.zeros(len(shortest.document), bool)
        self._begins[list(self._begun)] = True

    @cached_property
    def overlap(self) -> int:
        """The number of words that two pieces of a document must share, so that no n-gram is missed."""
        return max([*self.sizes, *self.lengths.tolist()])

    def scan(self, documents: Iterable[tuple[int, bytes]]) -> None:
        """Search `documents` for everything: their numbers and their whole texts in UTF-8.

        A number may come again with the next part of its text, if the parts share `overlap` words.
        """
        numbers: list[int] = []
        texts: list[bytes] = []
        size = 0
        for number, text in documents:
            numbers.append(number)
            texts.append(normalize(text))
            size += len(text)
            if size >= _CHUNK_BYTES:
                self._scan_chunk(numbers, texts)
                numbers, texts, size = [], [], 0
        self._scan_chunk(numbers, texts)

    def found(self, n: int) -> np.ndarray:
        """For each text, the first document that has one of its n-grams."""
        table = self._tables[n]
        first = np.full(len(self.lengths), NOT_FOUND)
        np.minimum.at(first, self._text_of(table.places), table.document[table.pattern])
        return first

    def words_of(self, text: int) -> str:
        """The words of a text, joined by spaces."""
        return self._words(int(self._starts[text]), int(self.lengths[text]))

    def example(self, n: int, text: int) -> tuple[str, int]:
        """The first n-gram of `text` that was found, as a string, and the first document that has it."""
        table = self._tables[n]
        low, high = np.searchsorted(table.places, self._starts[text : text + 2])
        documents = table.document[table.pattern[low:high]]
        which = int(np.flatnonzero(documents != NOT_FOUND)[0])
        place = int(table.places[low + which])
        return self._words(place, n), int(documents[which])

    @property
    def found_whole(self) -> np.ndarray:
        """For each text, the first document that contains all of its words in sequence."""
        whole = self._whole.copy()
        for table in self._short.values():
            whole[self._text_of(table.places)] = table.document[table.pattern]
        return whole

    @cached_property
    def _spelled(self) -> list[bytes]:
        return list(self._vocabulary)

    def _places(self, n: int) -> np.ndarray:
        """The positions in the flat array of words at which an n-gram begins that stays within its text."""
        ends = np.repeat(self._starts[1:], self.lengths)
        return np.flatnonzero(ends - np.arange(len(self._flat)) >= n)

    def _text_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, places, side="right") - 1

    def _words(self, place: int, n: int) -> str:
        return b" ".join(self._spelled[number] for number in self._flat[place : place + n]).decode()

    def _hashes(self, ids: np.ndarray, sizes: Sequence[int]) -> dict[int, np.ndarray]:
        """The hash of the n words from each position on, for each n of `sizes`: a polynomial modulo 2**64."""
        values = self._values[ids]
        rolling = np.zeros(len(ids) + 1, np.uint64)
        hashes = {}
        for n in range(1, max(sizes, default=0) + 1):
            rolling = rolling[:-1] * _MULTIPLIER
            rolling += values[n - 1 :][: len(rolling)]
            if n in sizes:
                hashes[n] = rolling
            if not len(rolling):
                return {**{size: rolling for size in sizes}, **hashes}
        return hashes

    def _scan_chunk(self, numbers: Sequence[int], texts: Sequence[bytes]) -> None:
        found = (b" " + _END + b" ").join(texts).split()
        ids = np.fromiter(map(self._vocabulary.get, found, repeat(_UNKNOWN)), np.uint32, len(found))
        ends = np.flatnonzero(ids == _END_ID)
        document_of_shard = np.array(numbers, np.int64)

        def documents(places: np.ndarray) -> np.ndarray:
            return document_of_shard[np.searchsorted(ends, places)]

        first = self.sizes[0]
        hashes = self._hashes(ids, (*self._short, first))
        for n, table in self._short.items():
            places, patterns = table.find(ids, np.arange(len(hashes[n])), hashes[n])
            table.note(patterns, documents(places))
        places, patterns = self._tables[first].find(ids, np.arange(len(hashes[first])), hashes[first])
        self._tables[first].note(patterns, documents(places))
        self._note_whole(ids, places, patterns, documents)
        for n in self.sizes[1:]:
            # A longer n-gram begins with a shorter one.
            places = places[places + n <= len(ids)]
            longer = self._hashes_at(ids, places, n)
            places, patterns = self._tables[n].find(ids, places, longer)
            self._tables[n].note(patterns, documents(places))

    def _hashes_at(self, ids: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
        hashes = np.zeros(len(places), np.uint64)
        for k in range(n):
            hashes = hashes * _MULTIPLIER + self._values[ids[places + k]]
        return hashes

    def _note_whole(
        self,
        ids: np.ndarray,
        places: np.ndarray,
        patterns: np.ndarray,
        documents: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Record the texts that, after their first n-gram was found, continue as the document does."""
        places, patterns = places[self._begins[patterns]], patterns[self._begins[patterns]]
        for place, pattern, document in zip(
            places.tolist(), patterns.tolist(), documents(places).tolist(), strict=True
        ):
            for text in self._begun[pattern]:
                text_ids = self._flat[self._starts[text] : self._starts[text + 1]]
                if document < self._whole[text] and np.array_equal(
                    ids[place : place + len(text_ids)], text_ids
                ):
                    self._whole[text] = document


class _Table:
    """Patterns of `n` words, at the positions `places` of the array `flat`, indexed by their hashes.

    `pattern`: the pattern's number for each position; `document`: where each pattern was found.
    """

    def __init__(self, flat: np.ndarray, places: np.ndarray, n: int, hashes: np.ndarray) -> None:
        self.places, self._flat, self._n = places, flat, n
        self._hashes, first, pattern = np.unique(hashes[places], return_index=True, return_inverse=True)
        self._first = places[first]
        self.pattern = pattern.astype(np.int32)
        self.document = np.full(len(self._hashes), NOT_FOUND)
        # Most lookups find nothing: in nine of ten cases, the upper bits of the hash suffice to tell.
        bits = max(1, len(self._hashes).bit_length() + 3)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(2**bits, bool)
        self._filter[self._hashes >> self._shift] = True

    def at(self, place: int) -> int:
        """The number of the pattern at a position of `flat`, which must be one of `places`."""
        return int(self.pattern[np.searchsorted(self.places, place)])

    def find(self, ids: np.ndarray, places: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `places` in `ids` whose `n` words, with these `hashes`, match a pattern, and the patterns."""
        near = np.flatnonzero(self._filter[hashes >> self._shift])
        places, hashes = places[near], hashes[near]
        patterns = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        same = self._hashes[patterns] == hashes
        places, patterns = places[same], patterns[same]
        for k in range(self._n):
            same = ids[places + k] == self._flat[self._first[patterns] + k]
            places, patterns = places[same], patterns[same]
        return places, patterns

    def note(self, patterns: np.ndarray, documents: np.ndarray) -> None:
        """Record the documents in which patterns were found."""
        np.minimum.at(self.document, patterns, documents)


def pieces(tokens: np.ndarray, decode: Callable[[list[int]], bytes], overlap: int) -> Iterator[bytes]:
    """Yield the text of a document of any length in parts that share `overlap` words.

    `tokens` are those of the text only. The text is cut at ASCII white space; a part has about
    `_PIECE_TOKENS` tokens, or more if the longest word needs them.
    """
    rest = tail = b""
    for start in range(0, len(tokens), _PIECE_TOKENS):
        data = rest + decode(tokens[start : start + _PIECE_TOKENS].tolist())
        last = start + _PIECE_TOKENS >= len(tokens)
        cut = len(data) if last else max(data.rfind(b" "), data.rfind(b"\n")) + 1
        rest, text = data[cut:], tail + data[:cut]
        yield text
        if not last:
            tail = b" ".join(normalize(text).rsplit(None, overlap)[-overlap:]) + b" "
