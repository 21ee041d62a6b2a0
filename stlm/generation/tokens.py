"""A transformer over tokens that continues a text, with or without a cache of keys and values.

Shapes: L new tokens, N of them whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stlm.model.cache import Cache
from stlm.model.inference import Inference
from stlm.model.layout import CausalRows
from stlm.model.transformer import Transformer
from stlm.tokens.tokenizer import Tokenizer


class TokenGenerator:
    """A :class:`~stlm.generation.interface.TokenReader` for a transformer of ours.

    The text follows the end-of-text token, like a document in training. If it outgrows the context, the
    window moves on by half of the context: the model reads on from there, at positions from 0, as in the
    measurement of perplexity (`stlm.evaluation.forwards.windows`). With `cached`, keys and values are kept
    until the window moves; the tokens are the same without. With the cache, passes are in C where the model
    has such (`stlm.model.inference.why_not`).
    """

    unit = "tokens"

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer, cached: bool = True) -> None:
        self.eot = tokenizer.eot
        self.transformer, self.tokenizer = transformer.eval(), tokenizer
        self._device = transformer.embedding.weight.device
        self._cache = Cache.of(transformer, 1, self._device) if cached else None
        self._inference: Inference | None = None
        self._reads_prefixes = getattr(transformer, "reads_prefixes", False)
        self._reads_answers = getattr(transformer, "reads_answers", False) or self._reads_prefixes
        self._tokens: list[int] = []
        self._begin = 0  # the first of them in the window
        self._prompt_end = -1  # the last of a prompt, which the model answers

    @property
    def dropped(self) -> int:
        """See `TextGenerator`. The end of text before the first token does not count."""
        return max(0, self._begin - 1)

    def start(self, prompt: str) -> Tensor:
        """See `TextGenerator`."""
        self.restart([self.eot, *self.tokenizer.encode(prompt)])
        self._prompt_end = len(self._tokens) - 1 if self._reads_answers and prompt else -1
        return self._logits(1)[0]

    def next(self, symbol: int, largest: int | None = None) -> Tensor:
        """See `TextGenerator`."""
        self._tokens.append(symbol)
        return self._logits(1, largest)[0]

    @property
    def tokens(self) -> Sequence[int]:
        """See `TokenReader`."""
        return self._tokens

    @property
    def room(self) -> int:
        """See `TokenReader`."""
        context = self.transformer.config.context
        return context - len(self._tokens) + window_begin(len(self._tokens), context)

    def restart(self, tokens: Sequence[int]) -> None:
        """See `TokenReader`."""
        self._tokens, self._begin, self._prompt_end = list(tokens), 0, -1
        if self._cache is not None:
            self._cache.clear()
            self._inference = Inference.of(self.transformer, self._inference)

    def read(self, symbols: Sequence[int], last: int | None = None) -> Tensor:
        """See `TokenReader`."""
        self._tokens += symbols
        return self._logits(len(symbols) if last is None else last)

    def forget(self, count: int) -> None:
        """See `TokenReader`."""
        del self._tokens[len(self._tokens) - count :]
        if self._cache is not None:
            self._cache.crop(max(0, min(self._cache.length, len(self._tokens) - self._begin)))

    @torch.inference_mode()
    def afresh(self, back: int = 0) -> Tensor:
        """See `TokenReader`."""
        return self._pass(self._begin, len(self._tokens) - back, 1, None)[0]

    def vocabulary(self) -> dict[int, bytes]:
        """See `TokenReader`."""
        ids = range(self.tokenizer.vocab_size)
        return {id_: self.tokenizer.decode_bytes([id_]) for id_ in ids if id_ != self.eot}

    def piece(self, symbol: int) -> bytes:
        """See `TextGenerator`."""
        return self.tokenizer.decode_bytes([symbol])

    @torch.inference_mode()
    def _logits(self, last: int, largest: int | None = None) -> Tensor:
        """The logits [N, V] after each of the text's `last` N tokens; reads what the cache does not hold.

        `largest`: see `TextGenerator.next`.
        """
        cache = self._cache
        begin = window_begin(len(self._tokens), self.transformer.config.context)
        # It moves back where symbols are forgotten at which it had moved on.
        if begin != self._begin and cache is not None:
            cache.clear()
        self._begin = begin
        return self._pass(
            begin + (cache.length if cache is not None else 0), len(self._tokens), last, cache, largest
        )

    def _pass(
        self, begin: int, end: int, last: int, cache: Cache | None, largest: int | None = None
    ) -> Tensor:
        """The logits [N, V] after each of the `last` N of the text's tokens `begin` to `end` - 1.

        The cache holds those before; without one, the window begins at `begin`. `largest`: see
        `TextGenerator.next`.
        """
        L = end - begin
        tokens, vocabulary = self._tokens[begin:end], self.transformer.config.vocab_size
        # Passes in C read tokens of the vocabulary alone; they go on from a cache that torch has filled.
        if cache is not None and self._inference is not None and max(tokens) < vocabulary:
            positions, wanted = range(cache.length, cache.length + L), range(L - last, L)
            return self._inference.read(tokens, [0] * L, positions, cache.extend(L), wanted, largest)
        tokens_1L = torch.tensor([tokens], device=self._device)
        context, answers_1 = self.transformer.config.context, None
        last_read = last_answered(self._prompt_end, self._begin, context, self._reads_prefixes)
        if last_read >= begin:
            answers_1 = torch.tensor([last_read - begin], device=self._device)
        layout = CausalRows(L, answers_1) if cache is None else cache.extend(L, answers_1)
        last_N = torch.arange(L - last, L, device=self._device)
        return self.transformer.head(self.transformer.hidden(tokens_1L, layout, last_N)).float()


def window_begin(tokens: int, context: int) -> int:
    """The first of `tokens` that the model sees: the smallest multiple of half the context that fits."""
    stride = max(1, context // 2)
    return max(0, -(-(tokens - context) // stride)) * stride


def last_answered(prompt_end: int, begin: int, context: int, reads_prefixes: bool) -> int:
    """The last token of a text that a model answers in its window, which begins at token `begin`.

    `prompt_end`: the last token of the prompt; -1: there is none. If it is before the window, nothing is
    answered. A model that reads prefixes has in a window that has moved on all as its prefix that was there
    when it did, as in `stlm.evaluation.forwards.windows`.
    """
    if not reads_prefixes or begin == 0:
        return prompt_end
    return max(prompt_end, begin + context - max(1, context // 2))
