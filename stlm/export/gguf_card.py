"""What a run's records say of a model, as the metadata of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import Keys

from stlm.report.card import Card
from stlm.report.schema import DependencyRecord, published_in
from stlm.report.sources import Text

# Keys of our own; llama.cpp reads over them.
TRAINING_TOKENS, RUN, STEP, MODEL_CARD = (
    f"stlm.{name}" for name in ("training_tokens", "run", "step", "model_card")
)
_USE = """\
llama.cpp loads this file. It writes the end-of-text token before each prompt itself, as documents begin in
training (`tokenizer.ggml.add_bos_token`)."""


def about_model(card: Card | None, checkpoint: Path) -> dict[str, Any]:
    """Key -> value: name, licence, corpora and published models behind it with licence and origin, the card.

    Without a card only the name is known, that of the checkpoint's folder.
    """
    general = Keys.General
    if card is None:
        return {general.TYPE: "model", general.NAME: checkpoint.name}
    train, metadata = card.train, card.metadata()
    languages = metadata.language or []
    about: dict[str, Any] = {
        general.TYPE: "model",
        general.NAME: card.title,
        general.DESCRIPTION: f"A language model of {train.parameters.total:,} parameters, trained on "
        f"{card.tokens:,} tokens of {train.corpus} with STLM",
        general.LICENSE: metadata.license,
        general.TAGS: metadata.tags,
        TRAINING_TOKENS: card.tokens,
        STEP: card.step,
        RUN: train.run,
    }
    if languages:
        about[general.LANGUAGES] = [languages] if isinstance(languages, str) else languages
    about[general.DATASET_COUNT] = len(card.texts)
    for number, text in enumerate(card.texts):
        about[general.DATASET_NAME.format(id=number)] = text.name
        about[general.DATASET_DESCRIPTION.format(id=number)] = _of_text(text)
        if text.repository:
            about[general.DATASET_REPO_URL.format(id=number)] = (
                f"https://huggingface.co/datasets/{text.repository}"
            )
    if parents := published_in(train.depends):
        about[general.BASE_MODEL_COUNT] = len(parents)
        for number, (name, parent) in enumerate(parents.items()):
            about[general.BASE_MODEL_NAME.format(id=number)] = name
            about[general.BASE_MODEL_DESCRIPTION.format(id=number)] = _of_parent(parent)
    return about | {MODEL_CARD: card.markdown(library_name="gguf", use=_USE)}


def _of_text(text: Text) -> str:
    return f"licence: {text.licence or 'not known here'}; from: {text.origin or 'not known here'}"


def _of_parent(parent: DependencyRecord) -> str:
    tokens = f"; trained on {parent.training_tokens:,} tokens" if parent.training_tokens else ""
    return (
        f"licence: {parent.licence or 'not known here'}; from: {parent.origin or 'not known here'}{tokens}; "
        f"SHA-256 of the weights: {parent.weights_sha256 or 'not known here'}"
    )
