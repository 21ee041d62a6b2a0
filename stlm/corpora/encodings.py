"""Detect the encoding of a text file, and read its text.

A file that is valid UTF-8 throughout is UTF-8. UTF-16 and UTF-32 are recognized by their byte-order mark, or
by the positions of their NUL bytes. Any other encoding is guessed from a bounded sample of the lines that are
not ASCII, and the guess is accepted only if the whole file can be decoded by it.
"""

from __future__ import annotations

import codecs
import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from stlm.corpora.compression import damage, open_bytes

UNKNOWN = "unknown"
UTF8 = ("utf-8", "utf-8-sig")

_BLOCK = 1 << 20
_HEAD = 1 << 16
_SAMPLE = 1 << 15
_FEW = 8  # so few non-ASCII bytes say nothing about the encoding
# The byte-order marks of UTF-32 begin with those of UTF-16, so they come first.
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Common encodings of text files; one of the dozens of rare ones would match a short sample by chance.
_COMMON = [
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "iso8859_2",
    "iso8859_5", "iso8859_7", "iso8859_9", "iso8859_15", "koi8_r", "koi8_u", "mac_roman", "cp437", "cp850",
    "cp866", "cp874", "gb18030", "big5", "cp932", "euc_jp", "cp949",
]  # fmt: skip


def detect_encoding(path: Path) -> str:
    """The name of Python's codec for the text file ``path`` (decompressed), or "unknown".

    "utf-8-sig", "utf-16" and "utf-32" stand for files that begin with a byte-order mark, which the codec
    removes; "utf-16-le" and the like for files without one. Raises `SourceError` if the file is damaged.
    """
    about = path.stat()
    return _detect(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _detect(path: Path, _size: int, _modified: int) -> str:
    with damage(path.name):
        with open_bytes(path) as file:
            head = file.read(_HEAD)
        marked = next((codec for bom, codec in _BOMS if head.startswith(bom)), None)
        if marked:
            return marked if _decodes(path, marked) else UNKNOWN
        if b"\0" in head:
            wide = _wide_codec(head)
            if wide and _decodes(path, wide):
                return wide
        if _decodes(path, "utf-8"):
            return "utf-8"
        if b"\0" in head:
            return UNKNOWN  # no text of any other encoding
        return next((codec for codec in _guesses(_sample(path)) if _decodes(path, codec)), UNKNOWN)


def _decodes(path: Path, codec: str) -> bool:
    decoder = codecs.getincrementaldecoder(codec)(errors="strict")
    try:
        with open_bytes(path) as file:
            while block := file.read(_BLOCK):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeError:
        return False
    return True


def _wide_codec(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without byte-order mark: most characters are below U+0100, with high bytes of NUL."""
    head = head[: len(head) // 4 * 4]
    nul = [head[place::4].count(0) / max(len(head) // 4, 1) for place in range(4)]
    if min(nul[2:]) > 0.9 and nul[0] < 0.1:
        return "utf-32-le"
    if min(nul[:2]) > 0.9 and nul[3] < 0.1:
        return "utf-32-be"
    even, odd = (nul[0] + nul[2]) / 2, (nul[1] + nul[3]) / 2
    if odd > 0.02 and even < odd / 20:
        return "utf-16-le"
    if even > 0.02 and odd < even / 20:
        return "utf-16-be"
    return None


def _sample(path: Path) -> bytes:
    """32 kB of lines that are not ASCII: the beginning of a long file may have none."""
    sample = bytearray()
    with open_bytes(path) as file:
        while len(sample) < _SAMPLE and (line := file.readline(_SAMPLE)):
            if not line.isascii():
                sample += line
    return bytes(sample)


def _guesses(sample: bytes) -> Iterator[str]:
    """Encodings that ``sample`` may have, the likeliest first; none if it is no text."""
    if b"\0" in sample:
        return
    text = sample.decode("utf-8", errors="surrogateescape")
    broken = sum("\udc80" <= character <= "\udcff" for character in text)
    if sum(not character.isascii() for character in text) - broken >= broken:
        return  # UTF-8 with a few damaged bytes: decoded otherwise, all of it would become nonsense
    if sum(byte > 127 for byte in sample) < _FEW:
        yield "cp1252"
    from charset_normalizer import from_bytes

    matches = list(from_bytes(sample, cp_isolation=_COMMON))
    # Several may decode the sample equally well; the Western European one is by far the most common.
    best = [
        match
        for match in matches
        if (match.chaos, match.coherence) == (matches[0].chaos, matches[0].coherence)
    ]
    if any("cp1252" in match.could_be_from_charset for match in best):
        yield "cp1252"
    for match in matches:
        yield from (match.encoding, *match.could_be_from_charset)


@contextmanager
def open_text(path: Path, encoding: str, newline: str | None) -> Iterator[TextIO]:
    """The text of ``path``, decompressed and decoded. With ``newline`` None, CRLF and CR become LF.

    With encoding "unknown", bytes that are not UTF-8 become lone surrogates, which tokenizing counts.
    """
    codec = "utf-8" if encoding == UNKNOWN else encoding
    errors = "surrogateescape" if encoding == UNKNOWN else "strict"
    with open_bytes(path) as file, _closing_text(file, codec, errors, newline) as text:
        yield text


@contextmanager
def _closing_text(file: BinaryIO, codec: str, errors: str, newline: str | None) -> Iterator[TextIO]:
    text = io.TextIOWrapper(file, encoding=codec, errors=errors, newline=newline)
    try:
        yield text
    finally:
        if not text.closed:
            text.close()
