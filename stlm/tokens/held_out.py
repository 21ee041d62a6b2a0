"""Which documents of val and test are read: the same ones whatever the tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stlm.tokens.shards import ComponentTokens, Document, read_split
from stlm.tokens.tokenizer import load_tokenizer


class HeldOut(NamedTuple):
    """Documents of a split in the order of its shards, each with its component of the corpus.

    `documents_total` and `bytes_total` count the whole split.
    """

    documents: list[Document]
    components: list[str]
    documents_total: int
    bytes_total: int


def held_out(
    folder: Path, split: str, max_bytes: int | None, max_documents: int | None = None, seed: int = 0
) -> HeldOut:
    """Whole documents of a split of `data/tokens/<corpus>/<tokenizer>/`, up to a budget.

    They are drawn by `seed` until they have `max_bytes` of UTF-8 text or are `max_documents` (None: no
    bound). Each component of a mix gives its share of the budgets, by weight, and at least one document.
    Nothing depends on the tokenizer, which changes neither the order of documents nor their bytes.
    """
    components = read_split(folder, split)
    weights = sum(component.weight for component in components)
    documents, names = [], []
    for component in components:
        share = component.weight / weights
        chosen = _choose(
            component,
            None if max_bytes is None else max_bytes * share,
            None if max_documents is None else max(1, round(max_documents * share)),
            seed,
        )
        taken = [document for place, document in enumerate(component) if place in chosen]
        documents += taken
        names += [component.name] * len(taken)
    lengths = [shard.n_bytes for component in components for shard in component.shards]
    return HeldOut(documents, names, sum(map(len, lengths)), int(sum(n_bytes.sum() for n_bytes in lengths)))


def _choose(
    component: ComponentTokens, max_bytes: float | None, max_documents: int | None, seed: int
) -> set[int]:
    """The indices of the documents that are taken from a component."""
    order = np.arange(len(component))
    if max_bytes is not None or max_documents is not None:
        order = np.random.default_rng(seed).permutation(len(component))[:max_documents]
    if max_bytes is not None:
        n_bytes = np.concatenate([shard.n_bytes for shard in component.shards] or [order])
        before = np.cumsum(n_bytes[order]) - n_bytes[order]
        order = order[before < max_bytes]
    return set(order.tolist())


def text_ids(folder: Path, documents: Sequence[Document]) -> np.ndarray:
    """uint64 [documents]: 64 bits of a hash of each document's text, which does not depend on the tokenizer.

    `folder` is the folder of tokens, which contains the tokenizer that decodes them.
    """
    tokenizer = load_tokenizer(folder / "tokenizer")
    texts = (tokenizer.decode(document.tokens.tolist()).encode() for document in documents)
    hashes = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(hashes, "<u8")


def text_digest(ids: np.ndarray, components: Sequence[str]) -> str:
    """A hash of all documents together, from their `text_ids` and components: equal for equal text."""
    names = "\n".join(components).encode()
    return hashlib.sha256(ids.astype("<u8").tobytes() + names).hexdigest()
