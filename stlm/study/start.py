"""Checks of what a run starts from: whether its weights can become those of the run's model."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from stlm.errors import UserError
from stlm.model.config import ModelConfig
from stlm.study.checks import dependency
from stlm.study.runs import Run, SourceModel
from stlm.techniques.base import refuse
from stlm.tokens.names import hf_name, is_per_corpus

# Keys of which the run may have less: the rest is cut.
SIZES = ("layers", "width", "heads", "kv_heads", "ffn_width")
# Keys that change no weight that is inherited.
_FREE = {"dropout", "attention_dropout", "zero_init", "vocab_size"}
# Parts that can be made where there are none: factors by decomposition, adapters, weights of the previous
# token and tables of values that change nothing at first.
_MADE = {"low_rank": None, "embedding_rank": None, "lora": None, "qkv_shift": False, "value_embeddings": 0}
# Parts with which a model cannot be cut: its matrices must be whole, and each layer's own.
_WHOLE = ("sharing", "lora", "low_rank", "embedding_rank", "bytes")


def check_start(
    file: str, run: Run, runs: Mapping[str, Run], models: Mapping[str, SourceModel] | None = None
) -> None:
    """What a run starts from must have its tokens, and weights from which its model can be cut."""
    if "start" not in run.dependencies:
        return
    named, origin = run.dependencies["start"], dependency(run, "start", runs, models or {})
    key = f"{file}: run {run.name}: {named.key}: {named.name!r}"
    refuse(origin.techniques.values(), "start_from", lambda message: UserError(f"{key}: its {message}"))
    _check_tokens(key, run, origin)
    _check_model(key, run.model, origin.model)
    if is_cut(run.model, origin.model):
        if named.key != "training.start_from":
            raise UserError(f"{key} is larger than the run's model; only training.start_from cuts")
        try:
            check_cut(run, origin.model)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None


def is_cut(model: ModelConfig, origin: ModelConfig) -> bool:
    """Whether `model` has less of a size than `origin` (its vocabulary aside)."""
    return any(getattr(model, name) != getattr(origin, name) for name in SIZES)


def _check_tokens(key: str, run: Run, origin: Run | SourceModel) -> None:
    """The tokens of the run must be those of the origin, or a part of them."""
    ours, theirs = hf_name(run.tokenizer), hf_name(origin.tokenizer)
    if ours is not None and theirs is not None and ours.model == theirs.model:
        larger = theirs.size is None or (ours.size is not None and ours.size < theirs.size)
        if larger and (theirs.size is None or run.corpus == origin.corpus):
            return
    if run.tokenizer != origin.tokenizer:
        expected = "the same" if theirs is None else f"the same, or of hf:{theirs.model}:N a smaller one"
        raise UserError(
            f"{key} has the tokenizer {origin.tokenizer}, the run {run.tokenizer}; they must be {expected}"
        )
    if is_per_corpus(run.tokenizer) and run.corpus != origin.corpus:
        raise UserError(
            f"{key} has the corpus {origin.corpus}, the run {run.corpus}, and so another vocabulary of the "
            f"name {run.tokenizer}; they must be the same"
        )


def _check_model(key: str, ours: ModelConfig, theirs: ModelConfig) -> None:
    """Every key of the model must be the origin's, smaller, or of a part that can be made."""
    for name in ModelConfig.model_fields:
        own, other = getattr(ours, name), getattr(theirs, name)
        made = name in _MADE and other == _MADE[name]
        untied = name == "tied" and other  # the head becomes a copy
        longer = name == "context" and (ours.positions != "learned" or own <= other)
        if own == other or made or untied or longer or name in _FREE:
            continue
        if name in SIZES and (own < other or (name == "kv_heads" and ours.width < theirs.width)):
            continue
        if name == "value_embeddings" and ours.layers < theirs.layers:
            continue
        why = "a model may be cut, not grown" if name in SIZES else "weights of the one do not fit the other"
        raise UserError(f"{key} has model.{name}: {_plain(other)}, the run {_plain(own)}; {why}")


def check_cut(run: Run, origin: ModelConfig) -> None:
    """Raise ValueError for sizes to which a model of `origin` cannot be cut, or not in the way asked for."""
    model, how = run.model, run.training.inherit
    for name in _WHOLE:
        if getattr(origin, name) is not None:
            raise ValueError(f"model.{name}: {_plain(getattr(origin, name))}: such a model is not cut")
    if model.sharing is not None:
        raise ValueError("model.sharing: layers that share matrices are not cut")
    if model.head_width != origin.head_width:
        raise ValueError(
            f"model.heads: {model.heads} of width {model.head_width}, expected heads of width "
            f"{origin.head_width}: width {model.width} has {model.width / origin.head_width:g} of them"
        )
    group, groups = model.heads // model.kv_heads, origin.heads // origin.kv_heads
    if group > groups or (group > 1 and model.kv_heads > origin.kv_heads):
        raise ValueError(
            f"model.kv_heads: {model.kv_heads} for {model.heads} heads are groups of {group}, and the origin "
            f"has {origin.kv_heads} groups of {groups}; expected {_kv_heads(model.heads, origin)}"
        )
    if model.width < origin.width and model.positions == "sinusoidal":
        raise ValueError("model.width: sinusoidal positions are fixed, so the width cannot be cut")
    if model.width < origin.width and model.norm != "rmsnorm":
        raise ValueError(f"model.norm: {model.norm}: the width of such a model is not cut; only rmsnorm's is")
    if isinstance(how.layers, tuple):
        if len(how.layers) != model.layers:
            raise ValueError(
                f"training.inherit.layers: {list(how.layers)} names {len(how.layers)} layers, but "
                f"model.layers is {model.layers}"
            )
        if how.layers[-1] >= origin.layers:
            raise ValueError(
                f"training.inherit.layers: {how.layers[-1]}: the last of its layers is {origin.layers - 1}"
            )


def _kv_heads(heads: int, origin: ModelConfig) -> str:
    """The numbers of key/value heads with which `heads` can be cut from `origin`."""
    groups = origin.heads // origin.kv_heads
    valid = [k for k in range(1, heads) if heads % k == 0 and k <= origin.kv_heads and heads // k <= groups]
    return ", ".join(map(str, [*valid, heads])) + (
        " (a copy for each head)" if heads > origin.kv_heads else ""
    )


def _plain(value: object) -> object:
    """A value as it is written in a file."""
    return value.model_dump() if isinstance(value, BaseModel) else value
