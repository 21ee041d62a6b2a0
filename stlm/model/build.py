"""The model that a config describes."""

from __future__ import annotations

from stlm.model.byte_transformer import ByteTransformer
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer


def build_model(config: ModelConfig) -> Transformer:
    """A new model of `config` (with its `vocab_size`), its weights drawn from torch's random numbers."""
    return Transformer(config) if config.bytes is None else ByteTransformer(config)
