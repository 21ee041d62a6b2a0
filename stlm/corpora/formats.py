"""The formats that text is read from, told by a file's suffix in any case; each plain or compressed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from stlm.corpora.compression import COMPRESSIONS, damage, split_compression
from stlm.corpora.csv_files import csv_rows
from stlm.corpora.encodings import UNKNOWN, UTF8, detect_encoding, open_text
from stlm.corpora.errors import SourceError, shown
from stlm.corpora.finding import find_files
from stlm.corpora.json_files import json_lines, json_values, kind_of
from stlm.corpora.tables import table_rows
from stlm.corpora.text_files import (
    END_OF_TEXT,
    Cut,
    Documents,
    documents_of,
    has_end_of_text,
)

__all__ = ["detect_encoding", "find_files", "iter_documents", "known_suffix"]

SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_SAMPLED_FILES = 100  # that are looked into for lines `<|endoftext|>`


def known_suffix(path: Path) -> str | None:
    """The format that a file's suffix names, or None; a suffix of a compression behind it is passed over.

    "text", "jsonl", "json", "csv", "tsv", "parquet" or "arrow".
    """
    return SUFFIXES.get(os.path.splitext(split_compression(path.name)[0])[1].lower())


class BadValue(ValueError):
    """A row that lacks a text where one is expected; the message says what it has."""


@dataclass
class Tally:
    """What was met while files were read, for source.json and the user."""

    encodings: Counter[str] = field(default_factory=Counter)
    """Encoding -> files with it, of text, JSON and CSV."""
    undecoded: list[str] = field(default_factory=list)
    """Files whose encoding could not be told."""
    empty: list[str] = field(default_factory=list)
    """Text files without text."""
    divided: int = 0
    """Rows that documents above 16 MB became."""

    @property
    def converted(self) -> dict[str, int]:
        """Encoding -> files that were converted to UTF-8."""
        return {name: n for name, n in sorted(self.encodings.items()) if name not in (*UTF8, UNKNOWN)}


@dataclass(frozen=True)
class DataFile:
    """A file of a source: where it lies, and its name in messages."""

    path: Path
    name: str
    kind: str
    """As ``known_suffix`` gives it."""

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> DataFile:
        """``path`` with its kind; `SourceError` for an unknown suffix, with those that are known."""
        # Of a link into a store of blobs (a hub's cache) the name at the source says what it is.
        said = Path(name or path.name)
        kind = known_suffix(said)
        if kind is None:
            raise SourceError(
                f"{shown(str(said))}: unknown kind of file, suffix {said.suffix!r}; expected one of "
                f"{', '.join(SUFFIXES)}, plain or with {', '.join(COMPRESSIONS)} behind it"
            )
        return cls(path, shown(str(said)), kind)

    def documents(self, cut: Cut, tally: Tally) -> Iterator[tuple[str, bool]]:
        """The documents of a text file, and whether each is one of several rows of a long document."""
        encoding = self._encoding(tally)
        with damage(self.name), open_text(self.path, encoding, newline=None) as text:
            yield from documents_of(text, cut)

    def rows(self, columns: Sequence[str], tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a file of JSON, CSV or columns, each with its place ("line 3"), with ``columns``.

        A column is a name or a path `a.b`; the row has what the path begins with.
        """
        if self.kind in ("parquet", "arrow"):
            yield from table_rows(self.path, self.kind, self.name, columns)
            return
        encoding = self._encoding(tally)
        with (
            damage(self.name),
            open_text(self.path, encoding, newline="\n" if "json" in self.kind else "") as text,
        ):
            if self.kind in ("csv", "tsv"):
                yield from csv_rows(text, self.name, self.kind, columns)
                return
            read = json_lines if self.kind == "jsonl" else json_values
            for place, row in read(text, self.name):
                for column in columns:
                    if column not in row and column.partition(".")[0] not in row:
                        found = ", ".join(row) or "none"
                        raise SourceError(f"{self.name}: {place}: no column {column!r}; found {found}")
                yield place, row

    def _encoding(self, tally: Tally) -> str:
        encoding = detect_encoding(self.path)
        tally.encodings[encoding] += 1
        if encoding == UNKNOWN:
            tally.undecoded.append(self.name)
        return encoding


def value_at(row: dict[str, Any], column: str) -> Any:
    """The value of a column, or at a path `a.b` into objects; null where an object on the way is null."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or part not in value:
            found = ", ".join(value) if isinstance(value, dict) else kind_of(value)
            raise BadValue(
                f"no column {column!r}: expected an object with {part!r}, found {found or 'an empty one'}"
            )
        value = value[part]
    return value


def text_of(value: Any, name: str) -> str | None:
    """A text or null. Bytes need not be UTF-8: they come through as those of a text file do."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    if value is None or isinstance(value, str):
        return value
    raise BadValue(f"{name}: expected a text, found {kind_of(value)}")


def default_cut(files: Sequence[DataFile]) -> tuple[Cut, str]:
    """How text files are cut where nothing says so, and why, in words."""
    for file in files[:_SAMPLED_FILES]:
        with damage(file.name), open_text(file.path, detect_encoding(file.path), newline=None) as text:
            if has_end_of_text(text):
                return Cut(separator=END_OF_TEXT), f"{file.name} has lines <|endoftext|>"
    return Cut(documents="file"), "a file is a document unless the entry says otherwise"


def iter_documents(
    path: Path, *, text: str = "text", documents: str | None = None, separator: str = ""
) -> Iterator[str]:
    """The documents of one file, as `stlm fetch` takes them: a text file cut, of others the column ``text``.

    ``documents`` is "file", "line" or "paragraph"; ``separator`` a regular expression. Without either, a text
    file is cut at lines `<|endoftext|>` if it has any, and else is one document. Rows without text (null) are
    passed over. Raises `SourceError`, a `UserError`, naming the file and the place.
    """
    file, tally = DataFile.of(path), Tally()
    if file.kind == "text":
        cut = Cut(documents=cast("Documents | None", documents), separator=separator)
        if not documents and not separator:
            cut, _ = default_cut([file])
        yield from (document for document, _ in file.documents(cut, tally))
        return
    for place, row in file.rows([text], tally):
        try:
            document = text_of(value_at(row, text), text)
        except BadValue as error:
            raise SourceError(f"{file.name}: {place}: {error}") from None
        if document is not None:
            yield document
