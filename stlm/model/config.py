"""What a model is: its hyper-parameters, its size and its cost. Needs no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelConfig(BaseModel):
    """A decoder-only transformer (paper, Table 1). Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: int = Field(8, ge=1, description="Transformer blocks.")
    width: int = Field(512, ge=1, description="Model dimension (the residual stream's).")
    heads: int = Field(16, ge=1, description="Query heads. Must divide `width`.")
    kv_heads: int = Field(
        4,
        ge=1,
        description="Key/value heads, each shared by `heads / kv_heads` query heads (grouped-query "
        "attention). Must divide `heads`.",
    )
    ffn: Literal["swiglu", "gelu", "relu2"] = Field(
        "swiglu", description="Kind of feed-forward network; `relu2`: squared ReLU, two matrices as `gelu`."
    )
    ffn_width: int = Field(1536, ge=1, description="Hidden units of the feed-forward network.")
    positions: Literal["rope", "sinusoidal", "learned"] = Field(
        "rope",
        description="Positions: rotary (in attention), or sinusoidal or learned (added to the embedding).",
    )
    rope_theta: float = Field(
        10000.0, gt=0, description="Base of the rotary wavelengths; used by `rope` alone."
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="Kind of normalization, before each part."
    )
    norm_eps: float = Field(1e-5, gt=0, description="Added to the variance in each normalization.")
    context: int = Field(512, ge=2, description="Longest sequence, in tokens.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of activations dropped in training, after the embedding and each sub-layer.",
    )
    attention_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of attention weights dropped in training. On a CPU it is slow: it excludes "
        "fused attention.",
    )
    tied: bool = Field(True, description="Whether embedding and output head are one matrix.")
    qk_norm: bool = Field(
        False, description="Whether queries and keys are normalized, head by head, before the products."
    )
    qkv_shift: bool = Field(
        False,
        description="Whether queries, keys and values get those of the token before added, each channel "
        "times a learned weight.",
    )
    logit_softcap: float = Field(
        0.0, ge=0, description="Bound of the logits, by its tanh: c tanh(logit / c); 0 bounds none."
    )
    zero_init: bool = Field(
        False,
        description="Whether the projections into the residual stream start at zero: at first each block is "
        "the identity.",
    )
    value_embeddings: int = Field(
        0,
        ge=0,
        description="Layers, the last ones, whose attention values get an embedding of the token added. Each "
        "is a table of its own, counted among the embedding parameters. At most `layers`.",
    )
    vocab_size: int | None = Field(
        None, ge=2, description="Tokens in the vocabulary. Taken from the tokenizer; leave it out."
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.width % self.heads:
            fit = [h for h in range(1, self.width + 1) if self.width % h == 0]
            near = min(fit, key=lambda h: abs(h - self.heads))
            raise ValueError(
                f"heads: {self.heads} does not divide width: {self.width} (nearest that does: {near})"
            )
        if self.heads % self.kv_heads:
            fit = [h for h in range(1, self.heads + 1) if self.heads % h == 0]
            near = min(fit, key=lambda h: abs(h - self.kv_heads))
            raise ValueError(
                f"kv_heads: {self.kv_heads} does not divide heads: {self.heads} (nearest that does: {near})"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"positions: rope rotates pairs, so width / heads must be even; it is {self.head_width}"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"width: {self.width} is odd; sinusoidal positions come in sine/cosine pairs")
        if self.value_embeddings > self.layers:
            raise ValueError(
                f"value_embeddings: {self.value_embeddings} is more than the model has layers: {self.layers}"
            )
        return self

    @property
    def head_width(self) -> int:
        """Dimension of one attention head."""
        return self.width // self.heads


class ParameterCounts(NamedTuple):
    """Trainable parameters: all, those of embeddings and an untied head, and the rest."""

    total: int
    embedding: int
    non_embedding: int


def _vectors(config: ModelConfig) -> int:
    """Parameters that are no part of a matrix: gains and biases of normalizations, weights of channels."""
    # LayerNorm here has a gain and a bias, RMSNorm a gain.
    norm = config.width * (2 if config.norm == "layernorm" else 1)
    qk_gains = 2 * config.head_width if config.qk_norm else 0
    shifts = config.width + 2 * config.kv_heads * config.head_width if config.qkv_shift else 0
    return config.layers * (2 * norm + qk_gains + shifts) + norm


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of ``config`` (with its ``vocab_size``) without building the model."""
    if config.vocab_size is None:
        raise ValueError("parameter_counts needs a config with its vocab_size")
    kv_width = config.kv_heads * config.head_width
    attention = 2 * config.width * config.width + 2 * config.width * kv_width
    ffn = (3 if config.ffn == "swiglu" else 2) * config.width * config.ffn_width
    embedding = config.vocab_size * config.width * (1 if config.tied else 2)
    embedding += config.value_embeddings * config.vocab_size * kv_width
    if config.positions == "learned":
        embedding += config.context * config.width
    rest = config.layers * (attention + ffn) + _vectors(config)
    return ParameterCounts(embedding + rest, embedding, rest)


def training_flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations a training token costs, forward and backward.

    Six for each weight that a token is multiplied with (the head's matrix included, embedding look-ups not),
    plus attention's two products over an average of half the context (Kaplan et al. 2020, appendix B; the
    causal half counted). The optimizer's own work is not in it.
    """
    counts = parameter_counts(config)
    matrices = counts.non_embedding - _vectors(config) + config.vocab_size * config.width
    attention = 2 * config.layers * (config.context / 2) * config.width
    return 6.0 * (matrices + attention)
