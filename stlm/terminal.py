"""Output to streams of any encoding, closed or full ones: a character that the encoding lacks becomes a
look-alike, and a failed write is an error of one line."""

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
    """Let stdout and stderr accept any text in the encoding of the user's locale.

    A Latin-1 or ASCII terminal shows a minus sign as a hyphen and unknown characters as \\u6c34; a byte of a
    file name that is not UTF-8 is shown as \\xff on every terminal. Without this, such text is an error.

    Streams that the caller has closed are replaced by empty ones. Otherwise the next file that is opened
    would get the number of a closed stream, and the output of libraries would go into it.
    """
    _open_closed()
    codecs.register_error("stlm.readable", _readable)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # another program's stream may have no encoding
            stream.reconfigure(errors="stlm.readable")


def _open_closed() -> None:
    """Replace closed streams (None in Python) by an empty file that accepts everything."""
    closed = [number for number, name in enumerate(_STREAMS) if getattr(sys, name) is None]
    for number in closed:  # all of them first: an opened file gets the lowest free number
        try:
            os.fstat(number)
        except OSError:
            _silence(number)
    for number in closed:
        stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, _STREAMS[number], stream)


def _silence(number: int) -> None:
    """Redirect a stream to nowhere, so that Python can flush it at exit without an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def tell(text: str) -> None:
    """Print a line to stderr; if that fails, only the exit status reports the error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        with suppress(OSError):
            _silence(sys.stderr.fileno())


def flush_output(status: int) -> int:
    """Flush the output; returns the exit status: 2 if it was 0 and stdout cannot be written.

    141, as in shells for a process that SIGPIPE ended, if the reader of stdout, such as `head`, has stopped.
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
    if "\udc80" <= character <= "\udcff":  # Python's representation of a byte that it cannot decode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return _LOOK_ALIKES.get(character) or character.encode("ascii", "backslashreplace").decode()
