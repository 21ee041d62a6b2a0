"""Byte-pair encoding by tiktoken, with GPT-2's pre-tokenization and that of models which split digits."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

import numpy as np
import tiktoken

# Numerals of Unicode 17, which the regular expressions of tiktoken 0.14 do not know and `tokenizers` does.
_NEW = "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
# GPT-2's pre-tokenization (Radford et al. 2019) in tiktoken's possessive form: the same pieces, faster.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same in the text between numerals, each of which is a piece of its own: white space that ends before a
# numeral is one piece. As of `Digits(individual_digits=True)` before `ByteLevel()` in `tokenizers`.
DIGITS = (
    rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++|[\p{{N}}{_NEW}]| ?[^\s\p{{L}}\p{{N}}{_NEW}]++"
    rf"|\s++(?=[\p{{N}}{_NEW}]|$)|\s+(?!\S)|\s"
)
_NUMERAL = re.compile(f"[{_NEW}]")
# A long run of white space (Unicode's White_Space, the pattern's \s).
_LONG_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")


class BytePairs:
    """Encodes texts by a pattern (`GPT2` or `DIGITS`) and ranks: a token's bytes -> its id.

    Ids must grow with the merges that make the tokens, and every byte of UTF-8 needs one: tiktoken merges the
    pair whose token has the lowest id.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int]) -> None:
        self._pattern = pattern
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, uint32."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # The backtracking step of the pattern exhausts the regex engine's stack on about a million white
            # space characters. Cutting where pieces end does not change them.
            cuts = [0, *(place for run in _LONG_SPACE.finditer(text) for place in self._ends(run)), len(text)]
            parts = [text[a:b] for a, b in pairwise(cuts)]
            return np.concatenate(
                [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
            )

    def _ends(self, run: re.Match[str]) -> tuple[int, int]:
        """Where pieces end at a run of white space: before it, and after it or before its last character."""
        begin, end = run.span()
        follows = run.string[end : end + 1]
        whole = not follows or (self._pattern == DIGITS and _is_numeral(follows))
        return begin, end if whole else end - 1


def _is_numeral(character: str) -> bool:
    return unicodedata.category(character)[0] == "N" or _NUMERAL.match(character) is not None


def letters() -> dict[str, int]:
    """GPT-2's printable alphabet of bytes: letter -> byte.

    Printable Latin-1 bytes stand for themselves, the other 68 are U+0100 onwards.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    to_byte = {chr(byte): byte for byte in printable}
    return to_byte | {chr(256 + place): byte for place, byte in enumerate(others)}
