"""Sequences for the model: which positions need logits, and how sequences share the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Forward(NamedTuple):
    """One sequence for the model: its input, the first scored position, and the targets after its end.

    The targets of all positions but the last are the input itself, shifted; the last may have several.
    `answer`: the index of the token after which an answer begins, for models that read it; -1: none. For
    models that read prefixes it is the first scored position.
    """

    tokens: np.ndarray
    start: int
    finals: list[int]
    answer: int = -1

    @property
    def inner(self) -> int:
        """The number of scored positions without the last."""
        return len(self.tokens) - 1 - self.start


class Row(NamedTuple):
    """Sequences one after another in a row of n tokens, with common prefixes stored once: a trie.

    `positions` are the tokens' positions in their sequences. Each of `segments` is a sequence: its number of
    tokens that no earlier sequence has, and its path, the indices in the row of all of its tokens. Of the p
    log-probabilities to compute, number k is that of `targets[k]` after the row's token `picked[k]`; `counts`
    says how many of them belong to each of the forwards `numbers`. `answer`, in a row of one forward, is that
    forward's.
    """

    tokens: np.ndarray  # [n]
    positions: np.ndarray  # [n]
    segments: list[tuple[int, np.ndarray]]
    picked: np.ndarray  # [p]
    targets: np.ndarray  # [p]
    numbers: list[int]
    counts: list[int]
    answer: int = -1


def windows(tokens: np.ndarray, context: int, stride: int) -> Iterator[Forward]:
    """Overlapping windows over `tokens` that score each token but the first exactly once.

    Each window has at most `context` input tokens; all but the first overlap the previous window by
    `context - stride` tokens, which serve as context only.
    """
    end = 1  # the first token that is not scored yet
    begin = 0
    while end < len(tokens):
        stop = min(begin + context + 1, len(tokens))
        yield Forward(tokens[begin : stop - 1], end - 1 - begin, [int(tokens[stop - 1])])
        end = stop
        begin += stride


def by_length(items: Iterable[T], length: Callable[[T], int], tokens: int) -> Iterator[list[T]]:
    """Batches of at most so many tokens, padding included, or of one item; the longest items first."""
    ordered = sorted(items, key=length, reverse=True)
    begin = 0
    while begin < len(ordered):
        end = begin + max(1, tokens // length(ordered[begin]))
        yield ordered[begin:end]
        begin = end


class SharedPrefixes:
    """Sequences, ordered so that each shares its longest prefix with the one before it.

    `common[k]` is the length of that prefix. Positions that two sequences would score alike, such as the
    context of an item's options if whole strings are scored, are scored in the first only: `forwards` are the
    given ones without such positions, and `restore` copies the log-probabilities back. This matters, as the
    product with the vocabulary costs as much as one or several layers.
    """

    def __init__(self, forwards: Sequence[Forward]) -> None:
        # Bytes sort fast, and any order of fixed-width numbers will do.
        keys = [forward.tokens.tobytes() for forward in forwards]
        self.order = sorted(range(len(forwards)), key=keys.__getitem__)
        width = forwards[0].tokens.itemsize if forwards else 1
        self.common = [0] * len(self.order)
        self._starts = [forward.start for forward in forwards]
        self.forwards = list(forwards)
        for place in range(1, len(self.order)):
            before, number = self.order[place - 1], self.order[place]
            forward, neighbour = forwards[number], forwards[before]
            common = _common_prefix(keys[before], keys[number]) // width
            if forward.answer != neighbour.answer:
                # What follows the first of two answers' beginnings differs.
                common = min(common, *(one.answer for one in (forward, neighbour) if one.answer >= 0))
            self.common[place] = common
            # Before the last position of the common prefix, the neighbour's next token is the same.
            if neighbour.start <= forward.start < common - 1:
                self.forwards[number] = forward._replace(start=common - 1)

    def restore(self, found: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The results for the given forwards, from the results `found` for `forwards` (along axis 0)."""
        whole = list(found)
        for before, number in zip(self.order, self.order[1:], strict=False):
            start, narrowed = self._starts[number], self.forwards[number].start
            if narrowed > start:
                offset = self._starts[before]
                shared = whole[before][start - offset : narrowed - offset]
                whole[number] = np.concatenate([shared, whole[number]])
        return whole


def _common_prefix(a: bytes, b: bytes) -> int:
    """The number of equal leading bytes."""
    n = min(len(a), len(b))
    differ = np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


def pack(
    forwards: Sequence[Forward], order: Sequence[int], common: Sequence[int], capacity: int
) -> Iterator[Row]:
    """Pack the forwards into rows of at most `capacity` tokens; a longer sequence gets its own row.

    `order` and `common` are those of `SharedPrefixes`; if `common` is all zero, nothing is shared.
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
    """The row of `members`: numbers of forwards, each with the length of its prefix shared with the last."""
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
        forwards[members[0][0]].answer if len(members) == 1 else -1,
    )
