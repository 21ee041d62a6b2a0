"""Self-speculation with a model's further heads, which predict the tokens after the next one (Gloeckle et al.
2024, "Better & faster large language models via multi-token prediction", section 3.2).

Shapes: L tokens, S of them that a head reads, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stlm.generation.tokens import TokenGenerator
from stlm.model.cache import Cache
from stlm.model.inference import Inference
from stlm.model.transformer import Transformer
from stlm.techniques.multi_token import FurtherHeads
from stlm.tokens.tokenizer import Tokenizer


def ahead_drafts(model: Transformer) -> dict[str, int]:
    """The drafts of a model's further heads: `ahead-N`, with the heads for the tokens 2 to N after each."""
    heads = getattr(model, "ahead", None)
    return {} if heads is None else {f"ahead-{last}": last for last in range(2, heads.last + 1)}


class AheadSpeculator(TokenGenerator):
    """A :class:`~stlm.generation.speculation.Speculator` that drafts with a model's own further heads.

    At the last verified token the model itself says the next token, and heads 2 to `last` those after it, at
    most `last` - 1 of them. Each head has a cache of its own, and reads the trunk's stream of verification.
    """

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer, last: int) -> None:
        """`transformer` has further heads (`stlm.techniques.multi_token`), at least up to head `last`."""
        super().__init__(transformer, tokenizer)
        self._heads: FurtherHeads = transformer.ahead
        self._last = last
        # The heads' blocks as a model, in which head k has place k - 1. Place 0 is never passed.
        self._blocks = transformer.view()
        self._blocks.blocks = nn.ModuleList([transformer.blocks[0], *self._heads.blocks])
        self._blocks.value_embeddings = nn.ModuleList()
        self._blocks_in_c: Inference | None = None
        self._keys = Cache.of(self._blocks, 1, self._device)
        # Of the window's tokens: the trunk's stream and, in a chain, that of each head.
        width, context = transformer.config.width, transformer.config.context
        self._states = torch.zeros(last if self._heads.chained else 1, context, width, device=self._device)
        # How many of the window's tokens each head has read whose inputs no later token changes.
        self._held = [0] * (last + 1)
        self._drafted: list[int] = []  # given to `draft` since the last verification

    def restart(self, tokens: Sequence[int]) -> None:
        """See `TokenReader`."""
        super().restart(tokens)
        self._drafted.clear()
        self._blocks_in_c = None if self._inference is None else Inference.of(self._blocks)

    @torch.inference_mode()
    def draft(self, symbol: int) -> Tensor | None:
        """See `Speculator`. The n-th token drafted is that of head n + 1."""
        self._drafted.append(symbol)
        k = 1 + len(self._drafted)
        if k > self._last:
            return None
        begin, end = self._held[k], self._cache.length
        x_SD = self._states[k - 2 if self._heads.chained else 0, begin:end]
        if self._heads.chained:
            known = [*self._tokens[self._begin :], *self._drafted]
            tokens_1S = torch.tensor([known[begin + k - 1 : end + k - 1]], device=self._device)
            x_SD = self._heads.join(self.transformer, k, x_SD[None], tokens_1S)[0]
        x_SD = self._through(k, x_SD, begin, end)
        if self._heads.chained:
            self._states[k - 1, begin:end] = x_SD
        self._held[k] = min(end, self._settled(k, end + 1))
        if self._inference is not None:
            return self._inference.logits(x_SD[-1:].contiguous())[0]
        return self.transformer.head(self.transformer.finish(x_SD[-1:]))[0].float()

    def _through(self, k: int, x_SD: Tensor, begin: int, end: int) -> Tensor:
        """The stream after head k's block, of the window's tokens `begin` to `end` - 1."""
        if self._blocks_in_c is not None:
            x_SD = x_SD.clone()
            positions = range(begin, end)
            self._blocks_in_c.through(k - 1, k, x_SD, [0] * len(x_SD), positions, self._keys)
            return x_SD
        layout = self._keys.revisit(begin, end)
        return self._blocks.blocks[k - 1](x_SD[None], self.transformer.rope(layout), layout.layer(k - 1))[0]

    def _settled(self, k: int, known: int) -> int:
        """For how many of the window's tokens the first `known` of them decide what head k reads."""
        return max(0, known - k + 1) if self._heads.chained else known

    def verify(self, symbols: Sequence[int]) -> Tensor:
        """See `Speculator`."""
        self._drafted.clear()
        return self.read(symbols)

    def reject(self, count: int) -> None:
        """See `Speculator`."""
        self.forget(count)

    def forget(self, count: int) -> None:
        """See `TokenReader`."""
        super().forget(count)
        left = len(self._tokens) - self._begin
        self._held = [min(held, max(0, self._settled(k, left))) for k, held in enumerate(self._held)]

    def _pass(
        self, begin: int, end: int, last: int, cache: Cache | None, largest: int | None = None
    ) -> Tensor:
        """See `TokenGenerator._pass`; keeps the trunk's stream."""
        if cache is None:
            return super()._pass(begin, end, last, cache, largest)
        L, held, trunk = end - begin, cache.length, self._heads.trunk
        if not held:  # another window
            self._held = [0] * len(self._held)
        tokens, here, layout = self._tokens[begin:end], slice(held, held + L), cache.extend(L)
        if self._inference is not None:
            x_LD = torch.empty(L, self.transformer.config.width)
            positions, layers = range(held, held + L), len(self.transformer.blocks)
            self._inference.through(0, trunk, x_LD, tokens, positions, layout)
            self._states[0, here] = x_LD
            if trunk < layers:
                self._inference.through(trunk, layers, x_LD, tokens, positions, layout)
            return self._inference.logits(x_LD[L - last :])
        tokens_1L = torch.tensor([tokens], device=self._device)
        kept = self.transformer.residuals(tokens_1L, layout, after=[trunk - 1])
        self._states[0, here] = kept[0][0]
        return self.transformer.head(self.transformer.finish(kept[-1][0, L - last :])).float()
