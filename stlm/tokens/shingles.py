"""Hashes of the words of documents, and of every n consecutive words (shingles, n-grams)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stlm.tokens.words import normalize

# Bytes hashed at a time: arrays of 64 bits for each byte should fit the processor's cache.
_BLOCK_BYTES = 1 << 18
# Knuth's multiplier for 64 bits; odd, so that it has an inverse modulo 2**64.
_MULTIPLIER = 6364136223846793005
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)
_SHIFT = np.uint64(32)
_SPREAD = np.uint64(0xD6E8FEB86659FD93)


def _powers(base: int) -> np.ndarray:
    """base**i modulo 2**64 for each byte of a block."""
    powers_L = np.full(_BLOCK_BYTES + 1, base, np.uint64)
    powers_L[0] = 1
    return np.multiply.accumulate(powers_L)


_POWERS_L, _INVERSES_L = _powers(_MULTIPLIER), _powers(_INVERSE)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64, in place, because samples are selected by the lowest bits."""
    hashes ^= hashes >> _SHIFT
    hashes *= _SPREAD
    hashes ^= hashes >> _SHIFT
    return hashes


def _blocks(content: bytes) -> Iterator[bytes]:
    """Parts of at most a block, cut before a space; a word longer than a block is cut anywhere."""
    start = 0
    while len(content) - start > _BLOCK_BYTES:
        cut = content.rfind(b" ", start + 1, start + _BLOCK_BYTES)
        cut = start + _BLOCK_BYTES if cut < 0 else cut
        yield content[start:cut]
        start = cut
    yield content[start:]


def word_hashes(text: bytes) -> np.ndarray:
    """uint64 [W]: a hash of each word of a text (UTF-8); words as in `stlm.tokens.words`."""
    parts = [_block_hashes(block) for block in _blocks(normalize(text))]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _block_hashes(block: bytes) -> np.ndarray:
    letters_L = np.frombuffer(block, np.uint8)
    inside_L = np.empty(len(block) + 2, bool)
    inside_L[0] = inside_L[-1] = False
    np.greater(letters_L, 32, out=inside_L[1:-1])
    edges = np.flatnonzero(inside_L[1:] != inside_L[:-1])
    begins_W, ends_W = edges[0::2], edges[1::2]
    # A polynomial in the letters of each word: the difference of two prefix sums of the block.
    sums_L = np.empty(len(block) + 1, np.uint64)
    sums_L[0] = 0
    np.cumsum(letters_L * _POWERS_L[: len(block)], out=sums_L[1:])
    return _mixed((sums_L[ends_W] - sums_L[begins_W]) * _INVERSES_L[begins_W])


def shingles(hashes_W: np.ndarray, n: int) -> np.ndarray:
    """uint64 [W - n + 1]: a hash of every `n` consecutive words; empty if there are fewer words."""
    if len(hashes_W) < n:
        return np.empty(0, np.uint64)
    rolling = hashes_W.copy()
    for k in range(1, n):
        rolling = rolling[:-1] * np.uint64(_MULTIPLIER) + hashes_W[k:]
    return _mixed(rolling)


@dataclass(frozen=True)
class DocumentHashes:
    """Hashes of the shingles of documents, or of one in `rate`, in a file, document after document.

    Document i has those from `offsets[i]` to `offsets[i + 1]`. They are read, not memory-mapped, so that the
    reported memory of the process does not grow with the file.
    """

    path: Path
    offsets: np.ndarray
    rate: int

    @classmethod
    def of_lengths(cls, path: Path, lengths: np.ndarray, rate: int) -> DocumentHashes:
        """`lengths`: the number of hashes of each document."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(path, offsets, rate)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """The hashes `start` to `stop` (exclusive) of the file."""
        return np.fromfile(self.path, np.uint64, stop - start, offset=8 * start)

    def of(self, document: int) -> np.ndarray:
        """The hashes of a document."""
        return self.read(int(self.offsets[document]), int(self.offsets[document + 1]))

    def blocks(self, most: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Blocks of consecutive documents with at most `most` hashes: first, last (exclusive), hashes.

        A document with more hashes is a block by itself.
        """
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.offsets, self.offsets[first] + most, side="right")) - 1
            last = min(max(last, first + 1), len(self))
            yield first, last, self.read(int(self.offsets[first]), int(self.offsets[last]))
            first = last


def sample(hashes: np.ndarray, rate: int) -> np.ndarray:
    """One in `rate` (a power of two) of the hashes, selected by value: the same ones in every document."""
    return hashes if rate == 1 else hashes[(hashes & np.uint64(rate - 1)) == 0]
