"""Builds the model that a config and its techniques describe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from stlm.model.byte_transformer import ByteTransformer
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer


class Builder(Protocol):
    """An addition to a model, such as a technique (`stlm.techniques.base.Technique`).

    It must be hashable, because the counts of models are cached by it.
    """

    def build(self, model: Transformer) -> Transformer | None:
        """Add modules to a new model, or wrap its blocks; returns the model that replaces it, if one does."""


def build_model(config: ModelConfig, techniques: Iterable[Builder] = ()) -> Transformer:
    """Build a new model of `config`, with weights drawn from torch's random numbers.

    `config` must have its `vocab_size`. The `techniques` are added in order, after the model's own weights
    have been initialized.
    """
    model = Transformer(config) if config.bytes is None else ByteTransformer(config)
    model.techniques = tuple(techniques)
    for technique in model.techniques:
        model = technique.build(model) or model
    return model
