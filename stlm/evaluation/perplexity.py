"""Bits per byte, character and token perplexity of the test split (design, "Scoring")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stlm.errors import UserError
from stlm.evaluation.config import PerplexityConfig
from stlm.evaluation.interface import LanguageModel, Progress, no_progress
from stlm.tokens.shards import Document, read_split


class TestText(NamedTuple):
    """Documents of the test split, in their order, each with its component of the corpus; and how many there
    are in all."""

    documents: list[Document]
    components: list[str]
    total: int


def load_documents(tokens_folder: Path, config: PerplexityConfig, seed: int) -> TestText:
    """The documents of the test split that `config` takes.

    Their tokens are without the end-of-text token at the end of a shard's rows, which is no part of the text.
    With a bound the documents are drawn by `seed`, so that they do not all come from the corpus' beginning;
    a mix's components give their shares of it, each at least one document.
    """
    documents, names, total = [], [], 0
    components = read_split(tokens_folder, "test")
    weights = sum(component.weight for component in components)
    for component in components:
        own = [document._replace(tokens=document.tokens[:-1]) for document in component]
        taken = _choose(own, config, component.weight / weights, seed)
        documents += taken
        names += [component.name] * len(taken)
        total += len(own)
    return TestText(documents, names, total)


def _choose(documents: list[Document], config: PerplexityConfig, share: float, seed: int) -> list[Document]:
    """The documents that are taken of a component, which gives its `share` of the bounds."""
    order = np.arange(len(documents))
    if config.max_documents is not None or config.max_tokens is not None:
        most = None if config.max_documents is None else max(1, round(config.max_documents * share))
        order = np.random.default_rng(seed).permutation(len(documents))[:most]
    if config.max_tokens is not None:
        before = np.cumsum([0, *(len(documents[i].tokens) for i in order[:-1])])[: len(order)]
        order = order[before < config.max_tokens * share]
    return [documents[i] for i in sorted(order)]


def measure(
    model: LanguageModel,
    documents: Sequence[Document],
    components: Sequence[str],
    stride: int | None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The perplexities of `documents`: every byte once, each document's first token after the end of text.

    Where they are of several `components` of a mix, also those of each, under the key `components`.
    """
    scores = model.document_loglikelihoods([d.tokens for d in documents], stride, progress)
    measured = {**_summary(documents, scores), "stride": stride, "split": "test"}
    names = list(dict.fromkeys(components))
    if len(names) > 1:
        measured["components"] = {}
        for name in names:
            own = [i for i, component in enumerate(components) if component == name]
            measured["components"][name] = _summary([documents[i] for i in own], [scores[i] for i in own])
    return measured


def _summary(documents: Sequence[Document], scores: Sequence[float]) -> dict[str, Any]:
    """Perplexities of documents from their log-likelihoods in nats."""
    nats = -math.fsum(scores)
    if not math.isfinite(nats):
        raise UserError(
            f"the log-probability of the test split is {-nats}: the checkpoint's weights give no finite "
            "numbers (did its training diverge?)"
        )
    tokens = sum(len(d.tokens) for d in documents)
    n_bytes, n_chars = sum(d.n_bytes for d in documents), sum(d.n_chars for d in documents)
    return {
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "char_perplexity": math.exp(nats / n_chars),
        "token_perplexity": math.exp(nats / tokens),
        "documents": len(documents),
        "tokens": tokens,
        "bytes": n_bytes,
        "chars": n_chars,
    }
