"""A transformer over tokens that continues a text, with or without a cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from stlm.model.cache import Cache
from stlm.model.layout import CausalRows
from stlm.model.transformer import Transformer
from stlm.tokens.tokenizer import Tokenizer


class TokenGenerator:
    """A :class:`~stlm.generation.interface.TextGenerator` whose symbols are tokens.

    The text follows the end-of-text token, like a document in training. If it outgrows the context, the
    window moves on by half of the context: the model reads on from there, at positions from 0, as in the
    measurement of perplexity (`stlm.evaluation.forwards.windows`). With `cached`, keys and values are kept
    until the window moves; the tokens are the same without.
    """

    unit = "tokens"

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer, cached: bool = True) -> None:
        self.eot = tokenizer.eot
        self._transformer, self._tokenizer = transformer.eval(), tokenizer
        self._device = transformer.embedding.weight.device
        self._cache = Cache.of(transformer, 1, self._device) if cached else None
        self._reads_answers = getattr(transformer, "reads_answers", False)
        self._tokens: list[int] = []
        self._begin = 0  # the first of them in the window
        self._prompt_end = -1  # the last of a prompt, which the model answers

    @property
    def dropped(self) -> int:
        """See `TextGenerator`. The end of text before the first token does not count."""
        return max(0, self._begin - 1)

    def start(self, prompt: str) -> Tensor:
        """See `TextGenerator`."""
        self._tokens = [self.eot, *self._tokenizer.encode(prompt)]
        self._begin = 0
        self._prompt_end = len(self._tokens) - 1 if self._reads_answers and prompt else -1
        if self._cache is not None:
            self._cache.clear()
        return self._logits()

    def next(self, symbol: int) -> Tensor:
        """See `TextGenerator`."""
        self._tokens.append(symbol)
        return self._logits()

    def piece(self, symbol: int) -> bytes:
        """See `TextGenerator`."""
        return self._tokenizer.decode_bytes([symbol])

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        context, cache = self._transformer.config.context, self._cache
        begin = window_begin(len(self._tokens), context)
        if begin > self._begin and cache is not None:
            cache.clear()
        self._begin = begin
        read = begin + (cache.length if cache is not None else 0)
        tokens_BL = torch.tensor([self._tokens[read:]], device=self._device)
        L = tokens_BL.shape[1]
        answers_1 = None
        if self._prompt_end >= read:
            answers_1 = torch.tensor([self._prompt_end - read], device=self._device)
        layout = CausalRows(L, answers_1) if cache is None else cache.extend(L, answers_1)
        last_1 = torch.tensor([L - 1], device=self._device)
        return self._transformer.head(self._transformer.hidden(tokens_BL, layout, last_1))[0].float()


def window_begin(tokens: int, context: int) -> int:
    """The first of `tokens` that the model sees: the smallest multiple of half the context that fits."""
    stride = max(1, context // 2)
    return max(0, -(-(tokens - context) // stride)) * stride
