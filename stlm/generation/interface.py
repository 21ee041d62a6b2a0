"""All that generation sees of a language model: scores of the next symbol.

The same code generates text with any model, such as a byte-level one, that implements :class:`TextGenerator`.
V is the number of symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TextGenerator(Protocol):
    """A model that continues one text at a time, symbol by symbol.

    A symbol is the unit that the model draws: a token of its vocabulary or, for a byte-level model, a byte or
    the end of a chunk.
    """

    @property
    def eot(self) -> int:
        """The symbol that ends a text."""
        ...

    @property
    def unit(self) -> str:
        """The plural noun, shown to users, for what `dropped` counts."""
        ...

    @property
    def dropped(self) -> int:
        """Symbols at the beginning of the text that no longer fit the context."""
        ...

    def start(self, prompt: str) -> Tensor:
        """Begin a new text with `prompt`, which starts a document and may be empty.

        Returns the logits [V], float32, of the symbol after it. Raises UserError for a prompt that UTF-8
        cannot encode.
        """
        ...

    def next(self, symbol: int, largest: int | None = None) -> Tensor:
        """Append a symbol other than `eot`; returns the logits [V], float32, of the next symbol.

        `largest`: how many of the largest logits are used, and those equal to the last of them. The others
        need not be exact then, only smaller. None: all are used.
        """
        ...

    def afresh(self) -> Tensor:
        """The logits [V], float32, of the next symbol once more, from one pass over the window, uncached.

        They are the same to the bit whether the text was read symbol by symbol or several at once.
        """
        ...

    def piece(self, symbol: int) -> bytes:
        """The UTF-8 bytes that a symbol other than `eot` adds to the text; they may end inside a character.

        Empty for a symbol without text, such as the end of a chunk, which does not count towards a length.
        """
        ...


class TokenReader(TextGenerator, Protocol):
    """A `TextGenerator` over tokens that reads several at once and takes back the last ones: what speculative
    decoding (`stlm.generation.speculation`) needs of both models. It has a cache.
    """

    @property
    def tokens(self) -> Sequence[int]:
        """The text, prompt and the token that starts texts included."""
        ...

    @property
    def room(self) -> int:
        """How many more tokens the model can read before its window moves on."""
        ...

    def restart(self, tokens: Sequence[int]) -> None:
        """Begin a new text with `tokens`, which the next `read` reads first."""
        ...

    def read(self, symbols: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens, at most `room` (or one); returns the logits [N, V] after each of them.

        With `last`, after the last so many only; they may then be more.
        """
        ...

    def forget(self, count: int) -> None:
        """Remove the last `count` tokens of the text, which have been read."""
        ...

    def afresh(self, back: int = 0) -> Tensor:
        """As `TextGenerator.afresh`, of the text without its last `back` tokens."""
        ...

    def vocabulary(self) -> dict[int, bytes]:
        """The `piece` of every token but `eot`."""
        ...
