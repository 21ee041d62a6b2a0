"""Which n-grams of given texts, and which of the texts whole, stand in a stream of documents.

`stlm.tokens.words` says what a word is.

Memory does not grow with the stream. A word that no given text has is one and the same unknown word, and
so is the mark between documents: no n-gram that is looked for has it, so that none crosses documents. The
rolling hashes of 64 bits only find candidates; each is compared word by word, so that nothing is reported
that is not there. Two n-grams that are looked for and have the same hash would be taken for one; among
the 1.2 million of the six benchmarks, 1.2e6**2 / 2**65, about 4e-8, such pairs are to be expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import repeat

import numpy as np

from stlm.tokens.words import normalize

# The mark between documents; `normalize` leaves no such byte in a text.
_END = b"\0"
_UNKNOWN, _END_ID = 0, 1
_CHUNK_BYTES = 1 << 20  # text held at a time, about
_PIECE_TOKENS = 1 << 18  # and of a document, what is decoded at a time
# Odd, with powers of a long period; this one is Knuth's for 64 bits.
_MULTIPLIER = np.uint64(6364136223846793005)

# Brown et al.'s shortest and longest n-gram.
SIZES = (8, 13)
NOT_FOUND = np.iinfo(np.int64).max


class NGrams:
    """`texts` to look for in documents: their n-grams, for each n of `sizes` (ascending), and each whole.

    Document numbers are the caller's; results name the lowest number, `NOT_FOUND` where there is none.
    """

    def __init__(self, texts: Iterable[str], sizes: Sequence[int]) -> None:
        self._vocabulary: dict[bytes, int] = {b"": _UNKNOWN, _END: _END_ID}
        ids: list[np.ndarray] = []
        for text in texts:
            own = normalize(text.encode(errors="replace")).split()
            number = self._vocabulary.setdefault
            ids.append(np.array([number(word, len(self._vocabulary)) for word in own], np.uint32))
        #: Words of each text.
        self.lengths = np.array([len(own) for own in ids], np.int64)
        self.sizes = tuple(sizes)
        self._starts = np.cumsum([0, *self.lengths])
        self._flat = np.concatenate([*ids, np.empty(0, np.uint32)])
        self._values = np.random.default_rng(0).integers(2**64, size=len(self._vocabulary), dtype=np.uint64)
        hashes = self._hashes(self._flat, self.sizes)
        self._of_size = {n: _Table(self._flat, self._places(n), n, hashes[n]) for n in self.sizes}
        # Whole texts that are shorter than the shortest n-gram are looked up by themselves, by their length;
        # a longer one where its first n-gram was found.
        short = [n for n in np.unique(self.lengths).tolist() if 0 < n < self.sizes[0]]
        hashes = self._hashes(self._flat, short)
        self._short = {
            n: _Table(self._flat, self._starts[:-1][self.lengths == n], n, hashes[n]) for n in short
        }
        self._whole = np.full(len(self.lengths), NOT_FOUND)
        # The first n-gram of a text -> the texts that begin with it.
        self._begun: dict[int, list[int]] = {}
        shortest = self._of_size[self.sizes[0]]
        for text in np.flatnonzero(self.lengths >= self.sizes[0]).tolist():
            self._begun.setdefault(shortest.at(int(self._starts[text])), []).append(text)
        self._begins = np.zeros(len(shortest.document), bool)
        self._begins[list(self._begun)] = True

    @cached_property
    def overlap(self) -> int:
        """Words that two pieces of one document must share, so that nothing between them is overlooked."""
        return max([*self.sizes, *self.lengths.tolist()])

    def scan(self, documents: Iterable[tuple[int, bytes]]) -> None:
        """Look for everything in `documents`: their numbers and texts, in UTF-8, each whole.

        A number may come again with another part of its text, if the parts share `overlap` words.
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
        """For each text, the first document that has an n-gram of it."""
        table = self._of_size[n]
        first = np.full(len(self.lengths), NOT_FOUND)
        np.minimum.at(first, self._text_of(table.places), table.document[table.pattern])
        return first

    def words_of(self, text: int) -> str:
        """The words of a text, with spaces between them."""
        return self._words(int(self._starts[text]), int(self.lengths[text]))

    def example(self, n: int, text: int) -> tuple[str, int]:
        """The first n-gram of `text` that was found, as a text, and the first document that has it."""
        table = self._of_size[n]
        low, high = np.searchsorted(table.places, self._starts[text : text + 2])
        documents = table.document[table.pattern[low:high]]
        which = int(np.flatnonzero(documents != NOT_FOUND)[0])
        place = int(table.places[low + which])
        return self._words(place, n), int(documents[which])

    @property
    def found_whole(self) -> np.ndarray:
        """For each text, the first document that has all of its words in sequence."""
        whole = self._whole.copy()
        for table in self._short.values():
            whole[self._text_of(table.places)] = table.document[table.pattern]
        return whole

    @cached_property
    def _spelled(self) -> list[bytes]:
        return list(self._vocabulary)

    def _places(self, n: int) -> np.ndarray:
        """Where in the flat array of words an n-gram begins that does not leave its text."""
        ends = np.repeat(self._starts[1:], self.lengths)
        return np.flatnonzero(ends - np.arange(len(self._flat)) >= n)

    def _text_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, places, side="right") - 1

    def _words(self, place: int, n: int) -> str:
        return b" ".join(self._spelled[number] for number in self._flat[place : place + n]).decode()

    def _hashes(self, ids: np.ndarray, sizes: Sequence[int]) -> dict[int, np.ndarray]:
        """The hash of the n words from each place on, for each n of `sizes`: a polynomial modulo 2**64."""
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
        of_document = np.array(numbers, np.int64)

        def documents(places: np.ndarray) -> np.ndarray:
            return of_document[np.searchsorted(ends, places)]

        first = self.sizes[0]
        hashes = self._hashes(ids, (*self._short, first))
        for n, table in self._short.items():
            places, patterns = table.find(ids, np.arange(len(hashes[n])), hashes[n])
            table.note(patterns, documents(places))
        places, patterns = self._of_size[first].find(ids, np.arange(len(hashes[first])), hashes[first])
        self._of_size[first].note(patterns, documents(places))
        self._note_whole(ids, places, patterns, documents)
        for n in self.sizes[1:]:
            # A longer n-gram begins with a shorter one.
            places = places[places + n <= len(ids)]
            longer = self._hashes_at(ids, places, n)
            places, patterns = self._of_size[n].find(ids, places, longer)
            self._of_size[n].note(patterns, documents(places))

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
        """Of the texts whose first n-gram was found, note those that go on as they do here."""
        places, patterns = places[self._begins[patterns]], patterns[self._begins[patterns]]
        for place, pattern, document in zip(
            places.tolist(), patterns.tolist(), documents(places).tolist(), strict=True
        ):
            for text in self._begun[pattern]:
                own = self._flat[self._starts[text] : self._starts[text + 1]]
                if document < self._whole[text] and np.array_equal(ids[place : place + len(own)], own):
                    self._whole[text] = document


class _Table:
    """Patterns of `n` words, those at `places` of the array `flat`, by their hashes.

    `pattern`: for each place, the number of its pattern; `document`: for each pattern, where it was found.
    """

    def __init__(self, flat: np.ndarray, places: np.ndarray, n: int, hashes: np.ndarray) -> None:
        self.places, self._flat, self._n = places, flat, n
        self._hashes, first, pattern = np.unique(hashes[places], return_index=True, return_inverse=True)
        self._first = places[first]
        self.pattern = pattern.astype(np.int32)
        self.document = np.full(len(self._hashes), NOT_FOUND)
        # Most of what is looked up is not there: the hash's upper bits alone tell so nine times out of ten.
        bits = max(1, len(self._hashes).bit_length() + 3)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(2**bits, bool)
        self._filter[self._hashes >> self._shift] = True

    def at(self, place: int) -> int:
        """The number of the pattern at a place of `flat`, which must be one of `places`."""
        return int(self.pattern[np.searchsorted(self.places, place)])

    def find(self, ids: np.ndarray, places: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of `places`, where `ids` has `n` words of these `hashes`, that have a pattern, and which."""
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
        """Record where patterns were found."""
        np.minimum.at(self.document, patterns, documents)


def pieces(tokens: np.ndarray, decode: Callable[[list[int]], bytes], overlap: int) -> Iterator[bytes]:
    """The text of a document of any length, in parts that share `overlap` words.

    `tokens` are those of the text alone. The parts are cut at ASCII white space; one holds about
    `_PIECE_TOKENS` tokens, or the longest word where that is more.
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
