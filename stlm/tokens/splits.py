"""The split of each document: as its source declares, otherwise by hash, near-duplicates together.

A *unit* must not be divided: the documents of a group (a book by its title), or one document. Units with
near-duplicate documents form *clusters*. The split of a cluster is a function of a hash of its units alone,
so that added documents move only their near-duplicates. The size of a cluster is limited to a share of its
corpus. A cluster that may not grow further goes to train, and so does what it could not be joined with.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from stlm.tokens.near_duplicates import Clusters
from stlm.tokens.shards import SPLITS

DROPPED = 255  # in addition to the indices of SPLITS
MOST_OF_CORPUS = 0.1  # largest share of a cluster
_FEW = 1000  # documents
FEW_UNITS = 20
_PART = 0.05  # share of a long text for val and for test


def digest(content: bytes) -> bytes:
    """128 bits: the first half determines the split, the second whether a vocabulary is trained on it."""
    return hashlib.blake2b(content, digest_size=16).digest()


def held_out(grouped: bool, rows: int) -> float:
    """The share of val, and of test: 1% of documents; 5% of groups (books), or of fewer than 1,000 documents.

    1% of so few might be none. A corpus that grows past 1,000 keeps a part of its earlier val and test.
    """
    return 0.05 if grouped or rows < _FEW else 0.01


@dataclass
class Units:
    """The units of one component, in the order of their first documents.

    `of_row`: the unit of each row. `keys`: 64 bits of each unit's digest. `sizes`: bytes of text.
    """

    of_row: np.ndarray
    keys: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, keys_N: np.ndarray, sizes_N: np.ndarray, grouped: bool) -> Units:
        """From the first half of each row's digest, and its bytes; if not `grouped`, each row is a unit."""
        if not grouped:
            return cls(np.arange(len(keys_N)), np.asarray(keys_N), np.asarray(sizes_N, np.float64))
        keys, first, place = np.unique(keys_N, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty(len(keys), np.int64)
        rank[order] = np.arange(len(keys))
        of_row = rank[place]
        return cls(of_row, keys[order], np.bincount(of_row, sizes_N, minlength=len(keys)))


def clusters_of(units: list[Units], links: list[tuple[float, int, int]]) -> Clusters:
    """The units of all components, numbered consecutively, joined by `links`."""
    shares = np.concatenate([component.sizes / max(component.sizes.sum(), 1) for component in units])
    # If there are few units, each is a large part.
    many = np.concatenate(
        [np.full(len(component.keys), len(component.keys) >= FEW_UNITS) for component in units]
    )
    clusters = Clusters(shares, MOST_OF_CORPUS, np.flatnonzero(many & (shares > MOST_OF_CORPUS)).tolist())
    for _, a, b in links:
        clusters.join(a, b)
    return clusters


def assign(units: list[Units], clusters: Clusters, shares: list[tuple[float, float]]) -> list[np.ndarray]:
    """For each component, the split of each unit: val at the bottom of the range of hashes, test at the top.

    `shares`: for each component those of val and test; 0 for a split that gets none. A cluster with units of
    several components has the lowest of their shares.
    """
    roots = clusters.roots
    keys = np.concatenate([component.keys for component in units])
    members = np.bincount(roots, minlength=len(keys))
    lowest = np.full(len(keys), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, roots, keys)
    places = keys / 2**64
    for root in np.flatnonzero(members > 1):
        # The lowest of several hashes is low; hashing it again makes it uniform.
        places[root] = int.from_bytes(digest(lowest[root].tobytes())[:8], "little") / 2**64
    places = places[roots]
    val, test = (
        _lowest(
            np.repeat([pair[index] for pair in shares], [len(component.keys) for component in units]),
            roots,
        )
        for index in (0, 1)
    )
    split = np.where(places < val, 1, np.where(places >= 1 - test, 2, 0)).astype(np.uint8)
    stays = np.isin(roots, clusters.refused)
    split[stays] = 0
    splits = []
    first = 0
    for component, component_shares in zip(units, shares, strict=True):
        rows = slice(first, first + len(component.keys))
        # A cluster with units of several components is not moved by one of them.
        inside = np.bincount(roots[rows], minlength=len(keys))[roots[rows]] == members[roots[rows]]
        _fill(split[rows], places[rows], roots[rows], inside & ~stays[rows], component_shares)
        splits.append(split[rows])
        first += len(component.keys)
    return splits


def _lowest(values: np.ndarray, roots: np.ndarray) -> np.ndarray:
    """For each unit, the lowest value in its cluster."""
    lowest = np.full(len(values), np.inf)
    np.minimum.at(lowest, roots, values)
    return lowest[roots]


def _fill(
    split: np.ndarray,
    places: np.ndarray,
    roots: np.ndarray,
    movable: np.ndarray,
    shares: tuple[float, float],
) -> None:
    """Give an empty val or test the nearest cluster, in place, if train keeps at least one."""
    for index, order in ((1, np.argsort(places, kind="stable")), (2, np.argsort(-places, kind="stable"))):
        if shares[index - 1] == 0 or (split == index).any():
            continue
        free = order[(split[order] == 0) & movable[order]]
        if len(free):
            chosen = roots == roots[free[0]]
            if (split[~chosen] == 0).any():
                split[chosen] = index


def contiguous(units: Units, sizes_N: np.ndarray, missing: frozenset[int]) -> np.ndarray:
    """The split of each row of few long texts: the last parts of every text go to val and test.

    The start of a row decides: in the last 5% of the bytes of its text it goes to test, in the 5% before to
    val, otherwise to train. A split that is not `missing` gets none.
    """
    order = np.argsort(units.of_row, kind="stable")
    ends = np.cumsum(sizes_N[order], dtype=np.float64)
    begins_of_units = np.concatenate([[0.0], np.cumsum(units.sizes)])
    begins = ends - sizes_N[order] - begins_of_units[units.of_row[order]]
    places = np.empty(len(order))
    places[order] = begins / np.maximum(units.sizes[units.of_row[order]], 1)
    split = np.zeros(len(order), np.uint8)
    for number, index in enumerate(sorted(missing)):
        split[places >= 1 - _PART * (len(missing) - number)] = index
    return split


def names(indices: frozenset[int]) -> str:
    """Splits in words: "val and test"."""
    return " and ".join(SPLITS[index] for index in sorted(indices))
