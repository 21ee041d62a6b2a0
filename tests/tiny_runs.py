"""Tiny runs on the counting corpus: fixtures for conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from counting_corpus import write_tokens

from stlm.model.config import ModelConfig
from stlm.study.runs import Run
from stlm.training.config import TrainingConfig


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
            "validation_bytes": 500,
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
