"""What a user did or has that cannot work, said so that they can mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_COMPARED = 200  # characters of a word that are compared
_LISTED = 50  # choices that are listed


class UserError(Exception):
    """Bad input. The message names the file, key or flag, what was found and what was expected.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


class Interrupted(Exception):
    """A signal asked a stage to stop, and what it had done is saved. The message says how to go on.

    The command line prints the message alone and exits with ``status``, 128 + the signal's number, as shells
    give a process that a signal ended.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


def shortened(text: str, longest: int = 80) -> str:
    """A text of the user's as a message shows it: its beginning, where it is longer than ``longest``."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint to append to an error: the choice most like ``word``, or all of them where none is like it.

    Of many choices the first ones are listed.
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(word[:_COMPARED], choices, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    if len(choices) > _LISTED:
        return f" (choices: {', '.join(choices[:_LISTED])} and {len(choices) - _LISTED} more)"
    return f" (choices: {', '.join(choices)})" if choices else ""
