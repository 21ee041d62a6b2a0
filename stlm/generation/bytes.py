"""A byte-level model that continues a text, with or without a cache of the core's keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from stlm.generation.tokens import window_begin
from stlm.model.byte_transformer import ByteTransformer
from stlm.model.cache import Cache
from stlm.tokens.chunks import CERTAIN, END, END_OF_TEXT, chunk_table
from stlm.tokens.interface import Tokenizer, utf8
from stlm.tokens.tokenizer import chunker_of


class ByteGenerator:
    """A :class:`~stlm.generation.interface.TextGenerator` whose symbols are bytes and the end of a chunk.

    The prompt's last chunk stays open, unless its end is certain: the model may continue it, so a prompt may
    end inside a word. If the text outgrows the context, the window moves on by chunks, as in
    `TokenGenerator`. The core reads a chunk when it is closed; with `cached`, it reads each chunk once. The
    byte decoder reads the open chunk anew for each symbol. The text is the same without a cache.
    """

    eot, unit = END_OF_TEXT, "bytes"

    def __init__(self, transformer: ByteTransformer, tokenizer: Tokenizer, cached: bool = True) -> None:
        self._transformer, self._chunker = transformer.eval(), chunker_of(tokenizer)
        self._device = transformer.embedding.weight.device
        self._cache = Cache.of(transformer, 1, self._device) if cached else None
        # The empty chunk is the end of the previous text.
        self._chunks: list[bytes] = [b""]
        self._open = b""
        self._begin = 0
        self._hidden_D: Tensor | None = None

    @property
    def dropped(self) -> int:
        """See `TextGenerator`; ends of chunks do not count, as they add no text."""
        return sum(map(len, self._chunks[: self._begin]))

    def start(self, prompt: str) -> Tensor:
        """See `TextGenerator`."""
        chunks = self._chunker.split(utf8(prompt))
        self._chunks, self._open = [b"", *chunks[:-1]], b"".join(chunks[-1:])
        self._begin, self._hidden_D = 0, None
        if self._cache is not None:
            self._cache.clear()
        return self._logits()

    def next(self, symbol: int, largest: int | None = None) -> Tensor:
        """See `TextGenerator`."""
        if symbol == END:
            self._close()
        else:
            self._open += bytes([symbol])
        return self._logits()

    @torch.inference_mode()
    def afresh(self) -> Tensor:
        """See `TextGenerator`."""
        rule = self._chunker.rule_after(self._chunks[-1], self._open)
        return self._transformer.next_logits(self._hidden(self._begin, None), self._open, rule)

    def piece(self, symbol: int) -> bytes:
        """See `TextGenerator`."""
        return b"" if symbol == END else bytes([symbol])

    def _close(self) -> None:
        self._chunks.append(self._open)
        self._open, self._hidden_D = b"", None

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        rule = self._chunker.rule_after(self._chunks[-1], self._open)
        if rule == CERTAIN:
            self._close()
            rule = self._chunker.rule_after(self._chunks[-1], self._open)
        if self._hidden_D is None:
            self._hidden_D = self._read()
        return self._transformer.next_logits(self._hidden_D, self._open, rule)

    def _read(self) -> Tensor:
        """The core's output [D] for the last closed chunk."""
        cache = self._cache
        begin = window_begin(len(self._chunks), self._transformer.config.context)
        if begin > self._begin and cache is not None:
            cache.clear()
        self._begin = begin
        return self._hidden(begin + (cache.length if cache is not None else 0), cache)

    def _hidden(self, begin: int, cache: Cache | None) -> Tensor:
        """The core's output [D] for the last closed chunk, read from chunk `begin` on."""
        new = self._chunks[begin:]
        self._transformer.use(chunk_table(self._chunker, new))
        chunks_1L = torch.arange(len(new), device=self._device)[None]
        held = None if cache is None else cache.extend(len(new))
        last_1 = torch.tensor([len(new) - 1], device=self._device)
        return self._transformer.hidden(chunks_1L, held, last_1)[0]
