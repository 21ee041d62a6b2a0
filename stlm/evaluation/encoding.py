"""Requests to token sequences, as lm_eval 0.4 does (`TemplateLM._encode_pair`), each text encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from stlm.evaluation.interface import Request


class Tokenizer(Protocol):
    """The part of `stlm.tokens`' tokenizers that scoring needs."""

    eot: int
    vocab_size: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


class Encoded(NamedTuple):
    """Token ids of a request, and how many of them, from the left, are its context (at least one)."""

    tokens: np.ndarray
    n_context: int
    starts_with_eot: bool


class RequestEncoder:
    """Encodes requests, remembering every text, so that a second checkpoint pays nothing.

    With a context, the whole text is encoded at once, and what follows as many tokens as the context has by
    itself is the continuation; the context's trailing whitespace counts as the continuation's. Without one,
    the end-of-text token is it. (Where the two run together in one token, such as a context that ends inside
    a word, the context's own tokens come first, except in a string that is scored whole.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eot = tokenizer.eot
        self._eot = np.array([tokenizer.eot], dtype=np.int32)
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, requests: Sequence[Request]) -> list[Encoded]:
        self._encode(text for r in requests for text in (r.context.rstrip(), r.context + r.continuation))
        encoded = []
        for request in requests:
            whole = self._known[request.context + request.continuation]
            context = self._known[request.context.rstrip()]
            n_context = len(context)
            if n_context:
                if not (request.whole or np.array_equal(whole[:n_context], context)):
                    whole = np.concatenate([context, whole[n_context:]])
                encoded.append(Encoded(whole, n_context, False))
            else:
                encoded.append(Encoded(np.concatenate([self._eot, whole]), 1, True))
        return encoded

    def _encode(self, texts: Iterable[str]) -> None:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        # In slices, so that the tokenizer's Python lists do not all exist at once.
        for begin in range(0, len(new), 10_000):
            part = new[begin : begin + 10_000]
            ids = self.tokenizer.encode_batch(part)
            self._known.update(zip(part, (np.asarray(i, dtype=np.int32) for i in ids), strict=True))
