"""Models with a draft: some of their own blocks, or another model with the same tokens.

Shapes: L tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.generation.interface import TokenReader
from stlm.generation.tokens import TokenGenerator
from stlm.model.transformer import Transformer
from stlm.tokens.tokenizer import Tokenizer


class ExitSpeculator(TokenGenerator):
    """A :class:`~stlm.generation.speculation.Speculator` that drafts with a model's own first blocks, its
    norm and its head (LayerSkip, Elhoushi et al. 2024, section 4.3).

    The first blocks read each token once: their keys and values, in the one cache, and the residual stream
    after them are those of verification, which passes through the other blocks alone.
    """

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer, first: Transformer) -> None:
        """`first`: the model of the first blocks, whose weights are those of `transformer`."""
        super().__init__(transformer, tokenizer)
        self._first = first
        self._exits: list[Tensor] = []  # the residual stream [1, 1, D] of each token that the draft has read

    def restart(self, tokens: Sequence[int]) -> None:
        """See `TokenReader`."""
        super().restart(tokens)
        self._exits.clear()

    @torch.inference_mode()
    def draft(self, symbol: int) -> Tensor:
        """See `Speculator`."""
        self._exits.append(self._through_first([symbol]))
        if self._inference is not None:
            return self._inference.logits(self._exits[-1][0])[0]
        return self._first.head(self._first.finish(self._exits[-1]))[0, 0].float()

    @torch.inference_mode()
    def verify(self, symbols: Sequence[int]) -> Tensor:
        """See `Speculator`."""
        if not self._exits:
            return self.read(symbols)
        unread = symbols[len(self._exits) :]
        exits = [*self._exits, self._through_first(unread)] if unread else self._exits
        held = len(self._tokens) - self._begin
        layout = self._cache.revisit(held, held + len(symbols))
        block, x_1LD = len(self._first.blocks), torch.cat(exits, dim=1)
        self._tokens += symbols
        self._exits = []
        if self._inference is not None:
            positions = range(held, held + len(symbols))
            self._inference.through(block, len(self.transformer.blocks), x_1LD[0], symbols, positions, layout)
            return self._inference.logits(x_1LD[0])
        tokens_1L = torch.tensor([symbols], device=self._device)
        x_1LD = self.transformer.continued(x_1LD, tokens_1L, layout, block)
        return self.transformer.head(self.transformer.finish(x_1LD))[0].float()

    def reject(self, count: int) -> None:
        """See `Speculator`."""
        self.forget(count)

    def _through_first(self, symbols: Sequence[int]) -> Tensor:
        """The residual stream [1, L, D] of the next tokens after the first blocks."""
        begin, cache = self._cache.length, self._cache.extend(len(symbols))
        if self._inference is not None:
            x_1LD = torch.empty(1, len(symbols), self.transformer.config.width)
            positions = range(begin, begin + len(symbols))
            self._inference.through(0, len(self._first.blocks), x_1LD[0], symbols, positions, cache)
            return x_1LD
        tokens_1L = torch.tensor([symbols], device=self._device)
        return self._first.residuals(tokens_1L, cache)[-1]


class SiblingSpeculator:
    """A :class:`~stlm.generation.speculation.Speculator` that drafts with another model.

    The draft reads the tokens of the model's text, in a window of its own.
    """

    def __init__(self, model: TokenReader, sibling: TokenReader) -> None:
        """Raises UserError if the two models do not have the same tokens."""
        self._model, self._sibling = model, sibling
        # The last tokens of the text that the draft has not read.
        self._unread: list[int] = []
        # Rows of a published model beyond its tokens are never drawn.
        self._size = 1 + max(_shared_vocabulary(model, sibling), default=0)
        self._drafted = 0  # tokens that the draft has read since the last verification
        self.eot, self.unit = model.eot, model.unit

    @property
    def dropped(self) -> int:
        """See `TextGenerator`."""
        return self._model.dropped

    @property
    def room(self) -> int:
        """See `Speculator`."""
        return self._model.room

    def start(self, prompt: str) -> Tensor:
        """See `TextGenerator`."""
        logits_V = self._model.start(prompt)
        self._sibling.restart(self._model.tokens)
        self._unread, self._drafted = [], 0
        return logits_V[: self._size]

    def next(self, symbol: int, largest: int | None = None) -> Tensor:
        """See `TextGenerator`."""
        return self.verify([symbol])[0]

    def piece(self, symbol: int) -> bytes:
        """See `TextGenerator`."""
        return self._model.piece(symbol)

    def afresh(self, back: int = 0) -> Tensor:
        """See `Speculator`."""
        return self._model.afresh(back)[: self._size]

    def draft(self, symbol: int) -> Tensor:
        """See `Speculator`."""
        logits_V = self._sibling.read([*self._unread, symbol], last=1)[0]
        self._unread = []
        self._drafted += 1
        return logits_V[: self._size]

    def verify(self, symbols: Sequence[int]) -> Tensor:
        """See `Speculator`."""
        logits_LV = self._model.read(symbols)
        self._unread += symbols[self._drafted :]
        self._drafted = 0
        return logits_LV[:, : self._size]

    def reject(self, count: int) -> None:
        """See `Speculator`."""
        self._model.forget(count)
        unread = min(count, len(self._unread))
        del self._unread[len(self._unread) - unread :]
        self._sibling.forget(count - unread)


def _shared_vocabulary(model: TokenReader, sibling: TokenReader) -> set[int]:
    """The ids of all tokens. Raises UserError if they are not those of the same texts in both models."""
    ours, theirs = model.vocabulary(), sibling.vocabulary()
    if len(ours) != len(theirs):
        raise UserError(
            f"the tokenizers differ: the model's has {len(ours) + 1:,} tokens, the draft's "
            f"{len(theirs) + 1:,}; expected one tokenizer"
        )
    if model.eot != sibling.eot:
        raise UserError(
            f"the tokenizers differ: a text ends with token {model.eot} of the model, {sibling.eot} of the "
            "draft; expected one tokenizer"
        )
    for id_, piece in sorted(ours.items()):
        if theirs.get(id_) != piece:
            found = theirs[id_].decode(errors="replace") if id_ in theirs else None
            raise UserError(
                f"the tokenizers differ: token {id_} is {piece.decode(errors='replace')!r} of the model, "
                f"{found!r} of the draft; expected one tokenizer"
            )
    return {*ours, model.eot}
