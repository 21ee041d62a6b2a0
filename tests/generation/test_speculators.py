"""Models with a draft say what they say alone; what was rejected leaves no trace in the cache."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from tiny_model import CONTEXT, OPTIONS, random_model

from stlm.errors import UserError
from stlm.generation.sampling import Sampling, one_by_one
from stlm.generation.speculation import Drafting, Speculation, Speculator, Statistics
from stlm.generation.speculators import ExitSpeculator, SiblingSpeculator
from stlm.generation.tokens import TokenGenerator
from stlm.model.transformer import Transformer
from stlm.techniques.early_exit import first_blocks
from stlm.techniques.mixture_of_depths import MixtureOfDepths
from stlm.techniques.series_activation import SeriesActivation
from stlm.tokens.bpe import train_bpe
from stlm.tokens.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(temperature=1.3, top_k=200, top_p=0.98, min_p=0.001)
SOME = ("gqa", "learned", "value embeddings", "shared layers, adapters", "factorized, untied", "fast recipe")
# Beyond the context, whose window moves three times.
LENGTH = 40


def models(name: str) -> Transformer:
    """A random model, in which tokens of the same letter are tied exactly if it is named so."""
    if name == "routed":
        return random_model(techniques=(MixtureOfDepths(capacity=0.5),), layers=4, qkv_shift=True)
    if name == "series":
        return random_model(techniques=(SeriesActivation(),))
    if name == "tied tokens":
        model = random_model()
        with torch.no_grad():
            model.embedding.weight[128:256] = model.embedding.weight[:128]
        return model
    return random_model(**OPTIONS[name])


def alone(model: Transformer, prompt: str, length: int = LENGTH) -> list[int]:
    generator = TokenGenerator(model, TOKENIZER)
    return list(islice(one_by_one(generator, generator.start(prompt), GREEDY, torch.Generator()), length))


def drafted(
    speculator: Speculator, prompt: str, drafting: Drafting, sampling: Sampling = GREEDY, length: int = LENGTH
) -> tuple[list[int], Statistics]:
    speculation = Speculation(speculator, drafting, sampling, torch.Generator().manual_seed(5))
    symbols = speculation.symbols(speculator.start(prompt), length)
    return list(islice(symbols, length)), speculation.statistics


@pytest.mark.parametrize("name", [*SOME, "tied tokens"])
def test_greedy_text_with_an_exit_is_the_models_at_every_exit_and_length(name: str) -> None:
    model = models(name)
    expected = alone(model, "né")
    accepted = []
    for block in range(1, len(model.blocks) + 1):
        speculator = ExitSpeculator(model, TOKENIZER, first_blocks(model, block))
        for length in (1, 3, 2 * CONTEXT):
            text, statistics = drafted(speculator, "né", Drafting(length))
            assert text == expected, (block, length)
        accepted.append(statistics.acceptance)
    # The last block's exit is the model itself.
    assert accepted[-1] == 1 and min(accepted) < 1


@pytest.mark.parametrize("name", ["gqa", "fast recipe", "routed", "series"])
@pytest.mark.parametrize("context", [CONTEXT, 6])
def test_greedy_text_with_another_model_is_the_models_whatever_its_context(name: str, context: int) -> None:
    model, sibling = models(name), random_model(context=context, layers=1)
    for one, prompt in ((sibling, "né"), (sibling, "x" * 50), (model, "né")):
        expected = alone(model, prompt)
        for length in (1, 4, 2 * CONTEXT):
            speculator = SiblingSpeculator(TokenGenerator(model, TOKENIZER), TokenGenerator(one, TOKENIZER))
            text, statistics = drafted(speculator, prompt, Drafting(length))
            assert text == expected, (prompt, length)
            assert statistics.acceptance == 1 if one is model else statistics.acceptance < 1
            assert speculator.dropped > 0


def test_a_draft_that_is_the_model_is_accepted_when_sampled() -> None:
    model = models("fast recipe")
    pair = SiblingSpeculator(TokenGenerator(model, TOKENIZER), TokenGenerator(model, TOKENIZER))
    last = ExitSpeculator(model, TOKENIZER, first_blocks(model, len(model.blocks)))
    for speculator in (pair, last):
        statistics = drafted(speculator, "né", Drafting(3), SAMPLED, 60)[1]
        assert statistics.acceptance == 1 and statistics.drafted > 25


@pytest.mark.parametrize("name", ["gqa", "fast recipe", "routed"])
def test_a_cache_after_rejections_is_one_that_was_never_given_them(name: str) -> None:
    model = models(name)
    if name == "routed":
        speculator = SiblingSpeculator(
            TokenGenerator(model, TOKENIZER), TokenGenerator(random_model(layers=1), TOKENIZER)
        )
        generators = [speculator._model, speculator._sibling]
    else:
        speculator = ExitSpeculator(model, TOKENIZER, first_blocks(model, 2))
        generators = [speculator]
    speculator.start("A")
    for symbols, rejected in (
        ([65, 200, 7, 31], 2),
        ([90, 12], 1),
        ([3], 0),
        ([5, 6, 77, 8, 9], 4),
        ([1, 2], 0),
    ):
        for symbol in symbols[:-1]:
            speculator.draft(symbol)
        speculator.verify(symbols)
        if rejected:
            speculator.reject(rejected)
        for generator in generators:
            check_cache(generator)
    assert list(generators[0].tokens) == [256, 65, 65, 200, 90, 3, 5, 1, 2]


def check_cache(generator: TokenGenerator) -> None:
    """The cache holds what one pass over the tokens that have been read would leave."""
    cache = generator._cache
    fresh = TokenGenerator(generator.transformer, TOKENIZER)
    fresh.restart(generator.tokens[: generator._begin + cache.length])
    fresh._logits(1)
    assert fresh._cache.length == cache.length and generator._begin == 0
    for found, expected in zip(cache._layers, fresh._cache._layers, strict=True):
        assert torch.equal(found._held_B, expected._held_B)
        held = int(found._held_B) if found._selects else cache.length
        assert torch.equal(found._positions_BN[:, :held], expected._positions_BN[:, :held])
        for one, other in (
            (found._k_BKNE[:, :, :held], expected._k_BKNE[:, :, :held]),
            (found._v_BKNE[:, :, :held], expected._v_BKNE[:, :, :held]),
            (found._unshifted_BNX[:, :held], expected._unshifted_BNX[:, :held]),
        ):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_the_first_blocks_read_each_token_once() -> None:
    model = models("gqa")
    read: dict[int, list[int]] = {number: [] for number in range(len(model.blocks))}
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, inputs, n=number: read[n].append(inputs[0].shape[1]))
    speculator = ExitSpeculator(model, TOKENIZER, first_blocks(model, 2))
    logits_V = speculator.start("abc")
    drafts = [int(logits_V.argmax())]
    for _ in range(3):
        drafts.append(int(speculator.draft(drafts[-1]).argmax()))
    speculator.verify(drafts)
    assert read == {0: [4, 1, 1, 1, 1], 1: [4, 1, 1, 1, 1], 2: [4, 4]}


def test_a_new_text_forgets_a_draft_that_was_cut_short() -> None:
    model = models("fast recipe")
    speculator = ExitSpeculator(model, TOKENIZER, first_blocks(model, 1))
    speculator.start("abc")
    speculator.draft(65)
    assert drafted(speculator, "né", Drafting(3))[0] == alone(model, "né")
    sibling = SiblingSpeculator(TokenGenerator(model, TOKENIZER), TokenGenerator(model, TOKENIZER))
    sibling.start("abc")
    sibling.draft(65)
    assert drafted(sibling, "né", Drafting(3))[1].acceptance == 1


def test_another_tokenizer_is_refused() -> None:
    texts = ["the cat sat on the mat " * 9, "a dog ran to the far hill " * 9]
    one, other = (train_bpe("bpe-262", [text]) for text in texts)

    def generator(tokenizer) -> TokenGenerator:
        return TokenGenerator(random_model(tokenizer.vocab_size), tokenizer)

    with pytest.raises(UserError, match="tokenizers differ: the model's has 262 tokens, the draft's 257"):
        SiblingSpeculator(generator(one), generator(TOKENIZER))
    with pytest.raises(UserError, match=r"tokenizers differ: token \d+ is '.+' of the model, '.+' of the dr"):
        SiblingSpeculator(generator(one), generator(other))
    SiblingSpeculator(generator(one), generator(train_bpe("bpe-262", [texts[0]])))
