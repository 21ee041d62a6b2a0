"""The names of tokenizers, one spelling for each. Imports no large library."""

from __future__ import annotations

import re
from typing import NamedTuple

from stlm.errors import UserError, shortened
from stlm.tokens.chunks import SYMBOLS, cuts_chunks, make_chunker


class HfName(NamedTuple):
    """The parts of `hf:MODEL` or `hf:MODEL:N`."""

    model: str
    size: int | None


def hf_name(tokenizer: str) -> HfName | None:
    """The parts of the name of a published model's tokenizer; None for other kinds."""
    kind, _, rest = tokenizer.partition(":")
    model, _, size = rest.partition(":")
    return HfName(model, int(size) if size else None) if kind == "hf" else None


LEAST, MOST = 258, 1_000_000


def bpe_size(name: str) -> int | None:
    """The N of `bpe-N`; None for a name of another kind. UserError where N is out of bounds."""
    match = re.fullmatch(r"bpe-([1-9][0-9]*)", name)
    if match is None:
        return None
    digits = match[1]
    if len(digits) > len(str(MOST)) or int(digits) > MOST:
        raise UserError(f"tokenizer: {shortened(name)!r} is too large: N is at most {MOST:,}")
    if int(digits) < LEAST:
        raise UserError(
            f"tokenizer: {name!r} is too small: 256 bytes, the end of text and a merge need {LEAST}"
        )
    return int(digits)


def vocabulary_size(tokenizer: str) -> int:
    """Number of tokens in the vocabulary of a tokenizer, given by name, with the end-of-text token.

    For `words`, `spaces` and `stride-N`, which cut chunks of bytes: the number of symbols.
    """
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
            "words, spaces, stride-N (for example stride-4)"
        )
    return size
