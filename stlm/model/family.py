"""Models of a given size by a fixed rule, and their cost."""

from __future__ import annotations

import math

from stlm.model.byte_config import MOST_LAYERS
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts

# The paper's three sizes, in parameters.
FAMILY = {"10M": 10_000_000, "50M": 50_000_000, "100M": 100_000_000}

# The proportions of the paper's 50M model (Table 1); the width per layer is that of GPT-2 small.
HEAD_WIDTH = 32
FFN_RATIO = 3
WIDTH_PER_LAYER = 64
_WIDTHS = range(64, 2049, 64)
_TOLERANCE = 0.1
# Bytes for a parameter during training with AdamW: weight, gradient and two moments in float32.
TRAINING_BYTES = 16


def kv_heads(heads: int) -> int | None:
    """Key/value heads for `heads` query heads: each serves four or three; None where neither divides them."""
    return next((heads // group for group in (4, 3) if heads % group == 0), None)


def propose(parameters: float, vocab_size: int = 50257, context: int = 512) -> ModelConfig:
    """The Modern Transformer (paper, section 4) with about `parameters` parameters.

    The rule: the width is a multiple of 64; heads have width 32; a key/value head serves four query heads, or
    three where four do not divide them (other widths are skipped); SwiGLU has three times the width; the
    embedding is tied. Among the widths and depths within 10% of `parameters`, width / layers is nearest to
    64.

    Raises ValueError if no model is within 10%.
    """
    found: list[tuple[float, float, ModelConfig]] = []
    for width in _WIDTHS:
        shared = kv_heads(width // HEAD_WIDTH)
        if shared is None:
            continue
        one, two = (
            ModelConfig(
                layers=layers,
                width=width,
                heads=width // HEAD_WIDTH,
                kv_heads=shared,
                ffn_width=FFN_RATIO * width,
                context=context,
                vocab_size=vocab_size,
            )
            for layers in (1, 2)
        )
        first, layer = parameter_counts(one).total, parameter_counts(two).total - parameter_counts(one).total
        # The depths whose models are within the tolerance, up to the most layers that a config allows.
        least, most = (parameters * (1 + sign * _TOLERANCE) for sign in (-1, 1))
        fewest = max(1, 1 + math.ceil((least - first) / layer))
        deepest = min(MOST_LAYERS, 1 + math.floor((most - first) / layer))
        if fewest <= deepest:
            layers = min(max(width // WIDTH_PER_LAYER, fewest), deepest)
            off = abs(math.log((first + (layers - 1) * layer) / parameters))
            shape = abs(math.log(width / layers / WIDTH_PER_LAYER))
            found.append((shape, off, one.model_copy(update={"layers": layers})))
    if not found:
        raise ValueError(
            f"no model of the rule has {parameters:,.0f} parameters, within {_TOLERANCE:.0%}, with a "
            f"vocabulary of {vocab_size:,} tokens"
        )
    return min(found, key=lambda candidate: candidate[:2])[2]
