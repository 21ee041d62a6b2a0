"""A made model of Llama's layout as `stlm fetch` writes it, its entry, and text in its tokens."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from counting_corpus import sentences, write_corpus
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from stlm.files import sha256, write_json
from stlm.model.config import ModelConfig
from stlm.model.llama import llama_config, llama_weights
from stlm.model.transformer import Transformer
from stlm.tokens.tokenize import tokenize_corpus

EOT = "<|endoftext|>"
VOCABULARY = 300
MODEL = {
    **{"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 64, "tied": True},
    **{"rope_theta": 500.0, "norm_eps": 1e-6},
}
ENTRY = """\
made:
  description: a made model
  licence: MIT
  origin: nowhere
  training_tokens: 1000
  prefix: <|endoftext|>
  model: {layers: 3, width: 32, heads: 4, kv_heads: 2, ffn_width: 48, rope_theta: 500.0, norm_eps: 1.0e-6,
          context: 64, tied: true, vocab_size: 300}
  sources:
    - kind: folder
      path: elsewhere
      files: {model.safetensors: model.safetensors, config.json: config.json, tokenizer.json: tokenizer.json}
"""


def made_model() -> Transformer:
    torch.manual_seed(7)
    model = Transformer(ModelConfig(**MODEL, vocab_size=VOCABULARY)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter) if "norm" in name else 5 * parameter)
    return model


def write_published(root: Path) -> Transformer:
    """params/models.yaml and data/raw/made/ below `root`; the model."""
    (root / "params").mkdir(exist_ok=True)
    (root / "params" / "models.yaml").write_text(ENTRY)
    folder, model = root / "data" / "raw" / "made", made_model()
    folder.mkdir(parents=True)
    save_file(llama_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {**llama_config(model.config), "eos_token_id": 0, "bos_token_id": 0})
    (folder / "tokenizer.json").write_text(_tokenizer())
    files = [
        {"path": file.name, "sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
    ]
    write_json(folder / "source.json", {"name": "made", "kind": "model", "prefix": EOT, "files": files})
    return model


def _tokenizer() -> str:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences(400), trainer)
    content = json.loads(bpe.to_str())
    assert len(content["model"]["vocab"]) == VOCABULARY
    return json.dumps(content)


def write_published_tokens(root: Path, *names: str) -> None:
    """data/tokens/tiny/NAME for each tokenizer, below `root`."""
    write_corpus(root / "data" / "raw" / "tiny", sentences(400))
    for name in names:
        tokenize_corpus(
            root / "data" / "raw" / "tiny",
            root / "data" / "tokens" / "tiny" / name,
            name,
            root / "data" / "raw" / "made",
            progress=False,
        )
