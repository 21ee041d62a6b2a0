"""Whether a model can read a run's text: as its teacher, or as the reference of its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stlm.tokens.names import hf_name, is_per_corpus

if TYPE_CHECKING:
    from stlm.study.runs import Run, SourceModel


def check_reader(name: str, model: Run | SourceModel, run: Run) -> None:
    """Raise ValueError unless `model`, called `name` in params/, reads the run's tokens in rows as long.

    It must have the run's tokenizer, or all tokens of the published model of which the run's has a part
    (`hf:NAME:N` of `hf:NAME`).
    """
    if model.model.bytes is not None:
        raise ValueError(f"{name!r} is byte-level; expected a model of tokens")
    ours, theirs = hf_name(run.tokenizer), hf_name(model.tokenizer)
    part = ours is not None and theirs is not None and theirs.size is None and ours.model == theirs.model
    if not part and model.tokenizer != run.tokenizer:
        expected = "the same" if theirs is None else f"the same, or the run's hf:{theirs.model}:N"
        raise ValueError(
            f"{name!r} has the tokenizer {model.tokenizer}, the run {run.tokenizer}; they must be {expected}"
        )
    if is_per_corpus(run.tokenizer) and not part and model.corpus != run.corpus:
        raise ValueError(
            f"{name!r} was trained on {model.corpus}, with another vocabulary of the name {run.tokenizer}; "
            f"choose a variant on {run.corpus}"
        )
    if model.model.context < run.model.context:
        raise ValueError(
            f"{name!r} has a context of {model.model.context}, shorter than the run's {run.model.context}"
        )
