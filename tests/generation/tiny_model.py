"""Random models of every option, and one as a run's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stlm.model.build import Builder, build_model
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.tokens.chunks import SYMBOLS
from stlm.tokens.tokenizer import ByteTokenizer, Tokenizer
from stlm.training.checkpoints import checkpoint_name, save_checkpoint

CONTEXT = 16
OPTIONS = {
    "gqa": {},
    "one key/value head": {"kv_heads": 1},
    "mha": {"kv_heads": 4},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "qkv shift": {"qkv_shift": True},
    "qk norm": {"qk_norm": True},
    "value embeddings": {"value_embeddings": 2},
    "soft cap, untied": {"logit_softcap": 4.0, "tied": False},
    "layernorm, gelu": {"norm": "layernorm", "ffn": "gelu"},
    "shared layers, adapters": {
        **{"layers": 4, "sharing": {"what": "all", "order": "groups", "group": 2}, "lora": {"rank": 3}},
    },
    "low rank": {"low_rank": {"ffn": 5, "attention": 6}},
    "factorized embedding": {"embedding_rank": 9},
    "factorized, untied": {"embedding_rank": 9, "tied": False},
    "fast recipe": {"ffn": "relu2", "qk_norm": True, "qkv_shift": True, "value_embeddings": 1},
}


def random_model(vocab_size: int = 257, techniques: Sequence[Builder] = (), **options: object) -> Transformer:
    """A model whose next token depends on all of its parts: none of them is left at zero or one."""
    size = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 40, "context": CONTEXT}
    torch.manual_seed(1)
    model = build_model(ModelConfig(vocab_size=vocab_size, **(size | options)), techniques)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A bias before the head as large as the rest would have one token win always.
            parameter.copy_(torch.randn_like(parameter) * (0.05 if name.endswith("bias") else 0.4))
    return model.eval()


def save_run(folder: Path, tokenizer: Tokenizer | None = None, **options: object) -> Path:
    """Checkpoints of a random model at steps 1 and 2 in a run's `folder`; the last one's."""
    tokenizer = tokenizer or ByteTokenizer()
    model = random_model(SYMBOLS if "bytes" in options else tokenizer.vocab_size, **options)
    for step in (1, 2):
        checkpoint = folder / "checkpoints" / checkpoint_name(step)
        save_checkpoint(checkpoint, model, {"step": step, "tokens": step})
    tokenizer.save(folder / "checkpoints" / "tokenizer")
    return checkpoint
