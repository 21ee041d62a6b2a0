"""Closed formulas of parameters and FLOPs, as the program had them before it counted on the modules.

The oracle of test_counts: it knows the models of the configs that were there then.
"""

from __future__ import annotations

from stlm.model.config import CHUNK_BYTES, ModelConfig, ParameterCounts
from stlm.model.reduction import PARTS

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
    units = {part: len(set(source_layers)) for part, source_layers in config.source_layers.items()}
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
