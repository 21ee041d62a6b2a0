"""Tiny runs with techniques, which can be trained and evaluated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from counting_corpus import write_tokens
from tiny_run import write_benchmarks
from tiny_runs import make_run, tokens_folder

from stlm.model.config import ModelConfig
from stlm.study.runs import Run
from stlm.training.config import TrainingConfig

__all__ = ["make_run", "make_technique_run", "prepared", "tokens_folder"]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with tokens and benchmarks, made once."""
    root = tmp_path_factory.mktemp("techniques")
    tokens = write_tokens(root / "made")
    shutil.copytree(tokens, root / "data" / "tokens" / "tiny" / "bytes")
    write_benchmarks(root / "data" / "raw")
    return root / "data"


@pytest.fixture
def make_technique_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path) -> Callable[..., Run]:
    """A function that gives a tiny run in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    os.symlink(prepared, tmp_path / "data")

    def make(name: str = "run", model=None, techniques=(), data=None, **training) -> Run:
        sizes = {"layers": 4, "width": 32, "heads": 2, "kv_heads": 1, "ffn_width": 48, "context": 32}
        recipe = {"steps": 8, "batch_size": 4, "accumulation": 1, "warmup_steps": 2, "learning_rate": 1e-2}
        recipe |= {"min_learning_rate": 1e-3, "validate_every": 4, "validation_bytes": 500, "log_every": 2}
        recipe |= {"save_every": 3, "precision": "float32"}
        return Run(
            study="test",
            name=name,
            variant=name,
            label=name,
            paper_row=None,
            seed=0,
            corpus="tiny",
            tokenizer="bytes",
            model=ModelConfig(**{"vocab_size": 257, **sizes, **(model or {})}),
            training=TrainingConfig(**(recipe | training)),
            techniques={one.key(): one for one in techniques},
            **({"data": data} if data else {}),
        )

    return make
