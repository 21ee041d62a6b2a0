"""Read CSV and TSV files row by row."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TextIO

from stlm.corpora.errors import SourceError

csv.field_size_limit(1 << 30)  # a field may hold a book


def csv_rows(
    text: TextIO, name: str, kind: str, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a file with a header: each row's place ("line 3", its last line) and its ``columns``.

    Fields are separated by commas, or by semicolons or tabs if only these give the header its columns; in a
    .tsv by tabs. Raises `SourceError` for columns that are missing or repeated, and for rows longer or
    shorter than the header.
    """
    first = text.readline()
    header, delimiter = _header(first, name, kind, columns)
    if header is None:
        return
    places = {column: header.index(column) for column in columns}
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(lines, None)
        except csv.Error as error:
            raise SourceError(
                f"{name}: truncated or corrupt, or not CSV (line {lines.line_num + 1}: {error})"
            ) from None
        if row is None:
            return
        if not row:
            continue
        place = f"line {lines.line_num + 1}"
        if len(row) != len(header):
            raise SourceError(f"{name}: {place}: {len(row)} fields, but the header has {len(header)}")
        yield place, {column: row[at] for column, at in places.items()}


def _header(first: str, name: str, kind: str, columns: Sequence[str]) -> tuple[list[str] | None, str]:
    """The names of the columns and the delimiter; None for an empty file."""
    delimiters = "\t" if kind == "tsv" else ",;\t"
    headers = {
        delimiter: next(csv.reader(io.StringIO(first), delimiter=delimiter), None) for delimiter in delimiters
    }
    chosen = delimiters[0]
    for delimiter, header in headers.items():
        if header is not None and all(column in header for column in columns):
            chosen = delimiter
            break
    header = headers[chosen]
    if header is None:
        return None, chosen
    count = Counter(header)
    for column in columns:
        if count[column] != 1:
            problem = f"no column {column!r}" if not count[column] else f"{count[column]} columns {column!r}"
            raise SourceError(f"{name}: {problem} in its header; found {', '.join(header)}")
    return header, chosen
