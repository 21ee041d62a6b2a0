"""Attention within documents that share a row: each token sees its own document only.

Tensor names as in stlm.model.transformer; M the length of rows with inserted places.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.layout import Layout, Selection, Stretched, attend_in_rows, owners, token_places


class Documents(Layout):
    """Consecutive documents in rows of tokens.

    `positions` [B, L] are the tokens' positions in their documents; `sees` [B, 1, L, L] says whether a query
    may attend to a key: the key must belong to the same document and must not come later.
    """

    in_rows = True

    def __init__(self, positions_BL: Tensor, sees_B1LL: Tensor, begins_BL: Tensor | None = None) -> None:
        """`begins_BL` marks the tokens that begin a document; None: those at position 0."""
        self.positions, self.sees = positions_BL, sees_B1LL
        self._begins = positions_BL == 0 if begins_BL is None else begins_BL

    @classmethod
    def of(cls, tokens_BL: Tensor, eot: int) -> Documents:
        """The layout of input tokens, in which the token `eot` begins each document.

        A document that the row cuts off at its left edge starts at position 0.
        """
        begins_BL = tokens_BL == eot
        places_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        first_BL = torch.where(begins_BL, places_L, 0).cummax(dim=1).values
        # A key belongs to the query's document if it lies between the document's first token and the query.
        sees_BLL = (places_L >= first_BL[:, :, None]) & (places_L <= places_L[:, None])
        return cls(places_L - first_BL, sees_BLL[:, None])

    def before(self, x_BLX: Tensor) -> Tensor:
        """`x_BLX` at the token before each in its document; zeros at a document's first token."""
        return F.pad(x_BLX[:, :-1], (0, 0, 1, 0)) * ~self._begins[..., None]

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`."""
        return attend_in_rows(q_BLHE, k_BLKE, v_BLKE, self.sees, dropout)

    def select(self, selection: Selection) -> Documents:
        """See `Layout.select`. The tokens keep their positions."""
        index_BS = selection.index_BS
        S = index_BS.shape[1]
        sees_BLL = self.sees[:, 0]
        sees_BSL = sees_BLL.gather(1, index_BS[..., None].expand(-1, -1, sees_BLL.shape[2]))
        sees_BSS = sees_BSL.gather(2, index_BS[:, None].expand(-1, S, -1))
        # Padding stands at the end, whatever its index in the row: no token but itself sees it.
        sees_BSS = sees_BSS.tril() | torch.eye(S, dtype=torch.bool, device=index_BS.device)
        begins_BS = sees_BSS.sum(dim=2) == 1
        return Documents(self.positions.gather(1, index_BS), sees_BSS[:, None], begins_BS)

    def rows(self, rows_R: Tensor) -> Documents:
        """See `Layout.rows`."""
        return Documents(self.positions[rows_R], self.sees[rows_R], self._begins[rows_R])

    def stretch(self, inserted_BL: Tensor, length: int | None = None) -> Stretched:
        """See `Layout.stretch`."""
        B, L = self.positions.shape
        inserted_BL = inserted_BL.expand(B, L)
        place_BL, last_BL = token_places(inserted_BL)
        M = 1 + int(last_BL.max()) if length is None else length
        owner_BM, after_BM = owners(place_BL, M)
        # Positions move on by what is inserted before in the same document.
        before_BL = inserted_BL.cumsum(dim=1) - inserted_BL
        token_L = torch.arange(L, device=inserted_BL.device)
        first_BL = torch.where(self._begins, token_L, 0).cummax(dim=1).values
        positions_BL = self.positions + before_BL - before_BL.gather(1, first_BL)
        # No place but padding sees padding, which stands at the end; its positions do not matter.
        positions_BM = (positions_BL.gather(1, owner_BM) + after_BM).clamp(max=M - 1)
        sees_BML = self.sees[:, 0].gather(1, owner_BM[..., None].expand(-1, -1, L))
        sees_BMM = sees_BML.gather(2, owner_BM[:, None].expand(-1, M, -1)).tril()
        begins_BM = self._begins.gather(1, owner_BM) & (after_BM == 0)
        return Stretched(Documents(positions_BM, sees_BMM[:, None], begins_BM), M, place_BL, last_BL)
