"""What generation sees of a language model: scores of the symbol that comes next, nothing else.

A model of another kind (byte-level, say) writes texts by the same code once it implements
:class:`TextGenerator`. V is the number of symbols.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TextGenerator(Protocol):
    """A model that continues one text at a time, symbol by symbol.

    A symbol is what the model draws at once: a token of its vocabulary; of a byte-level model, a byte or the
    end of a chunk.
    """

    @property
    def eot(self) -> int:
        """The symbol that ends a text."""
        ...

    @property
    def unit(self) -> str:
        """What `forgotten` counts, in the plural, for people."""
        ...

    @property
    def forgotten(self) -> int:
        """Symbols at the beginning of the text that the model sees no longer: its context is full."""
        ...

    def start(self, prompt: str) -> Tensor:
        """Begin a new text with `prompt`, which begins a document and may be empty.

        Returns the logits [V], float32, of the symbol after it. Raises UserError for a prompt that UTF-8
        cannot hold.
        """
        ...

    def next(self, symbol: int) -> Tensor:
        """Append a symbol other than `eot` to the text; the logits [V], float32, of the one after it."""
        ...

    def piece(self, symbol: int) -> bytes:
        """What a symbol other than `eot` adds to the text, in UTF-8; it may cut a character.

        Empty for a symbol that is no text, such as the end of a chunk; it does not count towards a length.
        """
        ...
