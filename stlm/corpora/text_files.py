"""Cut text files into documents: a file, a line, a paragraph, or the text between separators.

A text is processed as *fragments*, strings of at most a few megabytes, with None at the end of a document:
memory is bounded for any length of a line, a document or a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TextIO

MAX_DOCUMENT = 16 << 20  # bytes of UTF-8; a longer document becomes several rows
END_OF_TEXT = r"^[ \t]*<\|endoftext\|>[ \t]*$"  # on a separate line, as in TinyStories' files

_FRAGMENT = 1 << 20  # characters
_LONGEST_SEPARATOR = 1 << 16  # characters

Documents = Literal["file", "line", "paragraph"]


@dataclass(frozen=True)
class Cut:
    """How text files become documents. One of `documents`, `separator`, or `starts` and `lines` is set."""

    documents: Documents | None = None
    separator: str = ""
    starts: str = ""
    lines: int = 0

    @property
    def pieces(self) -> bool:
        """Whether the documents are parts of a file that belong together."""
        return self.documents in ("line", "paragraph") or self.lines > 0

    @property
    def name(self) -> str:
        """The way of cutting, as recorded in source.json."""
        if self.separator or self.starts:
            return "separator" if self.separator else "starts"
        return "lines" if self.lines else self.documents or "file"


def documents_of(text: TextIO, cut: Cut) -> Iterator[tuple[str, bool]]:
    """The documents of a text file, and whether each is one of several rows of a document above 16 MB.

    Empty lines at both ends of a document are removed, and documents of white space are skipped; with
    `starts` and `lines` every line is kept.
    """
    if cut.starts or cut.lines:
        yield from assembled(group_lines(_lines(text), cut.starts, cut.lines))
        return
    if cut.separator:
        fragments = _separated(iter(lambda: text.read(_FRAGMENT), ""), cut.separator)
    elif cut.documents in ("line", "paragraph"):
        fragments = _each_line(_lines(text)) if cut.documents == "line" else _paragraphs(_lines(text))
    else:
        fragments = iter(lambda: text.read(_FRAGMENT), "")
    for document, divided in assembled(fragments):
        if document.strip():
            yield document.strip("\n"), divided


def _lines(text: TextIO) -> Iterator[str]:
    """Lines with their line ends; a line above 1 M characters comes in fragments."""
    return iter(lambda: text.readline(_FRAGMENT), "")


def group_lines(lines: Iterable[str], starts: str, count: int) -> Iterator[str | None]:
    """Lines as documents: one begins where a line matches ``starts``, or after every ``count`` lines."""
    pattern = re.compile(starts) if starts else None
    whole = 0  # lines of the document so far
    at_start = True
    for line in lines:
        if at_start:
            begins = pattern is not None and pattern.match(line.removesuffix("\n"))
            if whole and (begins or (count and whole >= count)):
                yield None
                whole = 0
            whole += 1
        yield line
        at_start = line.endswith("\n")


def _each_line(lines: Iterable[str]) -> Iterator[str | None]:
    for line in lines:
        yield line
        if line.endswith("\n"):
            yield None


def _paragraphs(lines: Iterable[str]) -> Iterator[str | None]:
    at_start = True
    for line in lines:
        yield None if at_start and not line.strip() else line
        at_start = line.endswith("\n")


def _separated(chunks: Iterable[str], separator: str) -> Iterator[str | None]:
    """The text between matches of ``separator``, which may span lines (up to 65,536 characters)."""
    pattern = re.compile(separator, re.MULTILINE)
    text, begin, scan = "", 0, 0  # `begin`: of the text not yet yielded; `scan`: where the next search starts
    for chunk, last in _with_last(chunks):
        text += chunk
        # A match that ends near the end of the text read so far may continue in the next chunk.
        sure = len(text) if last else max(len(text) - _LONGEST_SEPARATOR, 0)
        match = pattern.search(text, scan)
        while match and (match.end() <= sure or match.end() - match.start() >= _LONGEST_SEPARATOR):
            yield text[begin : match.start()]
            yield None
            begin = match.end()
            scan = begin + (
                match.start() == match.end()
            )  # after an empty match, as of `(?=Chapter)`, search from the next character
            match = pattern.search(text, scan) if scan <= len(text) else None
        until = max(min(match.start() if match else sure, sure), begin)
        yield text[begin:until]
        # Some earlier text is kept for patterns that look back, such as `^`.
        kept = max(until - 1024, 0)
        text, begin, scan = text[kept:], until - kept, max(scan, until) - kept


def _with_last(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The chunks, and a final empty one that is marked as the last."""
    for chunk in chunks:
        yield chunk, False
    yield "", True


def assembled(fragments: Iterable[str | None]) -> Iterator[tuple[str, bool]]:
    """Documents from fragments, without the last line end; above 16 MB as several rows (with True)."""
    parts: list[str] = []
    size, divided = 0, False
    for fragment in fragments:
        if fragment is None:
            if parts:
                yield "".join(parts).removesuffix("\n"), divided
            parts, size, divided = [], 0, False
        elif fragment:
            parts.append(fragment)
            size += len(fragment) if fragment.isascii() else len(fragment.encode("utf-8", "surrogatepass"))
            if size > MAX_DOCUMENT:
                *rows, rest = divided_text("".join(parts))
                yield from ((row, True) for row in rows)
                parts, divided = [rest] if rest else [], True
                size = len(rest.encode("utf-8", "surrogatepass"))
    if parts:
        yield "".join(parts).removesuffix("\n"), divided


def divided_text(text: str) -> list[str]:
    """``text`` in parts of at most 16 MB of UTF-8, cut at line ends, otherwise after a space.

    The line end at a cut is removed; everything else is kept.
    """
    if len(text) * 4 <= MAX_DOCUMENT:
        return [text]
    encoded = text.encode("utf-8", "surrogatepass")
    parts: list[str] = []
    begin = 0
    while len(encoded) - begin > MAX_DOCUMENT:
        end = begin + MAX_DOCUMENT
        line, space = encoded.rfind(b"\n", begin + 1, end), encoded.rfind(b" ", begin + 1, end)
        if line > begin + MAX_DOCUMENT // 2:
            end, following = line, line + 1
        elif space > begin + MAX_DOCUMENT // 2:
            end = following = space + 1
        else:
            while encoded[end] & 0xC0 == 0x80:  # within a character
                end -= 1
            following = end
        parts.append(encoded[begin:end].decode("utf-8", "surrogatepass"))
        begin = following
    return [*parts, encoded[begin:].decode("utf-8", "surrogatepass")]


def has_end_of_text(text: TextIO) -> bool:
    """Whether the first 1 M characters have a line `<|endoftext|>`."""
    return re.search(END_OF_TEXT, text.read(_FRAGMENT), re.MULTILINE) is not None
