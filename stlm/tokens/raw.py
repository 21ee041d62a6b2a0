"""Streaming access to the raw text of a corpus, or of each component of a mix (data/raw/<name>/)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from stlm.corpora.config import SPLITS as SPLIT_NAMES
from stlm.errors import UserError, nearest
from stlm.files import read_record
from stlm.integrity import Listed, check_files
from stlm.remedy import remedy
from stlm.tokens.shards import SPLITS
from stlm.tokens.words import normalize_title

_BATCH_BYTES = 4 << 20  # text held at a time, about
_BATCH_ROWS = 4096
_READ_ROWS = 64  # the most rows decoded at a time: a few long documents may follow many short ones


@dataclass(frozen=True)
class RawComponent:
    """A source of documents: parquet files with a text column, and optional columns of groups and splits.

    `splits`: the declared split of each file, an index of SPLITS. `pieces`: rows are parts of the file that
    their group names. With `cut`, texts of train are read in passages of about that many bytes.
    """

    name: str
    weight: float
    folder: Path
    text: str
    group: str | None
    files: tuple[str, ...]
    sha256: tuple[str, ...]
    splits: tuple[int, ...] = ()
    split_column: str | None = None
    pieces: bool = False
    cut: int = 0

    @property
    def rows(self) -> int:
        """Number of rows of the files, before texts are cut."""
        return sum(_open(self.folder / file).metadata.num_rows for file in self.files)

    @property
    def text_bytes(self) -> int:
        """Approximate bytes of text: the uncompressed size of the text column."""
        return self._bytes_of(self.files)

    @property
    def train_bytes(self) -> int:
        """`text_bytes` of the files that are declared train; with a split column, of all files."""
        return self._bytes_of(
            [file for file, split in zip(self.files, self._file_splits, strict=True) if split == 0]
        )

    @property
    def _file_splits(self) -> tuple[int, ...]:
        return self.splits or (0,) * len(self.files)

    def _bytes_of(self, files: Sequence[str]) -> int:
        total = 0
        for file in files:
            metadata = _open(self.folder / file).metadata
            for i in range(metadata.num_row_groups):
                columns = (metadata.row_group(i).column(j) for j in range(metadata.num_columns))
                total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.text)
        return total

    @property
    def declared(self) -> frozenset[int]:
        """The splits that the source declares: indices of SPLITS."""
        if self.split_column is None:
            return frozenset(self._file_splits)
        return frozenset(split for _, splits in self._groups() for split in splits)

    def train_units(self, most: int) -> int:
        """Number of groups in train, at most `most`; a document without a group counts as one."""
        found: set[bytes] = set()
        alone = 0
        for groups, splits in self._groups():
            for group, split in zip(groups, splits, strict=True):
                if split == 0 and group is None:
                    alone += 1
                elif split == 0:
                    found.add(self.unit_of(group))
            if alone + len(found) >= most:
                return most
        return alone + len(found)

    def unit_of(self, group: bytes) -> bytes:
        """The key by which groups are compared: of a title, its letters and digits."""
        return group if self.pieces else normalize_title(group)

    def _groups(self) -> Iterator[tuple[list[bytes | None], list[int]]]:
        """Group and split of every row, in batches; the text is not read."""
        wanted = [column for column in (self.group, self.split_column) if column]
        for file, split in zip(self.files, self._file_splits, strict=True):
            path = self.folder / file
            parquet = _open(path)
            for column in wanted:
                _check_column(path, parquet.schema_arrow, column)
            if not wanted:
                rows = parquet.metadata.num_rows
                yield [None] * rows, [split] * rows
                continue
            try:
                for read in parquet.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(wanted))):
                    yield self._groups_of(read), self._splits_of(read, split)
            except (pa.ArrowException, OSError) as error:
                raise _corrupt(path, error) from error

    def _groups_of(self, read: pa.RecordBatch) -> list[bytes | None]:
        """The group of each row; None if it is empty."""
        if self.group is None:
            return [None] * read.num_rows
        return [group if group and group.strip() else None for group in _as_bytes(read.column(self.group))]

    def _splits_of(self, read: pa.RecordBatch, split: int) -> list[int]:
        if self.split_column is None:
            return [split] * read.num_rows
        return [self._split(value) for value in _as_bytes(read.column(self.split_column))]

    def _split(self, value: bytes | None) -> int:
        """The split that a value of the split column means."""
        spelled = (value or b"").decode(errors="replace").strip().casefold()
        if spelled not in SPLIT_NAMES:
            raise UserError(
                f"{self.folder}: column {self.split_column!r}: {spelled!r} is no split"
                f"{nearest(spelled, SPLIT_NAMES)}"
            )
        return SPLITS.index(SPLIT_NAMES[spelled])

    def batches(self) -> Iterator[RawBatch]:
        """All documents in the order of the files, in batches of a few megabytes.

        A batch exceeds this only by the last documents read: at most 64, a few megabytes by the average of
        their row group. Memory also holds a page of the file; `stlm fetch` writes small pages.
        """
        first = 0
        for number, file in enumerate(self.files):
            for batch in self._file_batches(self.folder / file, self._file_splits[number]):
                yield batch.cut(self.cut, first) if self.cut else batch
                first += len(batch.texts)

    def _file_batches(self, path: Path, split: int) -> Iterator[RawBatch]:
        parquet = _open(path)
        wanted = [column for column in (self.text, self.group, self.split_column) if column]
        for column in wanted:
            _check_column(path, parquet.schema_arrow, column)
        metadata = parquet.metadata
        batch = RawBatch([], [], [])
        size = 0
        try:
            for index in range(metadata.num_row_groups):
                row_group = metadata.row_group(index)
                rows = _BATCH_BYTES * row_group.num_rows // max(row_group.total_byte_size, 1)
                rows = min(max(rows, 1), _READ_ROWS)
                for read in parquet.iter_batches(
                    rows, row_groups=[index], columns=list(dict.fromkeys(wanted))
                ):
                    found = _as_bytes(read.column(self.text))
                    batch.texts.extend(found)
                    batch.groups.extend(self._groups_of(read))
                    batch.splits.extend(self._splits_of(read, split))
                    size += sum(len(text or b"") for text in found)
                    if size >= _BATCH_BYTES or len(batch.texts) >= _BATCH_ROWS:
                        yield batch
                        batch, size = RawBatch([], [], []), 0
            if batch.texts:
                yield batch
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(path, error) from error


@dataclass(frozen=True)
class RawBatch:
    """Documents as stored: bytes that should be UTF-8, or None; the group (or None) and split of each."""

    texts: list[bytes | None]
    groups: list[bytes | None]
    splits: list[int]

    def cut(self, size: int, first: int) -> RawBatch:
        """The batch with texts of train in passages of about `size` bytes, cut after paragraphs or lines.

        Passages of a text without a group get its number as group; numbers start at `first`.
        """
        parts = [
            passages(text, size) if text and split == 0 else [text]
            for text, split in zip(self.texts, self.splits, strict=True)
        ]
        counts = list(map(len, parts))
        return RawBatch(
            [passage for each in parts for passage in each],
            [
                b"%d" % (first + number) if group is None else group
                for number, (group, n) in enumerate(zip(self.groups, counts, strict=True))
                for _ in range(n)
            ],
            [split for split, n in zip(self.splits, counts, strict=True) for _ in range(n)],
        )


def passages(text: bytes, size: int) -> list[bytes]:
    """Consecutive parts of a text, which concatenate to the text: about `size` bytes, at most twice that.

    Each ends after an empty line, otherwise after a line, a space, or a character.
    """
    parts, start = [], 0
    while len(text) - start > size * 3 // 2:
        for separator in (b"\n\n", b"\n", b" "):
            end = text.find(separator, start + size, start + 2 * size)
            if end >= 0:
                end += len(separator)
                break
        else:
            end = start + size
            while end < len(text) and text[end] & 0xC0 == 0x80:  # within a character
                end += 1
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]] if start < len(text) or not parts else parts


class _File(BaseModel):
    path: str
    sha256: str
    bytes: int
    split: Literal["train", "val", "test"] = "train"


class _Source(BaseModel):
    """The part of source.json that is needed here."""

    kind: str
    mix: dict[str, float] = {}
    files: list[_File] = []
    text: str | None = None
    group: str | None = None
    split_column: str | None = None
    pieces: bool = False


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
        source_json = folder / "source.json"
        raise UserError(f"{source_json}: names no parquet file; {remedy(source_json)}")
    check_files(Listed(folder / entry.path, entry.sha256, entry.bytes) for entry in files)
    files.sort(key=lambda entry: entry.path)
    return RawComponent(
        name=name,
        weight=weight,
        folder=folder,
        text=source.text or "text",
        group=source.group,
        files=tuple(entry.path for entry in files),
        sha256=tuple(entry.sha256 for entry in files),
        splits=tuple(SPLITS.index(entry.split) for entry in files),
        split_column=source.split_column,
        pieces=source.pieces,
    )


def _open(path: Path) -> pq.ParquetFile:
    try:
        # Buffered reads of pages instead of whole row groups: memory does not grow with row groups.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{path}: truncated or corrupt parquet file ({reason}); {remedy(path)}")


def _check_column(path: Path, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise UserError(f"{path}: no column {column!r}{nearest(column, schema.names)}")


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    """A column as unchecked bytes: pyarrow would fail on the whole batch if one text is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        column = column.cast(pa.large_string())
    return column.cast(pa.large_binary()).to_pylist()
