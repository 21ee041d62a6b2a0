"""A corpus of a few hundred counting sentences, tokenized by the real stage."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.files import sha256, write_json
from stlm.tokens.tokenize import tokenize_corpus


def sentences(count: int) -> list[str]:
    animals = ["cat", "dog", "hen", "fox", "owl"]
    return [f"{i} {animals[i % 5]}s and {i + 1} {animals[(i + 1) % 5]}s ran home." for i in range(count)]


def write_corpus(folder: Path, texts: list[str]) -> None:
    """data/raw/<name>/ as `stlm fetch` writes it."""
    folder.mkdir(parents=True)
    path = folder / "train.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    entry = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "rows": len(texts)}
    write_json(
        folder / "source.json",
        {"name": folder.name, "kind": "corpus", "files": [entry], "text": "text", "group": None},
    )


def write_tokens(root: Path) -> Path:
    """data/tokens/tiny/bytes, below `root`."""
    write_corpus(root / "raw" / "tiny", sentences(400))
    tokenize_corpus(root / "raw" / "tiny", root / "tiny" / "bytes", "bytes", root, progress=False)
    return root / "tiny" / "bytes"
