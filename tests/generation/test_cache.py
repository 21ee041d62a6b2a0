"""With keys and values kept, a model says what it says without."""

from __future__ import annotations

import pytest
import torch
from tiny_model import CONTEXT, OPTIONS, random_model

from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.token_model import TokenModel
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator, window_begin
from stlm.model.cache import Cache
from stlm.techniques.early_exit import first_blocks
from stlm.tokens.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SAMPLED = Sampling(temperature=1.3, top_k=200, top_p=0.98, min_p=0.001)


def drawn(generator: TokenGenerator, prompt: str, length: int, sampling: Sampling) -> list[int]:
    """So many tokens; an end of text is replaced, so that none is cut short."""
    numbers, symbols = torch.Generator().manual_seed(5), []
    logits_V = generator.start(prompt)
    while len(symbols) < length:
        symbols.append(int(sampling.choose(logits_V, numbers)) % generator.eot)
        logits_V = generator.next(symbols[-1])
    return symbols


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hidden_states_in_parts_are_those_of_the_whole(options: dict) -> None:
    model = random_model(**options)
    tokens_BL = torch.randint(257, (3, CONTEXT), generator=torch.Generator().manual_seed(2))
    cache = Cache(model.config, 3, torch.device("cpu"))
    with torch.inference_mode():
        whole_BLD = model.hidden(tokens_BL)
        for again in range(2):  # the second time over what the first left
            parts = tokens_BL.split([1, 5, 1, 1, 3, 2, 1, 2], dim=1)
            found = [model.hidden(part, cache.extend(part.shape[1])) for part in parts]
            torch.testing.assert_close(torch.cat(found, dim=1), whole_BLD, atol=2e-5, rtol=1e-4)
            assert cache.length == CONTEXT, again
            cache.clear()
    assert cache.kv.shape == (model.config.layers, 2, 3, model.config.kv_heads, CONTEXT, 8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_that_were_removed_leave_no_trace(options: dict) -> None:
    model = random_model(**options)
    tokens_BL = torch.randint(257, (3, CONTEXT), generator=torch.Generator().manual_seed(2))
    other_BL = (tokens_BL + 1) % 257
    cache = Cache(model.config, 3, torch.device("cpu"))
    with torch.inference_mode():
        whole_BLD = model.hidden(tokens_BL)
        for kept, more in ((4, 3), (5, 1), (11, 5), (16, 0)):
            found_BLD = model.hidden(tokens_BL[:, cache.length : kept], cache.extend(kept - cache.length))
            expected_BLD = whole_BLD[:, kept - found_BLD.shape[1] : kept]
            torch.testing.assert_close(found_BLD, expected_BLD, atol=2e-5, rtol=1e-4)
            if more:
                model.hidden(other_BL[:, kept : kept + more], cache.extend(more))
            cache.crop(kept)
            assert cache.length == kept


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_first_blocks_may_read_ahead(options: dict) -> None:
    model = random_model(**options)
    first = first_blocks(model, 2)
    tokens_BL = torch.randint(257, (3, CONTEXT), generator=torch.Generator().manual_seed(2))
    cache = Cache(model.config, 3, torch.device("cpu"))
    with torch.inference_mode():
        whole_BLD = model.residuals(tokens_BL)[-1]
        model.residuals(tokens_BL[:, :5], cache.extend(5))
        for begin, end in ((5, 6), (6, 11), (11, 16)):
            ahead = [
                first.residuals(tokens_BL[:, [place]], cache.extend(1))[-1] for place in range(begin, end)
            ]
            part_BL, layout = tokens_BL[:, begin:end], cache.revisit(begin, end)
            found_BLD = model.continued(torch.cat(ahead, dim=1), part_BL, layout, block=2)
            torch.testing.assert_close(found_BLD, whole_BLD[:, begin:end], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_tokens_are_the_same_past_the_end_of_the_context(options: dict, sampling: Sampling) -> None:
    model = random_model(**options)
    with_cache = drawn(TokenGenerator(model, TOKENIZER), "Once", 4 * CONTEXT, sampling)
    assert with_cache == drawn(TokenGenerator(model, TOKENIZER, cached=False), "Once", 4 * CONTEXT, sampling)
    assert len(set(with_cache)) > 2


def test_one_token_of_work_for_one_token() -> None:
    model = random_model()
    read = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    drawn(TokenGenerator(model, TOKENIZER), "abc", 20, Sampling(temperature=0))
    # The prompt after an end of text; at the seventeenth token the window moves on by half of it.
    assert read == [4] + [1] * 12 + [9] + [1] * 7


@pytest.mark.parametrize("context", [16, 15, 2])
def test_windows_move_as_where_perplexity_is_measured(context: int) -> None:
    """The probabilities drawn from are those by which a text is scored, to its end."""
    model = random_model(context=context)
    generator = TokenGenerator(model, TOKENIZER)
    text = "It was a dark and stormy night, and the rain fell in torrents."
    logprobs, logits_V, dropped = [], generator.start(""), []
    for symbol in text.encode():
        logprobs.append(float(logits_V.log_softmax(dim=-1)[symbol]))
        dropped.append(generator.dropped)
        logits_V = generator.next(symbol)
    scorer = TokenModel(model, RequestEncoder(TOKENIZER))
    expected = scorer.document_loglikelihoods([list(text.encode())])[0]
    assert sum(logprobs) == pytest.approx(expected, abs=1e-3)
    assert dropped[0] == 0 and dropped == sorted(dropped)
    kept = [place + 1 - window_begin(place + 1, context) for place in range(len(text))]
    assert max(kept) == context and min(kept[context:]) > context - max(1, context // 2)


def test_a_prompt_beyond_the_context_is_read_from_where_its_window_begins() -> None:
    model = random_model()
    generator = TokenGenerator(model, TOKENIZER)
    text = "".join(chr(97 + place % 26) for place in range(3 * CONTEXT))
    logits_V = generator.start(text)
    assert generator.dropped == 3 * CONTEXT + 1 - 9 - 1
    tokens_1L = torch.tensor([list(text.encode())[generator.dropped :]])
    with torch.inference_mode():
        torch.testing.assert_close(logits_V, model(tokens_1L)[0, -1], atol=2e-5, rtol=1e-4)
    generator.start("a new text")
    assert generator.dropped == 0
