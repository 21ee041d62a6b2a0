"""Output that no terminal refuses: a character that its encoding lacks becomes a look-alike, or an escape."""

from __future__ import annotations

import codecs
import sys

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
}


def tune_streams() -> None:
    """Let stdout and stderr take any text in the encoding that the user's locale gives them.

    A Latin-1 or ASCII terminal shows a minus as a hyphen and what it cannot show as \\u6c34; a byte of a
    file's name that is not UTF-8 is shown as \\xff, on every terminal. Without this, such text is an error.
    """
    codecs.register_error("stlm.readable", _readable)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # another program's stream may have no encoding
            stream.reconfigure(errors="stlm.readable")


def _readable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_shown, error.object[error.start : error.end])), error.end


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte of a name that it cannot decode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return _LOOK_ALIKES.get(character) or character.encode("ascii", "backslashreplace").decode()
