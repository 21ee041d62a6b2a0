"""Near-duplicate documents: which documents share so much text that they belong in one split.

The sketch of a document consists of hashes of its word 5-grams: one in `rate`, selected by value, so that
equal 5-grams are selected in every document (MinHash by a threshold: the "mod m" sketches of Broder 1997;
FracMinHash, Irber et al. 2022). Unlike a fixed number of minima, such sketches measure containment as well as
resemblance: a passage within a long document counts as much as a second edition.

Candidates come from an inverted index: documents that share a rare 5-gram. Each candidate is verified by its
containment, the share of the shorter document's 5-grams that the other one has too. Memory is bounded: the
index is built from a part of the hashes at a time, and if there are too many candidate pairs, those with the
fewest shared hashes are dropped (lossy counting, Manku and Motwani 2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from stlm.tokens.shingles import DocumentHashes

WORDS = 5
# Containment from which documents belong together: in books, unrelated passages of 3,000 words share 1 to 3%
# of their 5-grams, passages with a paragraph in common 5% and more (docs/log.md).
CONTAINMENT = 0.1
# Short documents share that much by chance: for them half is required, and above it this many 5-grams.
SHORT_CONTAINMENT = 0.5
ENOUGH_SHARED = 100
# Enough 5-grams for the sketch of one document; and the most hashes of all documents, for the disk (4 GB).
ENOUGH_HASHES = 256
MOST_HASHES = 1 << 29
# A 5-gram in more documents than this is a common phrase: each document is compared with the next one only.
_COMMON = 8
_ENTRY_BYTES = 128  # memory of an index entry while it is sorted and pairs are counted
_PAIR_BYTES = 48
_FEWEST_PAIRS = 1000  # kept in any case


def linked(sketches: DocumentHashes, units: np.ndarray, memory_bytes: int) -> list[tuple[float, int, int]]:
    """Pairs of units with near-duplicate documents: (containment, unit, unit), highest containment first.

    `sketches` has the hashes of `WORDS` words of each document, sorted and distinct. `units` [documents] is
    the unit of each document (a book, a file, the document itself), negative if the document is left out;
    pairs within a unit are ignored.
    """
    first, second, counts = _candidates(sketches, units, memory_bytes)
    lengths = np.diff(sketches.offsets)
    shorter = np.minimum(lengths[first], lengths[second])
    # The index undercounts common phrases, so half of the required containment makes a candidate.
    near = np.flatnonzero(counts * 2 >= CONTAINMENT * shorter)
    strongest: dict[tuple[int, int], float] = {}
    for a, b, short in zip(first[near].tolist(), second[near].tolist(), shorter[near].tolist(), strict=True):
        shared = len(np.intersect1d(sketches.of(a), sketches.of(b), assume_unique=True))
        if _near(shared, short, sketches.rate):
            pair = tuple(sorted((int(units[a]), int(units[b]))))
            strongest[pair] = max(strongest.get(pair, 0.0), shared / short)
    return sorted(((share, a, b) for (a, b), share in strongest.items()), key=lambda link: (-link[0], link))


def _near(shared: int, shorter: int, rate: int) -> bool:
    containment = shared / shorter
    enough = containment >= CONTAINMENT and shared * rate >= ENOUGH_SHARED
    # A few sampled hashes say too little about a document.
    fewest = min(4, shorter) if rate == 1 else 4
    return enough or (containment >= SHORT_CONTAINMENT and shared >= fewest)


def _candidates(
    sketches: DocumentHashes, units: np.ndarray, memory_bytes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of documents of different units that share hashes, and the number shared: three arrays."""
    keys, counts = np.empty(0, np.uint64), np.empty(0, np.int64)
    most = max(memory_bytes // _PAIR_BYTES, _FEWEST_PAIRS)
    for hashes, documents in _parts(sketches, units, memory_bytes):
        found = [keys, *_pairs(hashes, documents, units, len(sketches))]
        weights = np.concatenate([counts, np.ones(sum(map(len, found[1:])), np.int64)])
        keys, place = np.unique(np.concatenate(found), return_inverse=True)
        counts = np.bincount(place, weights, minlength=len(keys)).astype(np.int64)
        while len(keys) > most:
            kept = counts > counts.min()
            if not kept.any():  # all are equal: keep the first ones
                kept[:most] = True
            keys, counts = keys[kept], counts[kept]
    size = np.uint64(max(len(sketches), 1))
    return (keys // size).astype(np.int64), (keys % size).astype(np.int64), counts


def _parts(
    sketches: DocumentHashes, units: np.ndarray, memory_bytes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The index, one part of the hashes at a time: sorted hashes, and the document of each."""
    parts = -(-int(sketches.offsets[-1]) * _ENTRY_BYTES // memory_bytes)
    for part in range(parts):
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for first, last, hashes in sketches.blocks(memory_bytes // _ENTRY_BYTES // 4):
            documents = np.repeat(np.arange(first, last), np.diff(sketches.offsets[first : last + 1]))
            # By higher bits than those used for sampling.
            chosen = ((hashes >> np.uint64(40)) % np.uint64(parts) == part) & (units[documents] >= 0)
            found.append((hashes[chosen], documents[chosen]))
        hashes, documents = (np.concatenate(each) for each in zip(*found, strict=True))
        order = np.argsort(hashes, kind="stable")
        yield hashes[order], documents[order]


def _pairs(hashes: np.ndarray, documents: np.ndarray, units: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Keys (document * size + later document) of the pairs that share a hash, one for each shared hash."""
    if not len(hashes):
        return
    begins = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    lengths = np.diff(np.append(begins, len(hashes)))
    runs = np.repeat(lengths, lengths)
    for distance in range(1, _COMMON):
        same = hashes[distance:] == hashes[:-distance]
        if distance > 1:
            same &= runs[distance:] <= _COMMON
        places = np.flatnonzero(same)
        if not len(places):
            return
        a, b = documents[places], documents[places + distance]
        apart = units[a] != units[b]
        yield a[apart].astype(np.uint64) * np.uint64(size) + b[apart].astype(np.uint64)


class Clusters:
    """Units joined into clusters of limited size, so that a chain of links cannot swallow a corpus."""

    def __init__(self, sizes: np.ndarray, most: float, refused: Iterable[int] = ()) -> None:
        """`sizes` of the units, the `most` of a cluster; `refused`: units too large by themselves."""
        self._parent = np.arange(len(sizes))
        self._sizes = np.array(sizes, np.float64)
        self._most = most
        self._refused = set(refused)

    def find(self, unit: int) -> int:
        """The representative unit of the cluster."""
        parent = self._parent
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = int(parent[unit])
        return unit

    def join(self, a: int, b: int) -> bool:
        """Join the clusters of two units unless the result is too large; whether they are one cluster now."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return True
        if self._sizes[a] + self._sizes[b] > self._most:
            self._refused |= {a, b}
            return False
        self._parent[b] = a
        self._sizes[a] += self._sizes[b]
        return True

    @property
    def roots(self) -> np.ndarray:
        """[units]: the representative of each unit's cluster."""
        return np.fromiter(map(self.find, range(len(self._parent))), np.int64, len(self._parent))

    @property
    def refused(self) -> np.ndarray:
        """The clusters that are too large, or would be after a join that was refused."""
        return np.array(sorted({self.find(unit) for unit in self._refused}), np.int64)

    def counts(self, first: int, last: int) -> dict[str, int]:
        """For the units `first` to `last` (exclusive): how many were joined, or stay in train."""
        roots = self.roots
        members = np.bincount(roots, minlength=len(roots))
        chosen = roots[first:last]
        return {
            "joined": int((members[chosen] > 1).sum()),
            "clusters": len(np.unique(chosen[members[chosen] > 1])),
            "kept_in_train": int(np.isin(chosen, self.refused).sum()),
        }
