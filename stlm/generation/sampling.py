"""Selects the next symbol: the most probable one, or one drawn from part of the distribution.

Shapes: ... any, V symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stlm.errors import UserError

if TYPE_CHECKING:
    from stlm.generation.interface import TextGenerator

# A uniform number below 1 is drawn as an integer below this, divided by it: rounding cannot make it 1.
_STEPS = 2**32
# Logits that differ by less than this share of the largest one may change places by rounding: with the cache,
# without it and several at once, sums of float32 are added in other orders.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Sampling:
    """How symbols are drawn. The settings apply in this order, as in `transformers`:

    1. `temperature` T: probabilities are proportional to exp(logit / T) (Ackley et al. 1985). 0 selects the
       most probable symbol, and the other settings do not apply.
    2. `top_k`: keeps the k most probable symbols (Fan et al. 2018), and ties with the k-th; None: all.
    3. `top_p`: of these, renormalized, keeps the fewest most probable ones whose probabilities sum to at
       least p (nucleus sampling, Holtzman et al. 2020); 1: all.
    4. `min_p`: of these, keeps those whose probability is at least min_p times the largest (Nguyen et al.
       2024); 0: all.

    Raises UserError for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature: {self.temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k: {self.top_k}: expected at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p: {self.top_p}: expected a number above 0, at most 1 (all symbols)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p: {self.min_p}: expected a number from 0 (all symbols) to 1")

    @property
    def largest(self) -> int | None:
        """How many of the largest logits decide, with those equal to the last of them; None: all.

        Of two, greedily: near ties are settled (see `most_probable`).
        """
        return 2 if self.temperature == 0 else self.top_k

    def logits(self, logits_V: Tensor) -> Tensor:
        """Logits [..., V] of the distribution to draw from; minus infinity for removed symbols."""
        # Relative to the largest logit, which stays 0 for any temperature. The bound keeps the reciprocal,
        # with which a GPU multiplies, finite.
        temperature = max(self.temperature, torch.finfo(logits_V.dtype).tiny)
        logits_V = (logits_V - logits_V.amax(dim=-1, keepdim=True)) / temperature
        if self.top_k is not None and self.top_k < logits_V.shape[-1]:
            kth_1 = logits_V.topk(self.top_k).values[..., -1:]
            logits_V = logits_V.masked_fill(logits_V < kth_1, -torch.inf)
        if self.top_p < 1:
            ordered_V, order_V = logits_V.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
            # Remove a symbol if those before it already reach top_p; the first symbol always stays.
            beyond_V = ordered_V.cumsum(dim=-1) - ordered_V >= self.top_p
            beyond_V[..., 0] = False
            beyond_V = torch.zeros_like(beyond_V).scatter(-1, order_V, beyond_V)
            logits_V = logits_V.masked_fill(beyond_V, -torch.inf)
        if self.min_p > 0:
            probability_V = logits_V.softmax(dim=-1)
            unlikely_V = probability_V < self.min_p * probability_V.amax(dim=-1, keepdim=True)
            logits_V = logits_V.masked_fill(unlikely_V, -torch.inf)
        return logits_V

    def choose(self, logits_V: Tensor, numbers: torch.Generator | Tensor | None = None) -> Tensor:
        """Symbols [...] for logits [..., V], drawn with `numbers` (see `draw`).

        One uniform number per symbol is looked up in the cumulative distribution: the same numbers draw the
        same symbols on every device and with every way to compute the logits, except for rounding.
        """
        if self.temperature == 0:
            return logits_V.argmax(dim=-1)
        if self.top_k is None or self.top_k >= logits_V.shape[-1]:
            return draw(self.probabilities(logits_V), numbers)
        # All that follows top-k sees the kept symbols alone: a vocabulary is hundreds of times as large.
        symbols_K = _candidates(logits_V, self.top_k)
        probabilities_K = self.probabilities(logits_V.gather(-1, symbols_K))
        return symbols_K.gather(-1, draw(probabilities_K, numbers)[..., None])[..., 0]

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The distribution [..., V] to draw from, float64, for a temperature above 0."""
        # In float32 the rounding of the sum would exceed the smallest probabilities.
        return self.logits(logits_V.double()).softmax(dim=-1)


def _candidates(logits_V: Tensor, top_k: int) -> Tensor:
    """The symbols [..., K] that top-k keeps, in order; rows with fewer than others have further ones."""
    largest_K, symbols_K = logits_V.topk(top_k)
    most = int((logits_V >= largest_K[..., -1:]).sum(dim=-1).max())
    if most > top_k:  # others are as probable as the k-th
        symbols_K = logits_V.topk(most).indices
    return symbols_K.sort(dim=-1).values


def draw(weights_V: Tensor, numbers: torch.Generator | Tensor | None = None) -> Tensor:
    """Symbols [...] for their weights [..., V], which need not sum to 1; see `Sampling.choose`.

    `numbers`: uniform numbers [..., 1], or the generator that draws them, on the CPU (None: torch's global
    one).
    """
    cumulative_V = weights_V.cumsum(dim=-1)
    total_1 = cumulative_V[..., -1:]
    even_1 = numbers if isinstance(numbers, Tensor) else uniform(total_1.shape, numbers)
    even_1 = even_1.to(total_1)
    # The first symbol above the number: never a symbol of probability 0.
    return torch.searchsorted(cumulative_V, even_1 * total_1, right=True).squeeze(-1)


def uniform(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Uniform random numbers from 0 to below 1, float64, on the CPU."""
    return torch.randint(_STEPS, shape, generator=generator).double() / _STEPS


def one_by_one(
    generator: TextGenerator, logits_V: Tensor, sampling: Sampling, numbers: torch.Generator
) -> Iterator[int]:
    """Yield the symbols after a text whose next has the logits `logits_V`, up to the end of text.

    A symbol is read when the one after it is asked for.
    """
    while True:
        if sampling.temperature == 0:
            (symbol,) = most_probable(logits_V[None], lambda _: generator.afresh())
        else:
            symbol = int(sampling.choose(logits_V, numbers))
        yield symbol
        if symbol == generator.eot:
            return
        logits_V = generator.next(symbol, sampling.largest)


def most_probable(logits_LV: Tensor, afresh: Callable[[int], Tensor]) -> Iterator[int]:
    """Yield the most probable symbol for each row of logits, the same however they were computed.

    Where rounding could decide which of two logits is the larger, `afresh(row)` gives the row's logits [V] by
    a computation that is always the same, to the bit.
    """
    top = logits_LV.topk(2)
    first_L, second_L = top.values.unbind(dim=-1)
    least_L = logits_LV.amin(dim=-1)
    if least_L.isneginf().any():  # symbols that are never drawn
        least_L = logits_LV.nan_to_num(neginf=0.0).amin(dim=-1)
    tied_L = first_L - second_L <= _ROUNDING * torch.maximum(first_L.abs(), least_L.abs())
    best_L = top.indices[:, 0]
    for row, (best, tied) in enumerate(zip(best_L.tolist(), tied_L.tolist(), strict=True)):
        yield int(afresh(row).argmax()) if tied else best
