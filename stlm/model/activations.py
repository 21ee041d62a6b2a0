"""What the backward pass needs of a block's forward pass, in bytes. Needs no torch."""

from __future__ import annotations

from stlm.model.config import ModelConfig


def block_activations(model: ModelConfig, narrow: int) -> float:
    """Bytes per token that one block keeps for the backward pass, in training.

    The residual stream twice in float32; in `narrow` bytes a number the inputs of matrix products (two
    normalized inputs, attention's output, the hidden units) and of nonlinear parts (queries, keys and values;
    gate and up). A byte-level model's blocks are the core's, whose tokens are chunks.
    """
    key_value = model.kv_heads * model.head_width
    hidden = (3 if model.ffn == "swiglu" else 2) * model.ffn_width
    return 8 * model.width + narrow * (4 * model.width + 2 * key_value + hidden)
