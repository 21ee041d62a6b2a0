"""Tiny training runs for benchmarks/gpu_checks.py, in the current folder, on the device or the CPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stlm.files import read_json, sha256, write_json
from stlm.model.config import ModelConfig
from stlm.study.runs import Run
from stlm.tokens.chunks import SYMBOLS
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenize import tokenize_corpus
from stlm.training import setup
from stlm.training.config import TrainingConfig
from stlm.training.devices import Device
from stlm.training.loop import train

MODEL = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn_width": 96, "context": 64, "dropout": 0.0}
BYTES = {"width": 32, "heads": 2, "ffn_width": 48}
RECIPE = {
    "steps": 12,
    "batch_size": 4,
    "accumulation": 2,
    "warmup_steps": 2,
    "learning_rate": 5e-3,
    "min_learning_rate": 1e-3,
    "validate_every": 6,
    "validation_bytes": 1000,
    "log_every": 1,
    "save_every": 4,
    "watch_every": 5,
    "precision": "float32",
    "compile": False,
}
# `stlm train` of the run in RUN, after the statements in BEFORE.
WORKER = """
import os, sys
import stlm.cli
from stlm.study.runs import Run
from stlm.training import loop
from stlm.training.loop import Trainer

def train(options):
    exec(os.environ.get("BEFORE", ""), globals())
    loop.train(Run.model_validate_json(os.environ["RUN"]))

stlm.cli.train = train
sys.exit(stlm.cli.main(["train", "check", "run"]))
"""


@cache
def on_cuda() -> bool:
    """Whether checks run on a GPU. Not asked when a module is loaded: CUDA, once begun, survives no fork."""
    return torch.cuda.is_available()


def device() -> str:
    """cuda or cpu."""
    return "cuda" if on_cuda() else "cpu"


def make_run(name: str, tokenizer: str = "bytes", data: dict | None = None, model=None, **training) -> Run:
    """A run on a few hundred sentences, tokenized where they are not yet."""
    folder, raw = Path("data/tokens/tiny"), Path("data/raw/tiny")
    if not raw.exists():
        raw.mkdir(parents=True)
        animals = ["cat", "dog", "hen", "fox", "owl"]
        texts = [f"{i} {animals[i % 5]}s and {i + 1} {animals[(i + 1) % 5]}s ran home." for i in range(600)]
        pq.write_table(pa.table({"text": texts}), raw / "train.parquet")
        path = raw / "train.parquet"
        entry = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "rows": len(texts)}
        about = {"name": "tiny", "kind": "corpus", "files": [entry], "text": "text", "group": None}
        write_json(raw / "source.json", about)
    if not (folder / tokenizer).exists():
        tokenize_corpus(raw, folder / tokenizer, tokenizer, folder, progress=False)
    model = {**MODEL, "vocab_size": SYMBOLS if model and "bytes" in model else 257, **(model or {})}
    return Run(
        study="check",
        name=name,
        variant=name,
        label=name,
        paper_row=None,
        seed=0,
        corpus="tiny",
        tokenizer=tokenizer,
        model=ModelConfig(**model),
        training=TrainingConfig(**{**RECIPE, **training}),
        data=DataConfig(**(data or {})),
    )


@contextmanager
def on_the_cpu():
    """Trainings here run on the CPU, the reference."""
    cpu = Device(torch.device("cpu"), "float32", False)
    with mock.patch.object(setup, "choose_device", return_value=cpu):
        yield


def losses(run: Run) -> list[float]:
    """The training loss of each step."""
    with (run.folder / "curve.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


def summary(run: Run) -> dict[str, Any]:
    """train.json."""
    return read_json(run.folder / "train.json")


def trained(run: Run) -> list[float]:
    """The losses of the run, trained here."""
    train(run)
    return losses(run)


def difference(one: list[float], other: list[float]) -> float:
    """The largest relative one of two curves."""
    assert len(one) == len(other), f"{len(one)} and {len(other)} steps"
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def worker(run: Run, *launcher: str, before: str = "", **environment: str) -> tuple[int, str]:
    """Train in a process (or in those of a `launcher`); its exit status and what it said."""
    Path("worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, *launcher, "worker.py"],
        env={**os.environ, "RUN": run.model_dump_json(), "BEFORE": before, **environment},
        capture_output=True,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stderr
