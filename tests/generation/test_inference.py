"""Passes in C: torch's up to rounding, the same to the bit however tokens are read, none in doubt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tiny_model import CONTEXT, OPTIONS, random_model
from torch import Tensor, nn

from stlm.generation.sampling import Sampling, most_probable
from stlm.generation.tokens import TokenGenerator
from stlm.kernels import library
from stlm.model import inference
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.inference import Inference, why_not
from stlm.model.row_cache import RowCache
from stlm.model.transformer import Transformer
from stlm.techniques.continuous_thoughts import ContinuousThoughts
from stlm.techniques.denoising import Denoising
from stlm.techniques.distillation import Distillation
from stlm.techniques.early_exit import EarlyExit
from stlm.techniques.encoder_decoder import EncoderDecoder
from stlm.techniques.experts import Experts
from stlm.techniques.masked_next_token import MaskedNextToken
from stlm.techniques.mixture_of_depths import MixtureOfDepths
from stlm.techniques.multi_token import MultiToken
from stlm.techniques.next_thought import NextThought
from stlm.techniques.pauses import Pauses
from stlm.techniques.pruning import Pruning
from stlm.techniques.quantization import Quantization
from stlm.techniques.recurrent_depth import RecurrentDepth
from stlm.techniques.registry import technique_names
from stlm.techniques.self_play import SelfPlay
from stlm.techniques.series_activation import SeriesActivation
from stlm.tokens.tokenizer import ByteTokenizer

CPU = torch.device("cpu")
TOKENS = torch.randint(257, (3, CONTEXT), generator=torch.Generator().manual_seed(2)).tolist()
needs_kernels = pytest.mark.skipif(
    not library.kernels().by_type, reason=f"no kernels: {library.kernels().why_none}"
)
pytestmark = needs_kernels

# Every kind of each part with every kind of the others; what only adds to them is in OPTIONS.
CROSSED = [
    {"positions": positions, "norm": norm, "ffn": ffn, "kv_heads": kv_heads, "tied": tied, **more}
    for (positions, norm, ffn), (kv_heads, tied, more) in product(
        product(("rope", "sinusoidal", "learned"), ("rmsnorm", "layernorm"), ("swiglu", "gelu", "relu2")),
        (
            (1, True, {"qkv_shift": True}),
            (2, False, {"qk_norm": True, "embedding_rank": 9}),
            (4, True, {"qk_norm": True, "qkv_shift": True, "embedding_rank": 10}),
        ),
    )
]


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to a hundred-thousandth of the largest."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("options", [*OPTIONS.values(), *CROSSED], ids=str)
def test_logits_and_caches_are_torchs(options: dict) -> None:
    model = random_model(**options)
    passes, row = Inference(model), TOKENS[0]
    ours, theirs = (Cache(model.config, 1, CPU) for _ in range(2))
    with torch.inference_mode():
        # The last tokens are removed and others read in their stead, as after a rejected draft.
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 10), (8, 9), (9, 13), (13, 16)):
            ours.crop(begin)
            theirs.crop(begin)
            part = row[begin:end] if begin != 8 else [row[8] ^ 1]
            positions = range(begin, end)
            found_LV = passes.read(part, [0] * len(part), positions, ours.extend(len(part)), range(len(part)))
            hidden = model.hidden(torch.tensor([part]), theirs.extend(len(part)))
            close(found_LV, model.head(hidden)[0])
            close(ours.kv, theirs.kv)
            if model.config.qkv_shift:
                close(ours.unshifted, theirs.unshifted)


@pytest.fixture
def threads() -> Callable[[int], None]:
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{}, OPTIONS["fast recipe"], {"kv_heads": 1, "low_rank": {"ffn": 20}}])
def test_the_bits_are_the_same_however_tokens_are_read(options: dict, threads) -> None:
    """One by one, several at once, with others, wanted or not, by one thread or by several."""
    # Large enough for several threads, with sizes that no vector length divides.
    model = random_model(width=150, heads=5, ffn_width=331, **{"kv_heads": 5, **options})
    expected: list[Tensor] = []
    passes = Inference(model)
    threads(1)
    cache = Cache(model.config, 1, CPU)
    for place, token in enumerate(TOKENS[1]):
        expected.append(passes.read([token], [0], [place], cache.extend(1), [0])[0])
    for count in (1, 2, 3):
        threads(count)
        rows = RowCache(model.config, 3, CPU)
        for begin, end in ((0, 1), (1, 8), (8, 9), (9, 16)):
            # Tokens of other rows are read with them, and take turns with them in the pass.
            asked = [(row, place) for place in range(begin, end) for row in (2, 1, 0)]
            for wanted in (range(len(asked)), [1, len(asked) - 2]):
                found = passes.read(
                    [TOKENS[row][place] for row, place in asked],
                    [row for row, _ in asked],
                    [place for _, place in asked],
                    rows,
                    wanted,
                )
                for index, found_V in zip(wanted, found, strict=True):
                    row, place = asked[index]
                    assert row != 1 or torch.equal(found_V, expected[place]), (count, place)


def test_blocks_in_parts_are_the_whole() -> None:
    model = random_model(**OPTIONS["fast recipe"])
    passes, tokens = Inference(model), TOKENS[0][:6]
    cache, places = Cache(model.config, 1, CPU), range(6)
    whole_LV = passes.read(tokens, [0] * 6, places, cache, range(6))
    x_LD = torch.empty(6, model.config.width)
    for first, last in ((0, 1), (1, 1), (1, 3)):
        passes.through(first, last, x_LD, tokens, places, cache)
    assert torch.equal(passes.logits(x_LD), whole_LV)


@pytest.mark.parametrize("largest", [1, 2, 5, 200, 999])
@pytest.mark.parametrize("width", [40, 64])
def test_the_largest_logits_are_exact(width: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_LEAST_SCREENED", 0)
    model = random_model(vocab_size=3001, width=width)
    with torch.no_grad():
        model.output.weight[100:103] = model.output.weight[7]  # equal logits
        model.output.weight[5] = 0
        model.output.weight[2000] = torch.nan
        model.output.weight[2001] *= 1e-3
    passes, cache = Inference(model), Cache(model.config, 1, CPU)
    guessed = 0
    for place, token in enumerate(TOKENS[0]):
        full_V = passes.read([token], [0], [place], cache, [0])[0]
        found_V = passes.read([token], [0], [place], cache, [0], largest)[0]
        numbers_V = full_V.nan_to_num(nan=-torch.inf)
        exact_V = full_V.isnan() | (numbers_V >= numbers_V.topk(largest).values[-1])
        assert torch.equal(found_V[exact_V].nan_to_num(7.0), full_V[exact_V].nan_to_num(7.0))
        assert found_V[~exact_V].max() < numbers_V[exact_V & ~full_V.isnan()].min()
        guessed += int((found_V != full_V).sum())
    assert guessed > 1000 * CONTEXT  # most rows are never read in float32


def test_a_changed_head_is_screened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_LEAST_SCREENED", 0)
    model = random_model()
    passes, cache = Inference(model), Cache(model.config, 1, CPU)
    passes.read([1], [0], [0], cache, [0], 2)
    later = Inference.of(model, passes)
    with torch.no_grad():
        model.output.weight.copy_(torch.randn_like(model.output.weight))
    for one in (passes, later, Inference.of(model, passes)):
        full_V, found_V = (one.read([1], [0], [0], cache, [0], largest)[0] for largest in (None, 2))
        assert torch.equal(found_V.topk(2).values, full_V.topk(2).values)
        assert int(found_V.argmax()) == int(full_V.argmax())


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.5, top_k=7)], ids=str)
def test_texts_with_a_screened_head_are_those_without(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = random_model(), []
    for least in (0, 2**40):
        monkeypatch.setattr(inference, "_LEAST_SCREENED", least)
        generator, numbers = TokenGenerator(model, ByteTokenizer()), torch.Generator().manual_seed(3)
        logits_V, drawn = generator.start("a"), []
        for _ in range(3 * CONTEXT):
            if sampling.temperature:
                drawn.append(int(sampling.choose(logits_V, numbers)))
            else:
                drawn += most_probable(logits_V[None], lambda _, own=generator: own.afresh())
            logits_V = generator.next(drawn[-1], sampling.largest)
        texts.append(drawn)
    assert texts[0] == texts[1]


def test_bounded_logits_are_not_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_LEAST_SCREENED", 0)
    model = random_model(logit_softcap=0.5)
    passes, cache = Inference(model), Cache(model.config, 1, CPU)
    full_1V, found_1V = (passes.read([1], [0], [0], cache, [0], largest) for largest in (None, 2))
    assert torch.equal(full_1V, found_1V)


# For every key of a model's config, another value than the default with which passes are in C, or None: then
# there are none.
KEYS = {
    "layers": {"layers": 2},
    "width": {"width": 16},
    "heads": {"heads": 2},
    "kv_heads": {"kv_heads": 1},
    "ffn": {"ffn": "gelu"},
    "ffn_width": {"ffn_width": 50},
    "positions": {"positions": "learned"},
    "rope_theta": {"rope_theta": 500.0},
    "norm": {"norm": "layernorm"},
    "norm_eps": {"norm_eps": 1e-3},
    "context": {"context": 8},
    "dropout": {"dropout": 0.5},
    "attention_dropout": {"attention_dropout": 0.5},
    "tied": {"tied": False},
    "qk_norm": {"qk_norm": True},
    "qkv_shift": {"qkv_shift": True},
    "logit_softcap": {"logit_softcap": 2.0},
    "zero_init": {"zero_init": True},
    "value_embeddings": {"value_embeddings": 1},
    "sharing": {"sharing": {"what": "all", "order": "one"}},
    "lora": {"lora": {"rank": 2}},
    "low_rank": {"low_rank": {"ffn": 5}},
    "embedding_rank": {"embedding_rank": 9},
    "vocab_size": {"vocab_size": 300},
    "bytes": None,
}


def test_every_key_of_a_model_is_known_here() -> None:
    assert set(KEYS) == set(ModelConfig.model_fields), "does stlm/kernels/inference.c know the new key?"


@pytest.mark.parametrize("key", [key for key, options in KEYS.items() if options])
def test_each_key_has_torchs_effect(key: str) -> None:
    model = random_model(**KEYS[key])
    tokens = TOKENS[0][: min(CONTEXT, model.config.context)]
    cache = Cache(model.config, 1, CPU)
    found_LV = Inference(model).read(tokens, [0] * len(tokens), range(len(tokens)), cache, range(len(tokens)))
    with torch.inference_mode():
        close(found_LV, model(torch.tensor([tokens]))[0])


# For every technique, settings and whether its models have passes in C.
TECHNIQUES = {
    "continuous_thoughts": (ContinuousThoughts(), False),
    "denoising": (Denoising(), True),
    "distillation": (Distillation(teacher="other"), True),
    "early_exit": (EarlyExit(), True),
    "encoder_decoder": (EncoderDecoder(encoder=1), False),
    "experts": (Experts(), False),
    "masked_next_token": (MaskedNextToken(), True),
    "mixture_of_depths": (MixtureOfDepths(capacity=0.5), False),
    "multi_token": (MultiToken(heads=2), True),
    "next_thought": (NextThought(encoder=1, decoder=1), False),
    "pauses": (Pauses(), False),
    "pruning": (Pruning(), True),
    "quantization": (Quantization(), True),
    "recurrent_depth": (RecurrentDepth(first=2), False),
    "self_play": (SelfPlay(opponent="other", prompt=4, continuation=4), True),
    "series_activation": (SeriesActivation(), False),
}


def test_every_technique_is_known_here() -> None:
    assert set(TECHNIQUES) == set(technique_names())


@pytest.mark.parametrize("name", TECHNIQUES)
def test_techniques_have_passes_in_c_or_not(name: str) -> None:
    technique, has = TECHNIQUES[name]
    model = random_model(techniques=(technique,))
    assert (why_not(model) is None) == has, why_not(model)
    assert (Inference.of(model) is not None) == has
    if has:
        found_LV = Inference(model).read(
            TOKENS[0], [0] * CONTEXT, range(CONTEXT), Cache(model.config, 1, CPU), range(CONTEXT)
        )
        with torch.inference_mode():
            close(found_LV, model(torch.tensor([TOKENS[0]]))[0])


class _Other(Transformer):
    pass


def _other_block(model: Transformer) -> None:
    class Changed(type(model.blocks[0])):
        pass

    model.blocks[1].__class__ = Changed


def _set(path: str, value: object) -> Callable[[Transformer], None]:
    owner, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(owner), name, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "being trained"),
        (lambda model: model.double(), "float64"),
        (lambda model: model.bfloat16(), "bfloat16"),
        (lambda model: model.to("meta"), "on meta"),
        (lambda model: setattr(model, "__class__", _Other), "_Other is another kind of model"),
        (_other_block, "Changed is another kind of block"),
        (lambda model: model.embedding.register_forward_hook(lambda *_: None), "Embedding has a hook"),
        (lambda model: model.blocks[1].ffn.register_forward_pre_hook(lambda *_: None), "SwiGLU has a hook"),
        (_set("blocks.1.ffn", nn.Identity()), "Identity is another kind of feed-forward"),
        (_set("blocks.1.ffn.activation", torch.tanh), "an activation is of another kind"),
        (_set("blocks.1.attention", nn.Identity()), "Identity is another kind of attention"),
        (_set("blocks.1.attention.out", nn.Linear(32, 32)), "a matrix is of another kind"),
        (_set("blocks.2.ffn_norm", nn.LayerNorm(32)), "a norm is of another kind"),
        (_set("norm", nn.Identity()), "Identity is another kind of norm"),
        (_set("output", nn.Linear(32, 257)), "the head is of another kind"),
        (_set("inserted_embeddings", nn.Identity()), "inserted"),
    ],
)
def test_what_is_not_known_has_no_passes_in_c(change: Callable, reason: str) -> None:
    model = random_model()
    assert why_not(model) is None
    change(model)
    assert reason in why_not(model)
    assert Inference.of(model) is None
    with pytest.raises(ValueError, match=reason):
        Inference(model)


def test_without_kernels_the_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = random_model(), []
    for none in (False, True):
        if none:
            monkeypatch.setattr(inference, "kernels", lambda: library.Found({}, "no C compiler (cc)"))
            assert why_not(model) == "no C compiler (cc)"
        generator, drawn = TokenGenerator(model, ByteTokenizer()), []
        logits_V = generator.start("Once")
        for _ in range(3 * CONTEXT):
            drawn += most_probable(logits_V[None], lambda _, own=generator: own.afresh())
            logits_V = generator.next(drawn[-1] % 256)
        texts.append(drawn)
        assert (generator._inference is None) == none
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("tokens", "rows", "positions"),
    [([257], [0], [0]), ([-1], [0], [0]), ([1], [1], [0]), ([1], [0], [CONTEXT]), ([1], [0], [-1])],
)
def test_nothing_is_read_or_written_outside(tokens: list, rows: list, positions: list) -> None:
    model = random_model()
    with pytest.raises(AssertionError):
        Inference(model).read(tokens, rows, positions, Cache(model.config, 1, CPU), [0])


def test_memory_that_a_weight_leaves_is_kept_while_passes_read_it() -> None:
    """`module.to` gives a parameter other memory; passes made before read what they were made of."""
    model = random_model()
    own, cache = Inference(model), Cache.of(model, 1, CPU)
    expected = own.read([1], [0], [0], cache, [0])
    with torch.no_grad():
        model.double().float()
        for parameter in model.parameters():
            parameter.zero_()
    kept = [torch.full_like(parameter, 7.0) for parameter in model.parameters()]
    assert torch.equal(own.read([1], [0], [0], cache, [0]), expected) and kept


@pytest.mark.parametrize("wanted", [[1], [-1], [0, 0]], ids=str)
def test_logits_of_no_token_are_refused(wanted: list[int]) -> None:
    model = random_model()
    with pytest.raises(AssertionError):
        Inference(model).read([1], [0], [0], Cache.of(model, 1, CPU), wanted)


def test_a_cache_of_another_shape_is_refused() -> None:
    model = random_model()
    for more in ({"places": 2 * CONTEXT}, {"layers": 1}):
        other = Cache(model.config, 1, CPU, **more)
        with pytest.raises(AssertionError):
            Inference(model).read([1], [0], [0], other, [0])
