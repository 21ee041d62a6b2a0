"""Tokens beyond the vocabulary, which a model reads and never predicts: a mask, sentinels, markers.

Shapes: B batch, L length, D width, N added tokens, V vocabulary, X any width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.projection import INITIAL_STD


class AddedEmbeddings(nn.Module):
    """The embeddings of N added tokens, whose ids follow the vocabulary's: V to V + N - 1."""

    parameter_group: ClassVar[str] = "added tokens"

    def __init__(self, count: int, vocabulary: int, width: int) -> None:
        super().__init__()
        self.count, self.vocabulary = count, vocabulary
        # Flat, N D numbers: optimizers treat vectors as gains, without weight decay.
        self.weight = nn.Parameter(torch.empty(count * width))
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def are_known(self, tokens_BL: Tensor) -> Tensor:
        """Whether each token [B, L] is one of the vocabulary."""
        return tokens_BL < self.vocabulary

    def in_vocabulary(self, tokens_BL: Tensor) -> Tensor:
        """The tokens, with any id of the vocabulary for those that are added."""
        return tokens_BL.clamp(max=self.vocabulary - 1)

    def put(self, x_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
        """`x_BLD` with the embeddings of the added tokens at their places, unchanged to the bit elsewhere.

        Raises IndexError, on a CPU, for an id that no added token has.
        """
        added_BLD = F.embedding((tokens_BL - self.vocabulary).clamp(min=0), self.weight.view(self.count, -1))
        return torch.where(self.are_known(tokens_BL)[..., None], x_BLD, added_BLD.to(x_BLD.dtype))

    def without(self, x_BLX: Tensor, tokens_BL: Tensor) -> Tensor:
        """`x_BLX` with zeros at the added tokens."""
        return x_BLX * self.are_known(tokens_BL)[..., None]
