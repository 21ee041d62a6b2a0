"""Whatever a source holds (parquet, Arrow streams, JSON lines, text), as parquet with the columns needed.

Everything streams: memory does not grow with the files.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.corpora.sources import SourceError

_T = TypeVar("_T")

BATCH_ROWS = 1024
BLOCK_ROWS = 16 * 1024  # rows of a row group: some 30 MB of text


def needs_conversion(paths: Iterable[str], join: Sequence[str], starts: str, lines: int) -> bool:
    """Whether the files are anything but parquet with the columns as they are."""
    return bool(join or starts or lines) or any(not path.endswith(".parquet") for path in paths)


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                # Bytes that are no UTF-8 survive as lone surrogates, for the stage that tokenizes to count.
                yield line.decode("utf-8", errors="surrogateescape").rstrip("\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{path.name}: truncated or corrupt ({error})") from None


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path.name}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise SourceError(f"{path.name}: line {number}: expected an object, found {_kind(row)}")
        missing = [column for column in columns if column not in row]
        if missing:
            raise SourceError(f"{path.name}: line {number}: no column {missing[0]!r}; found {', '.join(row)}")
        yield row


def _column_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """The record batches of a parquet file or an Arrow stream."""
    try:
        if path.suffix == ".parquet":
            yield from pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=columns and list(columns))
        else:
            with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
                yield from stream
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path.name}: truncated or corrupt ({str(error).splitlines()[0]})") from None


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows that have ``columns``, whatever the format; a line of a text file is a row with one column."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        yield from _json_rows(path, columns)
    elif name.endswith(".txt"):
        for line in _lines(path):
            yield dict.fromkeys(columns, line)
    else:
        check_columns(path, path.name, columns)
        for batch in _column_batches(path, columns):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError as error:
                raise SourceError(f"{path.name}: a text that is not UTF-8 ({error})") from None


def _names(path: Path, name: str) -> list[str]:
    try:
        if path.suffix == ".parquet":
            return pq.read_schema(path).names
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
            return stream.schema.names
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{name}: truncated or corrupt ({str(error).splitlines()[0]})") from None


class _BadRow(ValueError):
    """A row that lacks a text where one is expected; the message says what it has."""


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _text(value: Any, name: str) -> str | None:
    """A text or null. Bytes need not be UTF-8: they come through as those of a text file do."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    if value is None or isinstance(value, str):
        return value
    raise _BadRow(f"{name}: expected a text, found {_kind(value)}")


def _line(value: Any, name: str) -> str:
    line = _text(value, name)
    if line is None:
        raise _BadRow(f"{name}: expected a line of text, found null")
    return line


def _field(element: Any, key: str, name: str) -> Any:
    if element is None:
        return None
    if not isinstance(element, dict) or key not in element:
        found = ", ".join(element) if isinstance(element, dict) else _kind(element)
        raise _BadRow(f"{name}: expected elements with {key!r}, found {found or 'an empty one'}")
    return element[key]


def _joined(row: dict[str, Any], join: Sequence[str]) -> str:
    """The columns of ``join`` by empty lines; of a list of structs, one field of each element."""
    texts: list[str | None] = []
    for name in join:
        column, _, key = name.partition(".")
        value = row[column]
        elements = value if isinstance(value, list) else [value]
        texts += [_text(_field(element, key, name) if key else element, name) for element in elements]
    return "\n\n".join(text.strip("\n") for text in texts if text and text.strip())


def _grouped(lines: Iterable[str], starts: str, count: int) -> Iterator[str]:
    """Lines joined into documents: one begins where a line matches ``starts``, or every ``count`` lines."""
    pattern = re.compile(starts) if starts else None
    document: list[str] = []
    for line in lines:
        line = line.removesuffix("\n")
        if document and ((pattern and pattern.match(line)) or (count and len(document) >= count)):
            yield "\n".join(document)
            document = []
        document.append(line)
    if document:
        yield "\n".join(document)


def _documents(
    path: Path, text: str, group: str | None, join: Sequence[str], starts: str, lines: int
) -> Iterator[tuple[str, Any]]:
    """The text and the group of each document of a corpus file."""
    columns = list(dict.fromkeys([name.partition(".")[0] for name in join] or [text]))
    columns += [group] if group else []
    if starts or lines:
        found = _each(path, columns, lambda row: _line(row[text], text))
        yield from ((document, None) for document in _grouped(found, starts, lines))
    elif join:
        yield from _each(path, columns, lambda row: (_joined(row, join), row[group] if group else None))
    else:
        yield from _each(path, columns, lambda row: (_text(row[text], text), row[group] if group else None))


def _each(path: Path, columns: Sequence[str], read: Callable[[dict[str, Any]], _T]) -> Iterator[_T]:
    """What ``read`` makes of every row; a row that it refuses is named."""
    for number, row in enumerate(_rows(path, columns), 1):
        try:
            content = read(row)
        except _BadRow as error:
            raise SourceError(f"{path.name}: row {number}: {error}") from None
        yield content


def _encoded(text: str) -> bytes:
    """The bytes that were read: what was no UTF-8 comes out as it went in, lone surrogates as three bytes."""
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogatepass")


def _text_array(texts: Sequence[str | None]) -> pa.Array:
    """A string column, unchecked: it may hold bytes that are not UTF-8."""
    encoded = [None if text is None else _encoded(text) for text in texts]
    return pa.array(encoded, pa.binary()).cast(pa.string(), safe=False)


def corpus_to_parquet(
    path: Path, target: Path, *, text: str, group: str | None, join: Sequence[str], starts: str, lines: int
) -> None:
    """Write the documents of one corpus file as parquet: the text column, and the group column if any."""
    schema = pa.schema([(text, pa.string())] + ([(group, pa.string())] if group else []))
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:

        def write(block: list[tuple[str, Any]]) -> None:
            arrays = [_text_array([document for document, _ in block])]
            if group:
                arrays.append(pa.array([None if key is None else str(key) for _, key in block], pa.string()))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

        block: list[tuple[str, Any]] = []
        for document in _documents(path, text, group, join, starts, lines):
            block.append(document)
            if len(block) == BLOCK_ROWS:
                write(block)
                block = []
        if block:
            write(block)


def tables_to_parquet(paths: Sequence[Path], target: Path, columns: Sequence[str]) -> None:
    """Concatenate parquet files or Arrow streams (all columns of the first) into one parquet file."""
    writer = None
    try:
        for path in paths:
            check_columns(path, path.name, columns)
            for batch in _column_batches(path, None):
                if writer is None:
                    writer = pq.ParquetWriter(target, batch.schema.remove_metadata(), compression="zstd")
                writer.write_table(_conformed(batch, writer.schema, path))
    finally:
        if writer is not None:
            writer.close()


def _conformed(batch: pa.RecordBatch, schema: pa.Schema, path: Path) -> pa.Table:
    try:
        return pa.Table.from_batches([batch.select(schema.names)]).cast(schema)
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{path.name}: columns differ from the first file's ({error})") from None


def check_columns(path: Path, name: str, columns: Sequence[str], text: str | None = None) -> None:
    """Check that the file has ``columns``, and that ``text`` is one of strings or bytes."""
    found = _names(path, name)
    missing = [column for column in columns if column not in found]
    if missing:
        raise SourceError(
            f"{name}: no column {', '.join(map(repr, missing))}; expected {', '.join(columns)}; "
            f"found {', '.join(found) or 'none'}"
        )
    if text is not None:
        kind = pq.read_schema(path).field(text).type
        if not any(
            check(kind)
            for check in (
                pa.types.is_string,
                pa.types.is_large_string,
                pa.types.is_binary,
                pa.types.is_large_binary,
            )
        ):
            raise SourceError(f"{name}: column {text!r} is {kind}, expected strings")


def read_through(path: Path, name: str, columns: Sequence[str]) -> int:
    """Decode every value of ``columns``, so that damage shows here and not hours later; counts rows."""
    try:
        file = pq.ParquetFile(path)
        return sum(batch.num_rows for batch in file.iter_batches(BLOCK_ROWS, columns=list(columns)))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{name}: truncated or corrupt ({str(error).splitlines()[0]})") from None
