"""The hyper-parameters of a model. Needs no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stlm.model.byte_config import MOST_LAYERS, ByteConfig, check_divides
from stlm.model.reduction import PARTS, LoraConfig, LowRankConfig, SharingConfig

# Mean bytes of a chunk where the corpus is not known yet: about those of words or byte-pair tokens.
CHUNK_BYTES = 4.5


class ModelConfig(BaseModel):
    """A decoder-only transformer (paper, Table 1). Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: int = Field(8, ge=1, le=MOST_LAYERS, description="Transformer blocks.")
    width: int = Field(512, ge=1, description="Model dimension, the width of the residual stream.")
    heads: int = Field(16, ge=1, description="Query heads. Must divide `width`.")
    kv_heads: int = Field(
        4,
        ge=1,
        description="Key/value heads, each shared by `heads / kv_heads` query heads (grouped-query "
        "attention). Must divide `heads`.",
    )
    ffn: Literal["swiglu", "gelu", "relu2"] = Field(
        "swiglu",
        description="Kind of feed-forward network; `relu2`: squared ReLU, with two matrices like `gelu`.",
    )
    ffn_width: int = Field(1536, ge=1, description="Hidden units of the feed-forward network.")
    positions: Literal["rope", "sinusoidal", "learned"] = Field(
        "rope",
        description="Positions: rotary (in attention), or sinusoidal or learned (added to the embedding).",
    )
    rope_theta: float = Field(
        10000.0, gt=0, description="Base of the rotary wavelengths; used by `rope` only."
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
    tied: bool = Field(True, description="Whether the embedding and the output head share one matrix.")
    qk_norm: bool = Field(
        False, description="Whether queries and keys are normalized, head by head, before the products."
    )
    qkv_shift: bool = Field(
        False,
        description="Whether the previous token's queries, keys and values are added to a token's, with a "
        "learned weight for each channel.",
    )
    logit_softcap: float = Field(
        0.0, ge=0, description="Bound c of the logits: c tanh(logit / c); 0: no bound."
    )
    zero_init: bool = Field(
        False,
        description="Whether the projections into the residual stream start at zero: at first each block is "
        "the identity.",
    )
    value_embeddings: int = Field(
        0,
        ge=0,
        description="Number of last layers whose attention values get an embedding of the token added. Each "
        "layer has its own table, counted among the embedding parameters. At most `layers`.",
    )
    # Omitted from records when null, so that older configs compare equal.
    sharing: SharingConfig | None = Field(
        None,
        description="Sharing of matrices between layers; see `model.sharing`. null: none.",
        exclude_if=lambda value: value is None,
    )
    lora: LoraConfig | None = Field(
        None,
        description="Separate adapters in each layer, on shared or other matrices; see `model.lora`. null: "
        "none.",
        exclude_if=lambda value: value is None,
    )
    low_rank: LowRankConfig | None = Field(
        None,
        description="Blocks' matrices as products of two matrices of lower rank; see `model.low_rank`. "
        "null: none.",
        exclude_if=lambda value: value is None,
    )
    embedding_rank: int | None = Field(
        None,
        ge=1,
        description="Factorized embedding (ALBERT, Lan et al. 2020): a table of vectors of this length, and "
        "a matrix that maps them to `width`; a tied head uses both, an untied one has two more. It must save "
        "weights. null: a table of vectors of `width`.",
        exclude_if=lambda value: value is None,
    )
    bytes: ByteConfig | None = Field(
        None,
        description="Byte-level: chunks of bytes instead of tokens; see `model.bytes` and docs/bytes.md. "
        "null: an embedding for each token.",
        exclude_if=lambda value: value is None,
    )
    vocab_size: int | None = Field(
        None, ge=2, description="Tokens in the vocabulary. Taken from the tokenizer; leave it out."
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        check_divides("heads", self.heads, "width", self.width)
        check_divides("kv_heads", self.kv_heads, "heads", self.heads)
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
        self._check_sharing()
        self._check_ranks()
        self._check_bytes()
        return self

    def _check_bytes(self) -> None:
        """Refuse keys that act on tables of tokens, which a byte-level model lacks."""
        if self.bytes is None:
            return
        for key, without in (("value_embeddings", 0), ("logit_softcap", 0.0), ("embedding_rank", None)):
            if getattr(self, key) != without:
                raise ValueError(f"{key}: {getattr(self, key)}: a byte-level model (bytes) has none")

    def _check_sharing(self) -> None:
        if self.sharing is None:
            return
        for key in ("group", "units"):
            found = getattr(self.sharing, key)
            if found is not None and found > self.layers:
                raise ValueError(f"sharing.{key}: {found} is more than the model has layers: {self.layers}")
        if len(set(self.sharing.source_layers(self.layers))) < self.layers:
            return
        if self.layers == 1:
            raise ValueError("sharing: one layer has none to share with; leave sharing out")
        if self.sharing.order == "cyclic":
            raise ValueError(
                f"sharing.units: {self.sharing.units} for {self.layers} layers shares nothing (at most "
                f"{self.layers - 1} does)"
            )
        raise ValueError(
            f"sharing.order: sandwich leaves {self.layers} layers nothing to share, as the first and the "
            "last are their own (it needs layers: 4; order: one shares all)"
        )

    def _check_ranks(self) -> None:
        """Refuse factors that are as large as the matrix, and adapters of full rank."""
        if self.embedding_rank is not None:
            rank, vocabulary = self.embedding_rank, self.vocab_size
            if rank >= self.width:
                raise ValueError(f"embedding_rank: {rank} is no lower rank; it must be below {self.width}")
            # The vocabulary is None until the tokenizer is known.
            if vocabulary is not None:
                _check_saves("embedding_rank", rank, "a table", (vocabulary, self.width))
        for part, matrices in self.matrices.items():
            for name, shape in matrices.items():
                rank = self.rank(part, name)
                if rank is not None:
                    _check_saves(f"low_rank.{self.low_rank.key(part, name)}", rank, name, shape)
                if self.lora and part in self.lora.parts and self.lora.rank >= min(shape):
                    raise ValueError(
                        f"lora.rank: {self.lora.rank} is no lower rank in {part}; it must be below "
                        f"{min(shape)}"
                    )

    @property
    def head_width(self) -> int:
        """Dimension of one attention head."""
        return self.width // self.heads

    @property
    def matrices(self) -> dict[str, dict[str, tuple[int, int]]]:
        """The matrices of a block by part and name, as [outputs, inputs]; a joint product is one matrix."""
        width, key_value = self.width, self.kv_heads * self.head_width
        reads = (
            {"gate_up": (2 * self.ffn_width, width)}
            if self.ffn == "swiglu"
            else {"up": (self.ffn_width, width)}
        )
        return {
            "attention": {"qkv": (width + 2 * key_value, width), "out": (width, width)},
            "ffn": {**reads, "down": (width, self.ffn_width)},
        }

    def byte_blocks(self, layers: int) -> ModelConfig:
        """The config of a byte transformer: this model's blocks at byte size, without sharing or dropout."""
        return ModelConfig(
            layers=layers,
            width=self.bytes.width,
            heads=self.bytes.heads,
            kv_heads=self.bytes.heads,
            ffn=self.ffn,
            ffn_width=self.bytes.ffn_width,
            positions="sinusoidal",
            norm=self.norm,
            norm_eps=self.norm_eps,
            qk_norm=self.qk_norm,
            qkv_shift=self.qkv_shift,
            zero_init=self.zero_init,
            vocab_size=self.vocab_size,
        )

    @property
    def source_layers(self) -> dict[str, tuple[int, ...]]:
        """For each part of a block and each layer, from 0, the first layer that uses the same matrices."""
        unshared = tuple(range(self.layers))
        shared = self.sharing.parts if self.sharing else ()
        return {
            part: self.sharing.source_layers(self.layers) if part in shared else unshared for part in PARTS
        }

    def rank(self, part: str, name: str) -> int | None:
        """The rank of the matrix `name` of a part, `attention` or `ffn` (see `matrices`); None: full."""
        key = self.low_rank.key(part, name) if self.low_rank else None
        return None if key is None else getattr(self.low_rank, key)

    def adapters(self, part: str) -> LoraConfig | None:
        """The adapters on a part's matrices; None: it has none."""
        return self.lora if self.lora and part in self.lora.parts else None


def _check_saves(key: str, rank: int, name: str, shape: tuple[int, int]) -> None:
    """Raise ValueError if two factors of that rank have at least as many weights as the matrix."""
    rows, columns = shape
    if rank * (rows + columns) >= rows * columns:
        most = (rows * columns - 1) // (rows + columns)
        raise ValueError(
            f"{key}: {rank} saves nothing in {name} ({rows:,} x {columns:,}), whose two factors would have "
            f"{rank * (rows + columns):,} weights, not {rows * columns:,}; it must be at most {most}"
        )


class ParameterCounts(NamedTuple):
    """Parameters of the model that is scored, shared ones counted once: all, embeddings with an untied head,
    the rest.

    `active`: those that a token uses, on average; None: all. `training_only`: what training has besides, such
    as maps to a teacher's states; None: nothing.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int | None = None
    training_only: int | None = None

    @property
    def in_training(self) -> int:
        """All that training holds, and checkpoints have."""
        return self.total + (self.training_only or 0)

    def record(self) -> dict[str, int]:
        """The counts by name, without those that are None."""
        return {name: count for name, count in self._asdict().items() if count is not None}
