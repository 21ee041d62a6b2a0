"""What every tokenizer can do, and the folder that it is stored in."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from stlm.errors import UserError
from stlm.files import atomic_path, write_record

EOT = "<|endoftext|>"
DESCRIPTION = "tokenizer-name.json"


class Tokenizer(ABC):
    """Text <-> token ids in [0, vocab_size); `eot` is the id of the end-of-text token."""

    name: str
    vocab_size: int
    eot: int
    eot_spelling: str = EOT
    files: Mapping[str, bytes]  # what `save` writes in addition to the description

    @property
    def dtype(self) -> np.dtype:
        """The type that token shards store: uint16 up to 65,535 ids, uint32 above."""
        return np.dtype(np.uint16 if self.vocab_size <= 65_535 else np.uint32)

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The tokens of `text`, which must be encodable as UTF-8, as an array of `dtype`."""

    @abstractmethod
    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 of `ids`, which contain no end of text; a part of a text may end within a character."""

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; nothing is added. A lone surrogate is a `UserError`: UTF-8 cannot hold it."""
        utf8(text)
        return self.encode_array(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without end-of-text tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes([token for token in ids if token != self.eot]).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write the self-contained folder that :func:`load_tokenizer` reads."""
        for name, content in self.files.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        description = {"name": self.name, "vocab_size": self.vocab_size, "eot": self.eot, "sha256": digests}
        write_record(folder / DESCRIPTION, description)


def utf8(text: str) -> bytes:
    """The bytes of a text. Raises UserError for a lone surrogate, which UTF-8 cannot hold."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate ({text[error.start]!a} at character {error.start}), which UTF-8 "
            "cannot hold"
        ) from None
