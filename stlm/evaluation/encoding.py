"""Encodes requests as tokens, as lm_eval 0.4 does (`TemplateLM._encode_pair`), each text once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from stlm.errors import UserError
from stlm.evaluation.interface import Request


class Tokenizer(Protocol):
    """The part of the tokenizers in `stlm.tokens` that scoring needs."""

    eot: int
    vocab_size: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


class Encoded(NamedTuple):
    """The token ids of a request; the first of them (at least one) are its context."""

    tokens: np.ndarray
    n_context: int
    starts_with_eot: bool


def lost_on_the_left(requests: Sequence[Request], excess: Sequence[int]) -> list[int]:
    """How many tokens are not read of each request's text, given by how many it exceeds the context.

    The options of an item that are scored whole all lose as many, so that the same of them is compared.
    """
    most: dict[int, int] = {}
    for request, tokens in zip(requests, excess, strict=True):
        if request.whole and request.item is not None:
            most[request.item] = max(tokens, most.get(request.item, 0))
    return [
        most.get(request.item, tokens) if request.whole else tokens
        for request, tokens in zip(requests, excess, strict=True)
    ]


def adds_no_token(request: Request) -> UserError:
    """What is said of a continuation that the tokenizer joins to its context."""
    return UserError(
        f"the continuation {request.continuation[:40]!r} adds no token to its context "
        f"{request.context[-40:]!r}: the tokenizer makes them one; expected a context that ends where a "
        "token does, for example before a space"
    )


class RequestEncoder:
    """Encodes requests and caches every text, so that further checkpoints cost nothing.

    The whole text is encoded at once. The context alone is encoded, too, and the continuation begins after as
    many tokens; trailing whitespace of the context counts as part of the continuation. An empty context is
    the end-of-text token, and a context that begins a document follows it. If both merge in one token, for
    example when a context ends inside a word, the context's own tokens come first, except in a string that
    is scored whole.
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
                if request.begins:
                    encoded.append(Encoded(np.concatenate([self._eot, whole]), n_context + 1, True))
                else:
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
