"""How much of the held-out text stands in the training text: shared word 13-grams, by split and document.

Thirteen words in sequence are the usual sign of a leak (Brown et al. 2020, appendix C). All 13-grams of a
corpus are counted, or of more than `MOST_HASHES` one in `rate`, drawn by their hashes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stlm.tokens.shards import SPLITS
from stlm.tokens.shingles import DocumentHashes

WORDS = 13
MOST_HASHES = 1 << 28  # kept on the disk, 2 GB
HALF = 0.5
_FIFTH = 0.2
_FILTER_BITS = 24
_BLOCK = 1 << 19  # hashes


def measure_leaks(grams: DocumentHashes, splits_N: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of val and test: `ngrams`, `share` of them that stand in train, documents above a half and a fifth.

    `grams` have every document's 13-grams, repeats included; `splits_N` its index of SPLITS (others are left
    out). `worst` is the highest share of a document. Both are None where a split has no 13-gram.
    """
    held = {name: np.flatnonzero(splits_N == index) for index, name in enumerate(SPLITS) if index}
    wanted = [np.unique(grams.of(document)) for documents in held.values() for document in documents.tolist()]
    unique = np.unique(np.concatenate([np.empty(0, np.uint64), *wanted]))
    found = _found(grams, splits_N == 0, unique)
    return {name: _leak(grams, documents, unique, found) for name, documents in held.items()}


def _found(grams: DocumentHashes, is_train_N: np.ndarray, unique: np.ndarray) -> np.ndarray:
    """For each of the sorted hashes `unique`, whether a training document has it."""
    found = np.zeros(len(unique), bool)
    if not len(unique):
        return found
    # Most training text is elsewhere: the upper bits of a hash alone tell.
    shift = np.uint64(64 - _FILTER_BITS)
    filter_ = np.zeros(1 << _FILTER_BITS, bool)
    filter_[unique >> shift] = True
    for first, last, hashes in grams.blocks(_BLOCK):
        near = filter_[hashes >> shift]
        near &= np.repeat(is_train_N[first:last], np.diff(grams.offsets[first : last + 1]))
        hashes = hashes[near]
        place = np.minimum(np.searchsorted(unique, hashes), len(unique) - 1)
        found[place[unique[place] == hashes]] = True
    return found


def _leak(
    grams: DocumentHashes, documents: np.ndarray, unique: np.ndarray, found: np.ndarray
) -> dict[str, Any]:
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
