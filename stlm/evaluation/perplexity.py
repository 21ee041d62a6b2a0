"""Bits per byte, character and token perplexity of the test split (design, "Scoring")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stlm.errors import UserError
from stlm.evaluation.config import PerplexityConfig
from stlm.evaluation.interface import LanguageModel, Progress, no_progress
from stlm.tokens.shards import Document, read_split


def load_documents(tokens_folder: Path, config: PerplexityConfig, seed: int) -> tuple[list[Document], int]:
    """The documents of the test split that `config` takes, in their order, and how many there are in all.

    Their tokens are without the end-of-text token at the end of a shard's rows, which is no part of the text.
    With a bound the documents are drawn by `seed`, so that they do not all come from the corpus' beginning;
    at least one is taken.
    """
    documents = [
        document._replace(tokens=document.tokens[:-1])
        for component in read_split(tokens_folder, "test")
        for document in component
    ]
    order = np.arange(len(documents))
    if config.max_documents is not None or config.max_tokens is not None:
        order = np.random.default_rng(seed).permutation(len(documents))[: config.max_documents]
    if config.max_tokens is not None:
        before = np.cumsum([0, *(len(documents[i].tokens) for i in order[:-1])])
        order = order[before < config.max_tokens]
    return [documents[i] for i in sorted(order)], len(documents)


def measure(
    model: LanguageModel, documents: Sequence[Document], stride: int | None, progress: Progress = no_progress
) -> dict[str, Any]:
    """The perplexities of `documents`: every byte once, each document's first token after the end of text."""
    nats = -math.fsum(model.document_loglikelihoods([d.tokens for d in documents], stride, progress))
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
        "stride": stride,
        "split": "test",
    }
