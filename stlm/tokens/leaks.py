"""How much of the held-out text stands in the training text: shared word 13-grams, by split and document.

Thirteen words in sequence are the usual sign of a leak (Brown et al. 2020, appendix C). All 13-grams of a
corpus are counted, or if there are more than `MOST_HASHES`, one in `rate`, drawn by hash.
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
    """For val and test: `ngrams`, the `share` of them in train, and documents above a half and a fifth.

    `grams` has the 13-grams of every document, with repeats; `splits_N` its index in SPLITS (other values are
    left out). `worst` is the highest share of a document. `share` and `worst` are None without 13-grams.
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
    # The upper bits of a hash suffice to skip most of the training text.
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
        hashes = grams.of(document)
        if len(hashes):
            in_train = int(found[np.searchsorted(unique, hashes)].sum())
            total, leaked = total + len(hashes), leaked + in_train
            shares.append(in_train / len(hashes))
    return {
        "documents": len(documents),
        "ngrams": total * grams.rate,
        "share": leaked / total if total else None,
        "above_half": sum(share > HALF for share in shares),
        "above_fifth": sum(share > _FIFTH for share in shares),
        "worst": max(shares, default=None),
    }
