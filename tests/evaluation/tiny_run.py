"""Contents of a tiny run: its model's weights, its corpus and two small benchmarks."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.tokens.tokenizer import Tokenizer
from stlm.training.checkpoints import checkpoint_name, save_checkpoint

MODEL = ModelConfig(
    layers=1, width=32, heads=2, kv_heads=1, ffn="swiglu", ffn_width=48, context=64, vocab_size=257
)
ANIMALS = ["cat", "dog", "hen", "fox", "owl"]


def sentences(count: int) -> list[str]:
    return [
        f"{i} {ANIMALS[i % 5]}s, né {ANIMALS[i % 3]}s, ran home to eat. " * (i % 4 + 1) for i in range(count)
    ]


def write_benchmarks(raw: Path) -> None:
    rng = random.Random(0)
    pairs = [
        {
            "sentence_good": f"The {rng.choice(ANIMALS)}s run to {rng.choice(ANIMALS)}s {i}.",
            "sentence_bad": f"The {rng.choice(ANIMALS)} run to {rng.choice(ANIMALS)}s {i}.",
            "UID": f"paradigm_{i % 3}",
            "linguistics_term": f"phenomenon_{i % 3 // 2}",
        }
        for i in range(40)
    ]
    pairs[7]["sentence_bad"] = pairs[7]["sentence_good"]  # a tie, whatever the model
    choices = [
        {
            "ctx": f"The {rng.choice(ANIMALS)} was {'very ' * (i % 15)}hungry.",
            "endings": [f"It ate {i} {animal}s{' again' * k}." for k, animal in enumerate(ANIMALS[:4])],
            "label": rng.randrange(4),
            "kind": "food",
        }
        for i in range(30)
    ]
    for name, file, rows in (
        ("synthetic_pairs", "train", pairs),
        ("synthetic_choice", "validation", choices),
    ):
        (raw / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), raw / name / f"{file}.parquet")


def save_weights(run: Run, step: int, scale: float = 4.0) -> None:
    """Random weights, large enough that options differ, as the checkpoint at `step`."""
    torch.manual_seed(step)
    model = Transformer(run.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() == 2 else 1)
    folder = run.folder / "checkpoints" / checkpoint_name(step)
    save_checkpoint(folder, model, {"step": step, "tokens": step * 256})


def save_llama(folder: Path, tokenizer: Tokenizer, context: int) -> Path:
    """A checkpoint that is a Llama, of random weights and that tokenizer, in a run's `folder`; its path."""
    torch.manual_seed(2)
    size = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": context}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **size))
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that options differ.
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    checkpoint = folder / "checkpoints" / checkpoint_name(1)
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    tokenizer.save(checkpoint.parent / "tokenizer")
    return checkpoint
