"""Batches for training and a fixed set of windows for validation, from memory-mapped token shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from stlm.errors import UserError
from stlm.tokens.shards import ComponentTokens, Document, read_meta, read_split

# Slots after which the assignment of a batch's rows to the components of a mix repeats.
# Weights of up to four decimals are met exactly.
_PERIOD = 10_000


class Batches:
    """Endless training batches by random access: functions of (seed, index) alone; a resume needs no state.

    Each component's stream is cut into chunks of `context` tokens (plus the next one, the last target). An
    epoch visits every chunk once, in an order drawn from the seed, the component and the epoch. Components of
    a mix take turns so that after any number of rows each is within one row of its weight's share.
    """

    def __init__(self, folder: Path, context: int, batch_size: int, seed: int) -> None:
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.components = read_split(folder, "train")
        for component in self.components:
            if component.n_tokens < context + 1:
                raise UserError(
                    f"{folder}: the train split of {component.name!r} has {component.n_tokens:,} tokens, "
                    f"fewer than one context ({context:,}) and its last target; choose a larger corpus or a "
                    "smaller model.context"
                )
        self._turns, self._ranks, self._counts = _schedule([c.weight for c in self.components])
        self._order = lru_cache(maxsize=2 * len(self.components))(self._draw_order)

    def batch(self, step: int, micro: int = 0, accumulation: int = 1) -> np.ndarray:
        """int64 [batch_size, context + 1]: micro-batch `micro` of `accumulation` of `step`, both from 0."""
        out = np.empty((self.batch_size, self.context + 1), np.int64)
        for row, (component, start) in enumerate(self.sources(step, micro, accumulation)):
            component.read(start, out[row])
        return out

    def sources(self, step: int, micro: int = 0, accumulation: int = 1) -> list[tuple[ComponentTokens, int]]:
        """Where each row of `batch` comes from: a component, and where in its token stream the row begins."""
        first = (step * accumulation + micro) * self.batch_size
        found = []
        for slot in range(first, first + self.batch_size):
            period, place = divmod(slot, _PERIOD)
            turn = int(self._turns[place])
            component = self.components[turn]
            seen = period * int(self._counts[turn]) + int(self._ranks[place])
            epoch, index = divmod(seen, self._n_chunks(component))
            found.append((component, int(self._order(turn, epoch)[index]) * self.context))
        return found

    def _n_chunks(self, component: ComponentTokens) -> int:
        return (component.n_tokens - 1) // self.context

    def _draw_order(self, turn: int, epoch: int) -> np.ndarray:
        """The order of a component's chunks in an epoch; 4 bytes a chunk are all that is held in memory."""
        chunks = np.arange(self._n_chunks(self.components[turn]), dtype=np.uint32)
        np.random.default_rng((self.seed, turn, epoch)).shuffle(chunks)
        return chunks


def _schedule(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whose turn each slot of a period is, how often it was before, and each component's turns a period.

    Counts by largest remainder; turns by smooth weighted round robin, which keeps every prefix of the
    period within one turn of the exact shares.
    """
    shares = np.array(weights) / np.sum(weights) * _PERIOD
    counts = np.floor(shares + 1e-9).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: _PERIOD - counts.sum()]] += 1
    turns, ranks = np.zeros(_PERIOD, np.int64), np.zeros(_PERIOD, np.int64)
    credit, seen = np.zeros_like(counts), np.zeros_like(counts)
    for slot in range(_PERIOD):
        credit += counts
        turn = int(np.argmax(credit))
        credit[turn] -= _PERIOD
        turns[slot], ranks[slot] = turn, seen[turn]
        seen[turn] += 1
    return turns, ranks, counts


class ValidationSet:
    """Windows over a fixed choice of validation documents, every token of their text a target exactly once.

    The documents stand one after the other as in training, the end-of-text token before each, and are read
    in windows of `context` tokens that do not overlap. Each component of a mix gives its share of
    `max_tokens` in whole documents (at least one), the first in the order of a hash of their tokens, so that
    the choice hardly changes when documents are added.

    `n_tokens`, `n_bytes`, `n_chars` count the text of these documents: what the masked losses sum over.
    """

    def __init__(self, folder: Path, context: int, max_tokens: int) -> None:
        self.context = context
        components = read_split(folder, "val")
        total = sum(component.weight for component in components)
        chosen = [
            document
            for component in components
            for document in _choose(component, max_tokens * component.weight / total)
        ]
        self.n_tokens = sum(len(document.tokens) - 1 for document in chosen)
        self.n_bytes = sum(document.n_bytes for document in chosen)
        self.n_chars = sum(document.n_chars for document in chosen)
        self._eot = read_meta(folder).eot
        # The last document's end of text is no target, and nothing follows it.
        stream = np.concatenate([[self._eot], *(document.tokens for document in chosen)])[:-1]
        windows = -(-(len(stream) - 1) // context)
        self._stream = np.full(windows * context + 1, self._eot, np.int64)
        self._stream[: len(stream)] = stream

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(x_BL, y_BL, mask_BL): inputs, targets (int64), which targets are text; the last B may be less."""
        x_NL = self._stream[:-1].reshape(-1, self.context)
        y_NL = self._stream[1:].reshape(-1, self.context)
        for start in range(0, len(x_NL), batch_size):
            rows = slice(start, start + batch_size)
            yield x_NL[rows], y_NL[rows], y_NL[rows] != self._eot


def _choose(component: ComponentTokens, max_tokens: float) -> list[Document]:
    """The first documents in hash order that together have `max_tokens` tokens; at least one."""

    def place(document: Document) -> bytes:
        return hashlib.blake2b(document.tokens.tobytes(), digest_size=16).digest()

    chosen, tokens = [], 0
    for document in sorted(component, key=place):
        chosen.append(document)
        tokens += len(document.tokens)
        if tokens >= max_tokens:
            break
    return chosen
