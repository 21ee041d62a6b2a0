"""What a micro-batch of training reads, and what it predicts.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stlm.model.layout import Layout


class Rows(NamedTuple):
    """The rows of a micro-batch; techniques may change them before the forward pass (`Technique.rows`).

    `tokens_BL`: the inputs, ids of the vocabulary or of added tokens (`Transformer.add_tokens`).
    `targets_BL`: what each position predicts, ids of the vocabulary. `layout`: how sequences lie in the rows;
    None: one in each row. `counted_BL`: the positions whose targets count in the loss; None: all.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    layout: Layout | None = None
    counted_BL: Tensor | None = None

    @classmethod
    def of(cls, tokens_BM: Tensor, layout: Layout | None = None) -> Rows:
        """Rows of text [B, L + 1], in which each token but the first is a target; all of them count."""
        return cls(tokens_BM[:, :-1], tokens_BM[:, 1:], layout)

    def alone(self, row: int) -> Rows:
        """One of the rows, as a micro-batch of its own."""
        here_1 = torch.tensor([row], device=self.tokens_BL.device)
        return Rows(
            self.tokens_BL[here_1],
            self.targets_BL[here_1],
            None if self.layout is None else self.layout.rows(here_1),
            None if self.counted_BL is None else self.counted_BL[here_1],
        )


def drawn_shares(rows: int, shares: Sequence[float]) -> Tensor:
    """Which of the `shares` each of B rows belongs to [B], drawn at random on the CPU; len(shares): none.

    A row belongs to each with the probability that it states. All rows together belong to it as nearly B
    times that as whole numbers allow, rounded up or down at random (systematic sampling).
    """
    place_B = (torch.randperm(rows) + torch.rand((), dtype=torch.float64)) / rows
    return torch.searchsorted(torch.tensor(shares, dtype=torch.float64).cumsum(0), place_B, right=True)
