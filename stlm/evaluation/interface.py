"""All that evaluation sees of a language model: log-probabilities of given text.

The same code scores any model, for example a byte-level one or one from another library, that implements
:class:`LanguageModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

Progress = Callable[[int], object]


def no_progress(_: int) -> None:
    """Ignore the reported progress."""


class Request(NamedTuple):
    """A text to score: log P(continuation | context); with `whole`, log P(context continuation).

    An empty context is the beginning of a document (the end-of-text token). The first token of a whole string
    is scored after it, too; the others are conditioned on the string only, as in a continuation. `item` is
    the number of the item whose option this is; None: it is compared with no other request. `begins`: the
    context is the beginning of a document, and follows the end-of-text token.
    """

    context: str
    continuation: str
    whole: bool = False
    item: int | None = None
    begins: bool = False


class Score(NamedTuple):
    """Log-probability in nats, the number of tokens in its sum, and whether the context was truncated.

    `greedy`, if requested: whether each of these tokens is the most probable one at its position.
    """

    logprob: float
    n_tokens: int
    truncated: bool
    greedy: bool | None = None


class LanguageModel(Protocol):
    """Any model that can tell how probable a text is.

    `precise` is the model itself, or the same model in a precision that can tell near ties apart.
    """

    @property
    def precise(self) -> LanguageModel: ...

    def loglikelihoods(
        self, requests: Sequence[Request], progress: Progress = no_progress, greedy: bool = False
    ) -> list[Score]:
        """One score for each request, in order. `progress` gets the number of newly finished requests.

        Text that exceeds the context is truncated from the left. The `whole` requests of an item all lose as
        many tokens as the longest of them, so that their sums stay comparable.
        """
        ...

    def document_loglikelihoods(
        self, documents: Sequence[Sequence[int]], stride: int | None = None, progress: Progress = no_progress
    ) -> list[float]:
        """Log-probability (nats) of each document, with its first token after the end-of-text token.

        Documents longer than the context are read in windows that advance by `stride` tokens (None: half of
        the context); each token is scored once, in the first window that contains it. `progress` gets the
        number of newly finished windows.
        """
        ...
