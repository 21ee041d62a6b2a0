"""Pauses: learned vectors among the tokens, after which the next token is predicted."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, train_in_parts, train_in_two_processes, weights_of

from stlm.cli import main
from stlm.corpora.steps import MARKER
from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.interface import Request
from stlm.evaluation.readouts import find_readout, readouts_of
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_counts, parameter_groups
from stlm.model.documents import Documents
from stlm.model.flops import forward_flops
from stlm.model.layout import CausalRows, Selection
from stlm.model.segments import Segments
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.pauses import Pauses
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import load_checkpoint, save_checkpoint
from stlm.training.curve import validate
from stlm.training.loop import Trainer, train
from stlm.training.memory import training_memory
from stlm.training.optimizers import build_optimizer

OPTIONS = {
    "plain": {},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "values, shift": {"value_embeddings": 2, "qkv_shift": True, "qk_norm": True},
    "factorized, untied": {"embedding_rank": 9, "tied": False},
    "shared": {"sharing": {"what": "all", "order": "sandwich"}, "lora": {"rank": 3}},
}
LAYERS, CONTEXT, EOT = 3, 16, 0
CPU = torch.device("cpu")
TWO = Pauses(every=3, count=2, vectors="each")
KINDS = {"one": Pauses(every=4), "each": TWO, "at every token": Pauses(every=1, count=3)}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_kind = pytest.mark.parametrize("technique", KINDS.values(), ids=KINDS)


def config(**options: object) -> ModelConfig:
    sizes = {"layers": LAYERS, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 40, "context": CONTEXT}
    if "sharing" in options:
        sizes["layers"] = 4
    return ModelConfig(**{"vocab_size": 257, **sizes, **options})


def new_model(*techniques: Pauses, **options: object) -> Transformer:
    torch.manual_seed(1)
    return build_model(config(**options), techniques)


def random_model(*techniques: Pauses, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts."""
    model = new_model(*techniques, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.eval()


def tokens(rows: int = 3, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(2))


@each_option
def test_no_pauses_are_the_plain_model_to_the_bit(options):
    neutral = Pauses(count=0)
    assert neutral.neutral() and not Pauses().neutral()
    plain, model = random_model(**options), random_model(neutral, **options)
    assert torch.equal(model(tokens()), plain(tokens()))
    read = tokens(4, CONTEXT + 1)
    losses = [one.train().loss(read[:, :-1], read[:, 1:]) for one in (plain, model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def with_pauses_as_tokens(technique: Pauses, model: Transformer, row: list[int]) -> torch.Tensor:
    """The logits [L, V] of a plain model that reads pauses as further tokens of its vocabulary."""
    further = technique.count
    longer = model.most_places
    plain = build_model(model.config.model_copy(update={"vocab_size": 257 + further, "context": longer}))
    with torch.no_grad():
        own = dict(model.named_parameters())
        vectors = own.pop("inserted_embeddings.weight").view(-1, 32).expand(further, -1)
        for name, parameter in plain.named_parameters():
            if parameter.shape == own[name].shape:
                parameter.copy_(own[name])
            else:
                parameter.copy_(torch.cat([own[name], vectors]))
    read, places = [], []
    for place, token in enumerate(row):
        read.append(token)
        if (place + 1) % technique.every == 0:
            read += range(257, 257 + further)
        places.append(len(read) - 1)
    return plain.eval()(torch.tensor([read]))[0, places, :257]


@each_kind
@pytest.mark.parametrize("options", [{}, {"positions": "learned"}, {"positions": "sinusoidal"}], ids=str)
def test_they_are_read_as_tokens_and_the_last_one_predicts(technique, options):
    model = random_model(technique, **options)
    for length in (1, 2, 3, 4, 7, CONTEXT):
        for row in tokens(2, length):
            expected = with_pauses_as_tokens(technique, model, row.tolist())
            torch.testing.assert_close(model(row[None])[0], expected, atol=1e-4, rtol=1e-4)


@each_option
@each_kind
def test_a_pause_changes_what_is_predicted_and_learns(options, technique):
    model = random_model(technique, **options)
    without = model(tokens())
    with torch.no_grad():
        model.inserted_embeddings.weight.add_(0.3)
    moved = (model(tokens()) - without).abs().amax(dim=(0, 2)) > 1e-3
    assert moved.tolist() == [place + 1 >= technique.every for place in range(CONTEXT)]
    read = tokens(4, CONTEXT + 1)
    model.train().loss(read[:, :-1], read[:, 1:]).backward()
    gradient = model.inserted_embeddings.weight.grad.view(-1, 32)
    assert (gradient.norm(dim=1) > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_pause_is_a_target_or_counted_in_bits_per_byte():
    model, read = random_model(TWO), tokens(4, CONTEXT + 1)
    inputs, targets = read[:, :-1], read[:, 1:]
    assert model.hidden(inputs).shape == (4, CONTEXT, 32) and model(inputs).shape == (4, CONTEXT, 257)
    losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    assert len(losses) == 4 * CONTEXT
    torch.testing.assert_close(model.loss(inputs, targets), losses.mean())
    mask = torch.zeros(4, CONTEXT)
    mask[:, 2:9] = 1
    torch.testing.assert_close(model.loss(inputs, targets, mask), losses.view(4, -1)[:, 2:9].sum())
    # A document's probability is the product of its tokens', each once.
    document = tokens(1, CONTEXT - 1)[0].tolist()
    (found,) = TokenModel(model, RequestEncoder(ByteTokenizer())).document_loglikelihoods([document])
    logits = model(torch.tensor([[ByteTokenizer().eot, *document[:-1]]]))[0]
    expected = -F.cross_entropy(logits, torch.tensor(document), reduction="sum")
    assert found == pytest.approx(expected.item(), rel=1e-5)


@each_option
@each_kind
def test_no_later_token_is_seen_and_a_cache_changes_nothing(options, technique):
    model, changed = random_model(technique, **options), tokens()
    changed[:, 8] = changed[:, 8] % 256 + 1  # the ninth token, which pauses follow in two of three kinds
    with torch.inference_mode():
        whole, other = model.hidden(tokens()), model.hidden(changed)
        assert torch.equal(whole[:, :8], other[:, :8])
        assert not torch.isclose(whole[:, 8:], other[:, 8:]).all(dim=2).any()
        cache = Cache.of(model, 3, CPU)
        assert cache.kv.shape[4] == CONTEXT + technique.count * (CONTEXT // technique.every)
        for _ in range(2):  # the second time over what the first left
            parts = tokens().split([1, 5, 1, 1, 1, 3, 2, 1, 1], dim=1)
            found = torch.cat([model.hidden(part, cache.extend(part.shape[1])) for part in parts], dim=1)
            torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-3)
            assert cache.length == CONTEXT
            cache.clear()


@each_kind
def test_the_text_is_the_same_with_a_cache_past_the_end_of_the_context(technique):
    model, texts = random_model(technique), []
    for cached in (True, False):
        generator, numbers = TokenGenerator(model, ByteTokenizer(), cached), torch.Generator().manual_seed(5)
        logits_V = generator.start("Once")
        texts.append([])
        while len(texts[-1]) < 3 * CONTEXT:
            texts[-1].append(int(Sampling(temperature=1.0).choose(logits_V, numbers)) % generator.eot)
            logits_V = generator.next(texts[-1][-1])
    assert texts[0] == texts[1] and len(set(texts[0])) > 2


def test_a_text_is_written_as_it_is_scored():
    model = random_model(TWO)
    generator, text, total = TokenGenerator(model, ByteTokenizer()), "It was a dark and stormy night.", 0.0
    logits_V = generator.start("")
    for symbol in text.encode():
        total += float(logits_V.log_softmax(dim=-1)[symbol])
        logits_V = generator.next(symbol)
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    assert total == pytest.approx(scorer.document_loglikelihoods([list(text.encode())])[0], abs=1e-3)


@each_option
@each_kind
@torch.no_grad()
def test_documents_in_a_row_have_pauses_of_their_own(options, technique):
    model, read = random_model(technique, **options), tokens(4)
    for row, places in enumerate([(7,), (0, 1, 2, 12), (), (4, 9, 15)]):
        read[row, list(places)] = EOT
    whole = model.hidden(read, Documents.of(read, EOT))
    # In training, by other kernels.
    trained = model.train().hidden(read, Documents.of(read, EOT))
    torch.testing.assert_close(trained, whole, atol=1e-4, rtol=1e-3)
    model.eval()
    for row, places in zip(read, whole, strict=True):
        begins = sorted({0, *(row == EOT).nonzero().flatten().tolist(), CONTEXT})
        for begin, end in pairwise(begins):
            alone = model.hidden(row[None, begin:end])[0]
            torch.testing.assert_close(places[begin:end], alone, atol=1e-4, rtol=1e-3)


@each_option
@each_kind
def test_packed_in_a_trie_as_in_single_rows(options, technique):
    model = random_model(technique, **{"context": 48, **options})
    requests = [Request("the cat", f" {a}{b}") for a in ("sat", "ran", "w") for b in ("", " home", " on it")]
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    assert scorer.packs and scorer.batch_tokens == 4096 * 48 // model.most_places
    packed = [score.logprob for score in scorer.loglikelihoods(requests, greedy=True)]
    scorer.packs = False
    single = [score.logprob for score in scorer.loglikelihoods(requests)]
    assert packed == pytest.approx(single, abs=1e-3)
    half = TokenModel(model, RequestEncoder(ByteTokenizer()), precision="bfloat16")
    assert [score.logprob for score in half.loglikelihoods(requests)] == pytest.approx(single, rel=0.1)


def test_some_positions_alone_are_those_of_all():
    rows, model = torch.tensor([0, 2, 7, 17, 40]), random_model(TWO)
    read = tokens()
    read[1, 5] = EOT
    for layout in (None, Documents.of(read, EOT)):
        expected = model.hidden(read, layout).flatten(0, 1)[rows]
        torch.testing.assert_close(model.hidden(read, layout, rows), expected, atol=1e-5, rtol=1e-5)


def test_residuals_are_those_at_the_tokens():
    model = random_model(TWO)
    kept = model.residuals(tokens(), after=range(LAYERS))
    assert [x.shape for x in kept] == [(3, CONTEXT, 32)] * LAYERS
    assert torch.equal(model.finish(kept[-1]), model.hidden(tokens()))


# Pauses before answers


ANSWER = Pauses(place="answer", every=4, count=2)
ITEMS = [
    ("the cat", " sat"),
    ("the cat", " ran home"),
    ("the cat ran", " home"),
    ("the", " cat ran home"),
    ("a dog was", " not"),
    ("", "the cat ran"),
]


def answered(model: Transformer, context: str, continuation: str, whole: bool) -> float:
    """The log-probability by hand, of one request: pauses stand after the context's last token."""
    tokenizer = ByteTokenizer()
    text, first = list((context + continuation).encode()), len(context)
    plain = build_model(model.config)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    read, places = [tokenizer.eot] * (whole or not context), []
    for place, token in enumerate(text):
        places.append(len(read) - 1)
        read.append(token)
        if place == first - 1:
            read += [-1, -1]
    read = torch.tensor(read[:-1])
    x = plain.embedding(read.clamp(min=0))[None]
    x[0, read < 0] = model.inserted_embeddings.weight
    rope = model.cos_LE[: len(read), None], model.sin_LE[: len(read), None]
    for block in plain.eval().blocks:
        x = block(x, rope, CausalRows(len(read)))
    scored = range(0 if whole or not context else first, len(text))
    logprobs = plain.head(plain.finish(x))[0].log_softmax(dim=-1).detach()
    return sum(float(logprobs[places[n], text[n]]) for n in scored)


def test_in_scoring_they_stand_between_the_context_and_the_continuation():
    model = random_model(ANSWER, context=32)
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    assert not scorer.packs, "a trie has no answers"
    requests = [Request(*item) for item in ITEMS]
    expected = [answered(model, *item, whole=False) for item in ITEMS]
    found = [score.logprob for score in scorer.loglikelihoods(requests)]
    assert found == pytest.approx(expected, abs=1e-3)
    plain = TokenModel(find_readout(model, "pauses-0"), RequestEncoder(ByteTokenizer()))
    without = [score.logprob for score in plain.loglikelihoods(requests)]
    assert plain.packs and without[-1] == pytest.approx(found[-1], abs=1e-3)
    assert all(abs(one - other) > 1e-2 for one, other in zip(without[:-1], found[:-1], strict=True))


def test_whole_strings_share_what_comes_before_an_answer_alone():
    """Several requests are the same text, and differ in where its answer begins."""
    model = random_model(ANSWER, context=32)
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    requests = [Request(*item, whole=True) for item in ITEMS]
    together = [score.logprob for score in scorer.loglikelihoods(requests)]
    alone = [scorer.loglikelihoods([request])[0].logprob for request in requests]
    assert together == pytest.approx(alone, abs=1e-3)
    assert len({round(value, 2) for value in together[1:4]}) == 3
    # The first token follows an end of text, which the others do not.
    begins = scorer._first_tokens(np.array([ord("t")]))[0, 0]
    (text,) = scorer.loglikelihoods([Request("t", "he cat ran home", whole=True)])
    assert text.logprob - begins == pytest.approx(
        answered(model, "t", "he cat ran home", whole=False), abs=1e-3
    )


def test_a_context_beyond_the_models_loses_its_beginning_and_no_pause():
    model = random_model(ANSWER, context=16)
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    context = "It was a dark and stormy night"
    long, short = scorer.loglikelihoods([Request(context, " in May"), Request(context[-10:], " in May")])
    assert long.truncated and not short.truncated
    assert long.logprob == pytest.approx(short.logprob, abs=1e-3)
    # A continuation as long as the model's context leaves none to pause after.
    (none,) = scorer.loglikelihoods([Request("It", context + context)])
    assert none.truncated and none.logprob < 0


def test_text_without_answers_has_no_pauses():
    model = random_model(ANSWER)
    plain = find_readout(model, "pauses-0")
    assert torch.equal(model(tokens()), plain(tokens()))
    documents = [tokens(1, 40)[0].tolist()]
    scorers = [TokenModel(one, RequestEncoder(ByteTokenizer())) for one in (model, plain)]
    assert len({scorer.document_loglikelihoods(documents)[0] for scorer in scorers}) == 1
    assert forward_flops(model, CONTEXT) == forward_flops(plain, CONTEXT)


def test_in_generation_they_stand_after_the_prompt():
    model, texts = random_model(ANSWER), []
    for cached in (True, False):
        for prompt in ("Once", ""):
            generator, numbers = (
                TokenGenerator(model, ByteTokenizer(), cached),
                torch.Generator().manual_seed(5),
            )
            logits_V = generator.start(prompt)
            read = torch.tensor([[generator.eot, *prompt.encode()]])
            answers = torch.tensor([4 if prompt else -1])
            with torch.inference_mode():
                expected = model.head(model.hidden(read, CausalRows(read.shape[1], answers)))[0, -1]
                torch.testing.assert_close(logits_V, expected, atol=1e-4, rtol=1e-4)
                assert prompt == "" or (model(read)[0, -1] - logits_V).abs().max() > 1e-2
            texts.append([])
            while len(texts[-1]) < 3 * CONTEXT:
                texts[-1].append(int(Sampling(temperature=1.0).choose(logits_V, numbers)) % generator.eot)
                logits_V = generator.next(texts[-1][-1])
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


@pytest.mark.parametrize("layout", ["rows", "documents"])
def test_training_draws_where_they_stand(layout):
    model, read = random_model(ANSWER, qkv_shift=True).train(), tokens(8)
    read[:, 5] = EOT
    given = None if layout == "rows" else Documents.of(read, EOT)
    lengths, seen = [], []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model.inserted_embeddings.stretch = lambda *inputs, own=model.inserted_embeddings.stretch: (
        seen.append(own(*inputs)) or seen[-1]
    )
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.hidden(read, given))
    assert lengths == [CONTEXT + 2 * (CONTEXT // 4)] * 3
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    paused = seen[0].last_BL > seen[0].place_BL
    assert (paused.sum(dim=1) == CONTEXT // 4).all() and not (paused == paused[:1]).all()
    # Later tokens move nothing, wherever pauses stand.
    changed = read.clone()
    changed[:, 10:] = changed[:, 10:] % 256 + 1
    torch.manual_seed(1)
    other = model.hidden(changed, given)
    torch.testing.assert_close(other[:, :10], found[0][:, :10], atol=1e-5, rtol=1e-5)
    assert (other[:, 10:] - found[0][:, 10:]).abs().max() > 1e-2


MARKED = Pauses(place="answer", before=" and", every=4, count=2)


def marked_model(marker: tuple[int, ...], **options: object) -> Transformer:
    model = random_model(MARKED, **options)
    model.inserted_embeddings.mark(marker)
    return model


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "qkv_shift": True}], ids=str)
def test_training_has_them_before_answers_as_scoring_has(options):
    model, read = marked_model((7, 8), **options), tokens(3) % 250 + 7
    for row, place in enumerate((1, 6, CONTEXT - 2)):
        read[row, place : place + 2] = torch.tensor([7, 8])
    answers = torch.tensor([0, 5, CONTEXT - 3])
    scored = model.hidden(read, CausalRows(CONTEXT, answers))
    trained = model.train().hidden(read)
    torch.testing.assert_close(trained, scored, atol=1e-5, rtol=1e-4)
    assert (model.eval().hidden(read) - trained).abs().amax(dim=(1, 2)).min() > 1e-2, "text has none"
    # In documents each by itself, and as many in a row as there are markers.
    read[0, 8:11] = torch.tensor([EOT, 7, 8])
    given = Documents.of(read, EOT)
    stretched = model.train().inserted_embeddings.stretch(given, read)
    paused = (stretched.last_BL - stretched.place_BL).tolist()
    assert [[place for place, number in enumerate(row) if number] for row in paused] == [[0, 8], [5], [13]]
    assert {number for row in paused for number in row} == {0, 2}
    # No more than room is made for, and none for what the end of a row cuts.
    read[:] = torch.tensor([7, 8]).repeat(8)
    stretched = model.inserted_embeddings.stretch(CausalRows(CONTEXT), read)
    assert (stretched.last_BL - stretched.place_BL)[0].tolist() == [0, 2] * 4 + [0] * 8
    read[:, :] = 9
    read[:, 0], read[:, -1] = 8, 7
    stretched = model.inserted_embeddings.stretch(CausalRows(CONTEXT), read)
    assert torch.equal(stretched.last_BL, stretched.place_BL)


def test_before_answers_one_graph_is_the_same():
    model, read = marked_model((7, 8)).train(), tokens() % 2 + 7
    compiled = torch.compile(model.hidden, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(read), model.hidden(read), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("attention", ["across", "within"])
def test_a_run_pauses_before_the_answers_of_its_text(attention, make_technique_run):
    sizes = {"techniques": [MARKED], "data": DataConfig(attention=attention), "accumulation": 2}
    run, stopped = make_technique_run("whole", **sizes), make_technique_run("stopped", **sizes)
    setup = Trainer(run).setup
    (tokens_BM, _) = setup.micro_batches.of_step(1, setup.share)
    seen, stretch = [], setup.model.inserted_embeddings.stretch
    setup.model.inserted_embeddings.stretch = lambda *given: seen.append(stretch(*given)) or seen[-1]
    setup.model.train()
    setup.loss(tokens_BM, 1)
    (found,) = seen
    for row, pauses in zip(tokens_BM.tolist(), found.last_BL - found.place_BL, strict=True):
        text = "".join(chr(token) if token < 256 else "|" for token in row[:-1])
        begins = [match.start() for match in re.finditer(" and", text)]
        assert pauses.nonzero().flatten().tolist() == [begin - 1 for begin in begins if begin]
    train(run)
    train_in_parts(stopped, 5)
    assert curve_of(run) == curve_of(stopped)
    assert run.flops_per_token == make_technique_run(techniques=[ANSWER]).flops_per_token


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"before": "\nAnswer:"},
            r"run run: techniques.pauses.before: found '\\nAnswer:', which is in no row",
        ),
        (
            {"before": "s", "every": 30},
            r"techniques.pauses.every: found 30, with which \d+% of the answers have no pauses, as a row has "
            r"as many as 3; expected at most 16$",
        ),
    ],
)
def test_a_text_with_other_answers_is_refused(keys, message, make_technique_run):
    with pytest.raises(UserError, match=message):
        Trainer(make_technique_run(techniques=[MARKED.model_copy(update=keys)]))


def test_training_with_drawn_places_costs_what_torch_counts(make_technique_run, torch_operations):
    run = make_technique_run(techniques=[ANSWER], model={"context": CONTEXT})
    model, counts = build_model(run.model, [ANSWER]), []
    for length in (CONTEXT, CONTEXT + 2 * (CONTEXT // 4)):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.inserted_embeddings.train(length > CONTEXT)
            model.eval() if length == CONTEXT else None
            for block in model.blocks:
                block.eval()
            model(tokens(1))
        counts.append(counter.get_total_flops() - run.model.layers * 2 * 32 * length**2)
    assert forward_flops(model, CONTEXT) == counts[0]
    assert run.flops_per_token == pytest.approx(3 * counts[1] / CONTEXT, rel=1e-12)
    every = ANSWER.model_copy(update={"place": "every"})
    assert run.flops_per_token == run.model_copy(update={"techniques": {"pauses": every}}).flops_per_token


# Layouts


def test_rows_are_stretched_and_taken_back():
    inserted, x = torch.tensor([[0, 2, 0, 1, 0]]), torch.arange(1.0, 11).view(2, 5, 1)
    stretched = CausalRows(5).stretch(inserted)
    longer = stretched.spread(x, torch.tensor([[-1.0], [-2.0]]))
    assert longer[..., 0].tolist() == [[1, 2, -1, -2, 3, 4, -1, 5], [6, 7, -1, -2, 8, 9, -1, 10]]
    assert stretched.take(longer)[..., 0].tolist() == [[1, -2, 3, -1, 5], [6, -2, 8, -1, 10]]
    assert stretched.spread(x)[0, :, 0].tolist() == [1, 2, 0, 0, 3, 4, 0, 5]
    assert longer.flatten()[stretched.rows(torch.tensor([1, 2, 5, 8]))].tolist() == [-2, 3, 6, -1]
    assert stretched.layout.positions == slice(8)
    # Rows that differ: the shorter one is padded at its end.
    ragged = CausalRows(3).stretch(torch.tensor([[1, 0, 0], [0, 1, 1]]), 6)
    assert ragged.place_BL.tolist() == [[0, 2, 3], [0, 1, 3]]
    found = ragged.take(ragged.spread(torch.ones(2, 3, 1), torch.tensor([[-1.0]])))
    assert found[..., 0].tolist() == [[-1, 1, 1], [1, -1, -1]]


def test_documents_are_stretched_each_by_itself():
    read = torch.tensor([[5, 6, EOT, 7, 8, EOT], [5, 6, 7, 8, 9, 5]])
    inserted = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 0, 1, 0, 1]])
    stretched = Documents.of(read, EOT).stretch(inserted, 9)
    longer = stretched.spread(read[..., None].float(), torch.tensor([[-1.0]]))
    assert longer[1, :, 0].tolist() == [5, 6, -1, 7, 8, -1, 9, 5, -1]
    assert longer[0, :8, 0].tolist() == [5, 6, -1, EOT, 7, -1, 8, EOT]
    assert stretched.layout.positions[0, :8].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert stretched.layout.positions[1].tolist() == list(range(9))
    assert stretched.last_BL.tolist() == [[0, 2, 3, 5, 6, 7], [0, 2, 3, 5, 6, 8]]
    sees, place = stretched.layout.sees[:, 0], torch.arange(8)
    first = torch.tensor([0, 0, 0, 3, 3, 3, 3, 7])
    assert torch.equal(sees[0, :8, :8], (place >= first[:, None]) & (place <= place[:, None]))
    assert torch.equal(sees[1], torch.ones(9, 9).tril().bool())
    assert not sees[0, :8, 8].any(), "padding is seen by none"
    assert torch.equal(Documents.of(read, EOT).stretch(inserted).layout.sees, stretched.layout.sees)


def test_a_trie_is_stretched_and_what_follows_a_token_is_there_once():
    paths = [np.arange(4), np.array([0, 1, 4, 5, 6])]
    trie = Segments(np.array([0, 1, 2, 3, 2, 3, 4]), [(4, paths[0]), (3, paths[1])], CPU)
    stretched = trie.stretch(torch.tensor([[0, 1, 0, 1, 0, 2, 0]]))
    assert stretched.length == 7 + 4 and stretched.last_BL.tolist() == [[0, 2, 3, 5, 6, 9, 10]]
    assert stretched.layout.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]]
    before = stretched.layout.before(torch.arange(1.0, 12).view(1, 11, 1))
    assert before.flatten().tolist() == [0, 1, 2, 3, 4, 5, 3, 7, 8, 9, 10]


def test_layouts_without_room_say_so():
    from stlm.model.packed_chunks import Packing

    trie = Segments(np.array([0, 1]), [(2, np.arange(2))], CPU).select(Selection(torch.tensor([[0]])))
    for layout in (Packing(torch.tensor([2, 3]), causal=True), trie):
        with pytest.raises(NotImplementedError, match="has no room for inserted places"):
            layout.stretch(torch.tensor([[1]]))


# Weights and cost


@each_option
@each_kind
def test_weights_start_as_the_plain_models_and_pauses_are_counted(options, technique):
    model, plain = new_model(technique, **options), new_model(**options)
    own = dict(model.named_parameters())
    vectors = own.pop("inserted_embeddings.weight")
    assert vectors.numel() == 32 * (technique.count if technique.vectors == "each" else 1)
    assert 0.01 < vectors.std() < 0.03
    further = model.most_places - CONTEXT
    assert further == technique.count * (CONTEXT // technique.every)
    for name, parameter in plain.named_parameters():
        found = own.pop(name)
        if name == "positions.weight":
            assert len(found) == CONTEXT + further and 0.01 < found[CONTEXT:].std() < 0.03
            found = found[:CONTEXT]
        assert torch.equal(found, parameter), name
    assert not own
    groups, counted = parameter_groups(model), parameter_groups(plain)
    assert groups.pop("pauses") == vectors.numel()
    if "positions" in counted:
        counted["positions"] += 32 * further
    assert groups == counted
    assert parameter_groups(build_on_meta(config(**options), (technique,))) == parameter_groups(model)
    assert parameter_counts(config(**options), (technique,)).total == sum(
        p.numel() for p in model.parameters()
    )


def test_vectors_are_trained_as_gains_are(make_technique_run):
    training, model = make_technique_run(optimizer="muon").training, new_model(TWO)
    (group,) = [
        group
        for group in build_optimizer(model, training, torch.float32).param_groups
        if any(p is model.inserted_embeddings.weight for p in group["params"])
    ]
    assert group["weight_decay"] == 0 and not group["matrices"]


@each_kind
@pytest.mark.parametrize("length", [CONTEXT, CONTEXT - 1])
@pytest.mark.parametrize("options", [{}, {"embedding_rank": 9, "tied": False}], ids=str)
def test_flops_are_torchs_but_for_the_upper_half_of_attention(technique, length, options, torch_operations):
    model, plain = random_model(technique, **options), random_model(**options)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens(1, length))
    rows = length + technique.count * (length // technique.every)
    upper_half = LAYERS * 2 * 32 * rows**2
    assert forward_flops(model, length) == counter.get_total_flops() - upper_half
    assert forward_flops(model, length) > forward_flops(plain, length)
    assert forward_flops(model.output, length) == forward_flops(plain.output, length)


def test_documents_cost_as_much_as_one_row(torch_operations):
    """Rows of documents are padded to the length that is counted."""
    read, counts = tokens(2), []
    read[0, 5], read[1, 7] = EOT, EOT
    model = random_model(TWO)
    for layout in (None, Documents.of(read, EOT)):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.hidden(read, layout)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_memory_is_that_of_longer_rows(make_technique_run):
    run, plain = make_technique_run(techniques=[TWO]), make_technique_run()
    own, other = (training_memory(one, "float32", False, 4).sequence for one in (run, plain))
    tokens_of_the_batch = 8 * run.model.context
    rows = 1 + 2 * (32 // 3) / 32
    assert own - tokens_of_the_batch == pytest.approx((other - tokens_of_the_batch) * rows, abs=1)


def test_with_drawn_places_one_graph_is_the_same():
    model, read = random_model(ANSWER).train(), tokens()
    torch.manual_seed(3)
    expected = model.hidden(read)
    torch.manual_seed(3)
    compiled = torch.compile(model.hidden, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(read), expected, atol=1e-4, rtol=1e-3)


@each_option
def test_in_one_graph_it_is_the_same(options):
    """Traced whole, which raises where the compiler would have to leave the graph."""
    torch._dynamo.reset()  # it compiles the same code for eight models at most
    model, read = random_model(TWO, **options).train(), tokens(3, CONTEXT + 1)
    compiled = torch.compile(model.hidden, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(read[:, :-1]), model.eval().hidden(read[:, :-1]), atol=1e-4, rtol=1e-3
    )


def test_in_bfloat16_the_stream_stays_float32_and_gradients_are_finite():
    model, kept = random_model(TWO, value_embeddings=1).train(), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(tokens(), tokens()).backward()
    assert kept == [torch.float32]
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


# Other numbers of pauses


@pytest.mark.parametrize("options", [{}, {"positions": "sinusoidal"}, {"positions": "learned"}], ids=str)
def test_readouts_are_the_model_with_other_numbers_of_pauses(options):
    technique = Pauses(every=3, count=2, scored=(0, 1, 2))
    model = random_model(technique, **options)
    found = readouts_of(model)
    assert list(found) == ["pauses-0", "pauses-1"], "two are the model itself"
    assert torch.equal(find_readout(model, "pauses-2")(tokens()), model(tokens()))
    for count in (1, 4) if "learned" not in options.values() else (1,):
        own = find_readout(model, f"pauses-{count}")
        other = technique.model_copy(update={"count": count})
        for row in tokens(2):
            fresh = random_model(other, **options)
            fresh.load_state_dict({n: p[: len(fresh.state_dict()[n])] for n, p in model.state_dict().items()})
            torch.testing.assert_close(own(row[None]), fresh(row[None]), atol=1e-5, rtol=1e-5)
    plain = random_model(**options)
    plain.load_state_dict(
        {name: model.state_dict()[name][: len(p)] for name, p in plain.state_dict().items()}
    )
    assert torch.equal(found["pauses-0"](tokens()), plain(tokens()))
    assert forward_flops(found["pauses-0"], CONTEXT) == forward_flops(plain, CONTEXT)
    assert model.most_places == CONTEXT + 2 * 5, "the model itself is left as it was"
    with pytest.raises(UserError, match=r"'pauses-9999' is no readout.*did you mean 'pauses-"):
        find_readout(model, "pauses-9999")
    if "learned" in options.values():
        with pytest.raises(UserError, match="'pauses-3' is no readout"):
            find_readout(model, "pauses-3")


def test_readouts_of_an_evaluated_model_draw_no_places():
    model = random_model(Pauses(place="answer", every=3, count=2))
    model.reads_answers = True
    for training in (False, True):
        readout = find_readout(model.train(training), "pauses-1")
        assert torch.equal(readout(tokens()), readout(tokens())) == (not training)


def test_a_model_without_readouts_says_so():
    with pytest.raises(UserError, match="'pauses-1': the model has no readouts"):
        find_readout(random_model(), "pauses-1")


# Training and evaluation


def test_a_run_learns_and_is_scored_on_the_same_bytes(make_technique_run, capsys):
    plain = make_technique_run("plain", steps=12)
    run = make_technique_run(techniques=[Pauses(every=3, scored=(0,))], steps=12, watch_every=4)
    for one in (plain, run):
        train(one)
    record = read_json(run.folder / "train.json")
    assert record["flops"] == run.tokens * run.flops_per_token > plain.flops
    assert record["tokens"] == read_json(plain.folder / "train.json")["tokens"]
    losses = [float(row["train_loss"]) for row in curve_of(run) if row["train_loss"]]
    assert losses[-1] < losses[0]
    # Validation divides nats by the plain run's bytes and tokens.
    trainer = Trainer(run)
    validation, batches = trainer.curve.validation, list(trainer.curve.validation.batches(4))
    found = validate(trainer.setup, validation)
    model = trainer.setup.model.eval()
    with torch.no_grad():
        nats = sum(model.loss(*(torch.from_numpy(part) for part in batch)).item() for batch in batches)
    assert found.row["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / validation.n_bytes, rel=1e-5)
    for one in (plain, run):
        evaluate_run(one, EvaluationConfig(benchmarks=["synthetic_pairs"]))
    own, other = (read_json(one.folder / "evaluation.json") for one in (run, plain))
    assert list(own["readouts"]) == ["pauses-0"]
    scored = [one["checkpoints"]["step-0000012"]["perplexity"] for one in (own, other)]
    scored.append(own["readouts"]["pauses-0"]["perplexity"])
    assert len({(one["bytes"], one["tokens"], one["chars"]) for one in scored}) == 1
    assert len({one["bits_per_byte"] for one in scored}) == 3
    assert (
        own["readouts"]["pauses-0"]["flops_per_token"] == forward_flops(build_on_meta(plain.model), 32) / 32
    )
    assert own["readouts"]["pauses-0"]["parameters"] == plain.parameters.total

    capsys.readouterr()
    texts = []
    for flags in ((), ("--no-cache",), ("--readout", "pauses-5"), ("--readout", "pauses-5", "--no-cache")):
        assert main(["generate", "test/run", "1 2 3", "--tokens", "40", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[2] == texts[3]


def test_a_neutral_run_is_the_plain_one(make_technique_run):
    plain, own = make_technique_run("plain"), make_technique_run("own", techniques=[Pauses(count=0)])
    for run in (plain, own):
        train(run)
    assert curve_of(plain) == curve_of(own)
    assert all(torch.equal(value, weights_of(own)[name]) for name, value in weights_of(plain).items())


@pytest.mark.parametrize("technique", [TWO, ANSWER], ids=["every", "answer"])
@pytest.mark.parametrize("attention", ["across", "within"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(attention, technique, make_technique_run):
    sizes = {"techniques": [technique], "data": DataConfig(attention=attention), "accumulation": 2}
    sizes["model"] = {"dropout": 0.1}
    plain, stopped = make_technique_run("plain", **sizes), make_technique_run("stopped", **sizes)
    train(plain)
    train_in_parts(stopped, 5)
    assert curve_of(plain) == curve_of(stopped)
    assert all(torch.equal(value, weights_of(stopped)[name]) for name, value in weights_of(plain).items())


@pytest.mark.slow
@pytest.mark.parametrize("technique", [TWO, ANSWER], ids=["every", "answer"])
def test_two_processes_train_as_one(technique, make_technique_run):
    sizes = {"techniques": [technique], "accumulation": 2}
    one, two = make_technique_run("one", **sizes), make_technique_run("two", **sizes)
    train(one)
    train_in_two_processes(two)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, weights_of(two)[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_checkpoint_is_read_and_not_exported(tmp_path, positions):
    model = random_model(TWO, positions=positions)
    checkpoint = tmp_path / "checkpoints" / "step-0000001"
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    ByteTokenizer().save(tmp_path / "checkpoints" / "tokenizer")
    loaded, _ = load_checkpoint(checkpoint)
    assert torch.equal(loaded(tokens()), model(tokens()))
    with pytest.raises(UserError, match="pauses does not support export"):
        export_llama(checkpoint, tmp_path / "llama")


# Keys


def load(project, keys: str, more: str = ""):
    text = (project / "params" / "smoke.yaml").read_text()
    variant = f"  paused:\n    label: Paused\n    techniques: {{pauses: {keys}}}\n{more}"
    (project / "params" / "smoke.yaml").write_text(text + variant)
    return load_study("smoke")


def test_it_is_loaded_from_a_study(project):
    study = load(project, "{every: 4, count: 2, vectors: each, scored: [0, 1]}")
    found = study.runs["paused"].techniques["pauses"]
    assert found == Pauses(every=4, count=2, vectors="each", scored=(0, 1))
    assert "before" not in found.model_dump(), "as in records of earlier runs"
    paused = load_study("steps").runs["pauses-s0"].techniques["pauses"]
    assert paused.before == MARKER and paused.count == 6
    plain, own = (study.runs[name] for name in ("baseline", "paused"))
    assert own.parameters.total == plain.parameters.total + 2 * plain.model.width
    assert own.tokens == plain.tokens and own.flops_per_token > plain.flops_per_token


LEARNED = "    model: {positions: learned}\n"


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ("{every: 100000}", "", r"pauses\.every: 100000: expected at most model.context, \d+"),
        ("{every: 0}", "", r"pauses\.every: .*found 0"),
        ("{count: -1}", "", r"pauses\.count: .*found -1"),
        ("{counts: 1}", "", r"counts: no such key \(did you mean 'count'"),
        ("{scored: [0, 0]}", "", r"scored: \[0, 0\]: expected numbers of at least 0, each once"),
        ("{scored: [-1]}", "", r"scored: \[-1\]: expected numbers of at least 0"),
        ("{before: x}", "", r"before: found 'x' with place: every, expected null, or place: answer"),
        ("{vectors: each, scored: [2]}", "", r"scored: 2: expected at most 1, as many as there are vectors"),
        ("{count: 0, scored: [2]}", "", r"scored: 2: expected at most 0"),
        ("{scored: [2]}", LEARNED, r"scored: 2: with model.positions: learned.* 1 pause"),
    ],
)
def test_what_does_not_fit_is_refused(keys, more, message, project):
    with pytest.raises(UserError, match=message):
        load(project, keys, more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
        ("    training: {start_from: baseline}\n", "does not support weights of another run"),
    ],
)
def test_what_it_does_not_support_is_refused(more, message, project):
    with pytest.raises(UserError, match=f"techniques.pauses {message}"):
        load(project, "{}", more=more)
