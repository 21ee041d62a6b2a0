"""The error of a source that fails, and file names as text."""

from __future__ import annotations

from stlm.errors import UserError


class SourceError(UserError):
    """A source cannot give what it is asked for; the next source is tried."""


def shown(name: str) -> str:
    r"""A file's name as text: bytes that are not UTF-8 (old zip archives) become `\xe9`."""
    return name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
