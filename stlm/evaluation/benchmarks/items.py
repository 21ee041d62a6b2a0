"""Benchmarks: items with options, read from parquet files or made from held-out text."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel

from stlm.errors import UserError
from stlm.evaluation.config import Mode
from stlm.evaluation.interface import Request
from stlm.files import read_record
from stlm.integrity import Listed, check_files

Row = Mapping[str, Any]


class Option(NamedTuple):
    """One possible continuation: its context, the text scored after it, and the words that lengths count.

    `words` is the continuation without the space that joins it to the context, as in lm_eval's `acc_norm`.
    `begins`: see `Request`.
    """

    context: str
    continuation: str
    words: str
    begins: bool = False

    def request(self, mode: Mode) -> Request:
        """The text to score: the continuation given the context (harness), or both together (paper)."""
        return Request(self.context, self.continuation, whole=mode == "paper", begins=self.begins)


class Item(NamedTuple):
    """A question: its options, the index of the right one, and a group of each of the benchmark's kinds.

    `text`: question and right answer without the words of a prompt, if the right option has such words. An
    item with a single option asks whether the model itself would continue that way: it is right if each token
    of the option is the most probable one.
    """

    id: str
    options: tuple[Option, ...]
    gold: int
    groups: tuple[str, ...] = ()
    text: str = ""

    @property
    def answered_text(self) -> str:
        """The text that would give the item away: the question or context, and the right answer."""
        right = self.options[self.gold]
        return self.text or right.context + right.continuation


class BadRow(ValueError):
    """A row that is not an item; the message says why."""


class Writing(NamedTuple):
    """What a model writes itself, greedily, before the options are scored: the text up to `marker`, or
    `most` symbols if it does not come (a symbol is a token or, of a byte-level model, a byte)."""

    marker: str
    most: int


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What scoring needs to know about a benchmark, whatever the source of its items.

    `version` changes whenever the same model would get another score. `normalized`: whether the reference
    harness also reports `acc_norm`, the score divided by the option's number of characters. `modes`: the
    modes that make sense for it; a study's other modes skip it. `writing`: what the model writes first; its
    text comes before the continuation of each of an item's options.
    """

    name: str
    version: str
    group_kinds: tuple[str, ...] = ()
    normalized: bool = False
    modes: tuple[Mode, ...] = ("harness", "paper")
    writing: Writing | None = None


@dataclass(frozen=True, kw_only=True)
class FileBenchmark(Benchmark):
    """A benchmark whose items are rows of parquet files with the hub's columns.

    `splits` are tried in order. `lists`: those of the `columns` whose cells are lists. `read` turns rows into
    items, with ids by row within their file, and raises BadRow. `data`: the folder in data/raw/ if it differs
    from the benchmark's name; several benchmarks can read one folder.
    """

    splits: tuple[str, ...]
    columns: tuple[str, ...]
    lists: tuple[str, ...] = ()
    read: Callable[[Iterable[Row]], Iterator[Item]]
    data: str | None = None

    @property
    def data_name(self) -> str:
        """The name under which its data is fetched: an entry of params/benchmarks.yaml."""
        return self.data or self.name

    def files(self, folder: Path) -> tuple[str, list[Path]]:
        """The first split that `folder` has, and its parquet files. Raises UserError if it has none."""
        found = sorted(folder.rglob("*.parquet"))
        for split in self.splits:
            # The split is a word of the file name, as in test.parquet or test-00000-of-00001.parquet.
            matching = [f for f in found if split in re.split(r"[-_.]", f.name)]
            if matching:
                return split, matching
        raise UserError(
            f"{folder}: no parquet file of the split {' or '.join(self.splits)} of {self.name} "
            f"(found: {', '.join(f.name for f in found) or 'none'}); run: stlm fetch {self.data_name}"
        )

    def load(self, folder: Path) -> tuple[str, list[Item]]:
        """The split used, and its items. UserError: missing or damaged file, missing column, bad row."""
        split, files = self.files(folder)
        check_fetched(folder, files)
        items = [item for file in files for item in self._read_file(file)]
        if not items:
            raise UserError(
                f"{folder}: {self.name} has no rows in {', '.join(f.name for f in files)}"
                f"; run: stlm fetch {self.data_name}"
            )
        # Ids repeat if each file counts its rows from zero.
        if len({item.id for item in items}) < len(items):
            items = [item._replace(id=f"{number}-{item.id}") for number, item in enumerate(items)]
        return split, items

    def _read_file(self, file: Path) -> list[Item]:
        # Imported here, as checking params/ against the benchmarks' names must stay fast.
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            schema = pq.read_schema(file)
            found = schema.names
            missing = [column for column in self.columns if column not in found]
            if missing:
                raise UserError(
                    f"{file}: {self.name} lacks the column(s) {', '.join(missing)}; "
                    f"found {', '.join(found)}; expected {', '.join(self.columns)}; "
                    f"run: stlm fetch {self.data_name}"
                )
            for column in self.columns:
                kind = schema.field(column).type
                if column in self.lists and not pa.types.is_nested(kind):
                    raise UserError(
                        f"{file}: {self.name}: column {column}: found {kind}, expected a list; "
                        f"run: stlm fetch {self.data_name}"
                    )
            table = pq.read_table(file, columns=list(self.columns))
            rows = table.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{file}: not a readable parquet file ({error}); run: stlm fetch {self.data_name}"
            ) from error
        items: list[Item] = []
        try:
            for item in self.read(rows):
                items.append(item)
                if len(item.options) < 2:
                    raise BadRow(f"{len(item.options)} option(s), expected 2 or more")
        except (BadRow, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            # Each row is one item, so the number of items tells at which row the reader stopped.
            number = len(items) if not items or len(items[-1].options) > 1 else len(items) - 1
            raise UserError(
                f"{file}: {self.name}, row {number}: {_why(error, rows[number], table.schema)}; "
                f"run: stlm fetch {self.data_name}"
            ) from error
        return items


def _why(error: Exception, row: Row, schema: Any) -> str:
    """What is wrong with a row: the column without a value, or the types of the columns."""
    empty = [name for name, value in row.items() if value is None]
    if empty:
        return f"the column {empty[0]} has no value"
    if isinstance(error, BadRow):
        return str(error)
    types = ", ".join(f"{field.name} {field.type}" for field in schema)
    return f"not as expected ({error}); the columns are {types}"


@dataclass(frozen=True, kw_only=True)
class TextBenchmark(Benchmark):
    """A benchmark whose items are made from the test split of the run's own corpus; nothing is fetched.

    `make(texts, limit, seed)` gives at most `limit` items, the same for the same texts and seed; a lower
    limit gives a subset of them. `default_limit` applies if the study sets none.
    """

    make: Callable[[Sequence[str], int, int], list[Item]]
    default_limit: int


class _Fetched(BaseModel):
    path: str
    sha256: str
    bytes: int


class _Source(BaseModel):
    """What source.json says about the fetched files."""

    files: list[_Fetched]


def check_fetched(folder: Path, files: Iterable[Path]) -> None:
    """Compare files of `data/raw/NAME/` with its source.json. A folder without one was not fetched.

    Raises UserError for a file that is damaged, or that `stlm fetch` did not write.
    """
    source = folder / "source.json"
    if not source.exists():
        return
    listed = {folder / one.path: one for one in read_record(source, _Source).files}
    for file in files:
        if file not in listed:
            raise UserError(f"{file}: not of the files that source.json lists; run: stlm fetch {folder.name}")
        check_files([Listed(file, listed[file].sha256, listed[file].bytes)])


def gold_index(label: object, labels: Sequence[str]) -> int:
    """The index of `label` in `labels`; raises BadRow if it is missing."""
    if str(label) not in labels:
        raise BadRow(f"the answer {label!r} is none of {', '.join(labels)}")
    return labels.index(str(label))


def subset(items: Sequence[Item], limit: int | None, seed: int, name: str) -> list[Item]:
    """At most `limit` items, drawn by `seed`, in their original order; a lower limit gives a subset."""
    if limit is None or limit >= len(items):
        return list(items)
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(items))
    return [items[i] for i in sorted(order[:limit])]
