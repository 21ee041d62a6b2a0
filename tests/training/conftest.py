"""A corpus of a few hundred counting sentences, tokenized by the real stage, and runs on it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.files import sha256, write_json
from stlm.model.config import ModelConfig
from stlm.study import Run
from stlm.tokens.tokenize import tokenize_corpus
from stlm.training.config import TrainingConfig


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


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory) -> Path:
    """data/tokens/tiny/bytes, made once."""
    return write_tokens(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_run(tmp_path, monkeypatch, tokens_folder):
    """A function that gives a tiny run in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "data" / "tokens" / "tiny" / "bytes"
    target.parent.mkdir(parents=True)
    target.symlink_to(tokens_folder)

    def make(name="tiny-run", model=None, **training) -> Run:
        model = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "ffn_width": 48, **(model or {})}
        recipe = {
            "steps": 12,
            "batch_size": 4,
            "accumulation": 1,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-3,
            "validate_every": 4,
            "validation_tokens": 500,
            "log_every": 2,
            "save_every": 3,
            "precision": "float32",
        }
        return Run(
            study="test",
            name=name,
            variant=name,
            label=name,
            paper_row=None,
            seed=0,
            corpus="tiny",
            tokenizer="bytes",
            model=ModelConfig(**{"context": 32, "vocab_size": 257, "dropout": 0.1, **model}),
            training=TrainingConfig(**{**recipe, **training}),
        )

    return make
