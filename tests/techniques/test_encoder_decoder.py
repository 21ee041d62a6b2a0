"""Encoder-decoder: a prefix is read in both directions, and the tokens after it are predicted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, rows_of, same_weights, train_in_parts, train_in_two_processes, weights_of

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.encoding import Encoded, RequestEncoder
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.model.documents import Documents
from stlm.model.encoder_decoder import PrefixRows
from stlm.model.flops import forward_flops
from stlm.model.inference import why_not
from stlm.model.layout import CausalRows
from stlm.model.rotary import rotate
from stlm.model.rows import Rows
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.encoder_decoder import EncoderDecoder
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import load_checkpoint, save_checkpoint
from stlm.training.curve import validate
from stlm.training.loop import Trainer, train
from stlm.training.memory import training_memory
from stlm.training.optimizers import build_optimizer

OPTIONS = {
    "plain": {},
    "learned": {"positions": "learned", "norm": "layernorm", "ffn": "gelu"},
    "values, shift, norms": {"value_embeddings": 2, "qkv_shift": True, "qk_norm": True},
    "factorized, shared": {
        "positions": "sinusoidal",
        "embedding_rank": 9,
        "tied": False,
        "layers": 4,
        "sharing": {"what": "all", "order": "sandwich"},
    },
}
L, WIDTH, CPU = 10, 16, torch.device("cpu")
# Before every place the number of tokens that the encoder reads; the last row leaves one prediction.
PREFIXES = torch.tensor([1, 4, 7, L])
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def config(**options: object) -> ModelConfig:
    sizes = {"layers": 3, "width": WIDTH, "heads": 4, "kv_heads": 2, "ffn_width": 24, "context": L}
    return ModelConfig(**{"vocab_size": 257, **sizes, **options})


def new_model(*techniques: EncoderDecoder, **options: object) -> Transformer:
    torch.manual_seed(1)
    return build_model(config(**options), techniques)


def random_model(technique: EncoderDecoder | None = None, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts."""
    model = new_model(technique or EncoderDecoder(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def tokens(rows: int = 4, length: int = L) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(2))


def rows(technique: EncoderDecoder, read: torch.Tensor) -> Rows:
    """The rows that training reads instead of the tokens [B, L + 1]."""
    return technique.rows(Rows(read[:, :-1], read[:, 1:]), 1, 1)


# The plain model


def test_without_an_encoder_it_is_the_plain_model_to_the_bit():
    neutral = EncoderDecoder(encoder=0)
    assert neutral.neutral() and not EncoderDecoder().neutral()
    plain, model, read = new_model(), new_model(neutral), tokens(4, L + 1)
    assert type(model) is Transformer and torch.equal(model(read[:, :-1]), plain(read[:, :-1]))
    given = rows(neutral, read)
    assert given.layout is None and given.counted_BL is None
    losses = [one.train().loss(given.tokens_BL, given.targets_BL) for one in (plain, model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@each_option
def test_other_weights_are_those_of_the_plain_model_and_new_ones_are_counted(options):
    model, plain = new_model(EncoderDecoder(encoder=2), **options), new_model(**options)
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(own.pop(name), parameter), name
    decoder = len(plain.blocks) - 2
    assert all(name.split(".")[2] in ("cross", "cross_norm") for name in own)
    assert all(int(name.split(".")[1]) >= 2 for name in own)
    groups, counted = parameter_groups(model), parameter_groups(plain)
    # q and out [16, 16], k and v [8, 16] each.
    assert groups.pop("cross-attention") == decoder * (2 * 16 * 16 + 2 * 8 * 16)
    norms = groups.pop("norms") - counted.pop("norms")
    gains = 2 * WIDTH * (2 if options.get("norm") == "layernorm" else 1)
    assert norms == decoder * (gains + (2 * 4 if options.get("qk_norm") else 0))
    assert groups == counted
    on_meta = build_on_meta(config(**options), (EncoderDecoder(encoder=2),))
    assert parameter_groups(on_meta) == parameter_groups(model)


def test_blocks_are_divided_two_to_one():
    assert [EncoderDecoder().encoder_blocks(layers) for layers in range(2, 10)] == [1, 2, 3, 3, 4, 5, 5, 6]
    assert EncoderDecoder(encoder=1).encoder_blocks(9) == 1
    model = new_model(layers=6)
    assert sum(hasattr(block, "cross") for block in new_model(EncoderDecoder(), layers=6).blocks) == 2
    assert not any(hasattr(block, "cross") for block in model.blocks)


def test_equal_parameters_by_the_rule_of_the_documentation():
    """docs/techniques.md: the study `seam`'s model with ffn_width 341 instead of 384."""
    shape = {"layers": 6, "width": 128, "heads": 4, "kv_heads": 2, "vocab_size": 4096, "context": 256}
    plain = build_on_meta(ModelConfig(**shape, ffn_width=384))
    own = build_on_meta(ModelConfig(**shape, ffn_width=341), (EncoderDecoder(),))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (plain, own)]
    assert 384 - round(2 / 6 * (2 * 128 + 2 * 64) / 3) == 341
    assert abs(sizes[1] / sizes[0] - 1) < 0.001


# What is read


@each_option
def test_a_prefix_is_read_in_both_directions_and_no_later_token_is_seen(options):
    model, read = random_model(**options), tokens()
    layout = CausalRows(L, PREFIXES - 1)
    for training in (False, True):  # by other kernels
        model.train(training)
        whole = model.hidden(read, layout).detach()
        encoded = model.encode(read, PREFIXES).x_BPD.detach()
        fixed = PrefixRows(L, PREFIXES, L, L)  # as in training, with padding in all rows
        torch.testing.assert_close(
            model.hidden(read, fixed).detach(), whole, atol=1e-5, rtol=1e-5, equal_nan=True
        )
        for place in range(L):
            changed = read.clone()
            changed[:, place] = changed[:, place] % 256 + 1
            other = model.hidden(changed, layout).detach()
            moved = ~torch.isclose(other, whole, atol=1e-5, rtol=1e-4, equal_nan=True).all(dim=2)
            encoder_moved = (model.encode(changed, PREFIXES).x_BPD - encoded).abs().amax(dim=2) > 1e-6
            for row, prefix in enumerate(PREFIXES.tolist()):
                predicted = range(prefix - 1, L)
                assert whole[row, : prefix - 1].isnan().all() and whole[row, prefix - 1 :].isfinite().all()
                # A prefix's token moves all that is predicted, another one what is at and after it.
                expected = [query in predicted and (place < prefix or place <= query) for query in range(L)]
                assert moved[row].tolist() == expected, (training, row, place)
                # Every output of the encoder depends on every token of the prefix, and on no other.
                assert encoder_moved[row, :prefix].tolist() == [place < prefix] * prefix


@each_option
def test_some_places_alone_are_those_of_all(options):
    model, read = random_model(**options), tokens()
    some = torch.tensor([0, 9, 13, 17, 19, 26, 39])
    for layout in (None, CausalRows(L, PREFIXES - 1)):
        whole = model.hidden(read, layout).flatten(0, 1)
        with torch.no_grad():
            found = model.hidden(read, layout, some)
        torch.testing.assert_close(found, whole[some], atol=1e-4, rtol=1e-4)
    assert model.hidden(read, layout, torch.tensor([10])).isnan().all(), "it is before the second row's cut"


def test_rows_of_several_sequences_are_refused():
    model, read = random_model(), tokens()
    with pytest.raises(NotImplementedError, match="one sequence in each row, not Documents"):
        model.hidden(read, Documents.of(read, 0))
    with pytest.raises(NotImplementedError, match="no stream that passes all blocks"):
        model.residuals(read)
    assert "another kind of model" in (why_not(model) or "there are no kernels: another kind of model")


def attended(block, q, k, v, sees, config):
    """Values mixed by plain softmax attention: q [Q, H, E], k and v [C, K, E], sees [Q, C]."""
    groups = config.heads // config.kv_heads
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhe,che->hqc", q, k) / math.sqrt(config.head_width)
    weights = scores.masked_fill(~sees, -math.inf).softmax(dim=-1)
    return block(torch.einsum("hqc,che->qhe", weights, v).flatten(1))


@torch.no_grad()
def by_hand(model: Transformer, prefix: list[int], rest: list[int]) -> torch.Tensor:
    """The log-probabilities [n, V] of the n tokens `rest`, each given the prefix and those before it."""
    c, P = model.config, len(prefix)
    heads = [c.heads, c.kv_heads, c.kv_heads]

    def angles(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return model.cos_LE[begin:end, None], model.sin_LE[begin:end, None]

    def mixed(block, x, rope, sees):
        qkv = block.attention.qkv(block.attention_norm(x)).view(len(x), -1, c.head_width)
        q, k, v = qkv.split(heads, dim=1)
        return attended(block.attention.out, rotate(q, *rope), rotate(k, *rope), v, sees, c)

    x = model.embedding(torch.tensor(prefix))
    for block in model.blocks[: model.encoder]:
        x = x + mixed(block, x, angles(0, P), torch.ones(P, P, dtype=torch.bool))
        x = x + block.ffn(block.ffn_norm(x))
    read = [prefix[-1], *rest[:-1]]
    n, rope = len(read), angles(P - 1, P - 1 + len(read))
    y = model.embedding(torch.tensor(read))
    for block in model.blocks[model.encoder :]:
        y = y + mixed(block, y, rope, torch.ones(n, n, dtype=torch.bool).tril())
        cross = block.cross
        q = cross.q(block.cross_norm(y)).view(n, -1, c.head_width)
        k, v = cross.kv(cross.norm(x)).view(P, -1, c.head_width).chunk(2, dim=1)
        sees = torch.ones(n, P, dtype=torch.bool)
        y = y + attended(cross.out, rotate(q, *rope), rotate(k, *angles(0, P)), v, sees, c)
        y = y + block.ffn(block.ffn_norm(y))
    return (model.norm(y) @ model.output.weight.T).double().log_softmax(dim=-1)


def scored_by_hand(model: Transformer, prefix: list[int], rest: list[int]) -> float:
    return float(by_hand(model, prefix, rest)[range(len(rest)), rest].sum())


# Scoring

EOT = ByteTokenizer().eot
ITEMS = [
    ("a cat", " sat"),
    ("a cat", " ran"),
    ("a cat r", "an"),
    ("a", " cat ran"),
    ("", "a cat"),
    ("b", "y"),
]


def test_items_are_scored_as_by_hand():
    model = random_model()
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    assert not scorer.packs
    found = scorer.loglikelihoods([Request(*item) for item in ITEMS], greedy=True)
    for (context, continuation), score in zip(ITEMS, found, strict=True):
        prefix, rest = list(context.encode()) or [EOT], list(continuation.encode())
        expected = scored_by_hand(model, prefix, rest)
        assert score.logprob == pytest.approx(expected, abs=1e-3) and score.n_tokens == len(rest)
        best = by_hand(model, prefix, rest).argmax(dim=-1).tolist()
        assert score.greedy == (best == rest)
    # As whole strings the first token follows the end of text, and the others are predicted from it on.
    found = scorer.loglikelihoods([Request(*item, whole=True) for item in ITEMS])
    for (context, continuation), score in zip(ITEMS, found, strict=True):
        text = list((context + continuation).encode())
        expected = scored_by_hand(model, [EOT], text)
        if context:
            expected = scored_by_hand(model, [EOT], text[:1]) + scored_by_hand(model, text[:1], text[1:])
        assert score.logprob == pytest.approx(expected, abs=1e-3)
    # A context beyond the model's loses its beginning.
    (long,) = scorer.loglikelihoods([Request("It was a dark and", " night")])
    text = list(b"It was a dark and night")[-L - 1 :]
    assert long.truncated
    assert long.logprob == pytest.approx(scored_by_hand(model, text[:-6], text[-6:]), abs=1e-3)
    half = TokenModel(model, RequestEncoder(ByteTokenizer()), precision="bfloat16")
    scores = [half.loglikelihoods([Request(*item)])[0].logprob for item in ITEMS]
    exact = [scorer.loglikelihoods([Request(*item)])[0].logprob for item in ITEMS]
    assert scores == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("stride", [None, 3, L])
def test_documents_are_scored_as_by_hand_with_overlaps_in_the_encoder(stride):
    model = random_model()
    document = tokens(1, 27)[0].tolist()
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    (found,) = scorer.document_loglikelihoods([document], stride)
    text, step = [EOT, *document], stride or L // 2
    expected, end, begin = 0.0, 1, 0
    while end < len(text):
        stop = min(begin + L + 1, len(text))
        expected += scored_by_hand(model, text[begin:end], text[end:stop])
        end, begin = stop, begin + step
    assert found == pytest.approx(expected, abs=1e-3)


class Letters:
    """A tokenizer of an alphabet of three tokens, the end of text among them."""

    eot, vocab_size = 0, 3

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [["eab".index(letter) for letter in text] for text in texts]


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_probabilities_of_all_texts_sum_to_one(stride):
    scorer = TokenModel(random_model(vocab_size=3, context=4), RequestEncoder(Letters()))
    texts = list(itertools.product(range(3), repeat=5))  # two or more windows each
    total = np.exp(scorer.document_loglikelihoods(texts, stride)).sum()
    assert total == pytest.approx(1, abs=1e-5)
    # What a context leaves open, and a string that is scored whole.
    ends = itertools.product(range(3), repeat=2)
    answers = [Encoded(np.array([1, 0, 2, *end], np.int32), 3, False) for end in ends]
    assert np.exp([s.logprob for s in scorer.score_tokens(answers)]).sum() == pytest.approx(1, abs=1e-5)
    strings = ["".join(letters) for letters in itertools.product("eab", repeat=3)]
    for context in (0, 1):
        whole = [Request(text[:context], text[context:], whole=True) for text in strings]
        found = [score.logprob for score in scorer.loglikelihoods(whole)]
        assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)
    # It can fail: an encoder that reads what is scored, too, predicts what it has seen.
    model, hidden, encode = scorer.transformer, scorer.transformer.hidden, scorer.transformer.encode

    def sees_all(tokens_BL, layout, rows_N):
        longest = torch.full_like(layout.answers, tokens_BL.shape[1])
        model.encode = lambda *_: encode(tokens_BL, longest)
        return hidden(tokens_BL, layout, rows_N)

    model.hidden = sees_all
    leaking = np.exp(scorer.document_loglikelihoods(texts, stride)).sum()
    assert abs(leaking - 1) > 1e-3


# Generation


@each_option
@torch.no_grad()
def test_a_cache_changes_nothing(options):
    model, read = random_model(**options), tokens()
    cache = Cache.of(model, 4, CPU)
    for prefix in (1, 4, L):  # each time over what is left of the time before
        answers = None if prefix == 1 else torch.full((4,), prefix - 1)
        whole = model.hidden(read, CausalRows(L, answers))
        first = max(prefix, 2)
        parts = read.split([first, *[1] * min(2, L - first), max(0, L - first - 2)], dim=1)
        found = [
            model.hidden(part, cache.extend(part.shape[1], None if number else answers))
            for number, part in enumerate(parts)
            if part.shape[1]
        ]
        torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-4, rtol=1e-4, equal_nan=True)
        assert cache.length == L and cache.places.stop == L - prefix + 1
        cache.clear()
        assert cache.encoded is None


def test_a_prompt_is_encoded_and_the_text_is_the_same_with_a_cache_past_the_end_of_the_context():
    model, texts = random_model(), {}
    for cached, prompt in itertools.product((True, False), ("Once", "", "It was a dark and stormy")):
        generator, numbers = TokenGenerator(model, ByteTokenizer(), cached), torch.Generator().manual_seed(5)
        logits_V = generator.start(prompt)
        if len(prompt) < L:
            expected = by_hand(model, [EOT, *prompt.encode()], [0])[0]
            torch.testing.assert_close(logits_V.log_softmax(-1).double(), expected, atol=1e-4, rtol=1e-4)
        text = texts[cached, prompt] = []
        while len(text) < 3 * L:
            text.append(int(Sampling(temperature=1.0).choose(logits_V, numbers)) % EOT)
            logits_V = generator.next(text[-1])
    for prompt in ("Once", "", "It was a dark and stormy"):
        assert texts[True, prompt] == texts[False, prompt] and len(set(texts[True, prompt])) > 2


def test_a_text_is_written_as_it_is_scored():
    model = random_model()
    generator, text, total = TokenGenerator(model, ByteTokenizer()), "It was a dark and stormy night.", 0.0
    logits_V = generator.start("")
    for symbol in text.encode():
        total += float(logits_V.log_softmax(dim=-1)[symbol])
        logits_V = generator.next(symbol)
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    assert total == pytest.approx(scorer.document_loglikelihoods([list(text.encode())])[0], abs=1e-3)


def test_the_next_token_of_several_prompts_is_that_by_hand():
    model = random_model()
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    logits = scorer.next_logits([[1, 2, 3, 4], [5, 6], [7, 8, 9]], [1, 1, -1])
    expected = [
        by_hand(model, [1, 2], [3, 4, 0])[-1],
        by_hand(model, [5, 6], [0])[-1],
        by_hand(model, [7], [8, 9, 0])[-1],
    ]
    found = logits.double().log_softmax(dim=-1)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


# Training


def test_only_tokens_after_the_cut_are_targets(make_technique_run):
    technique = EncoderDecoder(cut=(0.2, 0.6))
    run = make_technique_run(techniques=[technique], model={"layers": 3})
    trainer = Trainer(run)
    model, read = trainer.setup.model.train(), tokens(64, 33)
    assert technique.prefixes(32) == (6, 19) and technique.targets(32) == 33 - 12.5
    torch.manual_seed(3)
    forward = trainer.setup.objective.forward(model, read, None, 1)
    prefixes = (forward.layout.prefix_B).tolist()
    assert set(prefixes) <= set(range(6, 20)) and len(set(prefixes)) > 9
    loss = trainer.setup.objective(forward)["next_token"]
    logprobs, count = 0.0, 0
    for row, prefix in zip(read.tolist()[:8], prefixes[:8], strict=True):
        logprobs += scored_by_hand(model, row[:prefix], row[prefix:])
        count += 33 - prefix
    assert forward.counted_BL[:8].sum() == count
    losses = F.cross_entropy(
        model.head(forward.hidden_ND[forward.counted_BL.flatten()]),
        read[:, 1:][forward.counted_BL],
        reduction="none",
    )
    assert -losses[:count].sum().item() == pytest.approx(logprobs, rel=1e-4)
    torch.testing.assert_close(loss, losses.mean())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.parameters())
    # The same numbers are drawn again, and over many rows all between the bounds, evenly.
    torch.manual_seed(3)
    again = rows(technique, read)
    assert again.layout.prefix_B.tolist() == prefixes
    many = rows(technique, tokens(1, 33).expand(4000, -1)).layout.prefix_B
    counts = many.bincount()
    assert counts[:6].sum() == 0 and len(counts) == 20
    assert counts[6:].min() > 200 and counts[6:].max() < 380
    assert rows(EncoderDecoder(cut=(0, 0)), read).counted_BL.all(), "text without context"
    assert rows(EncoderDecoder(cut=(1, 1)), read).counted_BL.sum(dim=1).tolist() == [1] * 64


@pytest.mark.filterwarnings("ignore")
def test_a_run_learns_is_evaluated_and_writes(make_technique_run, capsys):
    run = make_technique_run(techniques=[EncoderDecoder()], steps=12, watch_every=12)
    train(run)
    record = read_json(run.folder / "train.json")
    assert record["flops"] == pytest.approx(run.tokens * run.flops_per_token)
    assert record["remarks"][0].startswith(
        "encoder_decoder: of a row's 32 tokens, 24.5 on average were targets (77%)"
    )
    losses = [float(row["train_loss"]) for row in curve_of(run) if row["train_loss"]]
    assert losses[-1] < losses[0]
    entropies = {
        row["layer"]: float(row["attention_entropy"] or "nan")
        for row in rows_of(run.folder / "watch.csv")
        if row["step"] == "12"
    }
    assert entropies["block 1"] > 1, "the encoder is watched with prefixes of several tokens"
    # Validation is the plain loss of text without context: the first token alone is the prefix.
    trainer = Trainer(run)
    model = load_checkpoint(run.folder / "checkpoints" / "step-0000012")[0]
    trainer.setup.model.load_state_dict(model.state_dict())
    found = validate(trainer.setup, trainer.curve.validation).row["val_loss"]
    assert found == pytest.approx(record["final"]["val_loss"], abs=1e-5)
    total = 0.0
    for inputs, targets, mask in trainer.curve.validation.batches(4):
        for row, target, counted in zip(inputs.tolist(), targets.tolist(), mask, strict=True):
            logprobs = by_hand(model, row[:1], target)[range(32), target]
            total -= float(logprobs[torch.from_numpy(counted)].sum())
    assert found == pytest.approx(total / trainer.curve.validation.n_tokens, rel=1e-4)

    evaluate_run(run, EvaluationConfig(benchmarks=["synthetic_pairs", "synthetic_choice"]))
    scores = read_json(run.folder / "evaluation.json")["checkpoints"]["step-0000012"]
    assert math.isfinite(scores["perplexity"]["bits_per_byte"])
    assert set(scores["benchmarks"]) == {"synthetic_pairs", "synthetic_choice"}
    capsys.readouterr()
    texts = []
    for flags in ((), ("--no-cache",)):
        assert main(["generate", "test/run", "1 2 3", "--tokens", "40", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["generate", "test/run", "1 2 3", "--draft", "test/run"]) != 0
    assert "does not support speculative decoding" in capsys.readouterr().err


def test_a_resumed_run_is_the_one_that_was_not_stopped(make_technique_run):
    sizes = {"techniques": [EncoderDecoder()], "accumulation": 2, "model": {"dropout": 0.1, "layers": 2}}
    sizes |= {"steps": 4, "validate_every": 2, "save_every": 2}
    plain, stopped = make_technique_run("plain", **sizes), make_technique_run("stopped", **sizes)
    train(plain)
    train_in_parts(stopped, 3)
    assert curve_of(plain) == curve_of(stopped) and same_weights(plain, stopped)


@pytest.mark.slow
def test_two_processes_train_as_one(make_technique_run):
    sizes = {"techniques": [EncoderDecoder()], "accumulation": 2}
    one, two = make_technique_run("one", **sizes), make_technique_run("two", **sizes)
    train(one)
    train_in_two_processes(two)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, weights_of(two)[name], atol=2e-5, rtol=1e-3)


def test_dropout_of_cross_attention_follows_its_schedule():
    model, x = random_model(attention_dropout=0.5).train(), torch.randn(4, L, WIDTH)
    cross, encoded = model.blocks[-1].cross, model.eval().encode(tokens(), PREFIXES)
    expected = cross(x, None, encoded)
    cross.train()
    assert not torch.isclose(cross(x, None, encoded), expected).all(dim=2).any(dim=1)[1:].any()
    model.schedule_dropout(0.0)
    torch.testing.assert_close(cross(x, None, encoded), expected)


def test_matrices_of_cross_attention_are_trained_as_matrices(make_technique_run):
    training, model = make_technique_run(optimizer="muon").training, new_model(EncoderDecoder())
    groups = build_optimizer(model, training, torch.float32).param_groups
    cross = model.blocks[-1].cross
    for parameter, parts in ((cross.q.weight, []), (cross.out.weight, []), (cross.kv.weight, [8, 8])):
        (group,) = [group for group in groups if any(p is parameter for p in group["params"])]
        assert group["matrices"] and group["parts"] == parts
    (group,) = [group for group in groups if any(p is cross.norm.weight for p in group["params"])]
    assert group["weight_decay"] == 0


# Cost


@pytest.mark.parametrize("options", [{}, {"embedding_rank": 9, "tied": False}], ids=str)
def test_flops_are_torchs_but_for_the_upper_half_of_the_decoders_attention(
    options, make_technique_run, torch_operations
):
    technique = EncoderDecoder(cut=(0.3, 0.7))
    model, read = random_model(technique, **options), tokens(1, L + 1)
    given, counts = rows(technique, read), []
    assert (given.layout.encoded_places, given.layout.decoded_places) == (7, 8)
    for layout in (given.layout, None):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.hidden(read[:, :-1], layout)
        counts.append(counter.get_total_flops())
    upper_half = 2 * WIDTH  # of one layer's two products, times the squared places
    head = forward_flops(model.output, 1)
    assert model.flops_of(7, 8, 0) == counts[0] - upper_half * 8**2
    assert forward_flops(model, L) == counts[1] - upper_half * L**2 + L * head
    assert forward_flops(model, L) == model.flops_of(1, L, L)
    # A row has 11 - 5 = 6 targets on average: of them alone are there logits.
    sizes = {**config(**options).model_dump(exclude_none=True)}
    run = make_technique_run(techniques=[technique], model=sizes)
    trained = 3 * (counts[0] - upper_half * 8**2 + 6 * head)
    assert run.flops_per_token == pytest.approx(trained / L, rel=1e-12)
    plain = make_technique_run(model=sizes)
    neutral = make_technique_run(techniques=[EncoderDecoder(encoder=0)], model=sizes)
    assert neutral.flops_per_token == plain.flops_per_token > run.flops_per_token


def test_the_memory_estimate_is_at_most_what_autograd_keeps(make_technique_run):
    technique = EncoderDecoder(cut=(0.2, 0.8))
    run = make_technique_run(techniques=[technique], model={"layers": 3})
    model, read, kept = build_model(run.model, [technique]), tokens(4, 33), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    given = rows(technique, read)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = model.hidden(given.tokens_BL, given.layout)
    measured = sum(size for place, size in kept.items() if place not in weights)
    estimate = training_memory(run, "float32", False, 4).sequence * 4 - 4 * 32 * 8
    assert x.shape == (4, 32, 32) and measured / 3 < estimate < measured
    neutral = make_technique_run(techniques=[EncoderDecoder(encoder=0)], model={"layers": 3})
    plain = make_technique_run(model={"layers": 3})
    assert training_memory(neutral, "float32", False, 4) == training_memory(plain, "float32", False, 4)


# Checkpoints and keys


def test_a_checkpoint_is_read_and_not_exported(tmp_path):
    model = random_model()
    checkpoint = tmp_path / "checkpoints" / "step-0000001"
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    ByteTokenizer().save(tmp_path / "checkpoints" / "tokenizer")
    loaded, _ = load_checkpoint(checkpoint)
    assert torch.equal(loaded(tokens()), model(tokens()))
    with pytest.raises(UserError, match="encoder_decoder does not support export"):
        export_llama(checkpoint, tmp_path / "llama")


def load(project, keys: str, more: str = ""):
    text = (project / "params" / "smoke.yaml").read_text()
    variant = f"  halves:\n    label: Halves\n    techniques: {{encoder_decoder: {keys}}}\n{more}"
    (project / "params" / "smoke.yaml").write_text(text + variant)
    return load_study("smoke")


def test_it_is_loaded_from_a_study(project):
    study = load(project, "{encoder: 1, cut: [0.1, 1]}")
    plain, own = (study.runs[name] for name in ("baseline", "halves"))
    assert own.techniques["encoder_decoder"] == EncoderDecoder(encoder=1, cut=(0.1, 1))
    assert own.parameters.total > plain.parameters.total and own.tokens == plain.tokens


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        (
            "{encoder: 1000}",
            "",
            r"encoder_decoder\.encoder: found 1000 of model\.layers: (\d+), expected at most \d+, as",
        ),
        (
            "{}",
            "    model: {layers: 1}\n",
            r"encoder_decoder\.encoder: found 1 of model\.layers: 1, expected at most 0",
        ),
        ("{encoder: -1}", "", r"encoder_decoder\.encoder: .*found -1"),
        ("{cut: [0.5, 0.2]}", "", r"cut: found \[0\.5, 0\.2\], expected two shares from 0 to 1"),
        ("{cut: [0, 1.5]}", "", r"cut: found \[0\.0, 1\.5\], expected two shares from 0 to 1"),
        ("{cuts: [0, 1]}", "", r"cuts: no such key \(did you mean 'cut'"),
        ("{}", "    data: {attention: within}\n", "does not support attention within documents"),
        ("{}", "    training: {compile: true}\n", r"does not support torch\.compile"),
        ("{}", "    training: {start_from: baseline}\n", "does not support weights of another run"),
        ("{}", "    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
    ],
)
def test_what_does_not_fit_or_is_not_supported_is_refused(keys, more, message, project):
    with pytest.raises(UserError, match=message):
        load(project, keys, more)
