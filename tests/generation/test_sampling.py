"""What is left to draw from, against the definitions taken literally and against `transformers`."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stlm.errors import UserError
from stlm.generation.sampling import Sampling

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(temperature=2.0),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=1000),
    Sampling(top_p=0.9),
    Sampling(top_p=1e-9),
    Sampling(min_p=0.05),
    Sampling(min_p=1.0),
    Sampling(temperature=1.5, top_k=20, top_p=0.8, min_p=0.1),
    Sampling(temperature=0.7, top_k=5, top_p=0.99, min_p=0.01),
]


def rows(number: int = 60, symbols: int = 40) -> torch.Tensor:
    """Logits, from the thirtieth row on with symbols that are forbidden, as a byte-level model's rules do."""
    logits_BV = torch.randn(number, symbols, generator=torch.Generator().manual_seed(3)).double() * 2.5
    logits_BV[30:45, ::3] = -torch.inf
    logits_BV[45:, 2:] = -torch.inf  # fewer are left than any top-k but 1 takes
    return logits_BV


def distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """The definitions, one after the other, each on the renormalized probabilities of what is left."""

    def normalized(own: dict[int, float]) -> dict[int, float]:
        return {symbol: p / sum(own.values()) for symbol, p in own.items()}

    left = normalized({i: math.exp(logit / sampling.temperature) for i, logit in enumerate(logits)})
    order = sorted(left, key=lambda i: -left[i])
    if sampling.top_k is not None:
        left = normalized({i: left[i] for i in order[: sampling.top_k]})
    if sampling.top_p < 1:
        # The smallest set of the most probable ones whose sum is at least p.
        size = next(n for n in range(1, len(left) + 1) if sum(left[i] for i in order[:n]) >= sampling.top_p)
        left = normalized({i: left[i] for i in order[:size]})
    left = normalized({i: p for i, p in left.items() if p >= sampling.min_p * max(left.values())})
    return [left.get(i, 0.0) for i in range(len(logits))]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_distribution_is_the_one_defined(sampling: Sampling) -> None:
    logits_BV = rows()
    found = sampling.logits(logits_BV).softmax(dim=-1)
    expected = torch.tensor([distribution(row.tolist(), sampling) for row in logits_BV], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_distribution_is_that_of_transformers(sampling: Sampling) -> None:
    logits_BV = rows()
    theirs = TemperatureLogitsWarper(sampling.temperature)(None, logits_BV)
    if sampling.top_k is not None:
        theirs = TopKLogitsWarper(sampling.top_k)(None, theirs)
    if sampling.top_p < 1:
        theirs = TopPLogitsWarper(sampling.top_p)(None, theirs)
    if sampling.min_p > 0:
        theirs = MinPLogitsWarper(sampling.min_p)(None, theirs)
    torch.testing.assert_close(sampling.logits(logits_BV).softmax(-1), theirs.softmax(-1))


def test_symbols_tied_with_the_kth_stay() -> None:
    logits_V = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    assert Sampling(top_k=3).logits(logits_V).isfinite().tolist() == [True] * 5
    assert Sampling(top_k=2).logits(logits_V).isfinite().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_smallest_temperature_takes_the_most_probable_and_the_largest_any(dtype: torch.dtype) -> None:
    logits_V = torch.tensor([-3.0, 4.0, -torch.inf, 4.0, 3.9], dtype=dtype)
    for temperature in (1e-310, 5e-324, 1e-40):
        found = Sampling(temperature).logits(logits_V).softmax(-1)
        assert found.tolist() == [0, 0.5, 0, 0.5, 0]
    hot = Sampling(1e30).logits(logits_V).softmax(-1)
    torch.testing.assert_close(hot, torch.tensor([0.25, 0.25, 0, 0.25, 0.25], dtype=dtype))
    numbers = torch.Generator().manual_seed(0)
    drawn = {int(Sampling(1.7e308).choose(logits_V, numbers)) for _ in range(60)}
    assert drawn == {0, 1, 3, 4}


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.2, top_k=6, top_p=0.95)
    logits_V = rows(1, 10)[0]
    drawn = sampling.choose(logits_V.expand(200_000, 10), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=10).double() / len(drawn)
    expected = torch.tensor(distribution(logits_V.tolist(), sampling)).double()
    # Five standard errors of each share.
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / len(drawn)).sqrt()).all()


def test_greedy_and_seeds() -> None:
    logits_BV = rows()
    assert torch.equal(Sampling(temperature=0, top_k=3).choose(logits_BV), logits_BV.argmax(dim=-1))
    draws = [Sampling().choose(logits_BV, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_largest_number_draws_no_symbol_of_probability_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_V = torch.tensor([0.1, 0.2, -torch.inf, -torch.inf])
    for number, expected in ((2**32 - 1, 1), (0, 0)):
        monkeypatch.setattr(torch, "randint", lambda *_, n=number, **__: torch.tensor([n]))
        assert int(Sampling().choose(logits_V)) == expected
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([0]))
    assert int(Sampling().choose(logits_V.flip(0))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature: -0\.1: expected 0 \(greedy\) or more"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_k": 0}, "top-k: 0: expected at least 1"),
        ({"top_p": 0.0}, "top-p: 0.0: expected a number above 0"),
        ({"top_p": 1.1}, "top-p: 1.1"),
        ({"min_p": -0.1}, "min-p: -0.1: expected a number from 0"),
        ({"min_p": 2.0}, "min-p: 2.0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)
