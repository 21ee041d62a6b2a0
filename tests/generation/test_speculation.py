"""The rule of speculative decoding: the text's distribution is the model's own, whatever the draft says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from stlm.errors import UserError
from stlm.generation.sampling import Sampling, draw, most_probable, uniform
from stlm.generation.speculation import Drafting, Speculation, Statistics, verified

DRAWS, SYMBOLS = 10**6, 8
GREEDY = Sampling(temperature=0)
Rule = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def statistic(symbols_N: Tensor, p_V: Tensor) -> float:
    """Pearson's chi-square of draws against their law, of the symbols that it allows."""
    counts_V = torch.bincount(symbols_N, minlength=len(p_V)).double()
    expected_V = p_V * len(symbols_N)
    assert (counts_V[p_V == 0] == 0).all(), "a symbol of probability 0 was drawn"
    seen_V = p_V > 0
    return float(((counts_V - expected_V)[seen_V] ** 2 / expected_V[seen_V]).sum())


def limit(p_V: Tensor) -> float:
    """What a right rule exceeds once in a million times."""
    return float(chi2.isf(1e-6, max(1, int((p_V > 0).sum()) - 1)))


def laws(seed: int) -> tuple[Tensor, Tensor]:
    """p and q of eight symbols; each lacks some that the other has."""
    p_V, q_V = (
        torch.randn(2, SYMBOLS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5
    )
    p_V[1] = q_V[6] = -torch.inf
    return p_V.softmax(0), q_V.softmax(0)


def draws(rule: Rule, p_V: Tensor, q_V: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A million symbols by a rule, and which of them were drafted."""
    numbers = torch.Generator().manual_seed(seed)
    p_NV, q_NV = p_V.expand(DRAWS, -1), q_V.expand(DRAWS, -1)
    drafted_N = draw(q_NV, numbers)
    accepted_N, other_N = rule(p_NV, q_NV, drafted_N, numbers)
    return torch.where(accepted_N, drafted_N, other_N), accepted_N


@pytest.mark.parametrize("seed", range(3))
def test_a_million_symbols_have_the_models_law_and_as_many_are_accepted_as_the_laws_share(seed: int) -> None:
    p_V, q_V = laws(seed)
    symbols_N, accepted_N = draws(verified, p_V, q_V, seed)
    assert statistic(symbols_N, p_V) < limit(p_V)
    shared = float(torch.minimum(p_V, q_V).sum())
    assert 0.2 < shared < 0.8
    error = math.sqrt(shared * (1 - shared) / DRAWS)
    assert float(accepted_N.double().mean()) == pytest.approx(shared, abs=5 * error)


def matches_a_draw(p_NV: Tensor, q_NV: Tensor, drafted_N: Tensor, numbers: torch.Generator):
    """Compares tokens: accepted where the model draws the same one, else another of the model's."""
    return draw(p_NV, numbers) == drafted_N, draw(p_NV, numbers)


def matches_the_best(p_NV: Tensor, q_NV: Tensor, drafted_N: Tensor, numbers: torch.Generator):
    """Compares tokens: accepted where it is the model's most probable one."""
    return p_NV.argmax(1) == drafted_N, draw(p_NV, numbers)


def replaces_by_p(p_NV: Tensor, q_NV: Tensor, drafted_N: Tensor, numbers: torch.Generator):
    """Accepts with min(1, p/q), but draws from p, not from what is left of it."""
    return verified(p_NV, q_NV, drafted_N, numbers)[0], draw(p_NV, numbers)


def forgets_q(p_NV: Tensor, q_NV: Tensor, drafted_N: Tensor, numbers: torch.Generator):
    """Accepts with probability p."""
    even_N = uniform((DRAWS,), numbers)
    return even_N < p_NV.gather(1, drafted_N[:, None])[:, 0], verified(p_NV, q_NV, drafted_N, numbers)[1]


@pytest.mark.parametrize("rule", [matches_a_draw, matches_the_best, replaces_by_p, forgets_q])
def test_the_test_finds_wrong_rules(rule: Rule) -> None:
    p_V, q_V = laws(0)
    assert statistic(draws(rule, p_V, q_V)[0], p_V) > 20 * limit(p_V)


def test_a_draft_that_says_what_the_model_says_is_accepted() -> None:
    p_V = laws(0)[0]
    symbols_N, accepted_N = draws(verified, p_V, p_V)
    assert accepted_N.all() and statistic(symbols_N, p_V) < limit(p_V)


def test_certain_laws_are_compared_by_their_symbols() -> None:
    """As in greedy decoding: nothing of probability 0 is accepted or drawn."""
    p_V, q_V = torch.eye(SYMBOLS, dtype=torch.float64)[2:4]
    symbols_N, accepted_N = draws(verified, p_V, q_V)
    assert not accepted_N.any() and (symbols_N == 2).all()


class Chain:
    """A text whose next symbol depends on its last one, in the model and in the draft.

    It checks what it is given: a draft reads what the text continues with, and rejected symbols are the last.
    """

    unit, dropped = "symbols", 0

    def __init__(self, model_VV: Tensor, draft_VV: Tensor, eot: int, room: int = 1 << 30) -> None:
        self._model_VV, self._draft_VV, self.eot, self.room = model_VV, draft_VV, eot, room
        self.text: list[int] = []
        self.ahead: list[int] = []
        self.longest = 0

    def start(self, prompt: str) -> Tensor:
        self.text, self.ahead = [0], []
        return self._model_VV[0]

    def next(self, symbol: int, largest: int | None = None) -> Tensor:
        return self.verify([symbol])[0]

    def piece(self, symbol: int) -> bytes:
        return bytes([65 + symbol])

    def draft(self, symbol: int) -> Tensor:
        self.ahead.append(symbol)
        return self._draft_VV[symbol]

    def verify(self, symbols: Sequence[int]) -> Tensor:
        assert list(symbols[: len(self.ahead)]) == self.ahead and len(symbols) <= max(1, self.room)
        self.longest = max(self.longest, len(symbols))
        self.text += symbols
        self.ahead = []
        return self._model_VV[list(symbols)]

    def reject(self, count: int) -> None:
        assert count > 0
        del self.text[-count:]

    def afresh(self, back: int = 0) -> Tensor:
        return self._model_VV[self.text[len(self.text) - 1 - back]]


def chain(seed: int = 0, eot: bool = False, **options: int) -> Chain:
    numbers = torch.Generator().manual_seed(seed)
    model_VV, draft_VV = torch.randn(2, 5, 5, generator=numbers)
    if not eot:
        model_VV[:, 4] = draft_VV[:, 4] = -torch.inf
    return Chain(model_VV, draft_VV, 4, **options)


def written(
    speculator: Chain, drafting: Drafting, sampling: Sampling, count: int, seed: int = 0
) -> tuple[list[int], Statistics]:
    speculation = Speculation(speculator, drafting, sampling, torch.Generator().manual_seed(seed))
    return list(islice(speculation.symbols(speculator.start(""), count), count)), speculation.statistics


def transitions(text: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Each symbol, and those that follow it."""
    text_N = torch.tensor(text)
    for symbol in text_N.unique().tolist():
        yield symbol, text_N[1:][text_N[:-1] == symbol]


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=2),
    Sampling(top_p=0.7),
    Sampling(min_p=0.3),
    Sampling(temperature=1.5, top_k=3, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_text_has_the_models_law_and_both_are_sampled_alike(sampling: Sampling) -> None:
    speculator = chain()
    text, statistics = written(speculator, Drafting(3), sampling, 3000)
    p_VV, q_VV = map(sampling.probabilities, (speculator._model_VV, speculator._draft_VV))
    for symbol, after_N in transitions([0, *text]):
        assert statistic(after_N, p_VV[symbol]) < limit(p_VV[symbol])
    # Of the first drafted tokens all are judged; of later ones those before which all were accepted.
    assert 0 < statistics.acceptance < 1 and speculator.longest == 4
    unlike = torch.minimum(p_VV, q_VV)[:4].sum(1)
    once, one = written(chain(), Drafting(1), sampling, 3000)
    places = torch.tensor([0, *once[:-1]])
    assert one.acceptance == pytest.approx(float(unlike[places].mean()), abs=0.05)


def test_a_draft_that_is_drawn_from_another_law_than_it_says_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above fails where drafted tokens ignore the temperature."""

    def propose(self: Speculation, symbol: int, length: int) -> tuple[list[int], Tensor]:
        logits_V = self.speculator.draft(symbol)
        plain_V = Sampling().probabilities(logits_V)
        return [int(draw(plain_V, self.numbers))], self.sampling.probabilities(logits_V)[None]

    monkeypatch.setattr(Speculation, "_propose", propose)
    sampling, speculator = Sampling(temperature=0.5), chain()
    text, _ = written(speculator, Drafting(1), sampling, 3000)
    p_VV = sampling.probabilities(speculator._model_VV)
    assert any(statistic(after_N, p_VV[s]) > 3 * limit(p_VV[s]) for s, after_N in transitions(text))


def greedy_text(speculator: Chain, count: int) -> list[int]:
    text = [0]
    while len(text) <= count and text[-1] != speculator.eot:
        text.append(int(speculator._model_VV[text[-1]].argmax()))
    return text[1 : count + 1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [1, 2, 5])
def test_greedy_text_is_the_models(seed: int, length: int) -> None:
    for options in ({}, {"room": 3}, {"room": 1}, {"room": 0}, {"eot": True}):
        speculator = chain(seed, **options)
        text, statistics = written(speculator, Drafting(length), GREEDY, 30)
        assert text == greedy_text(speculator, 30)
        assert statistics.tokens >= len(text) - 1 and speculator.longest <= length + 1
        most = max(0, min(length, options.get("room", 99) - 1)) * statistics.passes
        assert statistics.drafted <= most


def test_a_text_ends_where_its_end_is_accepted_or_drawn() -> None:
    drafted = drawn = 0
    for seed in range(200):
        text, statistics = written(chain(seed % 20, eot=True), Drafting(3), Sampling(), 500, seed)
        assert text.index(4) == len(text) - 1
        # A pass that accepts an end gives no token more.
        if statistics.tokens < statistics.accepted + statistics.passes:
            drafted += 1
        else:
            drawn += 1
    assert drafted > 10 and drawn > 10


def test_sampled_text_is_a_beginning_of_longer_text() -> None:
    longer = written(chain(), Drafting(4), Sampling(), 60)[0]
    for count in (1, 2, 7, 59):
        assert written(chain(), Drafting(4), Sampling(), count)[0] == longer[:count]


def test_a_greedy_draft_is_no_longer_than_what_is_wanted() -> None:
    speculator = chain()
    for count in (1, 2, 3):
        speculator.longest = 0
        written(speculator, Drafting(50), GREEDY, count)
        assert speculator.longest < count


def test_a_draft_ends_where_it_is_unsure() -> None:
    drafted = []
    for fallback in (0.0, 0.5, 0.7, 1.0):
        speculator = chain()
        text, statistics = written(speculator, Drafting(4, fallback), GREEDY, 50)
        assert text == greedy_text(speculator, 50)
        drafted.append(statistics.drafted)
    assert drafted == sorted(drafted, reverse=True) and drafted[0] > drafted[2] > drafted[3] == 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_k=3)], ids=str)
def test_a_draft_that_ends_where_it_is_unsure_leaves_the_law(sampling: Sampling) -> None:
    speculator = chain()
    text, statistics = written(speculator, Drafting(4, fallback=0.5), sampling, 3000)
    p_VV = sampling.probabilities(speculator._model_VV)
    for symbol, after_N in transitions(text):
        assert statistic(after_N, p_VV[symbol]) < limit(p_VV[symbol])
    assert 0 < statistics.drafted < 4 * statistics.passes


def test_greedy_text_that_keeps_near_tokens_is_another() -> None:
    surprises = []
    for seed in range(5):
        speculator = chain(seed)
        text, _ = written(speculator, Drafting(4, rollback=2.0), GREEDY, 40)
        surprise_VV, best_V = -speculator._model_VV.log_softmax(1), speculator._model_VV.argmax(1)
        pairs = zip([0, *text[:-1]], text, strict=True)
        surprises += [float(surprise_VV[pair]) for pair in pairs if pair[1] != best_V[pair[0]]]
    # What is not the model's own surprises it by two nats at most.
    assert surprises and max(surprises) <= 2
    # At 0 nats only certainty is near enough, at a great many everything is.
    assert written(chain(), Drafting(4, rollback=0.0), GREEDY, 50)[0] == greedy_text(chain(), 50)
    assert written(chain(), Drafting(4, rollback=1e9), GREEDY, 50)[1].acceptance == 1


def test_sampled_text_that_keeps_near_tokens_has_another_law() -> None:
    speculator = chain()
    text, statistics = written(speculator, Drafting(4, rollback=2.0), Sampling(), 3000)
    p_VV = Sampling().probabilities(speculator._model_VV)
    assert any(statistic(after_N, p_VV[s]) > 5 * limit(p_VV[s]) for s, after_N in transitions(text))
    assert statistics.acceptance > written(chain(), Drafting(4), Sampling(), 3000)[1].acceptance


def test_near_ties_are_settled_by_one_computation() -> None:
    asked = []

    def afresh(row: int) -> Tensor:
        asked.append(row)
        return torch.tensor([0.0, 1.0, 2.0])

    logits_LV = torch.tensor(
        [
            [5.0, 1.0, 0.0],
            [5.0, 5.0001, 0.0],
            [5.0, 5.1, -torch.inf],
            [-9.0, -9.0, -9.0],
            [1.0, -torch.inf, -torch.inf],
        ]
    )
    assert list(most_probable(logits_LV, afresh)) == [0, 2, 1, 2, 0]
    assert asked == [1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "--draft-length: 0: expected at least 1"),
        ({"fallback": 1.5}, "--fallback: 1.5: expected a probability"),
        ({"fallback": math.nan}, "--fallback: nan"),
        ({"rollback": -1.0}, "--rollback: -1.0: expected 0 nats or more"),
        ({"rollback": math.nan}, "--rollback: nan"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Drafting(**options)


def test_what_became_of_the_drafts() -> None:
    assert str(Statistics()) == "nothing was drafted"
    said = str(Statistics(drafted=1200, accepted=300, passes=400, tokens=700))
    assert said == "25.0% of 1,200 drafted tokens accepted, 1.75 tokens for each pass of the model"
    assert "none of 0 drafted" in str(Statistics(passes=3, tokens=3))
