"""Streaming access to the raw text of a corpus, or of each component of a mix (data/raw/<name>/)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from stlm.errors import UserError, nearest
from stlm.files import read_record, sha256

_BATCH_BYTES = 4 << 20  # text held at a time, about
_BATCH_ROWS = 4096
_READ_ROWS = 64  # rows decoded at a time, at most: long documents may stand beside many short ones


@dataclass(frozen=True)
class RawComponent:
    """One source of documents: parquet files with a text column, and a group column or none."""

    name: str
    weight: float
    folder: Path
    text: str
    group: str | None
    files: tuple[str, ...]
    sha256: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(_open(self.folder / file).metadata.num_rows for file in self.files)

    def batches(self) -> Iterator[RawBatch]:
        """All documents in the files' order, in batches of a few megabytes.

        A batch is larger only by the last documents read: at most 64, a few megabytes of their row group's
        average. Memory holds a page of the file beside it, and `stlm fetch` writes small ones.
        """
        for file in self.files:
            yield from self._file_batches(self.folder / file)

    def _file_batches(self, path: Path) -> Iterator[RawBatch]:
        parquet = _open(path)
        for column in filter(None, (self.text, self.group)):
            _check_column(path, parquet.schema_arrow, column)
        metadata = parquet.metadata
        columns = [self.text] if self.group in (None, self.text) else [self.text, self.group]
        texts: list[bytes | None] = []
        groups: list[bytes | None] = []
        size = 0
        try:
            for index in range(metadata.num_row_groups):
                row_group = metadata.row_group(index)
                rows = _BATCH_BYTES * row_group.num_rows // max(row_group.total_byte_size, 1)
                rows = min(max(rows, 1), _READ_ROWS)
                for batch in parquet.iter_batches(rows, row_groups=[index], columns=columns):
                    found = _as_bytes(batch.column(self.text))
                    texts += found
                    groups += _as_bytes(batch.column(self.group)) if self.group else [None] * len(found)
                    size += sum(len(text or b"") for text in found)
                    if size >= _BATCH_BYTES or len(texts) >= _BATCH_ROWS:
                        yield RawBatch(texts, groups)
                        texts, groups, size = [], [], 0
            if texts:
                yield RawBatch(texts, groups)
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(path, error) from error


@dataclass(frozen=True)
class RawBatch:
    """Documents as stored: bytes that should be UTF-8, or None; and the group of each, or None."""

    texts: list[bytes | None]
    groups: list[bytes | None]


class _File(BaseModel):
    path: str
    sha256: str
    bytes: int


class _Source(BaseModel):
    """What source.json says that matters here."""

    kind: str
    mix: dict[str, float] = {}
    files: list[_File] = []
    text: str | None = None
    group: str | None = None


def raw_components(folder: Path) -> list[RawComponent]:
    """The components of `data/raw/<name>/`: one for a corpus, several for a mix, as its source.json says."""
    path = folder / "source.json"
    source = read_record(path, _Source)
    if source.kind != "mix":
        return [_component(folder, folder.name, 1.0, source)]
    if not source.mix:
        raise UserError(f"{path}: a mix of no component; run `stlm fetch {folder.name}` again")
    return [
        _component(folder / name, name, weight, read_record(folder / name / "source.json", _Source))
        for name, weight in source.mix.items()
    ]


def _component(folder: Path, name: str, weight: float, source: _Source) -> RawComponent:
    files = [entry for entry in source.files if entry.path.endswith(".parquet")]
    if not files:
        raise UserError(f"{folder / 'source.json'}: names no parquet file; run `stlm fetch` again")
    for entry in files:
        path = folder / entry.path
        if not path.exists():
            raise UserError(f"{path}: no such file, but source.json names it; run `stlm fetch` again")
        if path.stat().st_size != entry.bytes:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes, but {entry.bytes:,} were fetched: truncated or "
                "changed; run `stlm fetch` again"
            )
        if sha256(path) != entry.sha256:
            raise UserError(f"{path}: corrupt: its SHA-256 is not the one fetched; run `stlm fetch` again")
    files.sort(key=lambda entry: entry.path)
    return RawComponent(
        name=name,
        weight=weight,
        folder=folder,
        text=source.text or "text",
        group=source.group,
        files=tuple(entry.path for entry in files),
        sha256=tuple(entry.sha256 for entry in files),
    )


def _open(path: Path) -> pq.ParquetFile:
    try:
        # Buffered reads of pages instead of whole row groups: memory does not grow with the row groups.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{path}: truncated or corrupt parquet file ({reason}); run `stlm fetch` again")


def _check_column(path: Path, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise UserError(f"{path}: no column {column!r}{nearest(column, schema.names)}")


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    """A column as bytes, unchecked: pyarrow would fail on the whole batch where one text is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        column = column.cast(pa.large_string())
    return column.cast(pa.large_binary()).to_pylist()
