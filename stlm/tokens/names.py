"""The names of tokenizers, one spelling for each. Imports no large library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from stlm.errors import UserError, nearest, shortened
from stlm.tokens.chunks import SYMBOLS, cuts_chunks, make_chunker

LEAST, MOST = 258, 1_000_000
KINDS = "gpt2, bytes, bpe-N, hf:NAME, hf:NAME:N, words, spaces or stride-N"


class HfName(NamedTuple):
    """`hf:NAME` (`size` is None) or `hf:NAME:N`: a model of params/models.yaml, how many of its tokens."""

    model: str
    size: int | None


def hf_name(tokenizer: str) -> HfName | None:
    """The parts of `hf:NAME` and `hf:NAME:N`; None for a name of another kind.

    Raises UserError for a name that begins so and is neither, or an N out of bounds.
    """
    if not tokenizer.startswith("hf:"):
        return None
    match = re.fullmatch(r"hf:([A-Za-z0-9][A-Za-z0-9_-]*)(?::([1-9][0-9]*))?", tokenizer)
    if match is None:
        raise UserError(
            f"tokenizer: {shortened(tokenizer)!r}: expected hf:NAME or hf:NAME:N, for example "
            "hf:smollm2_135m:8192"
        )
    model, digits = match.groups()
    return HfName(model, None if digits is None else _bounded(digits, tokenizer))


def _bounded(digits: str, name: str) -> int:
    """The N of a tokenizer's name; UserError where it is out of bounds."""
    if len(digits) > len(str(MOST)) or int(digits) > MOST:
        raise UserError(f"tokenizer: {shortened(name)!r} is too large: N is at most {MOST:,}")
    if int(digits) < LEAST:
        raise UserError(
            f"tokenizer: {name!r} is too small: 256 bytes, the end of text and a merge need {LEAST}"
        )
    return int(digits)


def bpe_size(name: str) -> int | None:
    """The N of `bpe-N`; None for a name of another kind. UserError where N is out of bounds."""
    match = re.fullmatch(r"bpe-([1-9][0-9]*)", name)
    return None if match is None else _bounded(match[1], name)


def is_per_corpus(tokenizer: str) -> bool:
    """Whether the vocabulary is made for the corpus: the same name is another one for another corpus."""
    published = hf_name(tokenizer)
    return bpe_size(tokenizer) is not None or (published is not None and published.size is not None)


def vocabulary_size(tokenizer: str, root: Path = Path()) -> int:
    """Number of tokens in the vocabulary of a tokenizer, given by name, with the end-of-text token.

    For `words`, `spaces` and `stride-N`, which cut chunks of bytes: the number of symbols. That of a
    published model is looked up in params/models.yaml of `root`.
    """
    if (published := hf_name(tokenizer)) is not None:
        return _published_size(published, root)
    if tokenizer == "gpt2":
        return 50257
    if tokenizer == "bytes":
        return 257
    if cuts_chunks(tokenizer):
        make_chunker(tokenizer)
        return SYMBOLS
    size = bpe_size(tokenizer)
    if size is None:
        raise UserError(
            f"tokenizer: {shortened(tokenizer)!r} is none of gpt2, bytes, bpe-N (for example bpe-4096), "
            "hf:NAME, hf:NAME:N (for example hf:smollm2_135m:8192), words, spaces, stride-N (for example "
            "stride-4)"
        )
    return size


def _published_size(name: HfName, root: Path) -> int:
    from stlm.study.catalogues import load_models  # a study's files are no concern of other tokenizers

    models = load_models(root)
    if name.model not in models:
        raise UserError(
            f"tokenizer: hf:{shortened(name.model)}: no model in params/models.yaml"
            f"{nearest(name.model, models)}"
        )
    whole = models[name.model].model.vocab_size
    if name.size is not None and name.size > whole:
        raise UserError(
            f"tokenizer: hf:{name.model}:{name.size}: {name.model} has {whole:,} tokens; choose "
            f"hf:{name.model}, or a smaller N"
        )
    return whole if name.size is None else name.size
