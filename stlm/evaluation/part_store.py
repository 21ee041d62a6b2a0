"""Keeps finished parts of an evaluation, perplexity and each checkpoint's benchmarks, until all are done.

A part is stored as soon as it is scored, under a hash of everything that its scores depend on. An evaluation
that was killed, or in which a benchmark failed, therefore continues with what is missing; after one benchmark
was fetched anew, only that benchmark is scored.
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
from stlm.integrity import check_listed

_RESULT = "result.json"
_ROWS = "rows.parquet"


class Part(NamedTuple):
    """A result, as in evaluation.json, and its rows of items.parquet or documents.parquet."""

    result: dict[str, Any]
    rows: pa.Table


class PartStore:
    """The parts stored in `folder`, which `forget` deletes. Without a folder, nothing is stored."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def part(
        self, name: str, depends: Mapping[str, Any], score: Callable[[], Part], schema: pa.Schema
    ) -> Part:
        """The part `name`; `score` computes it unless an intact one with the same `depends` is stored.

        Its rows have `schema`.
        """
        if self.folder is None:
            return score()
        folder = self.folder / f"{name}-{fingerprint(depends)[:16]}"
        if not _is_whole(folder):
            write_part(folder, score())
        return read_part(folder, schema)

    def forget(self) -> None:
        """Delete all parts, including those of earlier settings, after everything is published."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class BenchmarkFailed(UserError):
    """A benchmark could not be scored; others may still be."""


class Failures:
    """Benchmarks that could not be read or scored, reported after all others, so no scores are lost."""

    def __init__(self, arguments: str, unreadable: Mapping[str, str]) -> None:
        """`arguments`: those of `stlm evaluate`. `unreadable`: benchmarks without items, with the reasons."""
        self._arguments = arguments
        self._found = dict(unreadable)
        for name, reason in self._found.items():
            print(f"{name} cannot be scored, going on with what can: {reason}", file=sys.stderr)

    def add(self, benchmark: str, error: UserError) -> None:
        """Record that a benchmark failed; if it fails at several checkpoints, the first is reported."""
        print(f"going on without {benchmark}: {error}", file=sys.stderr)
        self._found.setdefault(benchmark, str(error))

    def raise_if_any(self, store: PartStore) -> None:
        """Raise UserError if any failed, with the reasons and how to continue."""
        if not self._found:
            return
        lines = [f"not scored: {', '.join(self._found)}; nothing was written to results/"]
        lines += [f"{name}: {reason}" for name, reason in self._found.items()]
        location = "" if store.folder is None else f" (kept in {store.folder})"
        again = f"once that is mended: stlm evaluate {self._arguments}"
        raise UserError("\n".join([*lines, f"{again}, which scores only what is missing{location}"]))


def write_part(folder: Path, part: Part) -> None:
    """Store a part in its own folder, atomically."""
    with atomic_directory(folder) as temporary:
        pq.write_table(part.rows, temporary / _ROWS, compression="zstd")
        write_record(temporary / _RESULT, part.result, lists=[_ROWS])


def read_part(folder: Path, schema: pa.Schema) -> Part:
    """Read a stored part; its rows have `schema`."""
    return Part(read_json(folder / _RESULT), pq.read_table(folder / _ROWS, schema=schema))


def _is_whole(folder: Path) -> bool:
    """Whether `folder` holds an intact part; a damaged one is reported."""
    if not folder.is_dir():
        return False
    try:
        read_json(folder / _RESULT)
        check_listed(folder / _RESULT, _ROWS)
    except UserError:
        print(f"{folder}: damaged: scoring {folder.name} again", file=sys.stderr)
        return False
    return True
