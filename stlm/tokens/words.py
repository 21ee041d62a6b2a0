"""The definition of a word for comparing texts: near-duplicates, leaks between splits, contamination.

A word is "a lowercase, whitespace delimited word with no punctuation" (Brown et al. 2020, GPT-3, appendix C),
on ASCII text the same as that of the reference harness (`Janitor` of lm_eval): punctuation and symbols
(Unicode categories P and S) are deleted, letters lower-cased, and the rest is split at white space. There
are two additional rules. Dashes, and two hyphens or more, separate words, because books put them between
words without spaces; a single hyphen is deleted (`well-known` is `wellknown`). In scripts without spaces
(Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word.
"""

from __future__ import annotations

import re
import unicodedata

_ASCII = bytes(range(128))
# A character of UTF-8 that is not ASCII.
_CHARACTER = re.compile(rb"[\xc2-\xf4][\x80-\xbf]+")
# Hyphens that join the parts of a word; all other dashes (category Pd) separate words.
_HYPHENS = "-\u2010\u2011"
# Thai and Lao, Burmese, Khmer, Japanese syllables, ideographs.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def _normal(character: str) -> str:
    """The replacement of one character."""
    category = unicodedata.category(character)
    if character.isspace() or character == "\0" or (category == "Pd" and character not in _HYPHENS):
        return " "
    if category[0] in "PS":
        return ""
    return f" {character} " if _WITHOUT_SPACES.match(character) else character.lower()


class _Characters(dict[bytes, bytes]):
    """The UTF-8 of a character -> the UTF-8 of its replacement; filled on demand."""

    def __missing__(self, character: bytes) -> bytes:
        self[character] = _normal(character.decode()).encode()
        return self[character]


_CHARACTERS = _Characters()
_DELETED = bytes(c for c in _ASCII if not _normal(chr(c)))
_TABLE = bytes(ord(_normal(chr(c)) or " ") for c in _ASCII) + bytes(range(128, 256))


def normalize(text: bytes) -> bytes:
    """UTF-8 with words in lower case, without punctuation, and only ASCII white space between them."""
    text = text.replace(b"--", b"  ")
    if not text.isascii():
        text = _CHARACTER.sub(lambda found: _CHARACTERS[found[0]], text)
    return text.translate(_TABLE, _DELETED)


def words(text: str) -> list[str]:
    """The words of `text` that n-grams are made of."""
    return [word.decode() for word in normalize(text.encode(errors="replace")).split()]


def normalize_title(title: bytes) -> bytes:
    """The letters and digits of a title, in lower case, without accents, so that spellings of it are equal.

    A title that has neither letters nor digits, or is not UTF-8, is not changed.
    """
    try:
        spelled = unicodedata.normalize("NFKD", title.decode()).casefold()
    except UnicodeDecodeError:
        return title
    return "".join(c for c in spelled if c.isalnum()).encode() or title
