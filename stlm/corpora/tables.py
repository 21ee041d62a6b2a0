"""Parquet and Arrow files: their columns (nested ones by a path), and their rows in small batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.corpora.compression import damage, unpacked
from stlm.corpora.errors import SourceError
from stlm.errors import nearest

BATCH_BYTES = 4 << 20  # approximate size of a batch of rows
BATCH_ROWS = 1024

_ARROW_FILE = b"ARROW1"


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file that is read page by page: memory does not grow with the size of row groups."""
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def small_batches(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a parquet file in batches with about 4 MB of the wanted columns."""
    metadata = file.metadata
    wanted = {column.partition(".")[0] for column in columns} | set(columns)
    size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            if column.path_in_schema in wanted or column.path_in_schema.split(".")[0] in wanted:
                size += column.total_uncompressed_size
    rows = min(max(BATCH_BYTES * metadata.num_rows // max(size, 1), 1), BATCH_ROWS)
    yield from file.iter_batches(rows, columns=list(columns), use_threads=False)


@contextmanager
def _open_arrow(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema and batches of an Arrow file, a stream or the random-access format (Feather)."""
    with pa.memory_map(str(path)) as mapped:
        if mapped.read(len(_ARROW_FILE)) == _ARROW_FILE:
            with pa.ipc.open_file(mapped) as file:
                yield file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            mapped.seek(0)
            with pa.ipc.open_stream(mapped) as stream:
                yield stream.schema, iter(stream)


def table_schema(path: Path, kind: str, name: str) -> pa.Schema:
    """The columns of a file of ``kind`` "parquet" or "arrow"; `SourceError` if it is damaged."""
    with damage(name), unpacked(path) as plain:
        if kind == "parquet":
            return pq.read_schema(plain)
        with _open_arrow(plain) as (schema, _):
            return schema


def table_batches(path: Path, kind: str, name: str) -> Iterator[pa.RecordBatch]:
    """All columns, in the batches of the file (parquet: 1,024 rows)."""
    with damage(name), unpacked(path) as plain:
        if kind == "parquet":
            yield from pq.ParquetFile(plain).iter_batches(BATCH_ROWS)
            return
        with _open_arrow(plain) as (_, batches):
            yield from batches


def table_rows(
    path: Path, kind: str, name: str, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, each with its place ("row 3") and the top-level columns that contain ``columns``."""
    schema = table_schema(path, kind, name)
    tops = list(dict.fromkeys(top_level(schema, column, name) for column in columns))
    number = 0
    for batch in _narrow_batches(path, kind, name, tops):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise SourceError(f"{name}: a text that is not UTF-8 ({error})") from None
        for row in rows:
            number += 1
            yield f"row {number}", row


def _narrow_batches(path: Path, kind: str, name: str, tops: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with damage(name), unpacked(path) as plain:
        if kind == "parquet":
            yield from small_batches(open_parquet(plain), tops)
            return
        with _open_arrow(plain) as (_, batches):
            for batch in batches:
                narrow = batch.select(tops)
                step = min(max(BATCH_BYTES * narrow.num_rows // max(narrow.nbytes, 1), 1), BATCH_ROWS)
                for start in range(0, narrow.num_rows, step):
                    yield narrow.slice(start, step)


def top_level(schema: pa.Schema, column: str, name: str) -> str:
    """The top-level column that is or contains ``column``; `SourceError` for none or several."""
    top = column if column in schema.names else column.partition(".")[0]
    count = schema.names.count(top)
    if count > 1:
        raise SourceError(f"{name}: {count} columns are named {top!r}; expected one")
    if count == 0:
        raise SourceError(
            f"{name}: no column {column!r}; found {', '.join(schema.names) or 'none'}"
            f"{nearest(top, schema.names) if len(schema.names) > 1 else ''}"
        )
    return top


def column_type(schema: pa.Schema, column: str, name: str) -> pa.DataType:
    """The type of a column, or of the field at a path `a.b` into structs; for a dictionary, of its values."""
    top = top_level(schema, column, name)
    kind = schema.field(top).type
    rest = column[len(top) + 1 :]
    before = top
    for part in rest.split(".") if rest else ():
        if not pa.types.is_struct(kind):
            raise SourceError(
                f"{name}: no column {column!r}: {before!r} is {kind}, expected a struct with a field {part!r}"
            )
        fields = [field for field in kind if field.name == part]
        if len(fields) != 1:
            found = ", ".join(field.name for field in kind) or "none"
            count = f"{len(fields)} fields" if fields else "no field"
            raise SourceError(f"{name}: no column {column!r}: {before!r} has {count} {part!r}; found {found}")
        kind, before = fields[0].type, f"{before}.{part}"
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds strings, or bytes that are read as UTF-8."""
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if any(getattr(pa.types, f"is_{check}")(kind) for check in checks):
        return True
    return pa.types.is_fixed_size_binary(kind)


def is_single(kind: pa.DataType) -> bool:
    """Whether a value of the type is a single one (a text, a number, a date), not a list or struct."""
    return not pa.types.is_nested(kind)
