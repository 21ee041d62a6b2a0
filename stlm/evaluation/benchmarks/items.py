"""What a benchmark is: items with options, read from parquet files or made of held-out text."""

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
    """One way to go on: the text before it, the text scored after it, and the words that lengths count.

    `words` is the continuation without the space that joins it to its context, as in lm_eval's `acc_norm`.
    """

    context: str
    continuation: str
    words: str

    def request(self, mode: Mode) -> Request:
        """The text to score: the continuation given the context (harness), or both together (paper)."""
        return Request(self.context, self.continuation, whole=mode == "paper")


class Item(NamedTuple):
    """A question: its options, the index of the right one, and its group of each of the benchmark's kinds.

    `text`: question and right answer without the words of a prompt, where the right option holds such words.
    An item of one option asks whether the model itself would go on that way: it is right where every token
    of the option is the most probable one.
    """

    id: str
    options: tuple[Option, ...]
    gold: int
    groups: tuple[str, ...] = ()
    text: str = ""

    @property
    def own_text(self) -> str:
        """What a text that gives the item away would say: the question or context, and the right answer."""
        right = self.options[self.gold]
        return self.text or right.context + right.continuation


class BadRow(ValueError):
    """A row that is no item; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What scoring needs to know of a benchmark, wherever its items come from.

    `version` changes whenever the same model would get another score. `normalized`: whether the reference
    harness also reports `acc_norm`, the score divided by the characters of the option. `modes`: those in
    which it has a meaning; a study's other modes leave it out.
    """

    name: str
    version: str
    group_kinds: tuple[str, ...] = ()
    normalized: bool = False
    modes: tuple[Mode, ...] = ("harness", "paper")


@dataclass(frozen=True, kw_only=True)
class FileBenchmark(Benchmark):
    """A benchmark whose items are rows of parquet files with the hub's columns.

    `splits` are tried in order. `lists`: those of the `columns` that hold a list in each row. `read` turns
    numbered rows into items (ids within their file order) and raises BadRow. `data`: the folder of data/raw/
    where it is not the benchmark's own name, so that several benchmarks read what is fetched once.
    """

    splits: tuple[str, ...]
    columns: tuple[str, ...]
    lists: tuple[str, ...] = ()
    read: Callable[[Iterable[Row]], Iterator[Item]]
    data: str | None = None

    @property
    def data_name(self) -> str:
        """The name that its data is fetched by: an entry of params/benchmarks.yaml."""
        return self.data or self.name

    def files(self, folder: Path) -> tuple[str, list[Path]]:
        """The first split that `folder` holds, and its parquet files. UserError where it holds none."""
        found = sorted(folder.rglob("*.parquet"))
        for split in self.splits:
            # The split is a word of the file's name, as in test.parquet or test-00000-of-00001.parquet.
            own = [f for f in found if split in re.split(r"[-_.]", f.name)]
            if own:
                return split, own
        raise UserError(
            f"{folder}: no parquet file of the split {' or '.join(self.splits)} of {self.name} "
            f"(found: {', '.join(f.name for f in found) or 'none'}); run: stlm fetch {self.data_name}"
        )

    def load(self, folder: Path) -> tuple[str, list[Item]]:
        """The split used and its items. UserError: missing or damaged file, missing column, bad row."""
        split, files = self.files(folder)
        check_fetched(folder, files)
        items = [item for file in files for item in self._read_file(file)]
        if not items:
            raise UserError(
                f"{folder}: {self.name} has no rows in {', '.join(f.name for f in files)}"
                f"; run: stlm fetch {self.data_name}"
            )
        # Files that count their rows from zero each would repeat ids.
        if len({item.id for item in items}) < len(items):
            items = [item._replace(id=f"{number}-{item.id}") for number, item in enumerate(items)]
        return split, items

    def _read_file(self, file: Path) -> list[Item]:
        # Here, because params/ is checked against the benchmarks' names, which must not take long.
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
            # A row is an item, so that the one it stopped at is known.
            number = len(items) if not items or len(items[-1].options) > 1 else len(items) - 1
            raise UserError(
                f"{file}: {self.name}, row {number}: {_why(error, rows[number], table.schema)}; "
                f"run: stlm fetch {self.data_name}"
            ) from error
        return items


def _why(error: Exception, row: Row, schema: Any) -> str:
    """What is wrong with a row, with the column: one without a value, or the columns' types."""
    empty = [name for name, value in row.items() if value is None]
    if empty:
        return f"the column {empty[0]} has no value"
    if isinstance(error, BadRow):
        return str(error)
    types = ", ".join(f"{field.name} {field.type}" for field in schema)
    return f"not as expected ({error}); the columns are {types}"


@dataclass(frozen=True, kw_only=True)
class TextBenchmark(Benchmark):
    """A benchmark whose items are made of the test split of the run's own corpus: nothing is fetched for it.

    `make(texts, limit, seed)` gives at most `limit` items, the same for the same texts and seed; a lower
    limit gives some of these. `default_limit` holds where the study has none.
    """

    make: Callable[[Sequence[str], int, int], list[Item]]
    default_limit: int


class _Fetched(BaseModel):
    path: str
    sha256: str
    bytes: int


class _Source(BaseModel):
    """What source.json says of the files that were fetched."""

    files: list[_Fetched]


def check_fetched(folder: Path, files: Iterable[Path]) -> None:
    """Compare files of `data/raw/NAME/` with its source.json. A folder that has none was not fetched.

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
    """Where `label` stands among `labels`; BadRow where it does not."""
    if str(label) not in labels:
        raise BadRow(f"the answer {label!r} is none of {', '.join(labels)}")
    return labels.index(str(label))


def subset(items: Sequence[Item], limit: int | None, seed: int, name: str) -> list[Item]:
    """At most `limit` items, drawn by `seed`, in their own order; a lower limit draws some of these."""
    if limit is None or limit >= len(items):
        return list(items)
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(items))
    return [items[i] for i in sorted(order[:limit])]
