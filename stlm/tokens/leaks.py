"""How much of the held-out text stands in the training text: shared word 13-grams, by split and document.

Thirteen words in sequence are the usual sign of a leak (Brown et al. 2020, appendix C). All 13-grams of a
corpus are counted up to `EXACT` of them; of a larger one, one in `rate`, drawn by their hashes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stlm.tokens.near_duplicates import Sketches
from stlm.tokens.shards import SPLITS

WORDS = 13
EXACT = 1 << 28  # 13-grams kept on the disk, 2 GB
HALF = 0.5
_FIFTH = 0.2
_FILTER_BITS = 24
_BLOCK = 1 << 20


def measure_leaks(grams: Sketches, splits_N: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of val and test: `ngrams`, `share` of them that stand in train, documents above a half and a fifth.

    `grams` have every document's 13-grams, repeats included; `splits_N` its index of SPLITS (others are left
    out). `worst` is the highest share of a document. Both are None where a split has no 13-gram.
    """
    train = np.flatnonzero(splits_N == 0)
    held = {name: np.flatnonzero(splits_N == index) for index, name in enumerate(SPLITS) if index}
    wanted = [grams.of(int(document)) for documents in held.values() for document in documents]
    unique = np.unique(np.concatenate([np.empty(0, np.uint64), *wanted]))
    found = _found(grams, train, unique)
    return {name: _leak(grams, documents, unique, found) for name, documents in held.items()}


def _found(grams: Sketches, train: np.ndarray, unique: np.ndarray) -> np.ndarray:
    """For each of the sorted hashes `unique`, whether a training document has it."""
    found = np.zeros(len(unique), bool)
    if not len(unique):
        return found
    # Most training text is elsewhere: the upper bits of a hash alone tell.
    shift = np.uint64(64 - _FILTER_BITS)
    filter_ = np.zeros(1 << _FILTER_BITS, bool)
    filter_[unique >> shift] = True
    waiting: list[np.ndarray] = []
    size = 0
    for number, document in enumerate(train.tolist(), 1):
        own = grams.of(document)
        waiting.append(own)
        size += len(own)
        if size >= _BLOCK or number == len(train):
            hashes = np.concatenate(waiting)
            hashes = hashes[filter_[hashes >> shift]]
            place = np.minimum(np.searchsorted(unique, hashes), len(unique) - 1)
            found[place[unique[place] == hashes]] = True
            waiting, size = [], 0
    return found


def _leak(grams: Sketches, documents: np.ndarray, unique: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    total = leaked = 0
    shares = []
    for document in documents.tolist():
        own = grams.of(document)
        if len(own):
            here = int(found[np.searchsorted(unique, own)].sum())
            total, leaked = total + len(own), leaked + here
            shares.append(here / len(own))
    return {
        "documents": len(documents),
        "ngrams": total * grams.rate,
        "share": leaked / total if total else None,
        "above_half": sum(share > HALF for share in shares),
        "above_fifth": sum(share > _FIFTH for share in shares),
        "worst": max(shares, default=None),
    }
