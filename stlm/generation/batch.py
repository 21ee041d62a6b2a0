"""Many texts at once: the prompts in one pass, then a token of each text in a pass.

Shapes: R rows in a pass, L their longest text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stlm.generation.sampling import Sampling, draw, most_probable, uniform
from stlm.generation.tokens import TokenGenerator, window_begin
from stlm.model.row_cache import RowCache


@dataclass(eq=False)
class Row:
    """A text that is being written: its prompt, tokens, window and random numbers."""

    place: int  # in the cache
    tokens: list[int]
    numbers: torch.Generator
    left: int  # tokens that are still wanted
    begin: int = 0
    dropped: int = 0
    drawn: list[int] = field(default_factory=list)


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
        active, new = rows, rows
        while active:
            logits_RV = torch.empty(len(rows), self._model.config.vocab_size, device=self._device)
            if new:
                logits_RV[[row.place for row in new]] = self._read(new, cache)
            if others := [row for row in active if row not in new]:
                logits_RV[[row.place for row in others]] = self._step(others, cache)
            symbols = self._choose(active, logits_RV[[row.place for row in active]])
            for row, symbol in zip(active, symbols, strict=True):
                row.left -= 1
                if symbol == eot:
                    row.left = 0
                else:
                    row.drawn.append(symbol)
                    row.tokens.append(symbol)
            active = [row for row in active if row.left]
            new = []
            for row in active:
                begin = window_begin(len(row.tokens), self._context)
                if begin != row.begin:
                    row.begin = begin
                    new.append(row)
        return rows

    @torch.inference_mode()
    def _read(self, rows: Sequence[Row], cache: RowCache) -> Tensor:
        """The logits [R, V] after each row's text, whose window is read from its beginning on."""
        windows = [row.tokens[row.begin :] for row in rows]
        L = max(map(len, windows))
        tokens_RL = torch.tensor([[*window, *[0] * (L - len(window))] for window in windows])
        last_R = torch.tensor([number * L + len(window) - 1 for number, window in enumerate(windows)])
        return self._logits(rows, cache, tokens_RL, [0] * len(rows), last_R)

    @torch.inference_mode()
    def _step(self, rows: Sequence[Row], cache: RowCache) -> Tensor:
        """The logits [R, V] after each row's text, of which the cache holds all but the last token."""
        tokens_R1 = torch.tensor([row.tokens[-1:] for row in rows])
        begins = [len(row.tokens) - 1 - row.begin for row in rows]
        return self._logits(rows, cache, tokens_R1, begins, torch.arange(len(rows)))

    def _logits(
        self, rows: Sequence[Row], cache: RowCache, tokens_RL: Tensor, begins: Sequence[int], last_R: Tensor
    ) -> Tensor:
        places_R = torch.tensor([row.place for row in rows], device=self._device)
        begin_R = torch.tensor(begins, device=self._device)
        layout = cache.extend(places_R, begin_R, tokens_RL.shape[1])
        x_RD = self._model.hidden(tokens_RL.to(self._device), layout, last_R.to(self._device))
        return self._model.head(x_RD).float()

    def _choose(self, rows: Sequence[Row], logits_RV: Tensor) -> Iterator[int]:
        """The next symbol of each row, drawn with the row's own random numbers."""
        if self._sampling.temperature == 0:
            return most_probable(logits_RV, lambda number: self._afresh(rows[number]))
        even_R1 = torch.stack([uniform((1,), row.numbers) for row in rows])
        return iter(draw(self._sampling.probabilities(logits_RV), even_R1).tolist())

    @torch.inference_mode()
    def _afresh(self, row: Row) -> Tensor:
        """See `TextGenerator.afresh`."""
        generator = TokenGenerator(self._model, self._tokenizer, cached=False)
        generator.restart(row.tokens)
        return generator.read([], last=1)[0]
