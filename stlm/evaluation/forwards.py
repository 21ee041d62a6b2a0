"""Sequences to run through a model, and which of their positions need logits."""

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
    """Scores the positions that forwards have in common, such as the context of an item's options, once.

    `forwards` are those given, without the positions that another one scores; `restore` puts these back.
    Logits at few positions matter: a vocabulary's product costs as much as a layer or several.
    """

    def __init__(self, forwards: Sequence[Forward]) -> None:
        # In this order a forward shares its longest prefix with a neighbour; bytes sort fast.
        self._order = sorted(range(len(forwards)), key=lambda i: forwards[i].tokens.tobytes())
        self._starts = [forward.start for forward in forwards]
        self.forwards = list(forwards)
        for before, number in zip(self._order, self._order[1:], strict=False):
            own, other = forwards[number], forwards[before]
            # The neighbour has the same token after each position before the last of the common prefix.
            common = common_prefix(own.tokens, other.tokens) - 1
            if other.start <= own.start < common:
                self.forwards[number] = own._replace(start=common)

    def restore(self, logprobs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The log-probabilities of the forwards first given, from those of `forwards`."""
        whole = list(logprobs)
        for before, number in zip(self._order, self._order[1:], strict=False):
            start, narrowed = self._starts[number], self.forwards[number].start
            if narrowed > start:
                offset = self._starts[before]
                shared = whole[before][start - offset : narrowed - offset]
                whole[number] = np.concatenate([shared, whole[number]])
        return whole


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements are equal."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n
