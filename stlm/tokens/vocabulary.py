"""The tokenizer of a corpus: read, or made of the corpus' text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from stlm.errors import UserError
from stlm.tokens.bpe import train_bpe
from stlm.tokens.chunks import cuts_chunks, make_chunker
from stlm.tokens.names import hf_name, vocabulary_size
from stlm.tokens.published import PublishedTokenizer, fetched_tokenizer
from stlm.tokens.raw import RawComponent
from stlm.tokens.reduced import reduced_tokenizer
from stlm.tokens.splits import DROPPED, digest
from stlm.tokens.survey import Survey
from stlm.tokens.tokenizer import (
    DESCRIPTION,
    ByteTokenizer,
    ChunkTokenizer,
    Tokenizer,
    bpe_vocab_size,
    gpt2_tokenizer,
    load_tokenizer,
)

TRAINING_BYTES = 64 << 20  # approximate text that a vocabulary is trained on


def published_tokenizer(name: str, folder: Path) -> PublishedTokenizer | None:
    """The whole tokenizer of a published model, for hf:NAME and hf:NAME:N.

    Raises UserError for a name that is none, a model that was not fetched, or `hf:NAME` of a model whose
    embedding has more rows than its tokenizer has tokens.
    """
    if cuts_chunks(name):
        make_chunker(name)
    elif (found := hf_name(name)) is not None:
        tokenizer = fetched_tokenizer(f"hf:{found.model}", folder)
        size = tokenizer.vocab_size
        if found.size is None and (rows := vocabulary_size(name)) != size:
            raise UserError(
                f"tokenizer: {name}: the model's embedding has {rows:,} rows (vocab_size in "
                f"params/models.yaml), its tokenizer {size:,} tokens; expected equal numbers; "
                f"{name}:N takes the rows of N tokens"
            )
        return tokenizer
    elif name not in ("gpt2", "bytes"):
        bpe_vocab_size(name)
    return None


def make_tokenizer(
    name: str,
    published: PublishedTokenizer | None,
    vocabulary_folder: Path,
    components: Sequence[RawComponent],
    counts: Survey,
    folder: Path,
    progress: bool,
) -> Tokenizer:
    """The tokenizer of this name in `folder`/tokenizer: that of a killed run, otherwise a new one."""
    if (folder / "tokenizer" / DESCRIPTION).exists():
        return load_tokenizer(folder / "tokenizer")
    if published is not None:
        texts = training_texts(components, counts, progress)
        tokenizer: Tokenizer = (
            published if published.name == name else reduced_tokenizer(name, published, texts)
        )
    elif name == "bytes":
        tokenizer = ByteTokenizer()
    elif name == "gpt2":
        tokenizer = gpt2_tokenizer(vocabulary_folder)
    elif cuts_chunks(name):
        tokenizer = ChunkTokenizer(name, _chunks(name, components, counts, progress))
    else:
        tokenizer = train_bpe(name, training_texts(components, counts, progress), progress)
    tokenizer.save(folder / "tokenizer")
    return tokenizer


def training_texts(components: Sequence[RawComponent], counts: Survey, progress: bool) -> Iterator[str]:
    """The train split, or a sample of about TRAINING_BYTES of it, a mix's components by their weights.

    Whether a document is in the sample follows from its hash, so that the sample is the same every time.
    """
    total = sum(component.weight for component in components)
    rates = [
        TRAINING_BYTES * component.weight / total / max(train_bytes, 1)
        for component, train_bytes in zip(components, counts.train_bytes, strict=True)
    ]
    total_bytes = sum(min(rate, 1) * size for rate, size in zip(rates, counts.train_bytes, strict=True))
    with tqdm(
        total=int(total_bytes), desc="vocabulary", unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for batch in batches(components, counts):
            rate = rates[batch.component]
            for text, split in zip(batch.texts, batch.splits, strict=True):
                if split == 0 and (rate >= 1 or int.from_bytes(digest(text)[8:], "little") < rate * 2**64):
                    bar.update(len(text))
                    yield text.decode()


def _chunks(name: str, components: Sequence[RawComponent], counts: Survey, progress: bool) -> list[bytes]:
    """The distinct chunks of all documents that are kept, sorted."""
    chunker, chunks = make_chunker(name), set()
    with tqdm(total=counts.text_bytes, desc="chunks", unit="B", unit_scale=True, disable=not progress) as bar:
        for batch in batches(components, counts):
            for text, split in zip(batch.texts, batch.splits.tolist(), strict=True):
                if split != DROPPED:
                    chunks.update(chunker.split(text))
            bar.update(sum(len(text or b"") for text in batch.texts))
    return sorted(chunks)


class Batch(NamedTuple):
    """Raw documents: their component's index, the number of the first (over all components), their splits."""

    component: int
    first: int
    texts: list[bytes | None]
    splits: np.ndarray


def batches(components: Sequence[RawComponent], counts: Survey) -> Iterator[Batch]:
    first = 0
    for index, component in enumerate(components):
        for batch in component.batches():
            yield Batch(index, first, batch.texts, counts.splits[first : first + len(batch.texts)])
            first += len(batch.texts)
