"""Attention within documents that share a row: each token sees its own document alone.

Tensor names as in stlm.model.transformer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Documents(NamedTuple):
    """Where documents begin in rows of tokens, as attention and positions need it.

    `positions` [B, L] are the tokens' places in their documents; `sees` [B, 1, L, L] is whether a query may
    look at a key: of the same document, and not later.
    """

    positions: Tensor
    sees: Tensor

    @classmethod
    def of(cls, tokens_BL: Tensor, eot: int) -> Documents:
        """Of input tokens, in which an end of text `eot` is what the next document's first token follows.

        A row's beginning is position 0 of whatever document it cuts.
        """
        begins_BL = tokens_BL == eot
        places_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        first_BL = torch.where(begins_BL, places_L, 0).cummax(dim=1).values
        # A key is of the query's document where it stands between its beginning and the query.
        sees_BLL = (places_L >= first_BL[:, :, None]) & (places_L <= places_L[:, None])
        return cls(places_L - first_BL, sees_BLL[:, None])

    def before(self, x_BLX: Tensor) -> Tensor:
        """What `x_BLX` has at the token before each, in its document; zeros at a document's first token."""
        return F.pad(x_BLX[:, :-1], (0, 0, 1, 0)) * (self.positions > 0)[..., None]
