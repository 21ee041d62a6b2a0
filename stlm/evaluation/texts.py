"""Decodes the documents of token shards to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from stlm.tokens.shards import read_split
from stlm.tokens.tokenizer import load_tokenizer


class SplitTexts(Sequence[str]):
    """The texts of a split of `data/tokens/<corpus>/<tokenizer>/`, in order, decoded on access.

    Tokenizers are lossless: the texts are those of the corpus, whatever the tokenizer.
    """

    def __init__(self, tokens_folder: Path, split: str) -> None:
        self._tokenizer = load_tokenizer(tokens_folder / "tokenizer")
        self._tokens = [d.tokens for component in read_split(tokens_folder, split) for d in component]

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._tokenizer.decode(tokens) for tokens in self._tokens[index]]
        return self._tokenizer.decode(self._tokens[index])
