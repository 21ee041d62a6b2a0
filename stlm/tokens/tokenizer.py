"""Tokenizers: GPT-2's vocabulary, byte-pair vocabularies trained on a corpus, those of published models
(`stlm.tokens.published`), bytes, and chunks of bytes.

All are byte-level: `decode(encode(text))` is the text, for every text that UTF-8 can hold. `encode` never
returns the end-of-text token, whatever the text contains. It has the last id, except in `hf:NAME`.

All byte-pair kinds are encoded by tiktoken. The library that trains ours could encode too, with the same
tokens, but took 8 times as long on books (4 against 27-38 MB/s on two cores).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from stlm.errors import UserError, nearest
from stlm.files import read_record, record_sha256
from stlm.remedy import remedy
from stlm.tokens.byte_pairs import GPT2, BytePairs, letters
from stlm.tokens.chunks import Chunker, ChunkTable, Pieces, chunk_table, cuts_chunks, make_chunker
from stlm.tokens.interface import DESCRIPTION, EOT, Tokenizer
from stlm.tokens.names import KINDS, bpe_size, hf_name
from stlm.tokens.published import PARENT, TOKENIZER, PublishedTokenizer

# The digests that tiktoken itself checks for GPT-2's published vocabulary.
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes 0-255, and 256 for the end of a text."""

    name, vocab_size, eot = "bytes", 257, 256
    files: Mapping[str, bytes] = {}

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding with GPT-2's pre-tokenization; `ranks` maps a token's bytes to its id."""

    def __init__(self, name: str, ranks: dict[bytes, int], files: Mapping[str, bytes]) -> None:
        self.name, self.files = name, files
        self.eot = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._bytes = {id_: content for content, id_ in ranks.items()} | {self.eot: EOT.encode()}
        self._pairs = BytePairs(name, GPT2, ranks)

    def encode_array(self, text: str) -> np.ndarray:
        return self._pairs.encode(text).astype(self.dtype)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join([self._bytes[token] for token in ids])


class ChunkTokenizer(Tokenizer):
    """Chunks of bytes for byte-level models (`words`, `spaces` or `stride-N`): those of one corpus.

    Ids number the corpus' distinct chunks in the order of their bytes: shards hold ids, models see bytes.
    """

    def __init__(self, name: str, chunks: Sequence[bytes]) -> None:
        self.name, self.chunks = name, list(chunks)
        self.eot = len(self.chunks)
        self.vocab_size = self.eot + 1
        self.chunker = make_chunker(name)
        self._ids = {chunk: number for number, chunk in enumerate(self.chunks)}

    @property
    def files(self) -> Mapping[str, bytes]:
        lengths = bytes(map(len, self.chunks))
        return {"chunks.bin": b"".join(self.chunks), "chunk-lengths.bin": lengths}

    @classmethod
    def of(cls, name: str, files: Mapping[str, bytes]) -> ChunkTokenizer:
        """The tokenizer with the given content of its files."""
        content, ends = files["chunks.bin"], list(accumulate(files["chunk-lengths.bin"], initial=0))
        if ends[-1] != len(content):
            raise ValueError(f"{len(content)} bytes in chunks, {ends[-1]} by their lengths")
        return cls(name, [content[begin:end] for begin, end in pairwise(ends)])

    def encode_array(self, text: str) -> np.ndarray:
        chunks = self.chunker.split(text.encode())
        try:
            return np.fromiter(map(self._ids.__getitem__, chunks), self.dtype, len(chunks))
        except KeyError as error:
            raise UserError(
                f"tokenizer {self.name}: the corpus that it was made of has no {error.args[0]!r}: its ids "
                "serve that corpus alone; a byte-level model reads any text"
            ) from None

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join([self.chunks[token] for token in ids])


def chunker_of(tokenizer: Tokenizer) -> Chunker:
    """The chunker of a byte-level model: at the tokens of a tokenizer, or that of a chunk tokenizer."""
    if isinstance(tokenizer, ChunkTokenizer):
        return tokenizer.chunker
    if isinstance(tokenizer, PublishedTokenizer):
        raise UserError(f"tokenizer: {tokenizer.name} cuts no chunks for byte-level models (model.bytes)")
    tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.eot)]
    return Pieces(
        tokenizer.name,
        lambda content: [tokens[token] for token in tokenizer.encode(content.decode())],
        max(map(len, tokens)),
    )


def tokens_table(tokenizer: Tokenizer) -> ChunkTable:
    """The chunks of a tokenizer's ids as a byte-level model reads and writes them."""
    chunks = [tokenizer.decode_bytes([token]) for token in range(tokenizer.eot)]
    return chunk_table(chunker_of(tokenizer), [*chunks, b""])


class _Description(BaseModel):
    """The content of tokenizer-name.json."""

    name: str
    sha256: dict[str, str]
    vocab_size: int
    eot: int


def check_tokenizer(folder: Path, expected: str | None = None) -> str:
    """Compare a tokenizer's files with its description without loading them; the tokenizer's SHA-256.

    `expected` is the SHA-256 in `meta.json`, if it has one. A file that is missing, truncated or changed, or
    a tokenizer other than the expected one, is a `UserError`.
    """
    _read_files(folder)
    found = record_sha256(folder / DESCRIPTION)
    if expected is not None and found != expected:
        raise UserError(
            f"{folder}: another tokenizer than the one that the text was tokenized with (SHA-256 "
            f"{found[:12]}..., expected {expected[:12]}...); {remedy(folder / DESCRIPTION)}"
        )
    return found


def _read_files(folder: Path) -> tuple[str, dict[str, bytes], _Description]:
    """The name, the content of the files and the description of a tokenizer's folder, checked."""
    description = read_record(folder / DESCRIPTION, _Description)
    files = {
        file: _checked(folder / file, digest, remedy(folder / file))
        for file, digest in description.sha256.items()
    }
    return description.name, files, description


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a tokenizer's folder (`tokenizer/` in a folder of tokens or of checkpoints).

    A file that is missing, truncated or changed, or that is not a vocabulary of this kind, is a `UserError`
    that names it.
    """
    name, files, description = _read_files(folder)
    path = folder / DESCRIPTION
    absent = [file for file in _files_of(name) if file not in files]
    if absent:
        raise UserError(
            f"{path}: sha256 names no {' and no '.join(absent)}, which the tokenizer {name} is made of; "
            f"{remedy(path)}"
        )
    tokenizer = _from_files(name, files, folder)
    found, expected = (tokenizer.vocab_size, tokenizer.eot), (description.vocab_size, description.eot)
    if found != expected:
        raise UserError(
            f"{path}: vocab_size and eot are {expected[0]} and {expected[1]}, but the vocabulary of {name} "
            f"has {found[0]} tokens; {remedy(path)}"
        )
    return tokenizer


def _files_of(name: str) -> list[str]:
    """The names of a tokenizer's files; an unknown name is a `UserError`."""
    if name == "bytes":
        return []
    if name == "gpt2":
        return list(GPT2_SHA256)
    if cuts_chunks(name):
        return ["chunks.bin", "chunk-lengths.bin"]
    if hf_name(name) is not None:
        return [TOKENIZER, PARENT]
    bpe_vocab_size(name)
    return ["tokenizer.json"]


def _from_files(name: str, files: Mapping[str, bytes], folder: Path) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    file, *_ = _files_of(name)
    try:
        if cuts_chunks(name):
            return ChunkTokenizer.of(name, files)
        if name == "gpt2":
            return BpeTokenizer(name, _gpt2_ranks(files[file]), files)
        if hf_name(name) is not None:
            return PublishedTokenizer.of(name, files)
        return trained_tokenizer(name, files[file])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{folder / file}: no vocabulary as {name} has (the tokenizer of another program or model?); "
            f"{remedy(folder / file)}"
        ) from None


def gpt2_tokenizer(vocabulary_folder: Path) -> Tokenizer:
    """GPT-2's tokenizer from its published `encoder.json` and `vocab.bpe`, offline."""
    files = {
        name: _checked(vocabulary_folder / name, digest, "run `stlm fetch gpt2` again")
        for name, digest in GPT2_SHA256.items()
    }
    return BpeTokenizer("gpt2", _gpt2_ranks(files["encoder.json"]), files)


def trained_tokenizer(name: str, content: bytes) -> Tokenizer:
    """The tokenizer `bpe-N` from the `tokenizer.json` of :func:`stlm.tokens.bpe.train_bpe`."""
    vocabulary = json.loads(content)["model"]["vocab"]
    return BpeTokenizer(name, _ranks(vocabulary), {"tokenizer.json": content})


def bpe_vocab_size(name: str) -> int:
    """The N of `bpe-N`; any other name is a `UserError`."""
    size = bpe_size(name)
    if size is None:
        hint = nearest(name, ["gpt2", "bytes", "bpe-4096", "words", "spaces", "stride-4"])
        raise UserError(f"unknown tokenizer {name!r}: expected {KINDS}{hint}")
    return size


def _checked(path: Path, digest: str, advice: str) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such vocabulary file; {advice}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {advice}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise UserError(
            f"{path}: corrupt vocabulary file: SHA-256 is {found[:16]}... ({len(content)} bytes), "
            f"expected {digest[:16]}...; {advice}"
        )
    return content


def _gpt2_ranks(encoder: bytes) -> dict[bytes, int]:
    vocabulary = json.loads(encoder)
    del vocabulary[EOT]
    return _ranks(vocabulary)


def _ranks(vocabulary: Mapping[str, int]) -> dict[bytes, int]:
    """Token bytes -> id, from a vocabulary written in GPT-2's printable alphabet (see `letters`).

    Ids grow with the merges, so they serve as tiktoken's ranks. Raises ValueError or KeyError for a
    vocabulary of another kind, with which tiktoken would end the process from inside Rust.
    """
    to_byte = letters()
    ranks = {bytes(to_byte[letter] for letter in token): id_ for token, id_ in vocabulary.items()}
    if any(type(id_) is not int for id_ in ranks.values()) or sorted(ranks.values()) != [*range(len(ranks))]:
        raise ValueError("ids are not 0, 1, 2, ...")
    if b"" in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("not every byte has a token")
    return ranks
