"""Texts that a byte-level model writes: with and without the cache, and as its scores say."""

from __future__ import annotations

import pytest
import torch

from stlm.errors import UserError
from stlm.evaluation.byte_model import ByteModel, ChunkRequests
from stlm.evaluation.interface import Request
from stlm.generation.bytes import ByteGenerator
from stlm.generation.sampling import Sampling
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.tokens.bpe import train_bpe
from stlm.tokens.chunks import END, END_OF_TEXT, SYMBOLS, make_chunker
from stlm.tokens.tokenizer import ChunkTokenizer, Tokenizer, chunker_of

TEXT = "The cat's hungry; it ran home. One dog, né Rex, sleeps…\n\nToday it's 3.14 degrees, 'cats'."


def make_tokenizer(kind: str) -> Tokenizer:
    if kind.startswith("bpe"):
        return train_bpe(kind, [TEXT] * 20)
    return ChunkTokenizer(kind, sorted(set(make_chunker(kind).split(TEXT.encode()))))


def make_model(context: int, **options: object):
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": context}
    own = {"width": 16, "heads": 2, "ffn_width": 24}
    model = build_model(ModelConfig(**sizes, **options, vocab_size=SYMBOLS, bytes=own))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 1.0))
    return model.eval()


def write(generator: ByteGenerator, prompt: str, length: int, seed: int) -> list[int]:
    """Symbols drawn by the model's own probabilities."""
    drawn, logits_S = [], generator.start(prompt)
    numbers = torch.Generator().manual_seed(seed)
    for _ in range(length):
        symbol = int(Sampling().choose(logits_S, numbers))
        if symbol == generator.eot:
            break
        drawn.append(symbol)
        logits_S = generator.next(symbol)
        if len(drawn) % 7 == 0:
            torch.testing.assert_close(generator.afresh(), logits_S, atol=1e-4, rtol=1e-4)
    return drawn


@pytest.mark.parametrize("kind", ["bpe-300", "words", "spaces", "stride-4"])
@pytest.mark.parametrize("options", [{}, {"qkv_shift": True, "positions": "learned"}], ids=str)
def test_with_a_cache_the_same_is_written(kind, options):
    tokenizer, model = make_tokenizer(kind), make_model(8, **options)
    chunker = chunker_of(tokenizer)
    longest = 0
    for seed in range(3):
        found = [
            write(ByteGenerator(model, tokenizer, cached), "The cat's hu", 60, seed)
            for cached in (True, False)
        ]
        assert found[0] == found[1]
        longest = max(longest, len(found[0]))
        content = bytes(symbol for symbol in found[0] if symbol != END)
        if kind != "bpe-300":  # chunks that were written are those that the text is cut into
            ends = sum(symbol == END for symbol in found[0])
            assert ends == 0 or kind == "words"
            if kind == "words":
                chunks = chunker.split(b"The cat's hu" + content)
                forced = sum(len(chunk) == chunker.longest for chunk in chunks[2:-1])
                assert ends + forced in (len(chunks) - 3, len(chunks) - 2)
    assert longest == 60  # beyond a context of eight chunks: the window moved


@pytest.mark.parametrize("kind", ["bpe-300", "words", "spaces", "stride-4"])
def test_what_is_written_is_as_probable_as_it_is_scored(kind):
    tokenizer, model = make_tokenizer(kind), make_model(64)
    generator, total = ByteGenerator(model, tokenizer), 0.0
    logits_S = generator.start("")
    for chunk in chunker_of(tokenizer).split(TEXT.encode()):
        for byte in chunk:
            total += logits_S.log_softmax(-1)[byte].item()
            logits_S = generator.next(byte)
        if logits_S[END] > -torch.inf:
            total += logits_S.log_softmax(-1)[END].item()
            logits_S = generator.next(END)
        # Otherwise it was certain, or the text is not at a chunk's end.
    (score,) = ByteModel(model, ChunkRequests(tokenizer)).loglikelihoods([Request("", TEXT)])
    assert total == pytest.approx(score.logprob, abs=1e-3)


def test_the_prompts_last_word_stays_open_and_the_end_of_text_can_come_only_where_it_may():
    generator = ByteGenerator(make_model(16), make_tokenizer("words"))
    inside_S = generator.start("The ca")
    assert inside_S[ord("t")] > -torch.inf and inside_S[END] > -torch.inf
    assert inside_S[ord(" ")] == inside_S[END_OF_TEXT] == -torch.inf
    after_S = generator.next(END)
    assert after_S[ord("t")] == after_S[END] == -torch.inf
    assert after_S[ord(" ")] > -torch.inf and after_S[END_OF_TEXT] > -torch.inf
    assert (generator.piece(ord("t")), generator.piece(END)) == (b"t", b"")
    assert generator.eot == END_OF_TEXT and generator.dropped == 0
    generator.start("one two three four " * 5)
    assert generator.dropped > 0
    with pytest.raises(UserError, match="lone surrogate"):
        generator.start("a\ud800")
