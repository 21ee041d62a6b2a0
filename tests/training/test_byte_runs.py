"""Byte-level runs train, resume, validate, watch and are evaluated as runs over tokens are."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_distributed import assert_near, finish, torchrun
from test_resume import assert_same, interruptible, train_stopping_always  # noqa: F401

from stlm.evaluation.byte_model import ByteModel, ChunkRequests
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.files import read_json
from stlm.model.counts import parameter_counts, training_flops_per_token
from stlm.study.runs import Run
from stlm.tokens.batches import ValidationSet
from stlm.tokens.chunks import SYMBOLS
from stlm.tokens.config import DataConfig
from stlm.tokens.shards import read_split
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import load_checkpoint
from stlm.training.loop import Trainer, train

BYTES = {"width": 16, "heads": 2, "ffn_width": 24}
MUON = {"optimizer": "muon", "schedule": "wsd", "dropout_schedule": "triangular", "watch_every": 3}


@pytest.fixture(scope="session")
def chunked(tokens_folder) -> Path:
    """data/tokens/tiny/ with chunks of three kinds."""
    raw, folder = tokens_folder.parent.parent / "raw" / "tiny", tokens_folder.parent
    for kind in ("words", "stride-4", "bpe-300"):
        tokenize_corpus(raw, folder / kind, kind, folder, progress=False)
    return folder


@pytest.fixture
def make_byte_run(make_run, chunked):
    """As `make_run`, of a byte-level model on chunks of a kind."""

    def make(kind: str, name: str = "byte-run", model=None, **training) -> Run:
        target = Path("data/tokens/tiny") / kind
        if not target.exists():
            target.symlink_to(chunked / kind)
        run = make_run(name, {"vocab_size": SYMBOLS, "bytes": BYTES, **(model or {})}, **training)
        return run.model_copy(update={"tokenizer": kind})

    return make


@pytest.mark.parametrize(
    ("kind", "recipe", "data"),
    [("words", {}, {}), ("bpe-300", MUON, {"attention": "within"}), ("stride-4", {"accumulation": 2}, {})],
    ids=["words", "bpe-and-muon", "stride"],
)
def test_stopped_after_every_step_it_ends_the_same(kind, recipe, data, make_byte_run, monkeypatch):
    plain, stopped = (
        make_byte_run(kind, name, **recipe).model_copy(update={"data": DataConfig(**data)})
        for name in ("plain", "stopped")
    )
    train(plain)
    train_stopping_always(stopped, monkeypatch)
    train(stopped)
    assert_same(plain, stopped)


def test_an_end_that_follows_from_the_bytes_costs_nothing(make_byte_run):
    words, stride = make_byte_run("words", "words"), make_byte_run("stride-4", "stride")
    meta = read_json(words.tokens_folder / "meta.json")["components"]["tiny"]["splits"]["train"]
    size = meta["bytes"] / (meta["tokens"] - meta["documents"])
    assert words.flops_per_token == training_flops_per_token(words.model, size)
    near_four = read_json(stride.tokens_folder / "meta.json")["components"]["tiny"]["splits"]["train"]
    size = near_four["bytes"] / (near_four["tokens"] - near_four["documents"])
    assert 3.5 < size <= 4, "a document's last chunk may be shorter"
    assert stride.flops_per_token == training_flops_per_token(stride.model, size, ends_written=False)
    assert stride.flops_per_token < training_flops_per_token(stride.model, size)


@pytest.mark.slow
def test_two_processes_train_as_one(make_byte_run):
    """A chunk weighs the same in whichever process it is."""
    sizes = {"model": {"dropout": 0.0}, "steps": 20, "checkpoints": [5]}
    one, two = (make_byte_run("words", name, **sizes) for name in ("one", "two"))
    train(one)
    process = torchrun(two, 2)
    said = finish(process)
    assert process.returncode == 0, said
    assert_near(one, two)


def test_learns_validates_and_says_what_it_cost(make_byte_run):
    run = make_byte_run(
        "words", steps=60, validate_every=20, watch_every=20, validation_bytes=100, batch_size=8
    )
    train(run)
    said = read_json(run.folder / "train.json")
    assert said["parameters"] == parameter_counts(run.model).record()
    meta = read_json(run.tokens_folder / "meta.json")["components"]["tiny"]["splits"]["train"]
    size = meta["bytes"] / (meta["tokens"] - meta["documents"])
    assert said["flops"] == pytest.approx(run.tokens * training_flops_per_token(run.model, size))
    assert said["validation"]["bytes"] >= 100 and said["validation"]["documents"] > 1
    with (run.folder / "curve.csv").open() as file:
        bits = [float(row["val_bits_per_byte"]) for row in csv.DictReader(file) if row["val_bits_per_byte"]]
    assert bits[-1] < 3 and bits[-1] < bits[0] - 0.5
    with (run.folder / "watch.csv").open() as file:
        layers = {row["layer"] for row in csv.DictReader(file)}
    assert layers == {"embedding", "block 1", "head"}
    # What validation says is what scoring the same documents says.
    model, _ = load_checkpoint(run.folder / "checkpoints" / "step-0000060")
    tokenizer = load_tokenizer(run.folder / "checkpoints" / "tokenizer")
    validation = ValidationSet(run.tokens_folder, 10**6, 100)
    ((_, targets, mask),) = validation.batches(1)
    assert mask.sum() == validation.n_tokens
    texts = tokenizer.decode(targets[mask].tolist())
    (component,) = read_split(run.tokens_folder, "val")
    documents = [d.tokens[:-1] for d in component if tokenizer.decode(d.tokens) in texts]
    assert sum(map(len, documents)) == validation.n_tokens
    scores = ByteModel(model, ChunkRequests(tokenizer)).document_loglikelihoods(documents)
    # Validation reads documents one after the other, here each by itself: near, not the same.
    assert -sum(scores) / math.log(2) / validation.n_bytes == pytest.approx(bits[-1], abs=0.3)


@pytest.mark.parametrize("kind", ["words", "bpe-300"])
def test_is_evaluated_by_the_same_code(kind, make_byte_run, tmp_path):
    run = make_byte_run(kind)
    train(run)
    pairs = [
        {"sentence_good": f"{i} cats ran home.", "sentence_bad": bad, "UID": "p", "linguistics_term": "t"}
        for i, bad in enumerate(["0 cats ran home.", "1 cat ran home.", "2 zyx-né home.", "3 cats home."])
    ]
    (tmp_path / "raw" / "synthetic_pairs").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "raw" / "synthetic_pairs" / "train.parquet")
    config = EvaluationConfig(benchmarks={"synthetic_pairs": {}}, modes=["harness", "paper"])
    evaluate_run(run, config, tmp_path / "raw")
    written = read_json(run.folder / "evaluation.json")
    measured = written["checkpoints"]["step-0000012"]["perplexity"]
    test = read_json(run.tokens_folder / "meta.json")["components"]["tiny"]["splits"]["test"]
    assert measured["bytes"] == test["bytes"] and 1 < measured["bits_per_byte"] < 8
    assert written["precision"] == "float32" and written["tokenizer"]["name"] == kind
    modes = written["checkpoints"]["step-0000012"]["benchmarks"]["synthetic_pairs"]["modes"]
    # The first has two equal sentences: a tie.
    assert all(own["acc"]["n"] == 4 and own["ties"] == 1 for own in modes.values()) and len(modes) == 2


def test_matrices_of_the_byte_transformers_are_muons(make_byte_run):
    setup = Trainer(make_byte_run("words", optimizer="muon")).setup
    blocks = [*setup.model.blocks, *setup.model.embedding.blocks, *setup.model.decoder.blocks]
    expected = {id(p) for block in blocks for p in block.parameters() if p.dim() == 2}
    expected |= {id(setup.model.embedding.pool.up.weight), id(setup.model.decoder.condition.weight)}
    found = {id(p) for group in setup.optimizer.param_groups if group["matrices"] for p in group["params"]}
    assert found == expected
    parts = {tuple(group["parts"]) for group in setup.optimizer.param_groups if group["matrices"]}
    assert parts == {(), (32, 16, 16), (48, 48), (16, 16, 16), (24, 24), (16, 16)}


def test_two_seeds_differ_and_the_loss_starts_at_all_symbols_alike(make_byte_run):
    trainer = Trainer(make_byte_run("stride-4"))
    (tokens,) = trainer.setup.micro_batches.of_step(1, trainer.setup.share)
    loss = trainer.setup.model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    symbols = trainer.setup.model.embedding.table.begins_V.diff()[tokens[:, 1:]].double().mean().item()
    assert loss / symbols == pytest.approx(math.log(257), rel=0.2)
    other = Trainer(make_byte_run("stride-4").model_copy(update={"seed": 1}))
    assert not torch.equal(trainer.setup.model.embedding.weight, other.setup.model.embedding.weight)
