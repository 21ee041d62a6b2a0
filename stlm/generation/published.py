"""A published model of `transformers` that continues a text, with or without the model's cache.

Shapes: L new tokens, N of them whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.evaluation.hf_model import HfModel, load_hf
from stlm.evaluation.hf_tokenizer import HfTokenizer
from stlm.evaluation.plain_llama import load_plain_llama
from stlm.generation.tokens import TokenGenerator, window_begin
from stlm.model.cache import Cache
from stlm.model.transformer import Transformer
from stlm.tokens.byte_pairs import letters
from stlm.tokens.interface import utf8

# Any tokenizer must return this text token by token: words, spaces, letters of several bytes.
_SAMPLE = "A text, né on  two lines:\n\u6c34 \U0001f642!"


class HfGenerator:
    """A :class:`~stlm.generation.interface.TokenReader` for a published model.

    The text follows the token that starts texts, as in scoring, and ends with the tokenizer's eos. If it
    outgrows the context, the window moves on as in `TokenGenerator`. Rows of the model without a token are
    never drawn. With `cached`, the model keeps its cache of the tokens read, a class of transformers; without
    it, the tokens are the same, except for rounding.
    """

    unit = "tokens"

    def __init__(self, model: HfModel, tokenizer: HfTokenizer, cached: bool = True) -> None:
        if model.packs:
            raise ValueError("attention within rows knows no cache: load the model with packing=False")
        self._model, self._tokenizer, self._cached = model.model, tokenizer, cached
        self._context = model.config.context
        self._device = next(model.model.parameters()).device
        self.eot = tokenizer.eos
        self._pieces = _Pieces(tokenizer)
        self._empty_V = rows_without_token(model.config.vocab_size, tokenizer).to(self._device)
        takes = inspect.signature(model.model.forward).parameters
        self._chooses_logits = "logits_to_keep" in takes
        self._tokens: list[int] = []
        self._begin = 0  # the first of them in the window
        self._read, self._past = 0, None  # the number of the window's tokens that the cache holds

    @property
    def dropped(self) -> int:
        """See `TextGenerator`. The token that starts the text does not count."""
        return max(0, self._begin - 1)

    def start(self, prompt: str) -> Tensor:
        """See `TextGenerator`."""
        utf8(prompt)  # raises UserError if the prompt cannot be encoded
        self.restart([self._tokenizer.eot, *self._tokenizer.encode(prompt)])
        return self._logits(1)[0]

    def next(self, symbol: int, largest: int | None = None) -> Tensor:
        """See `TextGenerator`."""
        return self.read([symbol])[0]

    @property
    def tokens(self) -> Sequence[int]:
        """See `TokenReader`."""
        return self._tokens

    @property
    def room(self) -> int:
        """See `TokenReader`."""
        return self._context - len(self._tokens) + window_begin(len(self._tokens), self._context)

    def restart(self, tokens: Sequence[int]) -> None:
        """See `TokenReader`."""
        self._tokens = list(tokens)
        self._begin, self._read, self._past = 0, 0, None

    def read(self, symbols: Sequence[int], last: int | None = None) -> Tensor:
        """See `TokenReader`."""
        self._tokens += symbols
        return self._logits(len(symbols) if last is None else last)

    def forget(self, count: int) -> None:
        """See `TokenReader`."""
        del self._tokens[len(self._tokens) - count :]
        kept = max(0, min(self._read, len(self._tokens) - self._begin))
        if not kept:
            self._past = None
        elif self._past is not None:
            self._past.crop(kept - self._read)
        self._read = kept

    @torch.inference_mode()
    def afresh(self, back: int = 0) -> Tensor:
        """See `TokenReader`."""
        return self._pass(self._tokens[self._begin : len(self._tokens) - back], 1, None, False)[0][0]

    def vocabulary(self) -> dict[int, bytes]:
        """See `TokenReader`."""
        return {id_: self._pieces[id_] for id_ in self._tokenizer.ids.values() if id_ != self.eot}

    def cannot_crop(self) -> str | None:
        """Why the last tokens cannot be taken out of the model's cache; None if they can."""
        self.start("")
        if self._past is None:
            return f"{self._model.config.model_type} keeps no cache"
        if not getattr(self._past, "is_croppable", False) or any(self._past.is_sliding):
            return f"the cache of {self._model.config.model_type} does not keep all tokens"
        return None

    def piece(self, symbol: int) -> bytes:
        """See `TextGenerator`."""
        return self._pieces[symbol]

    @torch.inference_mode()
    def _logits(self, last: int) -> Tensor:
        """The logits [N, V] after each of the text's `last` N tokens; reads what the cache does not hold."""
        begin = window_begin(len(self._tokens), self._context)
        # It moves back where symbols are forgotten at which it had moved on.
        if begin != self._begin or not self._cached:
            self._read, self._past = 0, None
        self._begin = begin
        logits_NV, past = self._pass(self._tokens[begin + self._read :], last, self._past, self._cached)
        if self._cached:
            self._past = past
            self._cached = past is not None  # a recurrent model has another kind of state
            self._read = len(self._tokens) - begin
        return logits_NV

    def _pass(self, tokens: Sequence[int], last: int, past: Any, cached: bool) -> tuple[Tensor, Any]:
        """The logits [N, V] after each of the `last` N of `tokens`, which follow `past`, and a cache."""
        tokens_1L = torch.tensor([tokens], device=self._device)
        chosen = {"logits_to_keep": last} if self._chooses_logits else {}
        found = self._model(input_ids=tokens_1L, past_key_values=past, use_cache=cached, **chosen)
        logits_NV = found.logits[0, -last:].float().masked_fill(self._empty_V, -torch.inf)
        return logits_NV, getattr(found, "past_key_values", None)


class LlamaGenerator(TokenGenerator):
    """As `HfGenerator`, for a published model that is a plain Llama: our transformer, with passes in C."""

    def __init__(self, transformer: Transformer, tokenizer: HfTokenizer, cached: bool = True) -> None:
        super().__init__(transformer, tokenizer, cached)
        self._begins, self.eot = tokenizer.eot, tokenizer.eos
        self._pieces = _Pieces(tokenizer)
        empty_V = rows_without_token(transformer.config.vocab_size, tokenizer)
        self._empty_V = empty_V.to(self._device) if empty_V.any() else None

    def start(self, prompt: str) -> Tensor:
        """See `TextGenerator`."""
        utf8(prompt)  # raises UserError if the prompt cannot be encoded
        self.restart([self._begins, *self.tokenizer.encode(prompt)])
        return self._logits(1)[0]

    def vocabulary(self) -> dict[int, bytes]:
        """See `TokenReader`."""
        return {id_: self._pieces[id_] for id_ in self.tokenizer.ids.values() if id_ != self.eot}

    def piece(self, symbol: int) -> bytes:
        """See `TextGenerator`."""
        return self._pieces[symbol]

    def _pass(
        self, begin: int, end: int, last: int, cache: Cache | None, largest: int | None = None
    ) -> Tensor:
        """See `TokenGenerator`; rows of the model without a token get no probability."""
        if self._empty_V is None:
            return super()._pass(begin, end, last, cache, largest)
        return super()._pass(begin, end, last, cache).masked_fill(self._empty_V, -torch.inf)


def rows_without_token(rows: int, tokenizer: HfTokenizer) -> Tensor:
    """Whether each of a model's rows [V] has no token, as where a vocabulary is padded."""
    empty_V = torch.ones(rows, dtype=torch.bool)
    empty_V[list(tokenizer.ids.values())] = False
    return empty_V


class _Pieces:
    """The bytes that each token adds to a text, according to the tokenizer's decoder.

    In a byte-level tokenizer, the letters of a token stand for bytes. Otherwise, as in SentencePiece, \u2581
    stands for a space and <0x0A> for a byte. Raises UserError if a sample text does not survive, as with
    other decoders.
    """

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self._texts = {id_: token for token, id_ in tokenizer.ids.items()}
        self._added = tokenizer.added
        self._byte_level = "ByteLevel" in tokenizer.decoders
        self._byte_of = letters()
        found = b"".join(self[token] for token in tokenizer.encode(_SAMPLE)).decode(errors="replace")
        # Some tokenizers add a space before a text, some lack letters: then decode() differs in the same way.
        if found.lstrip(" ") != tokenizer.decode(tokenizer.encode(_SAMPLE)).lstrip(" "):
            raise UserError(
                f"{tokenizer.name}: its tokens are joined to texts in a way that is not known here "
                f"({', '.join(tokenizer.decoders) or 'no decoder'}): {_SAMPLE!r} would be {found!r}"
            )

    def __getitem__(self, token: int) -> bytes:
        text = self._texts[token]
        if token in self._added:
            return text.encode()
        if self._byte_level:
            known = self._byte_of
            return b"".join(bytes([known[one]]) if one in known else one.encode() for one in text)
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()


def is_published(folder: Path) -> bool:
    """Whether a folder's config.json is a `transformers` model's, and not a checkpoint's."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "model_type" in content and "weights_sha256" not in content


def load_published(
    folder: Path, device: torch.device, cached: bool = True, **options: Any
) -> HfGenerator | LlamaGenerator:
    """The generator for a published model's folder; `options` and errors are those of `load_hf`."""
    if loaded := load_plain_llama(folder, **options):
        return LlamaGenerator(loaded[0].to(device), loaded[1], cached)
    model, tokenizer = load_hf(folder, packing=False, **options)
    return HfGenerator(model.to(device), tokenizer, cached)
