"""All that generation sees of a language model: scores of the next symbol.

The same code generates text with any model, such as a byte-level one, that implements :class:`TextGenerator`.
V is the number of symbols.
"""

from __future__ import annotations

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

    def next(self, symbol: int) -> Tensor:
        """Append a symbol other than `eot`; returns the logits [V], float32, of the next symbol."""
        ...

    def piece(self, symbol: int) -> bytes:
        """The UTF-8 bytes that a symbol other than `eot` adds to the text; they may end inside a character.

        Empty for a symbol without text, such as the end of a chunk, which does not count towards a length.
        """
        ...
