"""The names of byte-pair vocabularies, one spelling for each size. Needs nothing heavy."""

from __future__ import annotations

import re

from stlm.errors import UserError, shortened

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
