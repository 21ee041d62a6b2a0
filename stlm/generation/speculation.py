"""Speculative decoding: a cheap model drafts tokens, which the model itself verifies in one pass.

Leviathan et al. (2023), "Fast inference from transformers via speculative decoding", algorithm 1, and Chen et
al. (2023), "Accelerating large language model decoding with speculative sampling", algorithm 2: the text has
exactly the model's own distribution, greedy text is exactly the model's own. Kim et al. (2023), "Speculative
decoding with Big Little Decoder", sections 3.2 and 3.3, is a faster rule under which it is not.

p is a distribution of the model, q one of the draft. Shapes: V vocabulary, K drafted tokens, L = K or K + 1
rows of the model's logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.generation.interface import TextGenerator
from stlm.generation.sampling import Sampling, draw, most_probable, uniform

# Drafted tokens for each pass of the model, unless told otherwise.
LENGTH = 4


class Speculator(TextGenerator, Protocol):
    """A model with a draft: another model, some of its own blocks (`stlm.generation.speculators`), or heads
    of its own for tokens further ahead (`stlm.generation.ahead`)."""

    @property
    def room(self) -> int:
        """How many more tokens the model can read before its window moves on."""
        ...

    def draft(self, symbol: int) -> Tensor | None:
        """The draft reads one more token; returns its logits [V], float32, of the next one.

        None: it can draft no more before the next verification.
        """
        ...

    def verify(self, symbols: Sequence[int]) -> Tensor:
        """The model reads tokens, at most `room` (or one): those that the draft has read since, and more.

        Returns its logits [L, V], float32, after each of them.
        """
        ...

    def reject(self, count: int) -> None:
        """Remove the last `count` tokens, which have been verified."""
        ...

    def afresh(self, back: int = 0) -> Tensor:
        """As `TextGenerator.afresh`, of the text without its last `back` tokens."""
        ...


@dataclass(frozen=True)
class Drafting:
    """How tokens are drafted and accepted. Raises UserError for a value out of its range.

    `length`: the most tokens of a draft. `fallback`: a draft ends where the draft model gives no token at
    least this probability; the text's distribution stays the model's. `rollback`: a drafted token is accepted
    if the model's surprise, -ln p(token), is at most this, in nats; the text is then not the model's. None:
    accepted with probability min(1, p/q). Both thresholds see the models' own probabilities, before
    temperature, top-k, top-p and min-p: Kim et al. write greedily, where all but one would be 0.
    """

    length: int = LENGTH
    fallback: float = 0.0
    rollback: float | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"--draft-length: {self.length}: expected at least 1")
        if not 0 <= self.fallback <= 1:
            raise UserError(f"--fallback: {self.fallback}: expected a probability from 0 (never) to 1")
        if self.rollback is not None and not 0 <= self.rollback < math.inf:
            raise UserError(f"--rollback: {self.rollback}: expected 0 nats or more")

    @property
    def exact(self) -> bool:
        """Whether the text has the model's own distribution."""
        return self.rollback is None


@dataclass
class Statistics:
    """What became of the drafts of one or more texts."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0  # of the model, after those over prompts
    tokens: int = 0  # that came of these passes

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were accepted; NaN if none were drafted."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def tokens_per_pass(self) -> float:
        """Tokens for each pass of the model: the accepted ones and the one that follows them."""
        return self.tokens / self.passes if self.passes else math.nan

    def __str__(self) -> str:
        if not self.passes:
            return "nothing was drafted"
        share = f"{self.acceptance:.1%}" if self.drafted else "none"
        return (
            f"{share} of {self.drafted:,} drafted tokens accepted, {self.tokens_per_pass:.2f} tokens for "
            "each pass of the model"
        )


def verified(
    p_LV: Tensor, q_KV: Tensor, drafted_K: Tensor, numbers: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Whether each drafted token is accepted [K], and the token [L] that comes in its place if it is not.

    `drafted_K` were drawn from the rows of `q_KV`. A token is accepted with probability min(1, p/q), else
    drawn from (p - q)+, normalized: either way it has distribution p. A row without a drafted token is drawn
    from p.
    """
    K = len(drafted_K)
    p_K, q_K = (rows.gather(1, drafted_K[:, None])[:, 0] for rows in (p_LV[:K], q_KV))
    accepted_K = uniform((K,), numbers).to(p_K) * q_K < p_K
    rest_LV = p_LV.clone()
    rest_LV[:K] = (p_LV[:K] - q_KV).clamp(min=0)
    # Nothing is left where p = q, up to rounding: there every token is accepted.
    rest_LV = torch.where(rest_LV.sum(dim=1, keepdim=True) > 0, rest_LV, p_LV)
    return accepted_K, draw(rest_LV, numbers)


@dataclass
class Speculation:
    """Draws the tokens of one text, with its random numbers; counts what becomes of the drafts."""

    speculator: Speculator
    drafting: Drafting
    sampling: Sampling
    numbers: torch.Generator
    statistics: Statistics = field(default_factory=Statistics)

    def symbols(self, logits_V: Tensor, most: int) -> Iterator[int]:
        """Yield the tokens after a text whose next has the logits `logits_V`, up to the end of text.

        They come in groups, one for each pass of the model. `most`: how many are wanted; without limit more
        may come.
        """
        speculator, eot = self.speculator, self.speculator.eot
        symbol = self._judge(logits_V[None], [], None)[1]
        yield symbol
        most -= 1
        while symbol != eot:
            # One more token than is drafted comes from each pass. A sampled text draws the same random
            # numbers whatever is wanted, so that it is a beginning of any longer one.
            limit = most - 1 if self.sampling.temperature == 0 else self.drafting.length
            drafted, q_KV = self._propose(symbol, min(limit, self.drafting.length, speculator.room - 1))
            # Nothing is asked about what follows the end of a text.
            ends = drafted[-1:] == [eot]
            logits_LV = speculator.verify([symbol, *drafted][: len(drafted) if ends else None])
            count, following = self._judge(logits_LV, drafted, q_KV)
            self.statistics.drafted += len(drafted)
            self.statistics.accepted += count
            self.statistics.passes += 1
            if rejected := max(0, len(logits_LV) - 1 - count):
                speculator.reject(rejected)
            group = drafted[:count] if following is None else [*drafted[:count], following]
            self.statistics.tokens += len(group)
            yield from group
            most -= len(group)
            symbol = group[-1]

    def _propose(self, symbol: int, length: int) -> tuple[list[int], Tensor | None]:
        """At most `length` drafted tokens after `symbol`, and the distributions [K, V] they are drawn from.

        None where no distributions are needed. The draft ends with the end of a text.
        """
        drafted: list[int] = []
        rows: list[Tensor] = []
        while len(drafted) < length and symbol != self.speculator.eot:
            logits_V = self.speculator.draft(symbol)
            if logits_V is None:
                break
            if self.drafting.fallback and logits_V.softmax(dim=-1).amax() < self.drafting.fallback:
                break
            if self.sampling.temperature == 0:
                symbol = int(logits_V.argmax())
            else:
                rows.append(self.sampling.probabilities(logits_V))
                symbol = int(draw(rows[-1], self.numbers))
            drafted.append(symbol)
        return drafted, torch.stack(rows) if rows else None

    def _judge(
        self, logits_LV: Tensor, drafted: Sequence[int], q_KV: Tensor | None
    ) -> tuple[int, int | None]:
        """How many drafted tokens are accepted, and the token after them: None after the end of a text."""
        if self.sampling.temperature == 0:
            return self._judge_greedily(logits_LV, drafted)
        p_LV = self.sampling.probabilities(logits_LV)
        if q_KV is None:
            return 0, int(draw(p_LV[0], self.numbers))
        if self.drafting.exact:
            drafted_K = torch.tensor(drafted, device=p_LV.device)
            accepted_K, other_L = verified(p_LV, q_KV, drafted_K, self.numbers)
        else:
            accepted_K, other_L = self._near(logits_LV, drafted), draw(p_LV, self.numbers)
        count = _leading(accepted_K.tolist())
        return count, int(other_L[count]) if count < len(other_L) else None

    def _judge_greedily(self, logits_LV: Tensor, drafted: Sequence[int]) -> tuple[int, int | None]:
        """As `_judge`: drafted tokens are accepted as long as they are the model's most probable ones."""
        last = len(logits_LV) - 1
        near = [False] * len(drafted)
        if not self.drafting.exact and drafted:
            near = self._near(logits_LV, drafted).tolist()
        best = most_probable(logits_LV, lambda row: self.speculator.afresh(last - row))
        for place, symbol in enumerate(best):
            if place == len(drafted) or (symbol != drafted[place] and not near[place]):
                return place, symbol
        return len(drafted), None

    def _near(self, logits_LV: Tensor, drafted: Sequence[int]) -> Tensor:
        """Whether each drafted token [K] is near enough to the model's distribution not to be rolled back."""
        drafted_K = torch.tensor(drafted, device=logits_LV.device)
        surprise_K = -logits_LV[: len(drafted)].log_softmax(dim=-1).gather(1, drafted_K[:, None])[:, 0]
        return surprise_K <= self.drafting.rollback


def _leading(accepted: Sequence[bool]) -> int:
    """How many are True before the first that is not."""
    return accepted.index(False) if False in accepted else len(accepted)
