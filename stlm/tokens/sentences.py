"""Which tokens end a sentence, by their text alone."""

from __future__ import annotations

import re

import numpy as np

from stlm.tokens.interface import Tokenizer

# A mark that ends a sentence, perhaps with closing quotes or brackets, or a line break; then white space.
_END = re.compile(r"(?:[.!?…。！？]['\"’”»)\]]*|\n)\s*\Z")


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """Whether each token ends a sentence, bool [vocab_size]: the end of text, and each token whose own text
    does.

    A token knows nothing of its neighbours: the points of abbreviations and of decimal numbers end sentences
    too, and a closing quote that is the next token begins one.
    """
    ends = np.zeros(tokenizer.vocab_size, dtype=bool)
    for token in range(tokenizer.vocab_size):
        # A part of a character becomes U+FFFD, which is no mark.
        ends[token] = token == tokenizer.eot or bool(
            _END.search(tokenizer.decode_bytes([token]).decode(errors="replace"))
        )
    return ends
