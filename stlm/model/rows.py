"""What a micro-batch of training reads, and what it predicts.

Shapes: B rows, L positions, M = L + 1 tokens of a row with its last target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
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

    @property
    def whole_BM(self) -> Tensor:  # noqa: N802, as it is a tensor
        """The tokens of each row and its last target [B, L + 1]."""
        return torch.cat([self.tokens_BL, self.targets_BL[:, -1:]], dim=1)

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


def document_parts(row_M: np.ndarray, eot: int) -> list[slice]:
    """Where the parts of documents in a row of tokens lie, without ends of text: one part more than there are
    ends of text. The first may have begun in the row before, the last may end in the row after."""
    ends = np.flatnonzero(row_M == eot).tolist()
    begins, stops = [0, *(end + 1 for end in ends)], [*ends, len(row_M)]
    return [slice(begin, stop) for begin, stop in zip(begins, stops, strict=True)]


def drawn_shares(rows: int, shares: Sequence[float]) -> Tensor:
    """Which of the `shares` each of B rows belongs to [B], drawn at random on the CPU; len(shares): none.

    A row belongs to each with the probability that it states. All rows together belong to it as nearly B
    times that as whole numbers allow, rounded up or down at random (systematic sampling).
    """
    place_B = (torch.randperm(rows) + torch.rand((), dtype=torch.float64)) / rows
    return torch.searchsorted(torch.tensor(shares, dtype=torch.float64).cumsum(0), place_B, right=True)
