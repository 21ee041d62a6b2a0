"""Output in any encoding, closed or without space: a character that the encoding lacks becomes a look-alike,
and what cannot be written is an error in a line."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress

from stlm.files import reason

_STREAMS = ("stdin", "stdout", "stderr")
_LOOK_ALIKES = {
    "−": "-",
    "–": "-",
    "—": "--",
    "…": "...",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "×": "x",
    "±": "+/-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "→": "->",
    "†": "+",
    "‡": "++",
    "§": "S",
}


def tune_streams() -> None:
    """Let stdout and stderr take any text in the encoding that the user's locale gives them.

    A Latin-1 or ASCII terminal shows a minus as a hyphen and what it cannot show as \\u6c34; a byte of a
    file's name that is not UTF-8 is shown as \\xff, on every terminal. Without this, such text is an error.

    Streams that the caller has closed become empty ones. Otherwise the next file that is opened takes the
    number of one, and what a library prints goes into it.
    """
    _open_closed()
    codecs.register_error("stlm.readable", _readable)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # another program's stream may have no encoding
            stream.reconfigure(errors="stlm.readable")


def _open_closed() -> None:
    """Give the streams that are closed, None in Python, a file that is empty and takes everything."""
    closed = [number for number, name in enumerate(_STREAMS) if getattr(sys, name) is None]
    for number in closed:  # all of them first: a file that is opened takes the lowest number that is free
        try:
            os.fstat(number)
        except OSError:
            _silence(number)
    for number in closed:
        stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, _STREAMS[number], stream)


def _silence(number: int) -> None:
    """Let a stream write to nowhere, so that Python's end finds nothing to complain of."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def tell(text: str) -> None:
    """Print a line to stderr; where that cannot be written, the exit status alone must tell."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        with suppress(OSError):
            _silence(sys.stderr.fileno())


def flush_output(status: int) -> int:
    """Write what is still to be written; the exit status, 2 where it was 0 and stdout takes no more.

    141, as shells give a process that SIGPIPE ended, where the reader of stdout, such as `head`, had enough.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):
            _silence(sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return status or 141
        tell(f"error: stdout: cannot write: {reason(error)}")
        status = status or 2
    try:
        sys.stderr.flush()
    except OSError:
        with suppress(OSError):
            _silence(sys.stderr.fileno())
    return status


def _readable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_shown, error.object[error.start : error.end])), error.end


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte of a name that it cannot decode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return _LOOK_ALIKES.get(character) or character.encode("ascii", "backslashreplace").decode()
