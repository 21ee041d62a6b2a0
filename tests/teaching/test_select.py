"""Chunks that a model chooses: a planted mixture of text and noise is told apart."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from counting_corpus import sentences, write_corpus

from stlm.files import read_json
from stlm.tokens.config import DataConfig, SelectConfig
from stlm.tokens.order import Order
from stlm.tokens.tokenize import tokenize_corpus
from stlm.training.loop import Trainer, train

CONTEXT = 32


@pytest.fixture
def mixture(tmp_path, monkeypatch, make_run):
    """data/tokens/tiny/bytes of 60 documents of sentences and 60 of random letters, in turns."""
    target = tmp_path / "data" / "tokens" / "tiny" / "bytes"
    target.unlink()
    draw, counting = random.Random(0), sentences(1200)
    texts = []
    for number in range(60):
        texts.append("\n".join(counting[20 * number : 20 * number + 20]))
        texts.append("".join(draw.choices([chr(code) for code in range(33, 127)], k=600)))
    write_corpus(tmp_path / "raw" / "tiny", texts)
    tokenize_corpus(tmp_path / "raw" / "tiny", target, "bytes", tmp_path, progress=False)
    return make_run


def noise_of(run) -> tuple[Order, np.ndarray]:
    """The order of the run's only component, and of each of its chunks the share of noise."""
    rows = Trainer(run).setup.micro_batches.rows
    (component,), (order,) = rows.components, rows._orders
    tokens = np.concatenate([shard.values for shard in component.shards])
    # Within 9 tokens of a sentence there is a space; noise has none.
    near = np.convolve(tokens == ord(" "), np.ones(25), "same") > 0
    chunks = (component.n_tokens - 1) // CONTEXT
    return order, 1 - near[: chunks * CONTEXT].reshape(chunks, CONTEXT).mean(axis=1)


def chosen(make_run, **select):
    reference = make_run("reference", steps=60, model={"dropout": 0.0})
    if not reference.folder.exists():
        train(reference)
        train(make_run("smaller", steps=1, warmup_steps=1, learning_rate=1e-4, min_learning_rate=1e-4))
    data = DataConfig(reference="reference", select=SelectConfig(**select))
    return make_run("chosen", steps=110).model_copy(update={"data": data})


@pytest.mark.parametrize(
    ("select", "is_noise"),
    [
        ({"by": "perplexity"}, False),
        ({"by": "perplexity", "side": "high"}, True),
        ({"by": "difference", "smaller": "smaller"}, False),
        ({"by": "difference", "smaller": "smaller", "side": "low"}, True),
    ],
    ids=str,
)
def test_noise_and_text_are_told_apart(mixture, select, is_noise):
    order, noise = noise_of(chosen(mixture, share=0.4, **select))
    assert 0.3 < noise.mean() < 0.7, "both are there"
    assert order.chunks == len(order.part) == 440
    found = noise[order.part].mean()
    assert found > 0.95 if is_noise else found < 0.05
    read = {order.chunk(row) for row in range(order.chunks)}
    assert read == set(order.part.tolist())


def test_the_middle_is_between(mixture):
    low, _ = noise_of(chosen(mixture, by="perplexity", share=0.3, side="low"))
    middle, _ = noise_of(chosen(mixture, by="perplexity", share=0.3, side="middle"))
    high, _ = noise_of(chosen(mixture, by="perplexity", share=0.3, side="high"))
    parts = [set(order.part.tolist()) for order in (low, middle, high)]
    assert not parts[0] & parts[1] and not parts[1] & parts[2]


def test_no_more_is_measured_than_is_needed(mixture):
    """For 10 steps of 4 rows and a share of 0.25, 160 chunks are drawn, the same for a seed."""
    run = chosen(mixture, by="perplexity", share=0.25)
    run = run.model_copy(update={"training": run.training.model_copy(update={"steps": 10})})
    order, noise = noise_of(run)
    (kept,) = (run.state_folder.parent / ".difficulty").glob("*.npy")
    assert len(np.load(kept)) == 160 < len(noise) and order.chunks == 40
    again, _ = noise_of(run)
    assert np.array_equal(order.part, again.part)


def test_a_run_on_chosen_text_is_trained_and_recorded(mixture):
    run = chosen(mixture, by="difference", share=0.5, smaller="smaller")
    run = run.model_copy(update={"training": run.training.model_copy(update={"steps": 6})})
    assert run.depends == {"reference": "reference", "smaller": "smaller"}
    train(run)
    record = read_json(run.folder / "train.json")
    assert record["data"]["select"]["by"] == "difference"
    assert set(record["depends"]) == {"reference", "smaller"}
    mark = Trainer(run).setup.fingerprint
    shutil.rmtree(Path(".state/test/.difficulty"))
    train(run.model_copy(update={"name": "smaller", "data": DataConfig(), "seed": 3}))
    assert Trainer(run).setup.fingerprint != mark
