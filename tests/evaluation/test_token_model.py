"""Fast scoring gives what slow scoring gives."""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import slow_reference as reference
import torch

from stlm.errors import UserError
from stlm.evaluation import scoring
from stlm.evaluation.benchmarks import Benchmark, Item
from stlm.evaluation.benchmarks.items import Option
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.tokens.tokenizer import ByteTokenizer

CONTEXT = 48


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    config = ModelConfig(
        layers=2, width=32, heads=4, kv_heads=2, ffn="swiglu", ffn_width=64, context=CONTEXT, vocab_size=257
    )
    model = Transformer(config).eval()
    with torch.no_grad():  # weights large enough that every token before a position matters
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


class PairTokenizer(ByteTokenizer):
    """Bytes, but " a" is one token: a context's last space may be part of the continuation's first token."""

    def encode(self, text):
        ids = super().encode(text)
        merged = []
        for token in ids:
            if merged and merged[-1] == ord(" ") and token == ord("a"):
                merged[-1] = 1
            else:
                merged.append(token)
        return merged


@pytest.fixture(scope="module", params=[ByteTokenizer, PairTokenizer])
def tokenizer(request):
    return request.param()


def model_of(transformer, tokenizer, **settings):
    return TokenModel(transformer, RequestEncoder(tokenizer), **settings)


def random_requests(n: int, longest: int) -> list[Request]:
    rng = random.Random(1)
    word = lambda: "".join(rng.choice("abc é") for _ in range(rng.randint(1, 6)))  # noqa: E731
    requests = []
    while len(requests) < n:
        context = rng.choice(["", " ".join(word() for _ in range(rng.randint(1, 4))).lstrip()])
        continuations = [" " + word().strip() + "x" for _ in range(3)] + [" b"]
        for continuation in continuations:
            if len((context + continuation).encode()) <= longest:
                requests += [Request(context, continuation), Request(context, continuation, whole=True)]
    return requests


def test_scores_equal_one_request_at_a_time_with_full_logits(transformer, tokenizer):
    requests = random_requests(120, longest=CONTEXT)
    found = model_of(transformer, tokenizer, batch_tokens=200).loglikelihoods(requests)
    for request, score in zip(requests, found, strict=True):
        if request.whole:
            expected, n_tokens = reference.whole(transformer, tokenizer, request)
        else:
            expected, n_tokens, truncated = reference.harness(transformer, tokenizer, request)
            assert score.truncated == truncated
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert score.n_tokens == n_tokens


def test_a_continuation_that_merges_into_its_context_is_told(transformer):
    """With `" "` before it the context has a token that the whole has not: there is none left to score."""

    class Merging(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.replace("ab", "B"))

    model = model_of(transformer, Merging())
    with pytest.raises(UserError, match="the continuation 'b' adds no token to its context 'xa'"):
        model.loglikelihoods([Request("xa", "b")])
    assert model.loglikelihoods([Request("xa", "bc")])[0].n_tokens == 1


def test_a_string_of_one_token_scored_whole_is_its_first_token(transformer):
    model = model_of(transformer, ByteTokenizer())
    whole, alone = model.loglikelihoods([Request("a", "", whole=True), Request("", "a")])
    assert (whole.n_tokens, alone.n_tokens) == (1, 1)
    assert whole.logprob == pytest.approx(alone.logprob, abs=1e-5)


def test_what_does_not_fit_is_cut_from_the_left_and_said(transformer, tokenizer):
    requests = [
        Request("abc " * 30, "b c"),
        Request("short", " c"),
        Request("a", "b" * 100),
        Request("x" * CONTEXT, "y"),  # exactly what fits: the last token is never an input
    ]
    found = model_of(transformer, tokenizer).loglikelihoods(requests)
    for request, score in zip(requests, found, strict=True):
        expected, n_tokens, truncated = reference.harness(transformer, tokenizer, request)
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert (score.n_tokens, score.truncated) == (n_tokens, truncated)
    assert [score.truncated for score in found] == [True, False, True, False]


def test_whole_strings_of_one_item_lose_the_same_tokens(transformer):
    """Otherwise the longer option would be asked for fewer of the context's tokens, and win."""
    context, options = "c" * 45, [" b", " bbbbbbb", " bbbb"]
    model = model_of(transformer, ByteTokenizer())
    found = model.loglikelihoods([Request(context, option, whole=True, item=7) for option in options])
    assert all(score.truncated for score in found)
    length_of_shared_context = {
        score.n_tokens - len(option) for score, option in zip(found, options, strict=True)
    }
    assert length_of_shared_context == {CONTEXT + 1 - 8 - 1}


def test_an_item_that_does_not_fit_leaves_the_others_whole(transformer, tokenizer):
    """Minimal pairs all have the same context, none; options with contexts of their own are one item."""
    pairs = Benchmark(name="pairs", version="1")
    contexts = ("b" * 47, "c" * 49)
    items = [
        Item("0", (Option("", " b cat", "b cat"), Option("", " b dog", "b dog")), 0),
        Item("1", (Option("", " " + "c" * 60, ""), Option("", " " + "c" * 55, "")), 0),
        Item("2", tuple(Option(context, " bc", "bc") for context in contexts), 0),
        Item("3", (Option("", " b", "b"), Option("", " c", "c")), 1),
    ]
    of_items = scoring.score(model_of(transformer, tokenizer), items, ["paper", "harness"])["paper"]
    assert [[found.truncated for found in item] for item in of_items] == [
        [False, False], [True, True], [True, True], [False, False]
    ]  # fmt: skip
    for item, scores in zip((items[0], items[3]), (of_items[0], of_items[3]), strict=True):
        for option, found in zip(item.options, scores, strict=True):
            expected, n_tokens = reference.whole(transformer, tokenizer, option.request("paper"))
            assert (found.logprob, found.n_tokens) == (pytest.approx(expected, abs=1e-4), n_tokens)
    # 61 and 56 tokens after the end-of-text one, then 50 and 52 without: each item's longest has CONTEXT + 1.
    assert [found.n_tokens for found in of_items[1]] == [CONTEXT, CONTEXT - 5]
    assert [found.n_tokens for found in of_items[2]] == [CONTEXT - 2, CONTEXT]
    assert scoring.summarize(pairs, "paper", items, of_items)["truncated"] == 2


def test_order_and_batches_do_not_matter(transformer, tokenizer):
    requests = random_requests(60, longest=CONTEXT)
    expected = model_of(transformer, tokenizer, batch_tokens=10_000).loglikelihoods(requests)
    order = random.Random(2).sample(range(len(requests)), len(requests))
    shuffled = model_of(transformer, tokenizer, batch_tokens=1).loglikelihoods([requests[i] for i in order])
    for position, i in enumerate(order):
        assert shuffled[position].logprob == pytest.approx(expected[i].logprob, abs=1e-4)


class CountingTransformer(torch.nn.Module):
    def __init__(self, transformer):
        super().__init__()
        self.inner, self.config = transformer, transformer.config
        self.rows = self.tokens = self.scored = 0

    def hidden(self, tokens_BL, segments, rows_N):
        self.rows += len(tokens_BL)
        self.tokens += tokens_BL.numel()
        return self.inner.hidden(tokens_BL, segments, rows_N)

    def head(self, x_ND, vocabulary=None):
        self.scored += len(x_ND)
        return self.inner.head(x_ND, vocabulary)

    def logit(self, x_ND, tokens_N):
        return self.inner.logit(x_ND, tokens_N)


def test_forward_passes_are_shared_and_only_scored_positions_get_logits(transformer):
    counting = CountingTransformer(transformer)
    letters = [Request("Q: which?\nAnswer:", letter) for letter in "ABCD"]
    model = model_of(counting, ByteTokenizer())
    seen = []
    model.loglikelihoods([*letters, *letters], seen.append)
    assert (counting.rows, counting.scored) == (1, 1)
    assert sum(seen) == 8
    counting.rows = counting.scored = 0
    model.loglikelihoods([Request("abc", " def"), Request("abc", " def", whole=True)])
    # One pass for both modes and one for the first token after the end of text; 6 inner targets and that.
    assert (counting.rows, counting.scored) == (2, 7)
    counting.rows = counting.tokens = counting.scored = 0
    model.loglikelihoods([Request("abc", ending, whole=True) for ending in (" def", " dxy", " z")])
    # One row with the inputs "abc de" and, after "abc d", the "x"; then the end of text. All are scored.
    assert (counting.rows, counting.tokens, counting.scored) == (2, 7 + 1, 7 + 1)


def test_a_model_that_takes_no_mask_gets_one_sequence_a_row(transformer):
    requests = random_requests(60, longest=CONTEXT)
    packed = model_of(transformer, ByteTokenizer()).loglikelihoods(requests)
    plain = copy.deepcopy(transformer)
    plain.packs = False
    hidden = plain.hidden

    def without_segments(tokens_BL, segments, rows_N):
        assert segments is None
        return hidden(tokens_BL, None, rows_N)

    plain.hidden = without_segments
    for one, other in zip(packed, model_of(plain, ByteTokenizer()).loglikelihoods(requests), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one[1:] == other[1:]


@pytest.mark.parametrize("whole", [False, True])
def test_greedy_says_whether_each_token_was_the_most_probable(transformer, whole):
    tokenizer = ByteTokenizer()
    model = model_of(transformer, tokenizer)
    requests = []
    for text in ("abc", "the cat", "a b"):
        with torch.no_grad():
            tokens = [256, *tokenizer.encode(text)] if whole else tokenizer.encode(text)
            for _ in range(4):
                tokens.append(int(transformer(torch.tensor([tokens]))[0, -1, :128].argmax()))
        # Bytes below 128 are characters of their own; where another byte is likelier, it is not greedy.
        continuation = tokenizer.decode(tokens[-4:])
        for wrong in ("", "q"):
            requests.append(Request(text, continuation[: 4 - len(wrong)] + wrong, whole))
    found = model.loglikelihoods(requests, greedy=True)
    for request, score in zip(requests, found, strict=True):
        text = tokenizer.encode(request.context + request.continuation)
        with torch.no_grad():
            best = transformer(torch.tensor([text[:-1]]))[0].argmax(dim=-1).tolist()
            first = int(transformer(torch.tensor([[256]]))[0, -1].argmax())
        skipped = 0 if whole else len(request.context) - 1
        expected = best[skipped:] == text[1 + skipped :] and (not whole or first == text[0])
        assert score.greedy == expected
    if not whole:
        assert {score.greedy for score in found} == {True, False}
    assert all(score.greedy is None for score in model.loglikelihoods(requests))


@pytest.mark.parametrize("stride", [None, 1, 7, CONTEXT])
def test_documents_are_scored_token_by_token_once(transformer, stride):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n) for n in (1, 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 131)]
    found = model_of(transformer, ByteTokenizer(), batch_tokens=150).document_loglikelihoods(
        documents, stride
    )
    step = stride or CONTEXT // 2
    for document, score in zip(documents, found, strict=True):
        tokens = [256, *document.tolist()]
        total = 0.0
        for position in range(1, len(tokens)):
            # The first window that holds the token starts at the lowest multiple of the stride in reach.
            begin = max(0, math.ceil((position - CONTEXT) / step) * step)
            total += reference.logprob_of_rest(transformer, tokens[begin : position + 1], position - begin)
        assert score == pytest.approx(total, abs=1e-3)


def test_a_stride_beyond_the_context_would_skip_tokens(transformer):
    with pytest.raises(UserError, match=r"perplexity\.stride: 49 .* 48 tokens"):
        model_of(transformer, ByteTokenizer()).document_loglikelihoods([[1]], CONTEXT + 1)


def test_bfloat16_stays_near_float32(transformer):
    requests = random_requests(40, longest=CONTEXT)
    exact = model_of(transformer, ByteTokenizer()).loglikelihoods(requests)
    half = model_of(transformer, ByteTokenizer(), precision="bfloat16").loglikelihoods(requests)
    assert any(a.logprob != b.logprob for a, b in zip(exact, half, strict=True))
    for a, b in zip(exact, half, strict=True):
        assert b.logprob == pytest.approx(a.logprob, rel=0.03, abs=0.2)


def test_near_ties_in_bfloat16_are_settled_in_float32(transformer):
    """A random model's options are close: bfloat16 alone would change some answers."""
    rng = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    items = []
    for number in range(400):
        context = "".join(rng.choice(letters) for _ in range(12))
        texts = [context[:2] + letter for letter in letters]
        items.append(Item(str(number), tuple(Option(context, " " + text, text) for text in texts), 0))
    exact = scoring.score(model_of(transformer, ByteTokenizer()), items, ["harness", "paper"])
    model = model_of(transformer, ByteTokenizer(), precision="bfloat16")
    found = scoring.score(model, items, ["harness", "paper"])
    unsettled = SimpleNamespace(loglikelihoods=model.loglikelihoods)
    unsettled.precise = unsettled
    alone = scoring.score(unsettled, items, ["harness", "paper"])

    def best(scores):
        return [int(np.argmax([score.logprob for score in item])) for item in scores]

    settled = 0
    for mode in ("harness", "paper"):
        assert best(found[mode]) == best(exact[mode])
        for own, half, full in zip(found[mode], alone[mode], exact[mode], strict=True):
            if own != half:
                settled += 1
                assert [s.logprob for s in own] == pytest.approx([s.logprob for s in full], abs=1e-4)
    assert any(best(alone[mode]) != best(exact[mode]) for mode in alone)
    assert 0 < settled < len(items)


def test_the_first_choice_of_all_tokens_is_float32s(transformer):
    """In bfloat16 the highest logits are often the same number."""
    rng = random.Random(5)
    items = []
    for number in range(40):
        context = "".join(rng.choice("abcdef") for _ in range(9))
        with torch.no_grad():
            logits = transformer(torch.tensor([ByteTokenizer().encode(context)]))[0, -1, :128]
        best = chr(int(logits.argmax()))
        items.append(Item(str(number), (Option(context, best, best),), 0))
    exact = scoring.score(model_of(transformer, ByteTokenizer()), items, ["harness"])["harness"]
    half = model_of(transformer, ByteTokenizer(), precision="bfloat16")
    found = scoring.score(half, items, ["harness"])["harness"]
    assert [item[0].greedy for item in found] == [item[0].greedy for item in exact]
    assert any(item[0].greedy for item in exact)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_scores_are_the_cpus(transformer):
    requests = [Request("", "the cat sat"), Request("the cat", " sat on the mat"), Request("a", " b")]
    tokenizer = ByteTokenizer()
    on_cpu = model_of(transformer, tokenizer).loglikelihoods(requests)
    on_gpu = model_of(copy.deepcopy(transformer).cuda(), tokenizer, device="cuda").loglikelihoods(requests)
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-2)
