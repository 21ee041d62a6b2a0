"""The tokenizer of a published model (`hf:NAME`): its `tokenizer.json`, where that is a byte-level BPE.

Ids are the model's, those of `transformers` with `split_special_tokens`: special tokens in a text are
ordinary text. Every text comes back, also where the published tokenizer loses characters (see
`Vocabulary.of`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from pydantic import BaseModel
from tokenizers import models

from stlm.errors import UserError
from stlm.files import read_record
from stlm.integrity import Listed, check_files
from stlm.remedy import remedy
from stlm.tokens.byte_pairs import DIGITS, GPT2, BytePairs, letters
from stlm.tokens.interface import Tokenizer

TOKENIZER, PARENT = "tokenizer.json", "parent.json"
# The bytes that occur in UTF-8.
UTF8 = (*range(0xC0), *range(0xC2, 0xF5))
_PLAIN: dict[str, Any] = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}


class NotByteLevelError(ValueError):
    """A tokenizer.json of another kind; the message names the key, what was found and what was expected."""


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE: tokens by id in GPT-2's alphabet (see `letters`), special ones as they are spelled.

    `merges` are pairs of ids in the order in which they apply; each has a token of its own, its `product`.
    """

    tokens: tuple[str, ...]
    merges: tuple[tuple[int, int], ...]
    special: frozenset[int]
    pre_tokenizer: Mapping[str, Any]

    @classmethod
    def of(cls, content: bytes, eot: str) -> Vocabulary:
        """The vocabulary of a `tokenizer.json`, whose texts begin with the special token `eot`.

        Published vocabularies may lack bytes that were in no text they were trained on (SmolLM2's has none
        for eight bytes of UTF-8, among them 0x04 and 0x1D): `tokenizers` loses such characters. Here they are
        written with the last special tokens, which text has no other way to write.

        Raises NotByteLevelError for any other kind of tokenizer.
        """
        found = json.loads(content)
        _check_kind(found)
        tokens = _tokens(found)
        special = {added["id"] for added in found["added_tokens"]}
        if eot not in tokens or tokens.index(eot) not in special:
            raise NotByteLevelError(f"added_tokens: no special token {eot!r}, which starts a text")
        special -= _stand_in(tokens, special, keep=tokens.index(eot))
        ids = {token: id_ for id_, token in enumerate(tokens)}
        merges = []
        for merge in found["model"]["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            for token in (left, right, left + right):
                if ids.get(token) in (None, *special):
                    raise NotByteLevelError(f"model.merges: {merge}: {token!r} is no token of the vocabulary")
            merges.append((ids[left], ids[right]))
        vocabulary = cls(tuple(tokens), tuple(merges), frozenset(special), found["pre_tokenizer"])
        _check_products(vocabulary)
        if found["model"].get("ignore_merges") and (odd := vocabulary.not_made()):
            raise NotByteLevelError(
                f"model.ignore_merges: true, and {tokens[odd[0]]!r} is not what its bytes are merged to"
            )
        return vocabulary

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id."""
        return {token: id_ for id_, token in enumerate(self.tokens)}

    @cached_property
    def products(self) -> list[int]:
        """The token that each merge makes."""
        return [self.ids[self.tokens[left] + self.tokens[right]] for left, right in self.merges]

    @cached_property
    def contents(self) -> list[bytes]:
        """The bytes of each token; of special ones, their spelling."""
        to_byte = letters()
        return [
            token.encode() if id_ in self.special else bytes(map(to_byte.__getitem__, token))
            for id_, token in enumerate(self.tokens)
        ]

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """The tokens of pieces of text, each written in GPT-2's alphabet and merged as a whole."""
        bpe = tokenizers.Tokenizer(models.BPE(self.ids, self._merges()))
        return [encoding.ids for encoding in bpe.encode_batch_fast(pieces, add_special_tokens=False)]

    def ranks(self) -> dict[bytes, int] | None:
        """Token bytes -> id for tiktoken; None where tiktoken would not write the same tokens.

        It merges any two tokens whose bytes together are a token, the lowest id first, and takes a whole
        piece that is a token as it is. That is the same where ids grow with the merges, and where each
        token's own merges make it: inside a token that is about to be made, whatever surrounds it, the same
        merges were done as for its bytes alone.
        """
        if any(a >= b for a, b in pairwise(self.products)) or self.not_made():
            return None
        return _all_ranks(self)

    def not_made(self) -> list[int]:
        """The tokens that are not what their own bytes are merged to; special ones do not count."""
        made = self.encode_pieces(self.tokens)
        return [id_ for id_, ids in enumerate(made) if ids != [id_] and id_ not in self.special]

    def to_json(self) -> bytes:
        """The `tokenizer.json` that `tokenizers` and `transformers` load; it adds no token to a text."""
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": id_, "content": self.tokens[id_], **added} for id_ in sorted(self.special)
            ],
            "normalizer": None,
            "pre_tokenizer": self.pre_tokenizer,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self.ids,
                "merges": self._merges(),
            },
        }
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()

    def _merges(self) -> list[tuple[str, str]]:
        return [(self.tokens[left], self.tokens[right]) for left, right in self.merges]


def _check_kind(found: Any) -> None:
    """Raise NotByteLevelError unless `tokenizer.json` is a BPE of bytes that changes no text."""
    model = found.get("model") or {}
    if model.get("type") != "BPE":
        raise NotByteLevelError(f"model.type: {model.get('type')!r}; expected 'BPE'")
    for key, plain in _PLAIN.items():
        if model.get(key) not in plain:
            raise NotByteLevelError(f"model.{key}: {model[key]!r}; expected {plain[-1]!r}")
    if found.get("normalizer") is not None:
        raise NotByteLevelError("normalizer: changes texts; expected null")
    steps = _steps(found.get("pre_tokenizer"))
    if not steps or steps[-1]["type"] != "ByteLevel" or any(step.get("add_prefix_space") for step in steps):
        raise NotByteLevelError(
            f"pre_tokenizer: {[step['type'] for step in steps]}; expected 'ByteLevel' last, add_prefix_space "
            "false"
        )
    for step in steps[:-1]:
        if step["type"] != "Digits" and not (step["type"] == "Split" and step["behavior"] == "Isolated"):
            raise NotByteLevelError(f"pre_tokenizer: {step['type']}: not one that keeps every character")
    for added in found["added_tokens"]:
        if not added["special"]:
            raise NotByteLevelError(f"added_tokens: {added['content']!r} is not special, as it must be")


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _tokens(found: Mapping[str, Any]) -> list[str]:
    """The tokens in the order of their ids, which must be 0, 1, 2, ..."""
    by_id = {id_: token for token, id_ in found["model"]["vocab"].items()}
    by_id |= {added["id"]: added["content"] for added in found["added_tokens"]}
    absent = next((id_ for id_ in range(len(by_id)) if id_ not in by_id), None)
    if absent is not None:
        raise NotByteLevelError(f"model.vocab: no token has id {absent}; expected 0, 1, 2, ...")
    return [by_id[id_] for id_ in range(len(by_id))]


def _stand_in(tokens: list[str], special: set[int], keep: int) -> set[int]:
    """Give the bytes of UTF-8 without a token, in order, the last special tokens; the ids of these."""
    letter_of = {byte: letter for letter, byte in letters().items()}
    ordinary = {token for id_, token in enumerate(tokens) if id_ not in special}
    absent = [byte for byte in UTF8 if letter_of[byte] not in ordinary]
    spare = sorted(special - {keep})
    if len(absent) > len(spare):
        raise NotByteLevelError(
            f"model.vocab: no token for {len(absent)} bytes that texts may have, first 0x{absent[0]:02X}, "
            f"and only {len(spare)} special tokens to write them with"
        )
    taken = spare[len(spare) - len(absent) :]
    for id_, byte in zip(taken, absent, strict=True):
        tokens[id_] = letter_of[byte]
    return set(taken)


def _check_products(vocabulary: Vocabulary) -> None:
    """Raise NotByteLevelError unless each token is a byte, special, or made by exactly one merge."""
    alphabet, products = letters(), set(vocabulary.products)
    if len(products) < len(vocabulary.merges):
        raise NotByteLevelError("model.merges: several merges make the same token")
    for id_, token in enumerate(vocabulary.tokens):
        if id_ in vocabulary.special:
            continue
        if not set(token) <= alphabet.keys():
            raise NotByteLevelError(f"model.vocab: {token!r} has a character that stands for no byte")
        if len(token) > 1 and id_ not in products:
            raise NotByteLevelError(f"model.vocab: {token!r} is made by no merge")


class PublishedTokenizer(Tokenizer):
    """`hf:NAME`, or `hf:NAME:N`, the N of its tokens that a corpus needs (`stlm.tokens.reduced`).

    `parent_ids` [vocab_size]: the model's id of each token. `first_pieces` [the model's vocabulary]: the id
    of the first of the tokens that each of the model's is written with, its own if it was kept; for special
    tokens, the end of text. Those of `hf:NAME` are identities.

    Encoding is tiktoken's where it writes the same tokens (on Wikipedia articles 8.5 MB/s of one core, the
    library `tokenizers` 2.2), otherwise that of `tokenizers`.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        eot: str,
        parent_ids: np.ndarray | None = None,
        first_pieces: np.ndarray | None = None,
        fast: bool | None = None,
    ) -> None:
        """`fast`: whether tiktoken writes the same tokens, where that is known; None: find out."""
        self.name, self.vocabulary, self.eot_spelling = name, vocabulary, eot
        self.vocab_size, self.eot = len(vocabulary.tokens), vocabulary.ids[eot]
        whole = np.arange(self.vocab_size)
        self.parent_ids = whole if parent_ids is None else parent_ids
        self.first_pieces = whole if first_pieces is None else first_pieces
        self._is_whole = parent_ids is None
        pattern = _pattern(vocabulary.pre_tokenizer)
        ranks = vocabulary.ranks() if fast is None else _all_ranks(vocabulary) if fast else None
        self._pairs = BytePairs(name, pattern, ranks) if pattern and ranks else None
        self._slow = _without_special(vocabulary) if self._pairs is None else None

    @property
    def is_fast(self) -> bool:
        """Whether tiktoken encodes."""
        return self._pairs is not None

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        parent: dict[str, Any] = {"eot": self.eot_spelling, "tiktoken": self.is_fast}
        if not self._is_whole:
            parent |= {"parent_ids": self.parent_ids.tolist(), "first_pieces": self.first_pieces.tolist()}
        return {TOKENIZER: self.vocabulary.to_json(), PARENT: json.dumps(parent).encode()}

    @classmethod
    def of(cls, name: str, files: Mapping[str, bytes]) -> PublishedTokenizer:
        """The tokenizer with the given content of its files."""
        parent = json.loads(files[PARENT])
        vocabulary = Vocabulary.of(files[TOKENIZER], parent["eot"])
        arrays = [np.array(parent[key]) if key in parent else None for key in ("parent_ids", "first_pieces")]
        tokenizer = cls(name, vocabulary, parent["eot"], *arrays, fast=parent["tiktoken"])
        if len(tokenizer.parent_ids) != tokenizer.vocab_size:
            raise ValueError(f"{len(tokenizer.parent_ids)} parent_ids, {tokenizer.vocab_size} tokens")
        return tokenizer

    def encode_array(self, text: str) -> np.ndarray:
        if self._pairs is not None:
            return self._pairs.encode(text).astype(self.dtype)
        return np.array(self._slow.encode(text, add_special_tokens=False).ids, self.dtype)

    def decode_bytes(self, ids: list[int]) -> bytes:
        contents = self.vocabulary.contents
        return b"".join([contents[token] for token in ids])


def _pattern(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """The pattern of `BytePairs` that cuts as `pre_tokenizer` does; None if there is none."""
    *before, last = _steps(pre_tokenizer)
    if not last.get("use_regex", True):
        return None
    if not before:
        return GPT2
    digits = len(before) == 1 and before[0]["type"] == "Digits" and before[0].get("individual_digits")
    return DIGITS if digits else None


def _all_ranks(vocabulary: Vocabulary) -> dict[bytes, int]:
    return {content: id_ for id_, content in enumerate(vocabulary.contents) if id_ not in vocabulary.special}


def _without_special(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The tokenizer of the library `tokenizers` to which special tokens are ordinary text."""
    content = json.loads(vocabulary.to_json())
    content["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(content))


class _File(BaseModel):
    path: str
    sha256: str
    bytes: int


class _Source(BaseModel):
    """The part of a fetched model's source.json that is read here."""

    prefix: str
    files: list[_File]


def fetched_tokenizer(name: str, folder: Path) -> PublishedTokenizer:
    """The whole tokenizer `name` of the model that `stlm fetch` wrote to `folder`.

    Raises UserError if its files are missing or damaged, or its tokenizer is no byte-level BPE.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run: stlm fetch {folder.name}")
    source = read_record(folder / "source.json", _Source)
    path = folder / TOKENIZER
    check_files(Listed(path, file.sha256, file.bytes) for file in source.files if file.path == TOKENIZER)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy(path)}")
    try:
        return PublishedTokenizer(name, Vocabulary.of(path.read_bytes(), source.prefix), source.prefix)
    except NotByteLevelError as error:
        raise UserError(
            f"{path}: no tokenizer that {name} can be made of, a byte-level BPE: {error}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not as the library tokenizers writes it; {remedy(path)}") from None
