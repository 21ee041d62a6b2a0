"""Corpora of a folder, fetched: what the tests of formats, encodings and names have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stlm.corpora.config import CorpusEntry
from stlm.corpora.fetch import fetch
from stlm.errors import UserError

ENTRY_KEYS = {"text", "group", "split"}


def folder_entry(folder: Path, files: Any = "**/*", **keys: Any) -> CorpusEntry:
    """A corpus of ``folder``; ``files`` is of train, or maps splits."""
    of_entry = {key: keys.pop(key) for key in ENTRY_KEYS & keys.keys()}
    files = files if isinstance(files, dict) else {"train": files}
    source = {"kind": "folder", "path": str(folder), "files": files, **keys}
    return CorpusEntry.model_validate(
        {"name": "own", "description": "", "licence": "", "sources": [source], **of_entry}
    )


def fetched(folder: Path, files: Any = "**/*", **keys: Any) -> dict[str, Any]:
    """source.json of the corpus, fetched beside ``folder``."""
    return fetch(folder_entry(folder, files, **keys), folder.parent / "raw" / "own")


def rows(folder: Path, split: str = "train") -> dict[str, list[Any]]:
    """The columns that were fetched for ``split``, of all its files in order."""
    found: dict[str, list[Any]] = {}
    for path in sorted((folder.parent / "raw" / "own").glob(f"{split}-*.parquet")):
        for name, column in pq.read_table(path).to_pydict().items():
            found.setdefault(name, []).extend(column)
    return found


def texts(folder: Path, files: Any = "**/*", **keys: Any) -> list[Any]:
    """The documents of train."""
    fetched(folder, files, **keys)
    return rows(folder)["text"]


def refused(folder: Path, files: Any = "**/*", **keys: Any) -> str:
    """What a fetch that cannot be says; nothing is left of it."""
    with pytest.raises(UserError) as raised:
        fetched(folder, files, **keys)
    assert not (folder.parent / "raw" / "own").exists()
    return str(raised.value)
