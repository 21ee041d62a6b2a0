"""Evaluates a published model on the data of a study's runs, by the same code."""

from __future__ import annotations

from pathlib import Path

from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import (
    RAW,
    CheckpointSummary,
    Subject,
    gather_material,
    score_model,
    write_results,
)
from stlm.evaluation.hf_folder import tokenizer_sha256, weights_sha256
from stlm.evaluation.hf_model import HfRequestEncoder, load_hf
from stlm.evaluation.part_store import Failures, PartStore
from stlm.evaluation.plain_llama import load_plain_llama
from stlm.study.runs import PublishedModel
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.dependencies import check_fetched


def evaluate_published(published: PublishedModel, config: EvaluationConfig, raw: Path = RAW) -> None:
    """Score a published model on the data of the study's runs; write the same files as for a run.

    A plain Llama is scored by our own transformer, others by that of transformers; the results are the same,
    except for rounding. The test text is that of `published.tokens_folder`, encoded by the model's own
    tokenizer. The checkpoint is named `published` and has step 0. Raises UserError for missing, damaged or
    foreign files.
    """
    folder = published.place if published.model is None else check_fetched(published.model)
    loaded = load_plain_llama(folder, published.context, published.prefix)
    transformer, tokenizer = loaded or load_hf(folder, published.context, published.prefix)
    encoder = HfRequestEncoder(tokenizer)
    material = gather_material(config, published.tokens_folder, raw, encoder, tokenizer_sha256(folder))
    written = load_tokenizer(published.tokens_folder / "tokenizer")
    # Our tokenizers are lossless, so this is the same text.
    texts = [written.decode(document.tokens.tolist()) for document in material.text.documents]
    text = material.text.encoded(tokenizer.encode_batch(texts))
    checkpoint = CheckpointSummary(step=0, tokens=0, weights_sha256=weights_sha256(folder))
    arguments = f"{published.study} {published.name}"
    store, failures = (
        PartStore(published.state_folder / "evaluation"),
        Failures(arguments, material.unreadable),
    )
    subject = Subject("published", checkpoint, True, published.name, published.settings)
    scored = score_model(material._replace(text=text), subject, lambda: transformer, store, failures)
    failures.raise_if_any(store)
    about = {
        "study": published.study,
        "run": published.name,
        "label": published.label,
        "prefix": tokenizer.prefix,
    }
    more = {
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "context": transformer.config.context,
        "published": published.settings,
    }
    write_results(published.results_folder, about, material, {"published": scored}, more)
    store.forget()
