"""Convert the files of a source to parquet with the required columns.

Everything streams, in blocks of a few megabytes: memory does not grow with the files or with their documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.corpora.compression import damage, split_compression
from stlm.corpora.config import SPLITS, CorpusEntry
from stlm.corpora.errors import SourceError
from stlm.corpora.formats import BadValue, DataFile, Tally, text_of, value_at
from stlm.corpora.json_files import kind_of
from stlm.corpora.tables import (
    column_type,
    is_single,
    is_text,
    open_parquet,
    small_batches,
    table_batches,
    table_schema,
    top_level,
)
from stlm.corpora.text_files import Cut, assembled, divided_text, group_lines
from stlm.errors import nearest

BLOCK_ROWS = 16 * 1024
BLOCK_BYTES = 16 << 20  # text of a row group
FILE_BYTES = 1 << 30  # text of a parquet file
_LONG_ROW = 64 << 10  # bytes; a page has up to 1,024 rows
FILE = "file"  # the column that names the file of a piece


@dataclass(frozen=True)
class Layout:
    """Which columns of a source's files hold the documents, and which columns they are written to.

    A path into objects (`a.b`) gets a plain name. Where documents are pieces of files, the column `file` is
    added.
    """

    text: str
    group: str | None
    split: str | None
    join: tuple[str, ...]
    pieces: bool
    raw_text: str
    raw_group: str | None
    raw_split: str | None

    @classmethod
    def of(cls, entry: CorpusEntry, join: Sequence[str], pieces: bool) -> Layout:
        """The layout of ``entry``. With ``pieces``, and if the entry names no group, files are the groups."""
        by_file = pieces and entry.group is None
        taken = [FILE] if by_file else []
        names: list[str | None] = []
        for column, plain in ((entry.text, "text"), (entry.group, "group"), (entry.split, "split")):
            name = plain if column is not None and ("." in column or column in taken) else column
            while name is not None and name in taken:
                name += "_"
            names.append(name)
            taken += [name] if name is not None else []
        text, group, split = names
        assert text is not None
        group = FILE if by_file else group
        return cls(entry.text, entry.group, entry.split, tuple(join), pieces, text, group, split)

    @property
    def raw_columns(self) -> tuple[str, ...]:
        """The columns of the raw files that later stages read."""
        return tuple(name for name in (self.raw_text, self.raw_group, self.raw_split) if name)

    @property
    def source_columns(self) -> tuple[str, ...]:
        """The columns (or paths) that rows of the source must have; for `join`, the columns alone."""
        texts = [name.partition(".")[0] for name in self.join] or [self.text]
        return tuple(dict.fromkeys([*texts, *(name for name in (self.group, self.split) if name)]))

    @property
    def renamed(self) -> bool:
        """Whether the raw columns differ from the source's."""
        return self.pieces or (self.raw_text, self.raw_group, self.raw_split) != (
            self.text,
            self.group,
            self.split,
        )


class Divided(Exception):
    """A document above 16 MB became several rows, which need the column `file`."""


def is_taken_as_is(file: DataFile, layout: Layout, cut: Cut) -> bool:
    """Whether a file is parquet with the columns as they are, and can be read a few megabytes at a time."""
    plain = file.kind == "parquet" and not split_compression(file.name)[1]
    changed = layout.join or cut.starts or cut.lines or layout.renamed
    return plain and not changed and not _has_long_rows(file)


def _has_long_rows(file: DataFile) -> bool:
    """Whether rows are so long that a page of them, which is read whole, has hundreds of megabytes."""
    with damage(file.name):
        metadata = open_parquet(file.path).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return sum(sizes) > _LONG_ROW * metadata.num_rows


@dataclass(frozen=True)
class _Document:
    text: str | None
    group: str | None = None
    split: str | None = None


def _documents(file: DataFile, layout: Layout, cut: Cut, tally: Tally) -> Iterator[_Document]:
    """The documents of one file."""
    if file.kind == "text":
        for column in (layout.group, layout.split):
            if column is not None:
                raise SourceError(f"{file.name}: no column {column!r}: a text file has no columns")
        found = 0
        for text, divided in file.documents(cut, tally):
            found += 1
            if divided:
                _count_divided(layout, tally)
            yield _Document(text, file.name if layout.pieces else None)
        tally.empty += [] if found else [file.name]
    elif cut.starts or cut.lines:
        lines = _each(file, layout, tally, lambda row: _line(value_at(row, layout.text), layout.text) + "\n")
        for text, divided in assembled(group_lines(lines, cut.starts, cut.lines)):
            if divided:
                _count_divided(layout, tally)
            yield _Document(text, file.name if layout.pieces else None)
    else:
        yield from _row_documents(file, layout, tally)


def _row_documents(file: DataFile, layout: Layout, tally: Tally) -> Iterator[_Document]:
    def read(row: dict[str, Any]) -> _Document:
        text = _joined(row, layout.join) if layout.join else text_of(value_at(row, layout.text), layout.text)
        return _Document(text, _single(row, layout.group), _single(row, layout.split))

    for number, document in enumerate(_each(file, layout, tally, read), 1):
        parts = [document.text] if document.text is None else divided_text(document.text)
        group = document.group
        if len(parts) > 1:
            _count_divided(layout, tally, len(parts))
            if layout.group is None:
                group = f"{file.name}, row {number}"
        for part in parts:
            yield _Document(part, group, document.split)


def _count_divided(layout: Layout, tally: Tally, rows: int = 1) -> None:
    if not layout.pieces and layout.group is None:
        raise Divided
    tally.divided += rows


def _each(
    file: DataFile, layout: Layout, tally: Tally, read: Callable[[dict[str, Any]], Any]
) -> Iterator[Any]:
    """``read`` applied to every row; the error for a rejected row names it."""
    for place, row in file.rows(layout.source_columns, tally):
        try:
            content = read(row)
        except BadValue as error:
            raise SourceError(f"{file.name}: {place}: {error}") from None
        yield content


def _line(value: Any, name: str) -> str:
    line = text_of(value, name)
    if line is None:
        raise BadValue(f"{name}: expected a line of text, found null")
    return line.removesuffix("\n")


def _single(row: dict[str, Any], column: str | None) -> str | None:
    """The value of a column of groups or splits, as text."""
    if column is None:
        return None
    value = value_at(row, column)
    if isinstance(value, list | dict):
        raise BadValue(f"{column}: expected a single value, found {kind_of(value)}")
    return text_of(value, column) if isinstance(value, bytes) else None if value is None else str(value)


def _field(element: Any, key: str, name: str) -> Any:
    if element is None:
        return None
    if not isinstance(element, dict) or key not in element:
        found = ", ".join(element) if isinstance(element, dict) else kind_of(element)
        raise BadValue(f"{name}: expected elements with {key!r}, found {found or 'an empty one'}")
    return element[key]


def _joined(row: dict[str, Any], join: Sequence[str]) -> str:
    """The columns of ``join``, joined by empty lines; of a list of structs, one field of each element."""
    texts: list[str | None] = []
    for name in join:
        column, _, key = name.partition(".")
        value = row[column]
        elements = value if isinstance(value, list) else [value]
        texts += [text_of(_field(element, key, name) if key else element, name) for element in elements]
    return "\n\n".join(text.strip("\n") for text in texts if text and text.strip())


def _encoded(text: str) -> bytes:
    """The bytes that were read: invalid UTF-8 is restored unchanged, a lone surrogate becomes three bytes."""
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogatepass")


def _text_array(texts: Sequence[bytes | None]) -> pa.Array:
    """A string column, unchecked: it may hold bytes that are not UTF-8."""
    return pa.array(texts, pa.binary()).cast(pa.string(), safe=False)


class _Writer:
    """Documents into parquet files of at most 1 GB of text, in row groups of at most 16 MB."""

    def __init__(self, layout: Layout, paths: Iterator[Path]) -> None:
        self.schema = pa.schema([(name, pa.string()) for name in layout.raw_columns])
        self.paths = paths
        self.writer: pq.ParquetWriter | None = None
        self.columns: list[list[bytes | None]] = [[] for _ in self.schema.names]
        self.has_group, self.has_split = layout.raw_group is not None, layout.raw_split is not None
        self.block_bytes = self.file_bytes = 0

    def add(self, document: _Document) -> None:
        values = [document.text]
        values += [document.group] if self.has_group else []
        values += [document.split] if self.has_split else []
        encoded = [None if value is None else _encoded(value) for value in values]
        size = sum(len(value) for value in encoded if value is not None)
        if self.columns[0] and (len(self.columns[0]) == BLOCK_ROWS or self.block_bytes + size > BLOCK_BYTES):
            self.flush()
        for column, value in zip(self.columns, encoded, strict=True):
            column.append(value)
        self.block_bytes += size

    def flush(self) -> None:
        """Write the buffered rows as a row group."""
        if not self.columns[0]:
            return
        if self.writer is None or self.file_bytes + self.block_bytes > FILE_BYTES:
            self.close()
            # A dictionary page holds up to 1,024 whole texts and is read as a whole.
            self.writer = pq.ParquetWriter(
                next(self.paths), self.schema, compression="zstd", use_dictionary=False
            )
        arrays = [_text_array(column) for column in self.columns]
        self.writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self.file_bytes += self.block_bytes
        self.columns, self.block_bytes = [[] for _ in self.columns], 0

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer, self.file_bytes = None, 0


def corpus_to_parquet(
    files: Sequence[DataFile], paths: Iterator[Path], layout: Layout, cut: Cut, tally: Tally
) -> None:
    """Write the documents of corpus files, in their order, into parquet files at the next ``paths``.

    Columns: text, and group and split where the layout has them. Raises `Divided` if a document had to be
    divided and the layout has no column that keeps its rows together.
    """
    writer = _Writer(layout, paths)
    try:
        for file in files:
            check_source_columns(file, layout)
            for document in _documents(file, layout, cut, tally):
                writer.add(document)
        writer.flush()
    finally:
        writer.close()


def tables_to_parquet(files: Sequence[DataFile], target: Path, columns: Sequence[str]) -> None:
    """Concatenate parquet or Arrow files (all columns of the first) into one parquet file."""
    writer = None
    try:
        for file in files:
            if file.kind not in ("parquet", "arrow"):
                raise SourceError(f"{file.name}: a benchmark is read from .parquet or .arrow files")
            check_columns(file, columns)
            for batch in table_batches(file.path, file.kind, file.name):
                if writer is None:
                    writer = pq.ParquetWriter(target, batch.schema.remove_metadata(), compression="zstd")
                writer.write_table(_conformed(batch, writer.schema, file.name))
    finally:
        if writer is not None:
            writer.close()


def _conformed(batch: pa.RecordBatch, schema: pa.Schema, name: str) -> pa.Table:
    try:
        return pa.Table.from_batches([batch.select(schema.names)]).cast(schema)
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{name}: columns differ from the first file's ({error})") from None


def check_columns(file: DataFile, columns: Sequence[str]) -> pa.Schema:
    """Check that a parquet or Arrow file has each of ``columns`` once; returns its schema."""
    schema = table_schema(file.path, file.kind, file.name)
    names = {*schema.names}
    missing = [column for column in columns if not names & {column, column.partition(".")[0]}]
    if missing:
        raise SourceError(
            f"{file.name}: no column {', '.join(map(repr, missing))}; expected {', '.join(columns)}; "
            f"found {', '.join(schema.names) or 'none'}"
        )
    for column in columns:
        top_level(schema, column, file.name)
    return schema


def check_source_columns(file: DataFile, layout: Layout) -> None:
    """Check a corpus's parquet or Arrow file: strings in the text column, single values in the others."""
    if file.kind not in ("parquet", "arrow"):
        return
    schema = check_columns(file, layout.source_columns)
    if not layout.join:
        kind = column_type(schema, layout.text, file.name)
        if not is_text(kind):
            raise SourceError(f"{file.name}: column {layout.text!r} is {kind}, expected strings")
    for key, column in (("group", layout.group), ("split", layout.split)):
        if column is not None and not is_single(kind := column_type(schema, column, file.name)):
            raise SourceError(f"{file.name}: {key} column {column!r} is {kind}, expected single values")


def read_through(path: Path, name: str, columns: Sequence[str], split: str | None = None) -> int:
    """Decode every value of ``columns``, so that damage is found now and not hours later; counts rows.

    Values of the column ``split`` must name splits.
    """
    rows = 0
    with damage(name):
        for batch in small_batches(open_parquet(path), columns):
            rows += batch.num_rows
            if split is not None:
                for value in batch.column(split).unique().to_pylist():
                    _check_split(value, split, name)
    return rows


def _check_split(value: Any, column: str, name: str) -> None:
    word = value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else value
    if word not in SPLITS:
        hint = nearest(word, SPLITS) if isinstance(word, str) else ""
        raise SourceError(
            f"{name}: split column {column!r} has {word!r}{hint}; expected train, val (or validation, valid, "
            "dev) or test"
        )
