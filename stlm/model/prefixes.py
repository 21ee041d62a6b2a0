"""Attention that is not causal: a part of each row, such as its beginning, is visible to itself in both
directions.

Shapes: B batch, L length, X any width, H query heads, K key/value heads, E head width, R chosen rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stlm.model.documents import Documents
from stlm.model.layout import CausalRows, Layout, attend_in_rows

if TYPE_CHECKING:
    from stlm.model.transformer import Transformer


class Prefixes(Layout):
    """Rows with a fully visible prefix and a causal rest (Raffel et al. 2020, section 3.2.1: "prefix LM").

    The tokens before `prefix_B` [B] (and from `begin_B` on, where it is given) see one another; every token
    sees those up to itself. A prefix as long as the row is attention in both directions, a prefix of 0 a
    causal row. `documents` restricts all of it to the row's documents, whose positions it then has.
    """

    def __init__(
        self,
        prefix_B: Tensor,
        length: int,
        begin_B: Tensor | None = None,
        documents: Documents | None = None,
    ) -> None:
        self.prefix_B, self._length, self._documents = prefix_B, length, documents
        self._begin_B = torch.zeros_like(prefix_B) if begin_B is None else begin_B
        # The causal layout whose positions these are.
        self._causal: Layout = CausalRows(length) if documents is None else documents
        self.positions = self._causal.positions
        place_L = torch.arange(length, device=prefix_B.device)
        prefix_BL = (place_L >= self._begin_B[:, None]) & (place_L < prefix_B[:, None])
        sees_BLL = (place_L <= place_L[:, None]) | (prefix_BL[:, :, None] & prefix_BL[:, None, :])
        if documents is not None:
            before_BLL = documents.sees[:, 0]
            sees_BLL = sees_BLL & (before_BLL | before_BLL.mT)
        self.sees = sees_BLL[:, None]

    def before(self, x_BLX: Tensor) -> Tensor:
        """See `Layout.before`."""
        return self._causal.before(x_BLX)

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`."""
        return attend_in_rows(q_BLHE, k_BLKE, v_BLKE, self.sees, dropout)

    def rows(self, rows_R: Tensor) -> Prefixes:
        """See `Layout.rows`."""
        documents = None if self._documents is None else self._documents.rows(rows_R)
        return Prefixes(self.prefix_B[rows_R], self._length, self._begin_B[rows_R], documents)


def pair_flops(model: Transformer) -> float:
    """Forward FLOPs of the attention of all blocks over one pair of positions, such as one that causal
    attention leaves out."""
    config = model.config
    return 4 * len(model.blocks) * config.heads * config.head_width
