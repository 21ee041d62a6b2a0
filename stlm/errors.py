"""Errors that the user can fix, and helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_COMPARED = 200  # characters of a word that are compared
_LISTED = 50  # choices that are listed


class UserError(Exception):
    """Bad input. The message names the file, key or flag, what was found and what was expected.

    The command line prints only the message, without a traceback, and exits with status 2.
    """


class Interrupted(Exception):
    """A signal stopped a stage after its work was saved. The message says how to continue.

    The command line prints only the message and exits with ``status``, 128 + the number of the signal, as
    shells do for a process that a signal ended.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


def shortened(text: str, longest: int = 80) -> str:
    """A text of the user for a message: only its beginning if it is longer than ``longest``."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint to append to an error: the choice most similar to ``word``, or all choices if none is similar.

    If there are many choices, the first ones are listed.
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(word[:_COMPARED], choices, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    if len(choices) > _LISTED:
        return f" (choices: {', '.join(choices[:_LISTED])} and {len(choices) - _LISTED} more)"
    return f" (choices: {', '.join(choices)})" if choices else ""
