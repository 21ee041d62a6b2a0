"""A tiny run with checkpoints, its tokens from the real stage, and two small benchmarks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import MODEL, save_weights, sentences, write_benchmarks

from stlm.files import sha256, write_json
from stlm.study.runs import Run
from stlm.tokens.tokenize import tokenize_corpus
from stlm.training.config import TrainingConfig


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """data/ with tokens and benchmarks, made once."""
    root = tmp_path_factory.mktemp("evaluation")
    corpus = root / "data" / "raw" / "tiny"
    corpus.mkdir(parents=True)
    texts = sentences(400)
    path = corpus / "train.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    entry = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "rows": len(texts)}
    write_json(
        corpus / "source.json",
        {"name": "tiny", "kind": "corpus", "files": [entry], "text": "text", "group": None},
    )
    tokenize_corpus(corpus, root / "data" / "tokens" / "tiny" / "bytes", "bytes", root, progress=False)
    write_benchmarks(root / "data" / "raw")
    return root / "data"


@pytest.fixture
def run(tmp_path, monkeypatch, prepared) -> Run:
    """A run in a working directory of its own, with checkpoints at steps 10, 20 and 30."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared, "data")
    run = Run(
        study="tiny",
        name="tiny-run",
        variant="baseline",
        label="Tiny",
        paper_row=None,
        seed=0,
        corpus="tiny",
        tokenizer="bytes",
        model=MODEL,
        training=TrainingConfig(steps=30, warmup_steps=2, batch_size=4),
    )
    for step in (10, 20, 30):
        save_weights(run, step)
    shutil.copytree(run.tokens_folder / "tokenizer", run.folder / "checkpoints" / "tokenizer")
    return run
