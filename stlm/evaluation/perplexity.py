"""Bits per byte, character and token perplexity of the test split (design, "Scoring")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stlm.errors import UserError
from stlm.evaluation.config import PerplexityConfig
from stlm.evaluation.interface import LanguageModel, Progress, no_progress
from stlm.evaluation.statistics import few_units, ratio_bootstrap
from stlm.tokens.held_out import held_out, text_digest, text_ids
from stlm.tokens.shards import Document

_NAMES = pa.dictionary(pa.int32(), pa.string())
# One row for each document of the test text, in the order of the split; `text` is a 64-bit hash of its text,
# `nats` its negative log-probability. `n_tokens` counts the model's tokens.
DOCUMENTS_SCHEMA = pa.schema(
    [
        ("checkpoint", _NAMES),
        ("step", pa.int64()),
        ("component", _NAMES),
        ("text", pa.uint64()),
        ("nats", pa.float64()),
        ("n_tokens", pa.int64()),
        ("n_bytes", pa.int64()),
        ("n_chars", pa.int64()),
    ]
)


class TestText(NamedTuple):
    """Documents of the test split, in order, each with its component of the corpus and the hash of its text,
    and the total numbers of documents and bytes."""

    documents: list[Document]
    components: list[str]
    ids: np.ndarray  # uint64 [documents]
    documents_total: int
    bytes_total: int

    def encoded(self, tokens: Sequence[Sequence[int]]) -> TestText:
        """The same text as tokens of another tokenizer, given for each document."""
        documents = [
            document._replace(tokens=np.asarray(ids, dtype=np.int32))
            for document, ids in zip(self.documents, tokens, strict=True)
        ]
        return self._replace(documents=documents)


def load_documents(tokens_folder: Path, config: PerplexityConfig, seed: int) -> TestText:
    """The documents of the test split that `config` selects; they are the same for every tokenizer.

    Their tokens exclude the end-of-text token at the end of a shard's rows, which is not part of the text. If
    their number is bounded, documents are drawn by `seed`, as the beginning of the corpus may be atypical; a
    mix's components keep their shares, with at least one document each.
    """
    text = held_out(tokens_folder, "test", config.max_bytes, config.max_documents, seed)
    return TestText(
        [document._replace(tokens=document.tokens[:-1]) for document in text.documents],
        text.components,
        text_ids(tokens_folder, text.documents),
        text.documents_total,
        text.bytes_total,
    )


def measure(
    model: LanguageModel, text: TestText, stride: int | None, progress: Progress = no_progress
) -> tuple[dict[str, Any], np.ndarray]:
    """The perplexities of `text`, and the nats of each document.

    Every byte counts once; each document's first token follows the end of text.

    If the documents belong to several components of a mix, the key `components` has the perplexities of each.
    """
    scores = model.document_loglikelihoods([d.tokens for d in text.documents], stride, progress)
    nats = -np.asarray(scores, dtype=float)
    names = np.array(text.components)
    measured = {
        **_summary(text.documents, nats, names),
        "stride": stride,
        "split": "test",
        "documents_total": text.documents_total,
        "bytes_total": text.bytes_total,
        "text_sha256": text_digest(text.ids, text.components),
    }
    distinct = list(dict.fromkeys(text.components))
    if len(distinct) > 1:
        measured["components"] = {}
        for name in distinct:
            members = np.flatnonzero(names == name)
            measured["components"][name] = _summary(
                [text.documents[i] for i in members], nats[members], names[members]
            )
    return measured, nats


def document_rows(name: str, step: int, text: TestText, nats: np.ndarray) -> pa.Table:
    """A checkpoint's rows in documents.parquet."""
    n = len(text.documents)
    columns = {
        "checkpoint": [name] * n,
        "step": [step] * n,
        "component": text.components,
        "text": text.ids,
        "nats": nats,
        "n_tokens": [len(document.tokens) for document in text.documents],
        "n_bytes": [document.n_bytes for document in text.documents],
        "n_chars": [document.n_chars for document in text.documents],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in DOCUMENTS_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=DOCUMENTS_SCHEMA)


def _summary(documents: Sequence[Document], nats_D: np.ndarray, strata_D: np.ndarray) -> dict[str, Any]:
    """Perplexities of documents, given their negative log-likelihoods in nats.

    `interval` is the 95% interval of bits per byte over documents, resampled within their components; it is
    null if a component has a single document.
    """
    nats = math.fsum(nats_D)
    if not math.isfinite(nats):
        raise UserError(
            f"the log-probability of the test split is {-nats}: the checkpoint's weights give no finite "
            "numbers (did its training diverge?)"
        )
    tokens = sum(len(d.tokens) for d in documents)
    n_bytes, n_chars = sum(d.n_bytes for d in documents), sum(d.n_chars for d in documents)
    interval = ratio_bootstrap(nats_D / math.log(2), [d.n_bytes for d in documents], strata_D)
    return {
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "interval": None
        if interval is None
        else {**interval._asdict(), "few_documents": few_units(strata_D)},
        "char_perplexity": _exp(nats / n_chars),
        "token_perplexity": _exp(nats / tokens),
        "documents": len(documents),
        "tokens": tokens,
        "bytes": n_bytes,
        "chars": n_chars,
    }


def _exp(nats: float) -> float:
    """The perplexity for `nats` per unit; raises UserError if it exceeds the range of a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        raise UserError(
            f"the test split has {nats:,.0f} nats a token or character, which is beyond any perplexity: did "
            "the checkpoint's training diverge?"
        ) from None
