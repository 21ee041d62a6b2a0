"""Finished parts of an evaluation, perplexity and each benchmark of each checkpoint, kept until all are.

A part is kept as soon as it is scored, under a hash of all that its scores depend on. So an evaluation that
is killed, or of which a benchmark fails, goes on with what is missing; and one whose benchmark was fetched
anew scores that one alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.errors import UserError
from stlm.files import atomic_directory, fingerprint, read_json, write_record
from stlm.integrity import check_beside

_RESULT = "result.json"
_ROWS = "rows.parquet"


class Part(NamedTuple):
    """A result, as evaluation.json will have it, and its rows of items.parquet or documents.parquet."""

    result: dict[str, Any]
    rows: pa.Table


class Kept:
    """The parts in a `folder`, which `forget` deletes. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def part(
        self, name: str, depends: Mapping[str, Any], score: Callable[[], Part], schema: pa.Schema
    ) -> Part:
        """The part `name`, by `score` where none is kept whole that was scored of the same (`depends`).

        Its rows have `schema`.
        """
        if self.folder is None:
            return score()
        folder = self.folder / f"{name}-{fingerprint(depends)[:16]}"
        if not _is_whole(folder):
            write_part(folder, score())
        return read_part(folder, schema)

    def forget(self) -> None:
        """All is published: delete the parts, those of earlier settings, too."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class BenchmarkFailed(UserError):
    """A benchmark could not be scored; others may be."""


class Failures:
    """Benchmarks that could not be read or scored, told when all others are: their scores are not lost."""

    def __init__(self, arguments: str, unreadable: Mapping[str, str]) -> None:
        """`arguments`: those of `stlm evaluate`. `unreadable`: benchmarks without items, and why."""
        self._arguments = arguments
        self._found = dict(unreadable)
        for name, reason in self._found.items():
            print(f"{name} cannot be scored, going on with what can: {reason}", file=sys.stderr)

    def add(self, benchmark: str, error: UserError) -> None:
        """A benchmark failed; where it fails at several checkpoints, the first is told."""
        print(f"going on without {benchmark}: {error}", file=sys.stderr)
        self._found.setdefault(benchmark, str(error))

    def tell(self, kept: Kept) -> None:
        """Raise UserError if there were any, with the reasons and how to go on."""
        if not self._found:
            return
        lines = [f"not scored: {', '.join(self._found)}; nothing was written to results/"]
        lines += [f"{name}: {reason}" for name, reason in self._found.items()]
        where = "" if kept.folder is None else f" (kept in {kept.folder})"
        again = f"once that is mended: stlm evaluate {self._arguments}"
        raise UserError("\n".join([*lines, f"{again}, which scores only what is missing{where}"]))


def write_part(folder: Path, part: Part) -> None:
    """Keep a part in a folder of its own, atomically."""
    with atomic_directory(folder) as temporary:
        pq.write_table(part.rows, temporary / _ROWS, compression="zstd")
        write_record(temporary / _RESULT, part.result, beside=[_ROWS])


def read_part(folder: Path, schema: pa.Schema) -> Part:
    """A part as it was kept; `schema` is that of its rows."""
    return Part(read_json(folder / _RESULT), pq.read_table(folder / _ROWS, schema=schema))


def _is_whole(folder: Path) -> bool:
    """Whether a part is kept in `folder`; a damaged one is not, and said to be."""
    if not folder.is_dir():
        return False
    try:
        read_json(folder / _RESULT)
        check_beside(folder / _RESULT, _ROWS)
    except UserError:
        print(f"{folder}: damaged: scoring {folder.name} again", file=sys.stderr)
        return False
    return True
