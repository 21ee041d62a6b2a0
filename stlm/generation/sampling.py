"""Which symbol comes next: the most probable one, or one drawn from a part of the distribution.

Shapes: ... any, V symbols.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stlm.errors import UserError

# A number drawn evenly from 0 to 1 is a whole one below this, divided by it: never so near 1 that rounding
# makes it 1.
_STEPS = 2**32


@dataclass(frozen=True)
class Sampling:
    """How symbols are drawn. Applied in this order, which is that of `transformers`:

    1. `temperature` T: probabilities go with exp(logit / T) (Ackley et al. 1985). 0 takes the most probable
       symbol, and nothing else applies.
    2. `top_k`: the k most probable symbols stay (Fan et al. 2018), and those as probable as the k-th; None:
       all.
    3. `top_p`: of these, renormalized, the fewest most probable ones stay whose probabilities sum to at
       least p (nucleus sampling, Holtzman et al. 2020); 1: all.
    4. `min_p`: of these, those stay whose probability is at least min_p times the most probable one's (Nguyen
       et al. 2024); 0: all.

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

    def logits(self, logits_V: Tensor) -> Tensor:
        """Logits [..., V] of the distribution that is drawn from, minus infinity for what is left out."""
        # Relative to the largest, which stays 0 however small the temperature is; it is never so small that
        # its reciprocal, which a GPU multiplies with, is infinite.
        temperature = max(self.temperature, torch.finfo(logits_V.dtype).tiny)
        logits_V = (logits_V - logits_V.amax(dim=-1, keepdim=True)) / temperature
        if self.top_k is not None and self.top_k < logits_V.shape[-1]:
            kth_1 = logits_V.topk(self.top_k).values[..., -1:]
            logits_V = logits_V.masked_fill(logits_V < kth_1, -torch.inf)
        if self.top_p < 1:
            ordered_V, order_V = logits_V.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
            # A symbol goes when those before it reach top_p already; the first always stays.
            beyond_V = ordered_V.cumsum(dim=-1) - ordered_V >= self.top_p
            beyond_V[..., 0] = False
            beyond_V = torch.zeros_like(beyond_V).scatter(-1, order_V, beyond_V)
            logits_V = logits_V.masked_fill(beyond_V, -torch.inf)
        if self.min_p > 0:
            probability_V = logits_V.softmax(dim=-1)
            unlikely_V = probability_V < self.min_p * probability_V.amax(dim=-1, keepdim=True)
            logits_V = logits_V.masked_fill(unlikely_V, -torch.inf)
        return logits_V

    def choose(self, logits_V: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Symbols [...] for logits [..., V]: drawn with `generator`, a CPU's (None: torch's own).

        One even number for each symbol is looked up in the cumulative distribution: the same numbers draw
        the same symbols on every device, and however the logits were computed, rounding aside.
        """
        if self.temperature == 0:
            return logits_V.argmax(dim=-1)
        # In float64: the sum of a large vocabulary's small probabilities in float32 is off by more than they.
        cumulative_V = self.logits(logits_V.double()).softmax(dim=-1).cumsum(dim=-1)
        total_1 = cumulative_V[..., -1:]
        even_1 = torch.randint(_STEPS, total_1.shape, generator=generator).to(total_1) / _STEPS
        # The first symbol above the number: one of probability 0 is never it.
        return torch.searchsorted(cumulative_V, even_1 * total_1, right=True).squeeze(-1)
