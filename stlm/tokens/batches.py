"""Batches for training and a fixed set of windows for validation, from memory-mapped token shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from stlm.errors import UserError, nearest
from stlm.tokens.config import DataConfig
from stlm.tokens.held_out import held_out, text_digest, text_ids
from stlm.tokens.order import Difficulty, Order
from stlm.tokens.shards import ComponentTokens, read_meta, read_split

# Number of rows after which the assignment of rows to the components of a mix repeats. It makes shares of up
# to four decimals exact.
_PERIOD = 10_000


class Batches:
    """Endless training batches with random access: functions of (seed, index) alone; resuming needs no state.

    Each component's stream is cut into chunks of `context` tokens (plus the next one, the last target). An
    epoch visits every chunk once, in an order drawn from the seed, the component and the epoch, or in another
    order of `config`. Components of a mix alternate: after any number of rows each of n is less than one row
    ahead of its share, and at most 1/2 + 1/3 + ... + 1/n rows behind. Shares are multiples of 1/10,000; a
    smaller share is an error.

    `rows` is the number of rows of the whole training; orders that depend on its length, and limits on
    repetition, need it. `difficulty` scores chunks if `config` orders by it, `selection` if it selects some.
    The first `skip` rows, which an earlier training run has read, are left out.
    """

    def __init__(
        self,
        folder: Path,
        context: int,
        batch_size: int,
        seed: int,
        config: DataConfig | None = None,
        rows: int | None = None,
        difficulty: Difficulty | None = None,
        skip: int = 0,
        selection: Difficulty | None = None,
    ) -> None:
        self.context, self.batch_size, self.seed, self.skip = context, batch_size, seed, skip
        self.config = config or DataConfig()
        corpus = read_split(folder, "train")
        self.components = _weighted(folder, corpus, self.config)
        for component in self.components:
            if component.n_tokens < context + 1:
                raise UserError(
                    f"{folder}: the train split of {component.name!r} has {component.n_tokens:,} tokens, "
                    f"fewer than one context ({context:,}) and its last target; choose a larger corpus or a "
                    "smaller model.context"
                )
        weights = [component.weight for component in self.components]
        self._turns, self._ranks, self._counts = _schedule(weights)
        # The first row of each component, if they follow one another.
        self._begins: np.ndarray | None = None
        if self.config.sequence:
            assert rows is not None, "data.sequence needs the number of rows"
            counts = _largest_remainder(weights, rows)
            self._begins = np.cumsum([0, *counts])
            if rows:  # 0: of a run of no steps
                self._check_read(folder, counts, rows)
        else:
            self._check_read(folder, self._counts, _PERIOD)
        self.shares = self._shares(rows)
        # The chunks of a component are drawn by its place in the corpus, so that runs which leave out other
        # components, or read them in another sequence, read the same chunks of it.
        places = {component.name: place for place, component in enumerate(corpus)}
        self._orders = [
            Order(
                component,
                places[component.name],
                context,
                seed,
                self.config,
                None if self.shares is None else self.shares[turn],
                self._unique_chunks(component.weight / sum(weights)),
                difficulty,
                selection,
            )
            for turn, component in enumerate(self.components)
        ]
        if self.shares is not None and self.config.max_epochs is not None:
            self._check_epochs(folder)

    def batch(self, step: int, micro: int = 0, accumulation: int = 1) -> np.ndarray:
        """int64 [batch_size, context + 1]: micro-batch `micro` of `accumulation` of `step`, both from 0."""
        out = np.empty((self.batch_size, self.context + 1), np.int64)
        for row, (component, start) in enumerate(self.sources(step, micro, accumulation)):
            component.read(start, out[row])
        return out

    def sources(self, step: int, micro: int = 0, accumulation: int = 1) -> list[tuple[ComponentTokens, int]]:
        """The source of each row of `batch`: a component, and the row's start in its token stream."""
        first = self.skip + (step * accumulation + micro) * self.batch_size
        found = []
        for slot in range(first, first + self.batch_size):
            turn, seen = self._turn(slot)
            found.append((self.components[turn], self._orders[turn].chunk(seen) * self.context))
        return found

    def _turn(self, slot: int) -> tuple[int, int]:
        """The component that a row belongs to, and how many rows it gave before."""
        if self._begins is not None:
            turn = min(int(np.searchsorted(self._begins, slot, side="right")), len(self.components)) - 1
            return turn, slot - int(self._begins[turn])
        period, place = divmod(slot, _PERIOD)
        turn = int(self._turns[place])
        return turn, period * int(self._counts[turn]) + int(self._ranks[place])

    def _shares(self, rows: int | None) -> list[int] | None:
        """The number of `rows` that each component gives."""
        if rows is None:
            return None
        if self._begins is not None:
            return np.diff(self._begins).tolist()
        periods, rest = divmod(rows, _PERIOD)
        counts = periods * self._counts + np.bincount(self._turns[:rest], minlength=len(self._counts))
        return counts.tolist()

    def _check_read(self, folder: Path, counts: np.ndarray, rows: int) -> None:
        """Reject a mix in which a component gives none of `rows`."""
        total = sum(component.weight for component in self.components)
        for component, count in zip(self.components, counts, strict=True):
            if not count:
                raise UserError(
                    f"{folder}: the share of {component.name!r} in the mix, {component.weight / total:.2g}, "
                    f"is none of {rows:,} rows: it would never be read; least possible share: "
                    f"{1 / rows:.2g}; raise its weight or leave it out"
                )

    def _unique_chunks(self, share: float) -> int | None:
        tokens = self.config.unique_tokens
        return None if tokens is None else max(1, round(tokens * share / self.context))

    def _check_epochs(self, folder: Path) -> None:
        """Reject training that repeats a component more often than `max_epochs`."""
        limit = self.config.max_epochs
        for component, order, rows in zip(self.components, self._orders, self.shares, strict=True):
            epochs = rows / order.chunks
            if epochs > limit:
                fit = int(sum(self.shares) * limit / epochs) * self.context
                raise UserError(
                    f"{folder}: {component.name!r} has {order.chunks * self.context:,} tokens to train on "
                    f"and would be repeated for {epochs:.2f} epochs, above data.max_epochs: {limit:g}; "
                    f"train on at most {fit:,} tokens (training.steps), lower its weight, or raise the limit "
                    f"to {math.ceil(epochs * 100) / 100:g}"
                )


def _weighted(folder: Path, components: list[ComponentTokens], config: DataConfig) -> list[ComponentTokens]:
    """The components to train on with their weights, in the sequence of `config` or else the mix."""
    by_name = {component.name: component for component in components}
    for name in (*config.weights, *config.sequence):
        if name not in by_name:
            raise UserError(f"{folder}: data names {name!r}, no component of it{nearest(name, by_name)}")
    if config.weights:
        by_name = {
            name: replace(component, weight=config.weights[name])
            for name, component in by_name.items()
            if name in config.weights
        }
    return [by_name[name] for name in config.sequence or by_name]


def _schedule(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each slot of a period its component and that component's earlier slots; each component's slots.

    Counts by largest remainder; slots by smooth weighted round robin: the component with the most credit is
    next. A component is ahead of its share by less than one slot, because the next one has credit, and at
    most 1/2 + ... + 1/n behind: let D(k) be the largest sum of k credits. A next component that is not among
    those k has the most credit, so D(k) <= k / (k + 1) (D(k + 1) + 1), from D(n) = 0 down to D(1).
    """
    counts = _largest_remainder(weights, _PERIOD)
    turns, ranks = np.zeros(_PERIOD, np.int64), np.zeros(_PERIOD, np.int64)
    credit, seen = np.zeros_like(counts), np.zeros_like(counts)
    for slot in range(_PERIOD):
        credit += counts
        turn = int(np.argmax(credit))
        credit[turn] -= _PERIOD
        turns[slot], ranks[slot] = turn, seen[turn]
        seen[turn] += 1
    return turns, ranks, counts


def _largest_remainder(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` divided into whole numbers in proportion to `weights`."""
    shares = np.array(weights) / np.sum(weights) * total
    counts = np.floor(shares + 1e-9).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts


class ValidationSet:
    """Windows over a fixed choice of validation documents; every token of their text is a target once.

    The documents follow one another as in training, each after an end-of-text token, and are read in windows
    of `context` tokens that do not overlap. Whole documents are drawn until they have `max_bytes` of text:
    the same ones for every tokenizer (`stlm.tokens.held_out`).

    `n_tokens`, `n_bytes`, `n_chars` count the text of these documents, over which the masked losses sum.
    """

    def __init__(self, folder: Path, context: int, max_bytes: int) -> None:
        self.context = context
        text = held_out(folder, "val", max_bytes)
        chosen = text.documents
        self.n_tokens = sum(len(document.tokens) - 1 for document in chosen)
        self.n_bytes = sum(document.n_bytes for document in chosen)
        self.n_chars = sum(document.n_chars for document in chosen)
        # The description of the text in train.json.
        self.record: dict[str, int | str] = {
            "documents": len(chosen),
            "documents_total": text.documents_total,
            "bytes": self.n_bytes,
            "bytes_total": text.bytes_total,
            "chars": self.n_chars,
            "tokens": self.n_tokens,
            "text_sha256": text_digest(text_ids(folder, chosen), text.components),
        }
        self._eot = read_meta(folder).eot
        # The end of text of the last document is not a target, and nothing follows it.
        stream = np.concatenate([[self._eot], *(document.tokens for document in chosen)])[:-1]
        windows = -(-(len(stream) - 1) // context)
        self._stream = np.full(windows * context + 1, self._eot, np.int64)
        self._stream[: len(stream)] = stream

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(x_BL, y_BL, mask_BL): inputs, targets (int64), whether each is text; the last B may be less."""
        x_NL = self._stream[:-1].reshape(-1, self.context)
        y_NL = self._stream[1:].reshape(-1, self.context)
        for start in range(0, len(x_NL), batch_size):
            rows = slice(start, start + batch_size)
            yield x_NL[rows], y_NL[rows], y_NL[rows] != self._eot
