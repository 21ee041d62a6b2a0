"""A published model as the teacher, and as the reference of the data, of a run with a part of its tokens."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from counting_corpus import sentences, write_corpus

from stlm.corpora.config import NEEDED
from stlm.corpora.fetch import fetch
from stlm.corpora.stories import story
from stlm.engines import dvc_stages
from stlm.errors import UserError
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.study.catalogues import load_models
from stlm.study.load import load_study
from stlm.study.runs import Run, SourceModel
from stlm.teaching.config import TaughtConfig
from stlm.teaching.names import taught_folder
from stlm.teaching.shards import TaughtText
from stlm.teaching.subset import Subset
from stlm.teaching.teach import teach
from stlm.teaching.teacher import Teacher
from stlm.techniques.distillation import Distillation
from stlm.tokens.bpe import train_bpe
from stlm.tokens.config import DataConfig, SelectConfig
from stlm.tokens.published import fetched_tokenizer
from stlm.tokens.reduced import reduced_tokenizer
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import save_checkpoint
from stlm.training.dependencies import Dependency
from stlm.training.loop import Trainer, train
from stlm.training.published import load_published

SHAPE = {"layers": 2, "width": 48, "heads": 4, "kv_heads": 2, "ffn_width": 64, "context": 64}
WHOLE, PART = 340, 300
NAME = f"hf:made:{PART}"


def write_model() -> ModelConfig:
    """data/raw/made/, a Llama with a byte-pair vocabulary, and its entry in params/models.yaml."""
    torch.manual_seed(1)
    config = ModelConfig(**SHAPE, vocab_size=WHOLE, dropout=0.0, rope_theta=1e4, norm_eps=1e-5, tied=True)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    train_bpe(f"bpe-{WHOLE}", sentences(400)).save(Path("made/checkpoints/tokenizer"))
    save_checkpoint(Path("made/checkpoints/step-0000001"), model, {"step": 1, "tokens": 9})
    export_llama(Path("made/checkpoints/step-0000001"), Path("exported"))
    keys = ("rope_theta", "norm_eps", "tied", "vocab_size")
    entry = {
        "description": "made up",
        "licence": "none",
        "origin": "a test",
        "training_tokens": 9,
        "prefix": "<|endoftext|>",
        "model": SHAPE | {key: getattr(config, key) for key in keys},
        "sources": [{"kind": "folder", "path": "exported", "files": {name: name for name in NEEDED}}],
    }
    Path("params").mkdir(exist_ok=True)
    Path("params/models.yaml").write_text(yaml.safe_dump({"made": entry}))
    fetch(load_models()["made"], Path("data/raw/made"))
    return config


@pytest.fixture
def make(make_run):
    """A function that gives a run with a part of the made model's tokens."""
    config = write_model()
    write_corpus(Path("data/raw/tiny"), sentences(400))
    tokens = Path("data/tokens/tiny") / NAME
    tokenize_corpus(Path("data/raw/tiny"), tokens, NAME, Path("data/raw/made"), progress=False)

    def make(name="student", data=None, **keys) -> Run:
        run = make_run(name, model={"dropout": 0.0, "vocab_size": PART})
        update = {"tokenizer": NAME, "sources": {}}
        if keys:
            technique = Distillation(teacher="made", **keys)
            technique.set_others({"teacher": SourceModel(name="made", model=config)})
            update |= {"techniques": {"distillation": technique}, "sources": {"teacher": "made"}}
        if data is not None:
            update |= {"data": data, "sources": update["sources"] | {"reference": "made"}}
        return run.model_copy(update=update)

    return make


def projected(run: Run, tokens: np.ndarray) -> torch.Tensor:
    """The made model's distribution [N, V] over the run's tokens, by its definition."""
    tokenizer = load_tokenizer(run.tokens_folder / "tokenizer")
    model = load_published(Path("data/raw/made"))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokenizer.parent_ids[tokens]))
    q = torch.softmax(logits.double(), dim=-1).flatten(0, 1)
    found = torch.zeros(len(q), PART, dtype=torch.float64)
    for word in range(WHOLE):
        found[:, tokenizer.first_pieces[word]] += q[:, word]
    return found


def test_answers_are_projected_to_the_runs_tokens(make):
    run = make(taught=TaughtConfig(top_k=PART - 1))
    text = TaughtText(teach(run, progress=False))
    tokens = Trainer(run).setup.micro_batches.rows.batch(0)[:, :-1]
    expected = projected(run, tokens)
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(len(expected), dtype=torch.float64))
    answers = text.answers(tokens)
    ids = torch.from_numpy(answers.ids_RLK.astype(np.int64)).flatten(0, 1)
    found = torch.from_numpy(answers.log_q_RLK.astype(np.float64)).flatten(0, 1).exp()
    torch.testing.assert_close(found, expected.gather(1, ids), rtol=2e-2, atol=1e-5)


def test_a_vocabulary_that_is_whole_is_not_projected(make):
    run = make(taught=TaughtConfig(tokens=2))
    whole = Path("data/tokens/tiny/hf:made")
    tokenize_corpus(Path("data/raw/tiny"), whole, "hf:made", Path("data/raw/made"), progress=False)
    dependency = Dependency.read(run, "teacher")
    assert Subset.of(dependency, whole) is None
    subset = Subset.of(dependency, run.tokens_folder)
    assert len(subset.parents_V) == PART and len(subset.first_pieces_W) == WHOLE
    assert np.array_equal(subset.first_pieces_W[subset.parents_V], np.arange(PART))


def test_training_asks_and_reads_the_same(make):
    asks, reads = make("asks", weight=0.5), make("reads", weight=0.5, taught=TaughtConfig(top_k=PART - 1))
    teach(reads, progress=False)
    losses = []
    for run in (asks, reads):
        trainer = Trainer(run)
        (batch,) = trainer.setup.micro_batches.of_step(1, trainer.setup.share)
        losses.append({name: part.item() for name, part in trainer.setup.losses(batch, 1).items()})
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    log_q = projected(asks, batch[:, :-1].numpy()).log()
    with torch.no_grad():
        log_p = torch.log_softmax(trainer.setup.model.eval()(batch[:, :-1]).double(), dim=-1).flatten(0, 1)
    kl = (log_q.exp() * (log_q - log_p)).sum(dim=1).mean().item()
    assert losses[0]["distillation"] == pytest.approx(0.5 * kl, rel=1e-4)
    train(reads)
    record = read_json(reads.folder / "train.json")
    assert record["depends"]["teacher"]["source"] == "made" and record["depends"]["teacher"]["flops"] == 0
    assert record["prepared"]["distillation"]["folder"] == str(taught_folder(reads))


def test_it_chooses_the_text(make):
    run = make(data=DataConfig(reference="made", select=SelectConfig(by="perplexity", share=0.25)))
    rows = Trainer(run).setup.micro_batches.rows
    (order,) = rows._orders
    q = {}
    for chunk in range((rows.components[0].n_tokens - 1) // 32):
        tokens = np.empty((1, 33), np.int64)
        rows.components[0].read(chunk * 32, tokens[0])
        p = projected(run, tokens[:, :-1]).gather(1, torch.from_numpy(tokens[0, 1:, None]))
        q[chunk] = -p.log().mean().item()
    drawn = np.random.default_rng((0, 0, 1 << 32)).permutation(len(q))[: 4 * 48]
    expected = sorted(drawn, key=q.__getitem__)[: round(0.25 * min(len(q), 192))]
    # In bfloat16 neighbours may change places.
    assert len(set(expected) & set(order.part.tolist())) >= 0.9 * len(expected)
    assert order.chunks == len(expected)


STUDY = """
description: A published teacher.
corpus: synthetic
tokenizer: hf:made:300
baseline: baseline
model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 48, context: 32}
training: {steps: 10, batch_size: 8, warmup_steps: 2}
evaluation: {benchmarks: []}
variants:
  baseline: {}
  student: {techniques: {distillation: {teacher: made, taught: {tokens: 8}}}}
  chosen: {data: {reference: made, select: {by: difference, share: 0.5, smaller: baseline}}}
"""


def study(project, *overrides: str):
    write_model()
    (project / "params" / "asked.yaml").write_text(STUDY)
    return load_study("asked", overrides)


def test_a_study_names_it(project):
    loaded = study(project)
    student, chosen = loaded.runs["student"], loaded.runs["chosen"]
    assert student.sources == {"teacher": "made"} and chosen.sources == {"reference": "made"}
    assert chosen.depends == {"smaller": "baseline"}
    folder = str(taught_folder(student))
    assert folder.startswith("data/taught/synthetic/hf:made:300/made-")
    stages = dvc_stages(loaded)
    stage = stages["teach-asked-student"]
    assert stage["cmd"] == "stlm teach asked student" and stage["outs"] == [{folder: {"persist": True}}]
    assert set(stage["deps"]) == {"data/tokens/synthetic/hf:made:300", "data/raw/made"}
    assert folder in stages["train-asked-student"]["deps"]
    assert "data/raw/made" in stages["train-asked-chosen"]["deps"]
    assert "results/asked/runs/baseline/checkpoints" in stages["train-asked-chosen"]["deps"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tokenizer=bpe-1024"],
            r"distillation\.teacher: 'made' has the tokenizer hf:made, the run bpe-1024",
        ),
        (["model.context=128"], r"'made' has a context of 64, shorter than the run's 128"),
        (
            ["variants.chosen.data.select.smaller=null"],
            r"select: by: difference needs smaller: a variant, or a model in params/models.yaml",
        ),
        (["variants.chosen.data.reference=null"], r"data\.select needs reference: a variant"),
        (
            ["variants.chosen.data.select.smaller=bseline"],
            r"select\.smaller: 'bseline' is no variant.*baseline",
        ),
    ],
)
def test_what_does_not_fit_is_refused(project, overrides, message):
    with pytest.raises(UserError, match=message):
        study(project, *overrides)


@pytest.mark.slow
@pytest.mark.network
def test_the_real_model_teaches(project, root, tmp_path_factory):
    """SmolLM2 in bfloat16 is near to float32, and knows of stories written with 2,000 of its tokens."""
    asked = load_models(root)["smollm2_135m"]
    asked = asked.model_copy(update={"sources": asked.sources[:1]})
    folder = Path("data/raw/smollm2_135m")
    try:
        fetch(asked, folder, cache=tmp_path_factory.getbasetemp())
    except UserError as error:
        pytest.skip(str(error))
    check_real_teacher(folder)


def check_real_teacher(folder: Path) -> None:
    """What the real model's teacher says of stories, whole and projected, in both precisions."""
    whole = fetched_tokenizer("hf:smollm2_135m", folder)
    rng = random.Random(0)
    texts = [story(rng) for _ in range(300)]
    part = reduced_tokenizer("hf:smollm2_135m:2000", whole, texts)
    subset = Subset(np.asarray(part.parent_ids), np.asarray(part.first_pieces))
    text = "\n\n".join(texts[:40])
    found = {}
    for name, tokenizer, projection in (("whole", whole, None), ("part", part, subset)):
        ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)[:255]]])
        losses = []
        for dtype in (torch.float32, torch.bfloat16):
            teacher = Teacher(load_published(folder), projection, dtype)
            losses.append(teacher.losses(ids).mean().item())
            sums = [q.sum(dim=1) for _, q in teacher.distributions(torch.randn(4, 576))]
            assert all((one > 0.99).all() for one in sums)  # up to a factor, of which the largest is one
        size = len(tokenizer.decode_bytes(ids[0, 1:].tolist()))
        found[name] = losses[0] * (ids.shape[1] - 1) / size / np.log(2)
        assert losses[1] == pytest.approx(losses[0], abs=0.02)
    # Bits a byte; the two read about as much of the text.
    assert found["whole"] < 1.6 and 0.75 * found["whole"] < found["part"] < 1.35 * found["whole"], found
