"""hf:NAME and hf:NAME:N in both engines: the model is fetched first, and names with colons are paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.engine

SHAPE = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "ffn_width": 32, "rope_theta": 10000.0}
SHAPE |= {"norm_eps": 1e-5, "context": 64, "tied": True, "vocab_size": 270}


def write_model(folder: Path) -> None:
    """A Llama with random weights and a vocabulary of bytes, some merges and the end of text, which is 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    merges = ["Ġ t", "h e", "Ġt he", "i n", "a n", "Ġ a", "e r", "o u", "Ġ w", "an d", "Ġa n", "r e", "in g"]
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [merge.replace(" ", "") for merge in merges]
    vocabulary = {word: id_ for id_, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_both_fetch_the_model_and_tokenize_with_it(fresh, tmp_path: Path) -> None:
    project = fresh.copy(tmp_path / "project")
    write_model(tmp_path / "model")
    files = {name: name for name in ("model.safetensors", "config.json", "tokenizer.json")}
    entry = {
        "description": "tiny",
        "licence": "Apache-2.0",
        "origin": "made here",
        "training_tokens": 10,
        "prefix": "<|endoftext|>",
        "model": SHAPE,
        "sources": [{"kind": "folder", "path": str(tmp_path / "model"), "files": files}],
    }
    (project.folder / "params" / "models.yaml").write_text(yaml.dump({"tiny": entry}))
    project.edit("tokenizer: bytes", "tokenizer: hf:tiny:262")
    project.edit("positions: learned}\n", "positions: learned}\n    tokenizer: hf:tiny\n")
    project.run("stlm", "use", "smoke")
    names = ["hf:tiny", "hf:tiny:262"]
    tokens = [f"data/tokens/synthetic/{name}" for name in names]
    commands = ["stlm fetch synthetic", "stlm fetch tiny"]
    commands += [f"stlm tokenize synthetic {name}" for name in names]
    by_dvc = project.copy(tmp_path / "by_dvc")
    assert project.snakemake(*tokens) == sorted(commands)
    assert project.snakemake("-n", *tokens) == []
    stages = ["tokenize-synthetic-hf-tiny-all", "tokenize-synthetic-hf-tiny-262"]
    printed = by_dvc.run("dvc", "repro", *stages)
    assert all(f"> {command}" in printed for command in commands)
    assert "up to date" in by_dvc.run("dvc", "status", *stages)
    for folder in tokens:
        metas = [(place.folder / folder / "meta.json").read_text() for place in (project, by_dvc)]
        assert metas[0] == metas[1]
