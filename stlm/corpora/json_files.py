"""Read JSON lines, and JSON files of one array or of consecutive values, element by element."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from stlm.corpora.errors import SourceError

_CHUNK = 1 << 20  # characters
_LARGEST = 1 << 28  # characters of one element
_SPACE = re.compile(r"[ \t\r\n]*")


def kind_of(value: Any) -> str:
    """The kind of a JSON value, for messages."""
    return "null" if value is None else type(value).__name__


def json_lines(text: TextIO, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its place ("line 3"). Empty lines are skipped."""
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; a file that is one array is called .json" if number == 1 and line[0] == "[" else ""
            raise SourceError(f"{name}: {place} is not JSON ({error}){hint}") from None
        yield place, _object(value, name, place)


def json_values(text: TextIO, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .json file, an array or consecutive values, each with its place.

    Memory holds one element and a megabyte, not the file.
    """
    reader = _Reader(text, name)
    if reader.peek() != "[":
        while reader.peek():
            yield reader.place, _object(reader.value(), name, reader.place)
            reader.number += 1
        return
    reader.skip()
    if reader.peek() == "]":
        return
    while True:
        yield reader.place, _object(reader.value(), name, reader.place)
        character = reader.peek()
        if character not in (",", "]"):
            found = f"found {character!r}" if character else "the file ends"
            raise SourceError(f"{name}: truncated or corrupt (expected , or ] after {reader.place}, {found})")
        reader.skip()
        reader.number += 1
        if character == "]":
            if reader.peek():
                raise SourceError(f"{name}: something follows the array: {reader.peek()!r}")
            return


def _object(value: Any, name: str, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{name}: {place}: expected an object, found {kind_of(value)}")
    return value


class _Reader:
    """Reads a text value by value."""

    def __init__(self, text: TextIO, name: str) -> None:
        self.text, self.name = text, name
        self.buffer, self.at, self.ended = "", 0, False
        self.number = 1

    @property
    def place(self) -> str:
        return f"element {self.number}"

    def _more(self) -> None:
        """Double the buffer, so that parsing a long element again costs at most twice its length."""
        chunk = self.text.read(max(_CHUNK, len(self.buffer) - self.at))
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0
        self.ended = not chunk

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            space = _SPACE.match(self.buffer, self.at)
            assert space is not None
            self.at = space.end()
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at : self.at + 1]
            self._more()

    def skip(self) -> None:
        self.at += 1

    def value(self) -> Any:
        """The next value. If the buffer ends within it, parsing is repeated with a larger buffer."""
        self.peek()
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.buffer, self.at)
                return value
            except json.JSONDecodeError as error:
                unfinished = "Unterminated string" in error.msg or error.pos >= len(self.buffer) - 16
                if self.ended and unfinished:
                    raise SourceError(
                        f"{self.name}: truncated or corrupt (the file ends within {self.place})"
                    ) from None
                if not unfinished or len(self.buffer) - self.at > _LARGEST:
                    raise SourceError(
                        f"{self.name}: {self.place} is not JSON ({error.msg} at "
                        f"{self.buffer[error.pos : error.pos + 20]!r})"
                    ) from None
                self._more()
            except RecursionError:
                raise SourceError(f"{self.name}: {self.place} is not JSON (nested too deeply)") from None


_DECODER = json.JSONDecoder()
