"""What evaluation sees of a language model: log-probabilities of given text, nothing else.

A model of another kind (byte-level, early-exit, from another library) is scored by the same code once it
implements :class:`LanguageModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

Progress = Callable[[int], object]


def no_progress(_: int) -> None:
    """Report progress to nobody."""


class Request(NamedTuple):
    """A text to score: log P(continuation | context); with `whole`, log P(context continuation).

    An empty context stands for the start of a document (the end-of-text token). The first token of a whole
    string is scored after it too; the others are conditioned on the string alone, as a continuation is.
    `item` numbers what the request is an option of; without, it is compared with no other.
    """

    context: str
    continuation: str
    whole: bool = False
    item: int | None = None


class Score(NamedTuple):
    """Log-probability in nats, the number of tokens it sums, and whether the context had to be cut.

    `greedy`, where asked for: whether each of these tokens is the most probable one at its place.
    """

    logprob: float
    n_tokens: int
    truncated: bool
    greedy: bool | None = None


class LanguageModel(Protocol):
    """Anything that can say how probable a text is.

    `precise` is the model itself, or the same in arithmetic fine enough to tell near ties apart.
    """

    @property
    def precise(self) -> LanguageModel: ...

    def loglikelihoods(
        self, requests: Sequence[Request], progress: Progress = no_progress, greedy: bool = False
    ) -> list[Score]:
        """One score a request, in order. `progress` is told how many more requests are done.

        What does not fit the model is cut from the left. Of the `whole` requests of an item, all lose as many
        tokens as the longest must, so that their sums stay comparable.
        """
        ...

    def document_loglikelihoods(
        self, documents: Sequence[Sequence[int]], stride: int | None = None, progress: Progress = no_progress
    ) -> list[float]:
        """Log-probability (nats) of every token of each document, its first after the end-of-text token.

        Documents longer than the model's context are read in windows that advance by `stride` tokens (None:
        half of the context); each token is scored once, in the first window that holds it. `progress` is
        told how many more windows are done.
        """
        ...
