"""The model that a config and techniques describe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from stlm.model.byte_transformer import ByteTransformer
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer


class Builder(Protocol):
    """What adds to a model: see `stlm.techniques.base.Technique`. Hashable, as counts of models are kept."""

    def build(self, model: Transformer) -> None:
        """Add modules to a new model, or wrap its blocks."""


def build_model(config: ModelConfig, techniques: Iterable[Builder] = ()) -> Transformer:
    """A new model of `config` (with its `vocab_size`), its weights drawn from torch's random numbers.

    `techniques` add to it in their order, after its own weights are drawn.
    """
    model = Transformer(config) if config.bytes is None else ByteTransformer(config)
    model.techniques = tuple(techniques)
    for technique in model.techniques:
        technique.build(model)
    return model
