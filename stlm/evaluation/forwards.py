"""Sequences to run through a model, which positions need logits, and how they share the rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Forward(NamedTuple):
    """One sequence through the model: its input, the first position scored, the tokens asked for at its end.

    The targets of all positions but the last are the input itself, shifted; the last may have several.
    """

    tokens: np.ndarray
    start: int
    finals: list[int]

    @property
    def inner(self) -> int:
        """Scored positions but the last."""
        return len(self.tokens) - 1 - self.start


class Row(NamedTuple):
    """Sequences one after another in a row of n tokens, what they have in common once: a trie.

    `positions` are the tokens' places in their sequences. Each of `segments` is a sequence: how many tokens
    the row has for it alone, and its path, the places in the row of all of its tokens. Of the p
    log-probabilities wanted, that of `targets[k]` comes after the row's token `picked[k]`; they belong to the
    forwards `numbers`, `counts` of them to each.
    """

    tokens: np.ndarray  # [n]
    positions: np.ndarray  # [n]
    segments: list[tuple[int, np.ndarray]]
    picked: np.ndarray  # [p]
    targets: np.ndarray  # [p]
    numbers: list[int]
    counts: list[int]


def windows(tokens: np.ndarray, context: int, stride: int) -> Iterator[Forward]:
    """Overlapping windows over `tokens` that score each token but the first exactly once.

    Each window holds at most `context` input tokens; all but the first window overlap the one before by
    `context - stride` tokens, which serve as context alone.
    """
    end = 1  # the first token not yet scored
    begin = 0
    while end < len(tokens):
        stop = min(begin + context + 1, len(tokens))
        yield Forward(tokens[begin : stop - 1], end - 1 - begin, [int(tokens[stop - 1])])
        end = stop
        begin += stride


class SharedPrefixes:
    """Sequences in an order in which each shares its longest prefix with the one before it.

    `common[k]` is the length of that prefix. What two sequences score alike, such as the context of an item's
    options in the mode that scores whole strings, is asked of the first alone: `forwards` are those given
    without such positions, `restore` puts their log-probabilities back. Logits at few positions matter: a
    vocabulary's product costs as much as a layer or several.
    """

    def __init__(self, forwards: Sequence[Forward]) -> None:
        # Bytes sort fast, and the order of any fixed-width numbers will do.
        keys = [forward.tokens.tobytes() for forward in forwards]
        self.order = sorted(range(len(forwards)), key=keys.__getitem__)
        width = forwards[0].tokens.itemsize if forwards else 1
        self.common = [0] * len(self.order)
        self._starts = [forward.start for forward in forwards]
        self.forwards = list(forwards)
        for place in range(1, len(self.order)):
            before, number = self.order[place - 1], self.order[place]
            common = self.common[place] = _common_prefix(keys[before], keys[number]) // width
            own, other = forwards[number], forwards[before]
            # The neighbour has the same token after each position before the last of the common prefix.
            if other.start <= own.start < common - 1:
                self.forwards[number] = own._replace(start=common - 1)

    def restore(self, found: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What was found for the forwards first given, from what was found for `forwards` (along axis 0)."""
        whole = list(found)
        for before, number in zip(self.order, self.order[1:], strict=False):
            start, narrowed = self._starts[number], self.forwards[number].start
            if narrowed > start:
                offset = self._starts[before]
                shared = whole[before][start - offset : narrowed - offset]
                whole[number] = np.concatenate([shared, whole[number]])
        return whole


def _common_prefix(a: bytes, b: bytes) -> int:
    """How many leading bytes are equal."""
    n = min(len(a), len(b))
    differ = np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


def pack(
    forwards: Sequence[Forward], order: Sequence[int], common: Sequence[int], capacity: int
) -> Iterator[Row]:
    """The forwards in rows of at most `capacity` tokens, or of one sequence that is longer.

    `order` and `common` as in `SharedPrefixes`; with all of `common` zero, nothing is shared.
    """
    members: list[tuple[int, int]] = []
    used = 0
    for number, shared in zip(order, common, strict=True):
        new = len(forwards[number].tokens) - shared
        if members and used + new > capacity:
            yield _row(forwards, members)
            members, used = [], 0
        if not members:
            shared, new = 0, len(forwards[number].tokens)
        members.append((number, shared))
        used += new
    if members:
        yield _row(forwards, members)


def _row(forwards: Sequence[Forward], members: Sequence[tuple[int, int]]) -> Row:
    """The row of `members`, numbers of forwards each with how many tokens it shares with the one before."""
    tokens, positions, segments, picked, targets, counts = [], [], [], [], [], []
    path = np.empty(0, dtype=np.int64)
    used = 0
    for number, shared in members:
        forward = forwards[number]
        new = len(forward.tokens) - shared
        path = np.concatenate([path[:shared], np.arange(used, used + new)])
        used += new
        tokens.append(forward.tokens[shared:])
        positions.append(np.arange(shared, shared + new))
        segments.append((new, path))
        picked += [path[forward.start : -1], path[[-1] * len(forward.finals)]]
        targets += [forward.tokens[forward.start + 1 :], np.asarray(forward.finals)]
        counts.append(forward.inner + len(forward.finals))
    return Row(
        np.concatenate(tokens).astype(np.int64),
        np.concatenate(positions),
        segments,
        np.concatenate(picked),
        np.concatenate(targets).astype(np.int64),
        [number for number, _ in members],
        counts,
    )
