"""Items of one option: right where the model itself would go on so."""

from __future__ import annotations

import math
import random

import pandas as pd
import pytest
import torch

from stlm.evaluation import scoring
from stlm.evaluation.benchmarks import LAST_WORD, Item, Option
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.token_model import TokenModel
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.report.run_files import score_items

ALPHABET = " abcdefgh"
CONTEXT = 24


class Letters:
    """A letter a token, and the end of text: whatever the model says can be written down."""

    eot, vocab_size = len(ALPHABET), len(ALPHABET) + 1

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ALPHABET.index(letter) for letter in text] for text in texts]


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=CONTEXT, vocab_size=Letters.vocab_size
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    return model


@torch.no_grad()
def logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0]


def brute_force(model: Transformer, context: str, continuation: str) -> bool:
    """Whether the model's own first choices, one token at a time, spell the continuation."""
    (tokens, wanted) = Letters().encode_batch([context, continuation])
    for token in wanted:
        if int(logits(model, tokens[-CONTEXT:])[-1].argmax()) != token:
            return False
        tokens = [*tokens, token]
    return True


def an_item(model: Transformer, rng: random.Random, number: int) -> Item:
    """A context, and what the model says after it, the last letter changed in some."""
    length = rng.randrange(2, CONTEXT + 6)
    context = "a" + "".join(rng.choice(ALPHABET) for _ in range(length)) + "b"
    tokens, said = Letters().encode_batch([context])[0], ""
    for _ in range(rng.randrange(1, 4)):
        best = logits(model, tokens[-CONTEXT:])[-1, : len(ALPHABET)].argmax()
        tokens, said = [*tokens, int(best)], said + ALPHABET[best]
    if rng.random() < 0.4:
        said = said[:-1] + rng.choice(ALPHABET)
    return Item(str(number), (Option(context, said, said.strip()),), 0)


@pytest.fixture(scope="module")
def items(transformer) -> list[Item]:
    rng = random.Random(0)
    return [an_item(transformer, rng, number) for number in range(150)]


@pytest.fixture(scope="module")
def scores(transformer, items):
    model = TokenModel(transformer, RequestEncoder(Letters()), batch_tokens=100)
    return scoring.score(model, items, ["harness"])


def test_greedy_is_what_the_model_says_token_by_token(transformer, items, scores):
    expected = [brute_force(transformer, o.context, o.continuation) for (o,) in (i.options for i in items)]
    assert 30 < sum(expected) < 120
    # A context that is cut shows the whole continuation more of it than a token at a time would see.
    compared = [number for number, (found,) in enumerate(scores["harness"]) if not found.truncated]
    assert len(compared) > 80
    assert [scores["harness"][n][0].greedy for n in compared] == [expected[n] for n in compared]


def test_nobody_asks_whether_options_are_greedy_where_there_are_several(transformer):
    model = TokenModel(transformer, RequestEncoder(Letters()))
    pair = Item("0", (Option("ab", " c", "c"), Option("ab", " d", "d")), 0)
    (found,) = scoring.score(model, [pair], ["harness"])["harness"]
    assert [score.greedy for score in found] == [None, None]


def test_the_summary_and_the_rows_agree(items, scores):
    found = scoring.summarize(LAST_WORD, "harness", items, scores["harness"])
    right = [score.greedy for (score,) in scores["harness"]]
    assert found["acc"]["value"] == pytest.approx(sum(right) / len(items))
    assert found["acc"]["n"] == len(items)
    assert "acc_norm" not in found and found["ties"] == 0
    nats = [-score.logprob for (score,) in scores["harness"]]
    assert found["word_perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)))

    labels = {"checkpoint": "step-1", "step": 1, "benchmark": LAST_WORD.name}
    rows = scoring.rows(labels, items, scores)
    outcomes = score_items(rows.to_pandas())
    assert outcomes["acc"].tolist() == [float(is_right) for is_right in right]
    assert (outcomes["chance"] == 0).all()


def test_items_of_one_and_of_several_options_are_told_apart():
    rows = [
        ("0", True, -1.0, None),
        ("0", False, -2.0, None),
        ("1", True, -3.0, True),
        ("2", True, -3.0, False),
    ]
    options = pd.DataFrame(rows, columns=["item", "gold", "logprob", "greedy"])
    options = options.assign(benchmark="b", mode="harness", n_chars=4)
    outcomes = score_items(options)
    assert outcomes["acc"].tolist() == outcomes["acc_norm"].tolist() == [1, 1, 0]
    assert outcomes["chance"].tolist() == [0.5, 0, 0]
    # Files written before the column was there have items of several options alone.
    assert score_items(options[:2].drop(columns="greedy"))["acc"].tolist() == [1]
