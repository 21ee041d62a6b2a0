"""Many texts at once: the prompts in one pass, then a token of each text in a pass.

Shapes: R rows in a pass, N tokens in a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stlm.generation.sampling import Sampling, most_probable, uniform
from stlm.generation.tokens import TokenGenerator, window_begin
from stlm.model.inference import Inference
from stlm.model.row_cache import RowCache

# The most tokens in a pass over prompts, unless one prompt alone has more: it bounds the memory.
_MOST_TOKENS = 8192


@dataclass(eq=False)
class Row:
    """A text that is being written: its prompt, tokens, window and random numbers."""

    place: int  # in the cache
    tokens: list[int]
    numbers: torch.Generator
    left: int  # tokens that are still wanted
    begin: int = 0  # the first token of the window
    held: int = 0  # tokens of the window that the cache holds
    dropped: int = 0
    drawn: list[int] = field(default_factory=list)

    @property
    def unread(self) -> list[int]:
        """The tokens of the window that the cache does not hold."""
        return self.tokens[self.begin + self.held :]


class Batch:
    """Draws texts by the model of a `TokenGenerator`; each is the one that the generator draws alone.

    Where texts outgrow the context their windows move on, each at its own time, as in `TokenGenerator`.
    """

    def __init__(self, generator: TokenGenerator, sampling: Sampling) -> None:
        self._model, self._tokenizer, self._sampling = generator.transformer, generator.tokenizer, sampling
        self._context = generator.transformer.config.context
        self._device = generator.transformer.embedding.weight.device

    def write(self, prompts: Sequence[str], seeds: Sequence[int], length: int) -> list[Row]:
        """Texts of at most `length` tokens for prompts and their seeds; raises UserError as `start` does."""
        eot = self._tokenizer.eot
        rows = [
            Row(place, [eot, *self._tokenizer.encode(prompt)], torch.Generator().manual_seed(seed), length)
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        cache = RowCache(self._model.config, len(rows), self._device)
        for row in rows:
            row.begin = window_begin(len(row.tokens), self._context)
            row.dropped = max(0, row.begin - 1)
        inference, active = Inference.of(self._model), rows
        while active:
            logits_RV = torch.cat([self._read(some, cache, inference) for some in self._passes(active)])
            symbols = self._choose(active, logits_RV)
            for row, symbol in zip(active, symbols, strict=True):
                row.held = len(row.tokens) - row.begin
                row.left -= 1
                if symbol == eot:
                    row.left = 0
                else:
                    row.drawn.append(symbol)
                    row.tokens.append(symbol)
            active = [row for row in active if row.left]
            for row in active:
                begin = window_begin(len(row.tokens), self._context)
                if begin != row.begin:
                    row.begin, row.held = begin, 0
        return rows

    def _passes(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """The rows in groups that are read at once: in order, with at most `_MOST_TOKENS` new tokens."""
        group, tokens = [], 0
        for row in rows:
            if group and tokens + len(row.unread) > _MOST_TOKENS:
                yield group
                group, tokens = [], 0
            group.append(row)
            tokens += len(row.unread)
        yield group

    @torch.inference_mode()
    def _read(self, rows: Sequence[Row], cache: RowCache, inference: Inference | None) -> Tensor:
        """The logits [R, V] after each row's text; reads what the cache does not hold of it."""
        if inference is not None:
            return self._pass_in_c(rows, cache, inference)
        new = [row for row in rows if not row.held]
        others = [row for row in rows if row.held]
        logits_RV = torch.empty(len(rows), self._model.config.vocab_size, device=self._device)
        for some, read in ((new, self._begin), (others, self._step)):
            if some:
                logits_RV[[place for place, row in enumerate(rows) if row in some]] = read(some, cache)
        return logits_RV

    def _pass_in_c(self, rows: Sequence[Row], cache: RowCache, inference: Inference) -> Tensor:
        tokens, places, positions, last = [], [], [], []
        for row in rows:
            unread = row.unread
            tokens += unread
            places += [row.place] * len(unread)
            positions += range(row.held, row.held + len(unread))
            last.append(len(tokens) - 1)
        return inference.read(tokens, places, positions, cache, last)

    def _begin(self, rows: Sequence[Row], cache: RowCache) -> Tensor:
        """The logits [R, V] after each row's text, of which the cache holds nothing yet."""
        lengths = [len(row.unread) for row in rows]
        layout = cache.begin([row.place for row in rows], lengths)
        tokens_1N = torch.tensor([[token for row in rows for token in row.unread]], device=self._device)
        last_R = torch.tensor(lengths, device=self._device).cumsum(0) - 1
        return self._model.head(self._model.hidden(tokens_1N, layout, last_R)).float()

    def _step(self, rows: Sequence[Row], cache: RowCache) -> Tensor:
        """The logits [R, V] after each row's text, of which the cache holds all but the last token."""
        places_R = torch.tensor([row.place for row in rows], device=self._device)
        begin_R = torch.tensor([row.held for row in rows], device=self._device)
        layout = cache.extend(places_R, begin_R)
        tokens_R1 = torch.tensor([row.unread for row in rows], device=self._device)
        last_R = torch.arange(len(rows), device=self._device)
        return self._model.head(self._model.hidden(tokens_R1, layout, last_R)).float()

    def _choose(self, rows: Sequence[Row], logits_RV: Tensor) -> Iterator[int]:
        """The next symbol of each row, drawn with the row's own random numbers."""
        if self._sampling.temperature == 0:
            return most_probable(logits_RV, lambda number: self._afresh(rows[number]))
        even_R1 = torch.stack([uniform((1,), row.numbers) for row in rows])
        return iter(self._sampling.choose(logits_RV, even_R1).tolist())

    @torch.inference_mode()
    def _afresh(self, row: Row) -> Tensor:
        """See `TextGenerator.afresh`."""
        generator = TokenGenerator(self._model, self._tokenizer, cached=False)
        generator.restart(row.tokens)
        return generator.read([], last=1)[0]
