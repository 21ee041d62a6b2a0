"""Scores of the byte-level model beside the chain rule, one symbol at a time."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch

from stlm.evaluation.byte_model import ByteModel, ChunkRequests
from stlm.evaluation.interface import Request
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.tokens.bpe import train_bpe
from stlm.tokens.chunks import CERTAIN, END, END_OF_TEXT, SYMBOLS, chunk_table, make_chunker
from stlm.tokens.tokenizer import ChunkTokenizer, Tokenizer, chunker_of

TEXTS = [
    "The cat's hungry; it ran home.",
    "One dog, né Rex, sleeps…\n\nToday it's 3.14 degrees, and the 'cats' of the street are at home again.",
    "x",
]
KINDS = ["bpe-300", "words", "spaces", "stride-4"]


def make_tokenizer(kind: str) -> Tokenizer:
    if kind.startswith("bpe"):
        return train_bpe(kind, TEXTS * 20)
    chunker = make_chunker(kind)
    return ChunkTokenizer(kind, sorted({chunk for text in TEXTS for chunk in chunker.split(text.encode())}))


def make_model(context: int = 64):
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": context}
    model = build_model(
        ModelConfig(**sizes, vocab_size=SYMBOLS, bytes={"width": 16, "heads": 2, "ffn_width": 24})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 1.0))
    return model.eval()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


class Symbol(NamedTuple):
    """A symbol of a text, its log-probability, the text's bytes up to it, whether it is the first choice."""

    symbol: int
    logprob: float
    size: int
    best: bool


@torch.no_grad()
def symbols_of(model, tokenizer: Tokenizer, text: str, after_end_of_text: bool) -> list[Symbol]:
    """A text symbol by symbol, each from a forward pass of its own.

    Without an end of text before it, the symbols of the first chunk have a log-probability of 0.
    """
    chunker = chunker_of(tokenizer)
    found, closed, size = [], [b""] if after_end_of_text else [], 0
    for chunk in chunker.split(text.encode()):
        if closed:
            model.use(chunk_table(chunker, closed))
            x_D = model.hidden(torch.arange(len(closed))[None])[0, -1]
        for place in range(len(chunk) + 1):
            rule = chunker.rule_after(closed[-1] if closed else b"", chunk[:place])
            symbol = chunk[place] if place < len(chunk) else END
            if rule == CERTAIN or (symbol == END and not chunker.allowed_RS[rule, END]):
                continue
            size += symbol != END
            if closed:
                logits_S = model.next_logits(x_D, chunk[:place], rule)
                own = logits_S.log_softmax(-1)[symbol].item(), size, logits_S.argmax().item() == symbol
            else:
                own = 0.0, size, True
            found.append(Symbol(symbol, *own))
        closed.append(chunk)
    return found


def continued(model, tokenizer: Tokenizer, request: Request) -> list[Symbol]:
    """The symbols after the context's last byte that is no white space."""
    text = request.context + request.continuation
    size = len(request.context.rstrip().encode())
    # A context within the first chunk has nothing before it but an end of text.
    for after_end_of_text in (False, True):
        symbols = symbols_of(model, tokenizer, text, after_end_of_text)
        end = max(
            (n for n, own in enumerate(symbols, 1) if own.size <= size and own.symbol != END), default=0
        )
        if end < len(symbols) and symbols[end].logprob != 0.0:
            return symbols[end:]
    raise AssertionError("a context and nothing after it")


def test_continuations_are_scored_from_the_contexts_last_byte_on(kind):
    tokenizer, model = make_tokenizer(kind), make_model()
    scorer = ByteModel(model, ChunkRequests(tokenizer))
    requests = [
        Request("The cat's", " hungry; it ran home."),
        Request("The cat's ", "hungry; it ran home."),  # the space counts as the continuation's
        Request("The cat's hun", "gry; it ran home."),  # inside a word
        Request("Th", "e cat's hungry"),  # inside the first chunk
        Request("", "The cat's hungry; it ran home."),
        Request("Der né", "e…"),  # chunks that no table has
        Request("one. two.", "\n\nthree"),
        Request("The cat's", " hungry; it ran home. Then it slept."),
    ]
    scores = scorer.loglikelihoods(requests, greedy=True)
    for request, score in zip(requests, scores, strict=True):
        symbols = continued(model, tokenizer, request)
        assert score.logprob == pytest.approx(sum(own.logprob for own in symbols), abs=2e-4), request
        assert score.greedy == all(own.best for own in symbols)
        assert not score.truncated


def test_whole_strings_are_scored_as_paths(kind):
    tokenizer, model = make_tokenizer(kind), make_model()
    scorer = ByteModel(model, ChunkRequests(tokenizer))
    requests = [
        Request("The cat's", " hungry", True, 0),
        Request("The cat's", " home.", True, 0),
        Request("", "x y", True, 1),
    ]
    for request, score in zip(requests, scorer.loglikelihoods(requests), strict=True):
        text = request.context + request.continuation
        after = symbols_of(model, tokenizer, text, True)
        # The first chunk follows the end of text, the others the string alone, as with tokens.
        alone = symbols_of(model, tokenizer, text, not request.context)
        first = len(chunker_of(tokenizer).split(text.encode())[0])
        own = [symbol.size for symbol in after].index(first) + 1
        own += own < len(after) and after[own].symbol == END
        expected = sum(symbol.logprob for symbol in [*after[:own], *alone[own:]])
        assert score.logprob == pytest.approx(expected, abs=2e-4)


def test_what_does_not_fit_is_cut_from_the_left_by_chunks(kind):
    tokenizer, model = make_tokenizer(kind), make_model(context=8)
    scorer = ByteModel(model, ChunkRequests(tokenizer))
    chunker = chunker_of(tokenizer)
    # The continuation has fewer than nine chunks, whatever their kind.
    context, continuation = "One dog, né Rex, sleeps. Two dogs, too", ". A cat."
    (score,) = scorer.loglikelihoods([Request(context, continuation)])
    chunks = chunker.split((context + continuation).encode())
    assert len(chunks) > 9 and score.truncated
    kept = b"".join(chunks[-9:])
    assert chunker.split(kept) == chunks[-9:], "alone, they are cut alike"
    # The first chunk that is left is read, and nothing before it.
    symbols = continued(model, tokenizer, Request(kept.decode().removesuffix(continuation), continuation))
    assert bytes(own.symbol for own in symbols if own.symbol != END) == continuation.encode()
    assert score.logprob == pytest.approx(sum(own.logprob for own in symbols), abs=2e-4)


def test_documents_read_in_windows_are_scored_once(kind):
    tokenizer, model = make_tokenizer(kind), make_model(context=8)
    scorer = ByteModel(model, ChunkRequests(tokenizer))
    documents = [tokenizer.encode(text) for text in TEXTS]
    stride = 5
    found = scorer.document_loglikelihoods(documents, stride)
    chunker = chunker_of(tokenizer)
    for text, logprob in zip(TEXTS, found, strict=True):
        chunks = [b"", *chunker.split(text.encode())]
        expected, end, begin = 0.0, 1, 0
        while end < len(chunks):
            stop = min(begin + 8 + 1, len(chunks))
            window = chunks[begin:stop]
            model.use(chunk_table(chunker, window))
            numbers = torch.arange(len(window))
            with torch.no_grad():
                x_ND = model.hidden(numbers[None, :-1])[0]
                own = model.log_probabilities(x_ND, numbers[1:], numbers[:-1])[0]
            expected += own[end - 1 - begin :].sum().item()
            end, begin = stop, begin + stride
        assert logprob == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("kind", ["words", "spaces", "stride-4"])
def test_probabilities_of_all_that_may_follow_a_context_sum_to_one(kind):
    """Over texts: what begins with the context is the context and one of all next bytes, or ends there."""
    tokenizer, model = make_tokenizer(kind), make_model()
    chunker = chunker_of(tokenizer)
    for context in (b"The cat's", b"The cat "):
        chunks = chunker.split(context)
        total = 0.0
        for byte in range(256):
            joint = chunker.split(context + bytes([byte]))
            total += math.exp(path(model, chunker, joint) - path(model, chunker, chunks))
        ending = path(model, chunker, chunks, ends=True) - path(model, chunker, chunks)
        assert total + math.exp(ending) == pytest.approx(1, abs=1e-4), context


@cache
def logprobs_of(model, chunker, closed: tuple[bytes, ...], begun: bytes, rule: int) -> torch.Tensor:
    """log P [S] of the next symbol after some chunks and what is begun of another."""
    model.use(chunk_table(chunker, closed))
    x_D = model.hidden(torch.arange(len(closed))[None])[0, -1]
    return model.next_logits(x_D, begun, rule).log_softmax(-1).double()


@torch.no_grad()
def path(model, chunker, chunks: list[bytes], ends: bool = False) -> float:
    """log P of all texts that begin with these chunks' bytes, the last one open; or of the text alone."""
    closed, total = [b""], 0.0
    for chunk in chunks:
        last = len(closed) == len(chunks)
        for place in range(len(chunk) + 1):
            rule = chunker.rule_after(closed[-1], chunk[:place])
            if rule == CERTAIN:
                break
            logprobs = logprobs_of(model, chunker, tuple(closed), chunk[:place], rule)
            if place < len(chunk):
                total += logprobs[chunk[place]].item()
            elif not last or (ends and chunker.allowed_RS[rule, END]):
                total += logprobs[END].item()
            elif ends:
                return total + logprobs[END_OF_TEXT].item()
        closed.append(chunk)
    if ends:
        rule = chunker.rule_after(closed[-1], b"")
        total += logprobs_of(model, chunker, tuple(closed), b"", rule)[END_OF_TEXT].item()
    return total


def test_encoder_numbers_chunks_once(kind):
    tokenizer = make_tokenizer(kind)
    requests = ChunkRequests(tokenizer)
    first = requests([Request("", TEXTS[0])])[0]
    before = len(requests.table.n_inputs_V)
    again = requests([Request("", TEXTS[0])])[0]
    assert np.array_equal(first.tokens, again.tokens) and len(requests.table.n_inputs_V) == before
    assert np.array_equal(requests.chunks_of(tokenizer.encode(TEXTS[0])), first.tokens[1:])
