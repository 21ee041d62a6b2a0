"""Continuous thoughts: hidden states read instead of written steps, in training, scoring and generation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from counting_corpus import write_corpus
from pydantic import ValidationError
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, same_weights, train_in_parts

from stlm.corpora.steps import MARKER
from stlm.errors import UserError
from stlm.evaluation import scoring
from stlm.evaluation.benchmarks.steps import read as read_items
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.interface import Request
from stlm.evaluation.readouts import find_readout, readouts_of
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation.find import load_generator
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_groups
from stlm.model.flops import forward_flops
from stlm.model.latent_places import BEGIN, END, THOUGHT, TOKEN
from stlm.model.layout import CausalRows
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.continuous_thoughts import ContinuousThoughts, Form, _sample
from stlm.tokens.bpe import train_bpe
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import load_checkpoint
from stlm.training.loop import train
from stlm.training.memory import training_memory
from stlm.training.objective import Forward

OPTIONS = {
    "plain": {},
    "learned": {"positions": "learned"},
    "shift": {"qkv_shift": True, "qk_norm": True},
    "factorized, untied": {"embedding_rank": 9, "tied": False},
    "shared": {"layers": 4, "sharing": {"what": "all", "order": "sandwich"}, "lora": {"rank": 3}},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
EOT, CONTEXT, WIDTH = ByteTokenizer().eot, 64, 32
FORM = Form(EOT, tuple(MARKER.encode()))
# Two thoughts a step, one step or all of them.
TWO = ContinuousThoughts(thoughts=2, stages=2, share=0.25)
TEXTS = ["1+2?\n1+2=3\nAnswer: 3", "5+1+4?\n5+1=6\n6+4=0\nAnswer: 0", "7+1?\n7+1=8\nAnswer: 8"]


def config(**options: object) -> ModelConfig:
    sizes = {"layers": 2, "width": WIDTH, "heads": 4, "kv_heads": 2, "ffn_width": 40, "context": CONTEXT}
    return ModelConfig(**{"vocab_size": 257, **sizes, **options})


def random_model(*techniques: ContinuousThoughts, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts."""
    torch.manual_seed(1)
    model = build_model(config(**options), techniques)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.eval()


def plain_of(model: Transformer) -> Transformer:
    """The model without anything inserted; its weights are shared."""
    plain = model.view()
    plain.inserted_embeddings, plain.thinks, plain.reads_answers = None, False, False
    return plain


def by_hand(model: Transformer, question: list[int], rest: list[int], count: int) -> torch.Tensor:
    """The logits of a plain model after each token, which reads all again for each thought."""
    blocks, places = plain_of(model), torch.arange(model.most_places)

    def stream(x: torch.Tensor) -> torch.Tensor:
        L, rope = x.shape[1], None
        if model.config.positions == "learned":
            x = x + model.positions.weight[places[:L]]
        else:
            rope = model.cos_LE[:L, None], model.sin_LE[:L, None]
        for block in blocks.blocks:
            x = block(x, rope, CausalRows(L))
        return x

    begin, end = model.inserted_embeddings.weight.view(2, 1, 1, -1)
    x = torch.cat([model.token_vectors(torch.tensor([question])), begin], dim=1)
    for _ in range(count):
        x = torch.cat([x, model.norm(stream(x)[:, -1:])], dim=1)
    x = torch.cat([x, end, model.token_vectors(torch.tensor([rest], dtype=torch.long))], dim=1)
    found = model.head(model.finish(stream(x)))[0]
    return torch.cat([found[: len(question) - 1], found[len(question) + count + 1 :]])


def split_text(text: str, replaced: int) -> tuple[list[int], list[int]]:
    """A document's question, after an end of text, and its rest without the first steps."""
    question, *lines = text.split("\n")
    rest = "".join(f"\n{line}" for line in lines[min(replaced, len(lines) - 1) :])
    return [EOT, *question.encode()], [*rest.encode()]


def rows_of(texts: list[str], rows: int = 1) -> torch.Tensor:
    """Rows of the same documents, with a cut one on both sides, and their last targets."""
    tokens = [*b"4\nAnswer: 4", EOT]
    for text in texts:
        tokens += [*text.encode(), EOT]
    return torch.tensor([[*tokens, *b"9+9?\n9+"]] * rows)


def loss_of(technique: ContinuousThoughts, model, read, step=4, steps=4, sum_over_rows=lambda x: x):
    technique._form = FORM
    forward = Forward(model, read[:, :-1], read[:, 1:], None, step, steps, sum_over_rows=sum_over_rows)
    (loss,) = technique.objective(forward).values()
    return loss


@pytest.mark.parametrize("options", [{}, {"positions": "learned"}], ids=str)
def test_no_thoughts_are_the_plain_model_to_the_bit(options):
    neutral, read = ContinuousThoughts(thoughts=0), rows_of(TEXTS[:2], 2)[:, : CONTEXT + 1]
    assert neutral.neutral() and not ContinuousThoughts().neutral()
    plain, model = random_model(**options).train(), random_model(neutral, **options).train()
    assert torch.equal(model(read[:, :-1]), plain(read[:, :-1]))
    forward = Forward(model, read[:, :-1], read[:, 1:], None, 1, 1)
    assert neutral.objective(forward) == {}
    losses = [plain.loss(read[:, :-1], read[:, 1:]), forward.next_token_loss()]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# The thoughts


@each_option
@torch.no_grad()
def test_rows_are_read_as_by_hand(options):
    model = random_model(TWO, **options)
    question, rest = split_text(TEXTS[1], 2)
    rows = [[*question, *rest], [*question[:4], *rest[:3]], [*question], [*question, *rest[:5]]]
    answers = [len(question) - 1, 3, len(question) - 1, -1]
    read = torch.zeros(4, len(rows[0]), dtype=torch.long)
    for number, row in enumerate(rows):
        read[number, : len(row)] = torch.tensor(row)
    found = model.head(model.hidden(read, CausalRows(read.shape[1], torch.tensor(answers))))
    for row, own, answer in zip(rows, found, answers, strict=True):
        if answer >= 0:
            expected = by_hand(model, row[: answer + 1], row[answer + 1 :], 4)
        else:
            expected = plain_of(model)(torch.tensor([row]))[0]
        torch.testing.assert_close(own[: len(row)], expected, atol=1e-4, rtol=1e-3)
    some = torch.tensor([0, 3, len(rows[0]) + 3])
    hidden = model.hidden(read, CausalRows(read.shape[1], torch.tensor(answers)), some)
    torch.testing.assert_close(model.head(hidden), found.flatten(0, 1)[some])


@torch.no_grad()
def test_the_input_of_a_thought_is_the_hidden_state_before_it():
    model, inputs, outputs = random_model(TWO), [], []
    model.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model.blocks[-1].register_forward_hook(lambda _, given, found: outputs.append(found))
    question, rest = split_text(TEXTS[0], 2)
    model.hidden(torch.tensor([[*question, *rest]]), CausalRows(16, torch.tensor([len(question) - 1])))
    assert [x.shape[1] for x in inputs] == [len(question) + 1, 1, 1, 1, 1, 1 + len(rest)]
    for thought, before in zip(inputs[1:5], outputs[:4], strict=True):
        assert torch.equal(thought[0, 0], model.norm(before[0, -1]))
    begin, end = model.inserted_embeddings.vectors()
    assert torch.equal(inputs[0][0, -1], begin) and torch.equal(inputs[-1][0, 0], end)
    # Before the last norm, it would be another vector.
    assert not torch.isclose(inputs[1][0, 0], outputs[0][0, -1]).all()


@each_option
@torch.no_grad()
def test_no_later_token_is_seen(options):
    model = random_model(TWO, **options)
    read = torch.randint(1, 256, (2, 20), generator=torch.Generator().manual_seed(2))
    layout = CausalRows(20, torch.tensor([8, 11]))
    whole = model.hidden(read, layout)
    for place in (5, 15):
        changed = read.clone()
        changed[:, place] = changed[:, place] % 255 + 1
        other = model.hidden(changed, layout)
        torch.testing.assert_close(other[:, :place], whole[:, :place], atol=1e-6, rtol=1e-5)
        assert not torch.isclose(other[:, place:], whole[:, place:]).all(dim=2).any()


# Training


def test_stages_follow_the_steps_of_training():
    technique = ContinuousThoughts(stages=3, share=0.2)
    stages = [technique.stage_at(step, 20) for step in range(1, 21)]
    assert stages == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 8
    assert technique.steps_of_stages(20) == [4, 4, 4, 8]
    without = ContinuousThoughts(stages=3, curriculum=False)
    assert {without.stage_at(step, 20) for step in range(1, 21)} == {3}
    assert without.steps_of_stages(20) == [0, 0, 0, 20]
    for steps in (7, 13, 1001):
        counts = [
            [technique.stage_at(step, steps) for step in range(1, steps + 1)].count(s) for s in range(4)
        ]
        assert counts == technique.steps_of_stages(steps)


def test_a_stage_replaces_the_first_steps_and_no_question_is_a_target():
    row = rows_of(TEXTS[:2]).numpy()
    for stage, kept in enumerate(
        [
            ["\n1+2=3\nAnswer: 3", "\n5+1=6\n6+4=0\nAnswer: 0"],
            ["\nAnswer: 3", "\n6+4=0\nAnswer: 0"],
            ["\nAnswer: 3", "\nAnswer: 0"],
        ]
    ):
        inserted = [BEGIN, *[THOUGHT] * 2 * stage, END] if stage else []
        found = TWO.arrange(row, stage, FORM)
        begin = 0
        for number, (question, rest) in enumerate(zip(["1+2?", "5+1+4?"], kept, strict=True)):
            places = 1 + len(question) + len(inserted) + len(rest)
            here = np.s_[0, begin : begin + places]
            kinds = found.kinds_BM[here].tolist()
            assert kinds == [TOKEN] * (1 + len(question)) + inserted + [TOKEN] * len(rest)
            tokens = [
                t for t, kind in zip(found.tokens_BM[here].tolist(), kinds, strict=True) if kind == TOKEN
            ]
            assert tokens == [EOT, *(question + rest).encode()]
            before = places - len(rest) - 1
            assert found.targets_BM[here].tolist() == [-1] * before + [*rest.encode(), EOT]
            expected = [0] * (1 + len(question)) + [*range(len(inserted))]
            expected += [max(0, len(inserted) - 1)] * len(rest)
            assert found.passes_BM[here].tolist() == expected
            assert found.positions_BM[here].tolist() == [*range(places)]
            assert set(found.sequences_BM[here].tolist()) == {number}
            begin += places
        assert found.tokens_BM.shape == (1, begin), "cut documents are left out"
    asked = TWO.model_copy(update={"questions": True}).arrange(row, 2, FORM)
    assert asked.targets_BM[0, :6].tolist() == [*b"1+2?", -1, -1]


def test_rows_with_fewer_documents_are_padded():
    rows = np.full((2, 60), EOT)
    for number, texts in enumerate([TEXTS[:2], TEXTS[:1]]):
        tokens = [EOT, *"".join(f"{text}\0" for text in texts).encode()]
        rows[number, : len(tokens)] = [EOT if token == 0 else token for token in tokens]
    found = TWO.arrange(rows, 1, FORM)
    length = int((found.passes_BM[1] >= 0).sum())
    assert (found.passes_BM[0] >= 0).all() and 0 < length < found.passes_BM.shape[1]
    assert (found.targets_BM[1, length:] == -1).all()
    nothing = TWO.arrange(np.full((2, 60), 65), 1, FORM)
    assert (nothing.passes_BM == -1).all() and nothing.tokens_BM.shape == (2, 1)


@pytest.mark.parametrize("asked", [False, True], ids=["steps and answers", "questions, too"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@each_option
@torch.no_grad()
def test_the_loss_is_that_of_each_document_by_hand(options, stage, asked):
    technique = TWO.model_copy(update={"questions": asked})
    model = random_model(technique, **options).train()
    step = {0: 1, 1: 2, 2: 4}[stage]
    assert technique.stage_at(step, 4) == stage
    losses = []
    for text in TEXTS:
        question, rest = split_text(text, stage)
        if stage:
            logits = by_hand(model, question, rest, 2 * stage)
        else:
            logits = plain_of(model)(torch.tensor([[*question, *rest]]))[0]
        targets = torch.tensor([*question[1:], *rest, EOT])
        every = F.cross_entropy(logits, targets, reduction="none")
        losses.append(every if asked else every[len(question) - 1 :])
    found = loss_of(technique, model, rows_of(TEXTS), step)
    torch.testing.assert_close(found, torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)


def test_the_mean_does_not_depend_on_which_process_has_which_rows():
    model = random_model(TWO).train()
    short, long = rows_of([TEXTS[0]])[0], rows_of([TEXTS[1]])[0]
    short = torch.cat([short, torch.full((len(long) - len(short),), ord("7"))])
    rows = torch.stack([short, long])
    whole = loss_of(TWO, model, rows, 2)
    sums = []
    for row in rows:
        loss_of(TWO, model, row[None], 2, sum_over_rows=lambda x: sums.append(x) or x)
    total = sums[0] + sums[1]
    assert total.tolist()[1] == 2 and sums[0][0] != sums[1][0], "their numbers of targets differ"
    halves = [loss_of(TWO, model, row[None], 2, sum_over_rows=lambda x: total) for row in rows]
    torch.testing.assert_close(sum(halves) / 2, whole)
    none = loss_of(TWO, model, torch.full((1, 40), 65), sum_over_rows=lambda x: total)
    assert none == 0 and none.requires_grad


def test_gradients_flow_through_all_thoughts_which_differ():
    model, inputs, outputs = random_model(TWO).train(), [], []

    def keep(kept: list) -> object:
        def hook(module, given, found=None):
            kept.append(given[0] if found is None else found)
            kept[-1].retain_grad()

        return hook

    model.blocks[0].register_forward_pre_hook(keep(inputs))
    model.blocks[-1].register_forward_hook(keep(outputs))
    loss_of(TWO, model, rows_of(TEXTS)).backward()
    assert len(inputs) == 6
    for thought_BSD in inputs[1:5]:
        assert thought_BSD.shape == (1, 3, WIDTH)
        assert (thought_BSD.grad.norm(dim=2) > 0).all()
        assert thought_BSD.var(dim=1).min() > 1e-6, "thoughts of other questions are other thoughts"
    # Also from a thought's input into the pass before.
    assert all((found.grad[:, -1].norm(dim=1) > 0).all() for found in outputs[:4])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert (model.inserted_embeddings.weight.grad.view(2, -1).norm(dim=1) > 0).all()


def test_in_bfloat16_gradients_are_finite_and_the_stream_stays_float32():
    model, kept = random_model(TWO).train(), []
    model.blocks[0].register_forward_pre_hook(lambda _, given: kept.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(TWO, model, rows_of(TEXTS)).backward()
    assert set(kept) == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Scoring and generation


ROWS = [
    {"question": "1+2+4?", "options": ["7", "6", "3"], "label": 0, "steps": 2},
    {"question": "5+1?", "options": ["6", "5", "11"], "label": 0, "steps": 1},
]


@torch.no_grad()
def test_a_benchmark_is_scored_after_thoughts():
    model = random_model(TWO)
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    assert not scorer.packs, "a trie has no answers"
    items = list(read_items(ROWS))
    scores = scoring.score(scorer, items, ["harness"])["harness"]
    plain = TokenModel(find_readout(model, "thoughts-0"), RequestEncoder(ByteTokenizer()))
    without = scoring.score(plain, items, ["harness"])["harness"]
    for item, of_options, others in zip(items, scores, without, strict=True):
        for option, score, other in zip(item.options, of_options, others, strict=True):
            question, rest = [EOT, *option.context.encode()], [*option.continuation.encode()]
            logits = by_hand(model, question, rest[:-1], 4)[len(question) - 1 :]
            expected = -F.cross_entropy(logits, torch.tensor(rest), reduction="sum")
            assert score.logprob == pytest.approx(float(expected), abs=1e-3)
            assert abs(score.logprob - other.logprob) > 1e-2


@torch.no_grad()
def test_text_without_answers_has_no_thoughts():
    model = random_model(TWO)
    plain = find_readout(model, "thoughts-0")
    read = torch.randint(256, (2, CONTEXT), generator=torch.Generator().manual_seed(2))
    assert torch.equal(model(read), plain(read))
    documents = [read[0].tolist()]
    scorers = [TokenModel(one, RequestEncoder(ByteTokenizer())) for one in (model, plain)]
    assert len({scorer.document_loglikelihoods(documents)[0] for scorer in scorers}) == 1
    assert len({scorer.loglikelihoods([Request("", "a b")])[0].logprob for scorer in scorers}) == 1
    assert forward_flops(model, CONTEXT) == forward_flops(plain, CONTEXT)


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "qkv_shift": True}], ids=str)
@torch.no_grad()
def test_in_generation_they_follow_the_prompt_with_a_cache_or_without(options):
    model, texts = random_model(TWO, context=16, **options), []
    for cached in (True, False):
        for prompt in ("Once", ""):
            generator = TokenGenerator(model, ByteTokenizer(), cached)
            numbers = torch.Generator().manual_seed(5)
            logits_V = generator.start(prompt)
            read = [EOT, *prompt.encode()]
            expected = by_hand(model, read, [], 4) if prompt else plain_of(model)(torch.tensor([read]))[0]
            torch.testing.assert_close(logits_V, expected[-1], atol=1e-4, rtol=1e-3)
            logits_V = generator.next(65)
            expected = by_hand(model, read, [65], 4) if prompt else None
            if prompt:
                torch.testing.assert_close(logits_V, expected[-1], atol=1e-4, rtol=1e-3)
            texts.append([])
            while len(texts[-1]) < 24:  # past the end of the context
                texts[-1].append(int(Sampling(temperature=1.0).choose(logits_V, numbers)) % EOT)
                logits_V = generator.next(texts[-1][-1])
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


@torch.no_grad()
def test_readouts_have_other_numbers_of_thoughts():
    model = random_model(ContinuousThoughts(thoughts=2, stages=2, scored=(0, 1, 4)))
    assert list(readouts_of(model)) == ["thoughts-0", "thoughts-1"], "four are the model itself"
    question, rest = split_text(TEXTS[0], 2)
    layout = CausalRows(len(question) + len(rest), torch.tensor([len(question) - 1]))
    for count in (1, 4, 7):
        readout = find_readout(model, f"thoughts-{count}")
        found = readout.head(readout.hidden(torch.tensor([[*question, *rest]]), layout))[0]
        expected = by_hand(readout, question, rest, count)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert model.most_places == CONTEXT + 6, "the model itself is left as it was"
    with pytest.raises(UserError, match="'thoughts-5': the model has no readouts"):
        find_readout(random_model(TWO, positions="learned"), "thoughts-5")


# Weights and cost


def test_weights_start_as_the_plain_models_and_the_marks_are_counted():
    for options in ({}, {"positions": "learned"}):
        torch.manual_seed(1)
        model = build_model(config(**options), [TWO])
        torch.manual_seed(1)
        plain = build_model(config(**options))
        own = dict(model.named_parameters())
        assert 0.01 < own.pop("inserted_embeddings.weight").std() < 0.03
        for name, parameter in plain.named_parameters():
            assert torch.equal(own.pop(name)[: len(parameter)], parameter), name
        assert not own
        groups = parameter_groups(model)
        assert groups.pop("thoughts") == 2 * WIDTH
        further = {"positions": 6 * WIDTH} if options else {}
        assert groups == {name: n + further.get(name, 0) for name, n in parameter_groups(plain).items()}


def texts(count: int) -> list[str]:
    """Documents of 27 bytes."""
    found = []
    for number in range(count):
        a, b, c = number // 100 % 10, number // 10 % 10, number % 10
        d, e = (a + b) % 10, (a + b + c) % 10
        found.append(f"{a}+{b}+{c}?\n{a}+{b}={d}\n{d}+{c}={e}\nAnswer:{e}")
    assert {len(text) for text in found} == {27}
    return found


@pytest.fixture(scope="module")
def steps_data(tmp_path_factory) -> Path:
    """data/ with tokens of questions with steps, of documents that are equally long, and a benchmark."""
    root = tmp_path_factory.mktemp("steps")
    write_corpus(root / "raw" / "steps", texts(300))
    tokenize_corpus(
        root / "raw" / "steps", root / "data" / "tokens" / "steps" / "bytes", "bytes", root, progress=False
    )
    folder = root / "data" / "raw" / "steps_arithmetic"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS * 4), folder / "test.parquet")
    return root / "data"


@pytest.fixture
def make_steps_run(make_technique_run, steps_data):
    """Tiny runs on questions with steps; three documents of 28 tokens fit a row, and one of them is cut."""

    def make(name: str, *techniques: ContinuousThoughts, **training):
        if not Path("data/raw/steps_arithmetic").exists():
            os.unlink("data")
            shutil.copytree(steps_data, "data")
        sizes = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "ffn_width": 24, "context": 84}
        run = make_technique_run(name, sizes, techniques, DataConfig(attention="within"), **training)
        return run.model_copy(update={"corpus": "steps"})

    return make


@pytest.mark.parametrize("options", [{}, {"embedding_rank": 9, "tied": False}], ids=str)
def test_training_costs_what_torch_counts_but_for_unseen_pairs(options, make_steps_run, torch_operations):
    last = TWO.model_copy(update={"curriculum": False})
    run = make_steps_run("run", last)
    run = run.model_copy(update={"model": run.model.model_copy(update=options)})
    last.prepare(run, None, None)
    model, read = (
        build_model(run.model, [last]),
        torch.from_numpy(_sample(run.tokens_folder, run.model.context)[:4]),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        last.objective(Forward(model, read[:, :-1], read[:, 1:], None, 8, 8))
    parts = last.arrange(read.numpy(), 2, last._form)
    passes = [int((parts.passes_BM[0] == number).sum()) for number in range(6)]
    places = sum(passes)
    assert (parts.passes_BM >= 0).all() and passes[1:5] == [2] * 4
    pairs = sum(own * sum(passes[: number + 1]) for number, own in enumerate(passes))
    attention = run.model.layers * 4 * run.model.width
    expected = counter.get_total_flops() / len(read) - attention * (pairs - places**2 / 2)
    assert run.flops_per_token * run.model.context / 3 == pytest.approx(expected, rel=1e-9)


def test_the_cost_is_the_mean_of_the_stages(make_steps_run):
    def flops(**keys) -> float:
        return make_steps_run("run", TWO.model_copy(update=keys), steps=8).flops_per_token

    alone = flops(curriculum=False)
    plain = make_steps_run("plain", steps=8)
    assert 0 < flops() and alone < plain.flops_per_token, (
        "two documents of three are read, and few are targets"
    )
    assert flops(questions=True) > flops()
    assert flops(thoughts=3) > flops()
    assert plain.flops_per_token == flops(thoughts=0)
    memory = [
        training_memory(one, "float32", False, 4).sequence for one in (make_steps_run("run", TWO), plain)
    ]
    assert 0.5 * memory[1] < memory[0] < 1.5 * memory[1]
    # Where there is no text yet, a guess.
    run = make_steps_run("run", TWO, steps=8)
    shutil.rmtree("data")
    guessed = run.flops_per_token
    assert guessed > plain.flops_per_token / 2 and guessed != alone


# Runs


def test_a_run_learns_resumes_and_is_scored(make_steps_run, capsys):
    technique = TWO.model_copy(update={"scored": (0,)})
    run, stopped = (make_steps_run(name, technique, steps=8) for name in ("run", "stopped"))
    train(run)
    train_in_parts(stopped, 3)
    assert curve_of(run) == curve_of(stopped) and same_weights(run, stopped)
    record = read_json(run.folder / "train.json")
    assert record["flops"] == run.tokens * run.flops_per_token
    assert set(run.techniques["continuous_thoughts"].steps_of_stages(8)) == {2, 4}
    evaluate_run(run, EvaluationConfig(benchmarks=["steps_arithmetic", "steps_arithmetic_written"], limit=1))
    found = read_json(run.folder / "evaluation.json")
    (scored,) = found["checkpoints"].values()
    assert scored["benchmarks"]["steps_arithmetic"]["items"] == 1
    assert scored["benchmarks"]["steps_arithmetic_written"]["written"]["symbols"] > 0
    bits = [one["perplexity"]["bits_per_byte"] for one in (scored, found["readouts"]["thoughts-0"])]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)
    checkpoint = run.folder / "checkpoints" / "step-0000008"
    logits = [
        load_generator(checkpoint, torch.device("cpu"), cached).start("1+2?") for cached in (True, False)
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)
    loaded, _ = load_checkpoint(checkpoint)
    torch.testing.assert_close(by_hand(loaded, [EOT, *b"1+2?"], [], 4)[-1], logits[0], atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match="continuous_thoughts does not support export"):
        export_llama(checkpoint, Path("llama"))


def test_other_text_is_refused_before_training(make_technique_run, make_steps_run):
    data = DataConfig(attention="within")
    with pytest.raises(
        UserError, match=r"continuous_thoughts: corpus: found tiny, which has other text; expected .*question"
    ):
        train(make_technique_run("run", {"context": 64}, [TWO], data))
    run = make_steps_run("short", TWO)
    short = run.model_copy(update={"model": run.model.model_copy(update={"context": 20})})
    meta = read_json(short.tokens_folder / "meta.json")["components"]["steps"]["splits"]["train"]
    mean = meta["tokens"] / meta["documents"]
    with pytest.raises(
        UserError,
        match=r"corpus: found steps, of which no document fits a row of model.context: 20 tokens; expected a "
        rf"context several times as long as a document, of {mean:.0f} tokens on average",
    ):
        train(short)


def test_lines_are_found_in_tokens_of_byte_pairs(tmp_path):
    tokenizer = train_bpe("bpe-262", TEXTS * 3)
    tokenizer.save(tmp_path / "tokenizer")
    form = Form(tokenizer.eot, tuple(tokenizer.encode(MARKER)))
    assert tokenizer.encode("\n") == [form.marker[0]]
    for text in TEXTS:
        document = np.array([tokenizer.eot, *tokenizer.encode(text)])
        lines = form.lines(document)
        assert tokenizer.decode(lines[0].tolist()) == text.split("\n")[0]
        assert [tokenizer.decode(line.tolist()) for line in lines[1:]] == [
            f"\n{line}" for line in text.split("\n")[1:]
        ]
    assert form.lines(np.array([tokenizer.eot, *tokenizer.encode("no question\nat all")])) is None
    assert form.lines(np.array([tokenizer.eot])) is None


# Keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"thoughts": -1}, "thoughts"),
        (
            {"thoughts": 400, "stages": 3},
            "thoughts: found 400 for each of 3 stages, 1200 in all; expected at most 333 for each, 1000 in",
        ),
        ({"share": 0.2, "curriculum": False}, "share: found 0.2 with curriculum: false, expected 0.15"),
        ({"thoughts": 0, "questions": True}, "questions: found true with thoughts: 0,.* expected false"),
        ({"share": 0.25}, "share: found 0.25 for each of the 4 stages.*expected less than 0.25"),
        ({"scored": (1, 1)}, r"scored: found \[1, 1\], expected numbers of at least 0, each once"),
        ({"thoughts": 0, "scored": (1,)}, "scored: found 1, expected at most 0 thoughts"),
        ({"thought": 1}, "thought"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        ContinuousThoughts(**keys)


def test_keys_that_do_not_fit_the_run_are_refused(make_steps_run):
    run = make_steps_run("run", steps=8)
    for keys, model, data, message in (
        ({}, {}, {"attention": "across"}, "thoughts: .*found data.attention: across, expected within"),
        (
            {},
            {"positions": "sinusoidal"},
            {},
            "thoughts: found model.positions: sinusoidal,.* expected rope or",
        ),
        ({}, {"value_embeddings": 1}, {}, "thoughts: found model.value_embeddings: 1, .*expected 0"),
        ({"scored": (5,)}, {"positions": "learned"}, {}, "scored: found 5, expected at most 4: .*learned"),
        ({"share": 0.01}, {}, {}, "share: found 0.01 of training.steps: 8, .*expected at least 0.125"),
    ):
        one = run.model_copy(
            update={
                "model": run.model.model_copy(update=model),
                "data": run.data.model_copy(update=data),
            }
        )
        technique = TWO.model_copy(update=keys)
        with pytest.raises(ValueError, match=message):
            technique.check(one, {})
        ContinuousThoughts(thoughts=0).check(one, {})
    TWO.check(run, {})


def load(project, keys: str, more: str):
    text = (project / "params" / "smoke.yaml").read_text()
    variant = f"  thinking:\n    label: Thinking\n    techniques: {{continuous_thoughts: {keys}}}\n{more}"
    (project / "params" / "smoke.yaml").write_text(text + variant)
    return load_study("smoke")


WITHIN = "    data: {attention: within}\n"


def test_it_is_loaded_from_a_study(project):
    study = load(project, "{thoughts: 2, stages: 3, share: 0.1}", WITHIN + "    corpus: steps_written\n")
    found = study.runs["thinking"].techniques["continuous_thoughts"]
    assert found == ContinuousThoughts(thoughts=2, stages=3, share=0.1)
    plain, own = (study.runs[name] for name in ("baseline", "thinking"))
    assert own.parameters.total == plain.parameters.total + 2 * plain.model.width


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
        ("    training: {start_from: baseline}\n", "does not support weights of another run"),
        ("    training: {compile: true}\n", "does not support torch.compile"),
    ],
)
def test_what_it_does_not_support_is_refused(more, message, project):
    with pytest.raises(UserError, match=f"techniques.continuous_thoughts {message}"):
        load(project, "{}", WITHIN + more)
