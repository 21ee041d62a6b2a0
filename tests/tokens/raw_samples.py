"""Raw corpora as `fetch` leaves them, small."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.files import sha256, write_json

_draw = random.Random(0)
_SYLLABLES = ["ka", "to", "rin", "sel", "mo", "dra", "pe", "ish", "lun", "ver", "ü", "水", "'s", "42", "öd"]
WORDS = ["".join(_draw.choices(_SYLLABLES, k=_draw.choice([1, 2, 2, 3]))) for _ in range(500)]


def stories(n: int, seed: int = 0, words: int = 60) -> list[str]:
    """`n` different texts of made-up sentences, some with letters outside ASCII."""
    draw = random.Random(seed)
    return [f"Story {seed}/{i}. " + " ".join(draw.choices(WORDS, k=words)) + ".\n" for i in range(n)]


def write_raw(
    folder: Path, texts: Sequence[str | bytes | None], groups: Sequence[str] | None = None, files: int = 1
) -> Path:
    """Write data/raw/<name>/: parquet files with a column `text`, perhaps `title`, and source.json.

    Texts given as bytes become strings whether or not they are UTF-8: those who write parquet do not look.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, rows = [], -(-len(texts) // files)
    for number in range(files):
        here = slice(number * rows, (number + 1) * rows)
        path = folder / f"train-{number:05d}.parquet"
        content = [text.encode() if isinstance(text, str) else text for text in texts[here]]
        column = pa.array(content, pa.binary())
        columns = {"text": pa.Array.from_buffers(pa.string(), len(column), column.buffers())}
        if groups is not None:
            columns["title"] = pa.array(groups[here])
        pq.write_table(pa.table(columns), path)
        entries.append({"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size})
    record = {"name": folder.name, "kind": "corpus", "files": entries, "text": "text"}
    write_json(folder / "source.json", {**record, "group": None if groups is None else "title"})
    return folder


def write_splits(folder: Path, files: Mapping[str, Sequence[dict[str, object]]], **record: object) -> Path:
    """Write data/raw/<name>/ with a file of rows for each declared split, whose names `record` may follow."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for split, rows in files.items():
        path = folder / f"{split}-00000.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        entries.append(
            {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "split": split}
        )
    about = {"name": folder.name, "kind": "corpus", "files": entries, "text": "text", "group": None}
    write_json(folder / "source.json", about | record)
    return folder
