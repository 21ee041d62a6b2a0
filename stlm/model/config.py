"""What a model is: its hyper-parameters, its size and its cost. Needs no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stlm.model.byte_config import MOST_LAYERS, ByteConfig, check_divides
from stlm.model.reduction import PARTS, LoraConfig, LowRankConfig, SharingConfig

# Bytes of a chunk where nobody knows yet: about those of a corpus' words or byte-pair tokens.
CHUNK_BYTES = 4.5


class ModelConfig(BaseModel):
    """A decoder-only transformer (paper, Table 1). Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: int = Field(8, ge=1, le=MOST_LAYERS, description="Transformer blocks.")
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
    # Omitted from records when null, so that older configs compare equal.
    sharing: SharingConfig | None = Field(
        None,
        description="Layers that use the same matrices; see `model.sharing`. null: none.",
        exclude_if=lambda value: value is None,
    )
    lora: LoraConfig | None = Field(
        None,
        description="Adapters of each layer's own, on shared matrices or any; see `model.lora`. null: none.",
        exclude_if=lambda value: value is None,
    )
    low_rank: LowRankConfig | None = Field(
        None,
        description="Matrices of the blocks as products of two of lower rank; see `model.low_rank`. null: "
        "none.",
        exclude_if=lambda value: value is None,
    )
    embedding_rank: int | None = Field(
        None,
        ge=1,
        description="Factorized embedding (ALBERT, Lan et al. 2020): a table of vectors of this length, and "
        "a matrix from there to `width`; a tied head uses both, an untied one has its own two. Must save "
        "weights; null: a table of vectors of `width`.",
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
        """What acts on tables of tokens has nothing to act on."""
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
        if len(set(self.sharing.homes(self.layers))) < self.layers:
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
        """Factors as large as the matrix are no reduction, nor is an adapter of full rank."""
        if self.embedding_rank is not None:
            rank, vocabulary = self.embedding_rank, self.vocab_size
            if rank >= self.width:
                raise ValueError(f"embedding_rank: {rank} is no lower rank; it must be below {self.width}")
            # Before the tokenizer is known, there is nothing to compare with.
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
        """A block's matrices by part and name, as [outputs, inputs]; joint products are one matrix."""
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
        """The blocks of a byte transformer: this model's in small, nothing shared, without dropout."""
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
    def homes(self) -> dict[str, tuple[int, ...]]:
        """For each part of a block and each layer, from 0: the first layer that uses the same matrices."""
        own = tuple(range(self.layers))
        shared = self.sharing.parts if self.sharing else ()
        return {part: self.sharing.homes(self.layers) if part in shared else own for part in PARTS}

    def rank(self, part: str, name: str) -> int | None:
        """The rank of a part's matrix, of attention's or the ffn's `matrices`; None: full."""
        key = self.low_rank.key(part, name) if self.low_rank else None
        return None if key is None else getattr(self.low_rank, key)

    def adapters(self, part: str) -> LoraConfig | None:
        """The adapters of a part's matrices."""
        return self.lora if self.lora and part in self.lora.parts else None


def _check_saves(key: str, rank: int, name: str, shape: tuple[int, int]) -> None:
    """Raises ValueError where two factors of that rank have as many weights as the matrix, or more."""
    rows, columns = shape
    if rank * (rows + columns) >= rows * columns:
        most = (rows * columns - 1) // (rows + columns)
        raise ValueError(
            f"{key}: {rank} saves nothing in {name} ({rows:,} x {columns:,}), whose two factors would have "
            f"{rank * (rows + columns):,} weights, not {rows * columns:,}; it must be at most {most}"
        )


# What counts as embedding: all that grows with the vocabulary or the context, or stands in its place.
EMBEDDING_GROUPS = (
    "token embedding",
    "byte embedding",
    "byte encoder",
    "positions",
    "value embeddings",
    "byte decoder",
    "head",
)


class ParameterCounts(NamedTuple):
    """Trainable parameters, shared ones once: all, those of embeddings and an untied head, and the rest."""

    total: int
    embedding: int
    non_embedding: int


def parameter_groups(config: ModelConfig) -> dict[str, int]:
    """Where the parameters of ``config`` (with its ``vocab_size``) are: group -> how many, shared ones once.

    The groups are in the order in which a token meets them; those without parameters are left out.
    """
    if config.vocab_size is None:
        raise ValueError("to count parameters takes a config with its vocab_size")
    key_value = config.kv_heads * config.head_width
    # LayerNorm here has a gain and a bias, RMSNorm a gain.
    norm = config.width * (2 if config.norm == "layernorm" else 1)
    qk_gains = 2 * config.head_width if config.qk_norm else 0
    shifts = config.width + 2 * key_value if config.qkv_shift else 0
    units = {part: len(set(homes)) for part, homes in config.homes.items()}
    bytes_in, bytes_out = _byte_groups(config)
    groups = {
        "token embedding": 0 if config.bytes else _table(config),
        **bytes_in,
        "positions": config.context * config.width if config.positions == "learned" else 0,
        "value embeddings": config.value_embeddings * config.vocab_size * key_value,
        "attention": units["attention"] * _weights(config, "attention"),
        "FFN": units["ffn"] * _weights(config, "ffn"),
        "adapters": config.layers * sum(_adapter_weights(config, part) for part in PARTS),
        "shifts": config.layers * shifts,
        "norms": config.layers * (2 * norm + qk_gains) + norm,
        **bytes_out,
        "head": 0 if config.tied else _table(config),
    }
    return {name: count for name, count in groups.items() if count}


def _table(config: ModelConfig) -> int:
    """Weights of the embedding, or of the head: between tokens and residual stream, or of bytes."""
    if config.bytes is not None:
        return config.vocab_size * config.bytes.width
    if config.embedding_rank is None:
        return config.vocab_size * config.width
    return config.embedding_rank * (config.vocab_size + config.width)


def _byte_groups(config: ModelConfig) -> tuple[dict[str, int], dict[str, int]]:
    """What a byte-level model has before the core, and after it but for a head of its own."""
    own = config.bytes
    if own is None:
        return {}, {}
    encoder, decoder = (
        parameter_counts(config.byte_blocks(layers)).non_embedding
        for layers in (own.encoder_layers, own.decoder_layers)
    )
    encoder += own.width * (config.width + _pooling_scores(config))
    return (
        {"byte embedding": _table(config), "byte encoder": encoder},
        {"byte decoder": decoder + config.width * own.decoder_layers * own.width},
    )


def _pooling_scores(config: ModelConfig) -> int:
    """Scores that a pooling gives each byte."""
    return {"attention": 1, "query": config.heads}.get(config.bytes.pooling, 0)


def _byte_flops(config: ModelConfig, n_bytes: float, n_symbols: float) -> float:
    """Training FLOPs of a chunk of so many bytes, written in so many symbols, but for the core's."""
    own = config.bytes
    # A byte sees all of its chunk, a symbol half of it on average.
    encoder = config.byte_blocks(own.encoder_layers).model_copy(update={"context": 2 * n_bytes})
    decoder = config.byte_blocks(own.decoder_layers).model_copy(update={"context": n_symbols})
    pooling = own.width * (
        config.width * (n_bytes if own.pooling == "query" else 1) + n_bytes * _pooling_scores(config)
    )
    conditions = config.width * own.decoder_layers * own.width
    return (
        n_bytes * (training_flops_per_token(encoder) - 6.0 * config.vocab_size * own.width)
        + n_symbols * training_flops_per_token(decoder)
        + 6.0 * (pooling + conditions)
    )


def _weights(config: ModelConfig, part: str) -> int:
    """Weights that a token is multiplied with in a part of a block."""
    total = 0
    for name, (rows, columns) in config.matrices[part].items():
        rank = config.rank(part, name)
        total += rows * columns if rank is None else rank * (rows + columns)
    return total


def _adapter_weights(config: ModelConfig, part: str) -> int:
    lora = config.adapters(part)
    return (
        sum(lora.rank * (rows + columns) for rows, columns in config.matrices[part].values()) if lora else 0
    )


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of ``config`` (with its ``vocab_size``) without building the model."""
    groups = parameter_groups(config)
    embedding = sum(groups.get(name, 0) for name in EMBEDDING_GROUPS)
    total = sum(groups.values())
    return ParameterCounts(total, embedding, total - embedding)


def training_flops_per_token(
    config: ModelConfig, chunk_bytes: float = CHUNK_BYTES, ends_written: bool = True
) -> float:
    """Floating-point operations a training token costs, forward and backward.

    Six for each weight and time that a token is multiplied with it: a shared one as often as it is used, the
    head's matrix included, embedding look-ups not; plus attention's two products over an average of half the
    context (Kaplan et al. 2020, appendix B; the causal half counted). The optimizer's own work is not in it.
    Of a byte-level model a token is a chunk, each counted as read and written, with a symbol for its end
    where that does not follow from the bytes. All are taken to be of their mean length, `chunk_bytes`:
    attention within chunks of different lengths costs more, as it goes with the mean of their squares.
    """
    products = config.layers * sum(_weights(config, part) + _adapter_weights(config, part) for part in PARTS)
    if config.bytes is not None:
        core = products + 2 * config.layers * (config.context / 2) * config.width
        return 6.0 * core + _byte_flops(config, chunk_bytes, chunk_bytes + ends_written)
    head = _table(config)
    # A factorized embedding is looked up, then multiplied.
    embedding = (config.embedding_rank or 0) * config.width
    attention = 2 * config.layers * (config.context / 2) * config.width
    return 6.0 * (products + head + embedding + attention)
