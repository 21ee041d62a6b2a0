"""The formats that text is read from, recognized by suffix in any case; each plain or compressed."""

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
_SAMPLED_FILES = 100  # files that are searched for lines `<|endoftext|>`


def known_suffix(path: Path) -> str | None:
    """The format that a file's suffix names, or None; a following compression suffix is ignored.

    "text", "jsonl", "json", "csv", "tsv", "parquet" or "arrow".
    """
    return SUFFIXES.get(os.path.splitext(split_compression(path.name)[0])[1].lower())


class BadValue(ValueError):
    """A row without the expected text; the message says what it has instead."""


@dataclass
class Tally:
    """What was found while files were read, for source.json and the user."""

    encodings: Counter[str] = field(default_factory=Counter)
    """Encoding -> number of files (text, JSON and CSV)."""
    undecoded: list[str] = field(default_factory=list)
    """Files whose encoding could not be detected."""
    empty: list[str] = field(default_factory=list)
    """Text files without text."""
    divided: int = 0
    """Number of rows that documents above 16 MB were divided into."""

    @property
    def converted(self) -> dict[str, int]:
        """Encoding -> number of files that were converted to UTF-8."""
        return {name: n for name, n in sorted(self.encodings.items()) if name not in (*UTF8, UNKNOWN)}


@dataclass(frozen=True)
class DataFile:
    """A file of a source: its local path, and its name in messages."""

    path: Path
    name: str
    kind: str
    """As ``known_suffix`` gives it."""

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> DataFile:
        """``path`` with its kind; `SourceError` for an unknown suffix, which lists the known ones."""
        # A link into a store of blobs (a hub's cache) has its suffix in the name at the source only.
        named = Path(name or path.name)
        kind = known_suffix(named)
        if kind is None:
            raise SourceError(
                f"{shown(str(named))}: unknown kind of file, suffix {named.suffix!r}; expected one of "
                f"{', '.join(SUFFIXES)}, plain or with {', '.join(COMPRESSIONS)} behind it"
            )
        return cls(path, shown(str(named)), kind)

    def documents(self, cut: Cut, tally: Tally) -> Iterator[tuple[str, bool]]:
        """The documents of a text file, and whether each is one of several rows of a long document."""
        encoding = self._encoding(tally)
        with damage(self.name), open_text(self.path, encoding, newline=None) as text:
            yield from documents_of(text, cut)

    def rows(self, columns: Sequence[str], tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a JSON, CSV, parquet or Arrow file, with ``columns``, each with its place ("line 3").

        A column is a name or a path `a.b`; for a path the row has its first part.
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
    """The value of a column, or at a path `a.b` into objects; None if an object on it is null."""
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
    """A text or None. Bytes need not be UTF-8: they are kept, like those of a text file."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    if value is None or isinstance(value, str):
        return value
    raise BadValue(f"{name}: expected a text, found {kind_of(value)}")


def default_cut(files: Sequence[DataFile]) -> tuple[Cut, str]:
    """How text files are cut by default, and the reason in words."""
    for file in files[:_SAMPLED_FILES]:
        with damage(file.name), open_text(file.path, detect_encoding(file.path), newline=None) as text:
            if has_end_of_text(text):
                return Cut(separator=END_OF_TEXT), f"{file.name} has lines <|endoftext|>"
    return Cut(documents="file"), "a file is a document unless the entry says otherwise"


def iter_documents(
    path: Path, *, text: str = "text", documents: str | None = None, separator: str = ""
) -> Iterator[str]:
    """The documents of one file, as in `stlm fetch`: parts of a text file, or the column ``text``.

    ``documents`` is "file", "line" or "paragraph"; ``separator`` a regular expression. Without either, a text
    file is cut at lines `<|endoftext|>` if it has any, otherwise it is one document. Rows without text are
    skipped. Raises `SourceError`, a `UserError`, which names the file and the place.
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
