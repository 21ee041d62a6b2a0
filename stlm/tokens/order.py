"""The order in which training reads the chunks of a component: a function of seed, epoch and row alone.

A chunk is `context` tokens of a component's stream, numbered by its position. All orders start from the
shuffled one: the chunks that it reads in an epoch, or until training ends, are then sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from stlm.tokens.config import DataConfig
from stlm.tokens.shards import ComponentTokens

# Scores of chunks (low is easy), called once: (component, its number, chunks) -> float32.
Difficulty = Callable[[ComponentTokens, int, np.ndarray], np.ndarray]


class Order:
    """The chunk that each row of a component reads. Memory: a few bytes a chunk for any number of epochs.

    `rows` is the number of rows of the training; None (endless) works only for `shuffled` and `source`.
    """

    def __init__(
        self,
        component: ComponentTokens,
        number: int,
        context: int,
        seed: int,
        config: DataConfig,
        rows: int | None,
        unique_chunks: int | None = None,
        difficulty: Difficulty | None = None,
        selection: Difficulty | None = None,
    ) -> None:
        self.number, self.seed, self.config, self.rows = number, seed, config, rows
        self.chunks = (component.n_tokens - 1) // context
        self.part = self._part(component, unique_chunks, selection)
        if self.part is not None:
            self.chunks = len(self.part)
        self.scores: np.ndarray | None = None
        if config.order in ("length", "difficulty"):
            self.scores = self._score(component, context, difficulty)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        if config.pacing == "competence":
            self._sorted = self._epoch(0)

    def _part(
        self, component: ComponentTokens, unique: int | None, selection: Difficulty | None
    ) -> np.ndarray | None:
        """The chunks to train on, sorted, uint32; None: all. At most so many `unique` ones."""
        select, count = self.config.select, self.chunks if unique is None else min(unique, self.chunks)
        if select is not None:
            # No more are measured than what is kept of them is needed for.
            needed = count if self.rows is None else min(count, self.rows)
            count = min(self.chunks, math.ceil(needed / select.share))
        if count == self.chunks and select is None:
            return None
        # A prefix of one permutation: a larger part contains a smaller one.
        drawn = np.random.default_rng((self.seed, self.number, 1 << 32)).permutation(self.chunks)
        part = np.sort(drawn[:count]).astype(np.uint32)
        if select is None:
            return part
        assert selection is not None, "select needs scores"
        order = np.argsort(selection(component, self.number, part), kind="stable")
        kept = max(1, round(select.share * count))
        begin = {"low": 0, "middle": (count - kept) // 2, "high": count - kept}[select.kept_side]
        return np.sort(part[order[begin : begin + kept]])

    def chunk(self, row: int) -> int:
        """The chunk that the component's row `row`, from 0, reads."""
        if self.config.pacing == "competence":
            return int(self._sorted[self._drawn(row)])
        epoch, index = divmod(row, self.chunks)
        return int(self._epoch(epoch)[index])

    def _drawn(self, row: int) -> int:
        """A position in the sorted chunks, uniform over the first share c of them (Platanios et al., eq. 7).

        c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2)): t is the share of training done, T that where c is 1.
        """
        start, share = self.config.competence_start, self.config.competence_share
        done = row / self.rows
        competence = min(1.0, math.sqrt(done * (1 - start**2) / share + start**2))
        available = max(1, int(competence * len(self._sorted)))
        return int(np.random.default_rng((self.seed, self.number, 1 << 33, row)).integers(available))

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        order = self._shuffled(epoch)
        if self.config.order == "shuffled":
            return order
        order = np.sort(order)
        if self.scores is not None:
            keys = self.scores[order]
            order = order[np.argsort(-keys if self.config.direction == "hard_first" else keys, kind="stable")]
        return order

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The chunks of an epoch in random order, up to the end of training."""
        chunks = np.arange(self.chunks, dtype=np.uint32) if self.part is None else self.part.copy()
        np.random.default_rng((self.seed, self.number, epoch)).shuffle(chunks)
        if self.rows is None or self.config.order == "shuffled":
            return chunks
        return chunks[: max(1, min(self.chunks, self.rows - epoch * self.chunks))]

    def _score(self, component: ComponentTokens, context: int, difficulty: Difficulty | None) -> np.ndarray:
        """A score for each chunk; NaN for chunks that are not read."""
        read = np.sort(self._shuffled(0))
        if self.config.order == "length":
            return mean_lengths(component, context)
        assert difficulty is not None, "order: difficulty needs scores"
        scores = np.full((component.n_tokens - 1) // context, np.nan, np.float32)
        scores[read] = difficulty(component, self.number, read)
        return scores


def mean_lengths(component: ComponentTokens, context: int) -> np.ndarray:
    """The length of the document that a chunk's tokens belong to, averaged over its tokens; float32."""
    ends = np.concatenate(
        [shard.offsets[1:] + start for shard, start in zip(component.shards, component.starts, strict=False)]
    ).astype(np.float64)
    lengths = np.diff(ends, prepend=0.0)
    # The sum over the first n tokens of the lengths of their documents grows linearly within a document.
    places = np.arange((component.n_tokens - 1) // context + 1, dtype=np.float64) * context
    sums = np.interp(places, np.concatenate([[0.0], ends]), np.concatenate([[0.0], np.cumsum(lengths**2)]))
    return (np.diff(sums) / context).astype(np.float32)
