"""Attention within documents that share a row: each token sees its own document alone.

Tensor names as in stlm.model.transformer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.causal_attention import causal_attention


class Documents(NamedTuple):
    """Where documents begin in rows of tokens, as attention and positions need it.

    `positions` [B, L] are the tokens' places in their documents; `sees` [B, 1, L, L] is whether a query may
    look at a key: of the same document, and not later. `dropout` is that of attention weights in training.
    """

    positions: Tensor
    sees: Tensor
    dropout: float = 0.0

    @classmethod
    def of(cls, tokens_BL: Tensor, eot: int, dropout: float = 0.0) -> Documents:
        """Of input tokens, in which an end of text `eot` is what the next document's first token follows.

        A row's beginning is position 0 of whatever document it cuts.
        """
        begins_BL = tokens_BL == eot
        places_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        first_BL = torch.where(begins_BL, places_L, 0).cummax(dim=1).values
        # A key is of the query's document where it stands between its beginning and the query.
        sees_BLL = (places_L >= first_BL[:, :, None]) & (places_L <= places_L[:, None])
        return cls(places_L - first_BL, sees_BLL[:, None], dropout)

    def before(self, x_BLX: Tensor) -> Tensor:
        """What `x_BLX` has at the token before each, in its document; zeros at a document's first token."""
        return F.pad(x_BLX[:, :-1], (0, 0, 1, 0)) * (self.positions > 0)[..., None]

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        """Mixed values [B, L, H, E]; each key/value head serves H / K query heads that follow one another."""
        if torch.is_grad_enabled() and q_BLHE.device.type == "cpu" and not self.dropout:
            return causal_attention(q_BLHE, k_BLKE, v_BLKE, self.sees)
        return F.scaled_dot_product_attention(
            q_BLHE.transpose(1, 2),
            k_BLKE.transpose(1, 2),
            v_BLKE.transpose(1, 2),
            attn_mask=self.sees,
            dropout_p=self.dropout,
            enable_gqa=k_BLKE.shape[2] != q_BLHE.shape[2],
        ).transpose(1, 2)
