"""The tokens of a published model that a corpus needs: `hf:NAME:N` (after PanGu-pi, Tang et al. 2024).

The tokens of the corpus are counted under the whole vocabulary. Then the rarest token that no other merge is
made of is removed, its count going to the two parts that it is written with from now on, until N remain.
Bytes stay, and so do all merges that lead to a token that was kept: every text can be written, and each
token that was kept is made where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np

from stlm.errors import UserError
from stlm.tokens.names import hf_name
from stlm.tokens.published import PublishedTokenizer, Vocabulary

_COUNTED = 1 << 20  # tokens that are counted at a time


class Needed(NamedTuple):
    """Ids of tokens that are kept, in order; the number of tokens that the counted text is written with.

    The number is a prediction: where a token was removed, its parts may be merged with their neighbours.
    """

    ids: list[int]
    text_tokens: int


def reduced_tokenizer(name: str, whole: PublishedTokenizer, texts: Iterable[str]) -> PublishedTokenizer:
    """`hf:NAME:N`: the N tokens (the end of text included) of `whole` that `texts` need.

    Equal texts give equal bits. Tokens that texts do not contain are kept if N allows, the first merges
    first. Raises UserError where the model has fewer tokens.
    """
    size = hf_name(name).size
    vocabulary = whole.vocabulary
    most = len(vocabulary.tokens) - len(vocabulary.special) + 1
    least = most - len(vocabulary.merges)
    if not least <= size <= most:
        raise UserError(
            f"tokenizer {name}: N must be from {least:,} (bytes and the end of text) to {most:,} (all tokens "
            f"that text is written with); choose {name[: name.rindex(':')]} for the model's own vocabulary"
        )
    ids = needed(vocabulary, count_tokens(whole, texts), size - 1).ids
    return with_tokens(name, whole, ids)


def count_tokens(tokenizer: PublishedTokenizer, texts: Iterable[str]) -> np.ndarray:
    """How often each token occurs in `texts`: int64 [vocab_size]."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    waiting: list[np.ndarray] = []
    held = 0
    for text in texts:
        waiting.append(tokenizer.encode_array(text))
        held += len(waiting[-1])
        if held >= _COUNTED:
            counts += np.bincount(np.concatenate(waiting), minlength=len(counts))
            waiting, held = [], 0
    if waiting:
        counts += np.bincount(np.concatenate(waiting), minlength=len(counts))
    return counts


def needed(vocabulary: Vocabulary, counts: np.ndarray, size: int) -> Needed:
    """The `size` tokens, without special ones, to keep for a text that has `counts` [V] of each.

    Of tokens as rare as each other, that of the last merge is removed first.
    """
    count = counts.tolist()
    parts = dict(zip(vocabulary.products, vocabulary.merges, strict=True))
    uses = [0] * len(count)  # how many merges a token is a part of, twice where it is both parts
    for merge in vocabulary.merges:
        for part in merge:
            uses[part] += 1
    kept = set(range(len(count))) - vocabulary.special
    # A token in the heap is part of no merge, so its count is final.
    rarest = [(count[token], -token) for token in parts if not uses[token]]
    heapify(rarest)
    while len(kept) > size:
        token = -heappop(rarest)[1]
        kept.remove(token)
        for part in parts[token]:
            count[part] += count[token]
            uses[part] -= 1
            if not uses[part] and part in parts:
                heappush(rarest, (count[part], -part))
    return Needed(sorted(kept), sum(count[token] for token in kept))


def with_tokens(name: str, whole: PublishedTokenizer, ids: Sequence[int]) -> PublishedTokenizer:
    """The tokenizer with these of the tokens of `whole`, in this order, and the end of text as the last.

    `ids` must grow, and contain the parts of each token that a merge makes.
    """
    old = whole.vocabulary
    parent_ids = [*ids, whole.eot]
    own = {parent: id_ for id_, parent in enumerate(parent_ids)}
    merges = [
        (own[left], own[right])
        for (left, right), product in zip(old.merges, old.products, strict=True)
        if product in own
    ]
    eot = len(ids)
    vocabulary = Vocabulary(
        tuple(old.tokens[parent] for parent in parent_ids), tuple(merges), frozenset({eot}), old.pre_tokenizer
    )
    pieces = vocabulary.encode_pieces(old.tokens)
    first = [eot if id_ in old.special else pieces[id_][0] for id_ in range(len(old.tokens))]
    # Where tiktoken writes the tokens of the whole vocabulary, it writes those of this one: the merges that
    # make a token were kept with it.
    return PublishedTokenizer(
        name, vocabulary, whole.eot_spelling, np.array(parent_ids), np.array(first), whole.is_fast
    )
