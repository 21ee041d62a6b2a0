"""How sequences lie in rows of tokens: what each token may attend to, and which token comes before it.

All layouts have the same methods, so attention and the blocks work with any of them: rows of one sequence
each (`CausalRows`), consecutive documents (`stlm.model.documents`), a trie of sequences with shared prefixes
(`stlm.model.segments`), chunks of bytes (`stlm.model.packed_chunks`), and tokens that follow the tokens in a
cache (`stlm.model.cache`).

Shapes: B batch, L length, X any width, H query heads, K key/value heads, E head width; S selected tokens of
a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.fused_attention import fused_attention


class Selection(NamedTuple):
    """Some tokens of each row, in order.

    `index_BS` are the tokens' indices in the row. A row with fewer than S selected tokens ends with padding,
    where `kept_BS` is False (None: no padding).
    """

    index_BS: Tensor
    kept_BS: Tensor | None = None

    @classmethod
    def of(cls, chosen_BL: Tensor) -> Selection:
        """Select the tokens at which `chosen_BL` is True; S is the largest number of them in a row."""
        count_B = chosen_BL.sum(dim=1)
        S = int(count_B.max()) if len(count_B) else 0
        # A stable sort puts the chosen tokens first and keeps their order.
        index_BS = chosen_BL.int().argsort(dim=1, descending=True, stable=True)[:, :S]
        kept_BS = torch.arange(S, device=chosen_BL.device) < count_B[:, None]
        return cls(index_BS, None if bool(kept_BS.all()) else kept_BS)

    def take(self, x_BLX: Tensor) -> Tensor:
        """The selected tokens' vectors [B, S, X]."""
        return x_BLX.gather(1, self.index_BS[..., None].expand(-1, -1, x_BLX.shape[-1]))

    def add_to(self, x_BLX: Tensor, delta_BSX: Tensor) -> Tensor:
        """`x_BLX` with `delta_BSX` added at the selected tokens; the others stay unchanged to the bit."""
        if self.kept_BS is not None:
            delta_BSX = delta_BSX * self.kept_BS[..., None]
        index_BSX = self.index_BS[..., None].expand_as(delta_BSX)
        return x_BLX.scatter_add(1, index_BSX, delta_BSX.to(x_BLX.dtype))


class Layout(ABC):
    """What the tokens [B, L] of some rows may see of one another.

    `positions`: the tokens' positions in their sequences, a slice (the same for all rows) or [B, L].
    `in_rows`: whether each token attends to the tokens of its row up to itself, except those that `sees`
    [B, 1, L, L] excludes (None: none), and to no others; the training kernels compute this case only.
    """

    in_rows: ClassVar[bool] = False
    positions: slice | Tensor
    sees: Tensor | None = None

    @abstractmethod
    def before(self, x_BLX: Tensor) -> Tensor:
        """`x_BLX` at the token before each in its sequence; zeros at a sequence's first token."""

    @abstractmethod
    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, dropout: float = 0.0) -> Tensor:
        """Values [B, L, H, E], mixed by attention over the tokens that each token may see."""

    def layer(self, number: int) -> Layout:
        """The layout for layer `number`, from 0: a cache holds separate keys and values for each layer."""
        return self

    def select(self, selection: Selection) -> Layout:
        """The layout of the selected tokens only [B, S]. Raises NotImplementedError if there is none."""
        raise NotImplementedError(f"{type(self).__name__} selects no tokens")

    def rows(self, rows_R: Tensor) -> Layout:
        """The layout of the batch's rows `rows_R` [R]. Raises NotImplementedError if there is none."""
        raise NotImplementedError(f"{type(self).__name__} selects no rows")


class CausalRows(Layout):
    """One sequence in each row, from its first token on: each token sees those up to itself."""

    in_rows = True

    def __init__(self, length: int) -> None:
        self.positions = slice(length)

    def before(self, x_BLX: Tensor) -> Tensor:
        """See `Layout.before`."""
        return F.pad(x_BLX[:, :-1], (0, 0, 1, 0))

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`."""
        return attend_in_rows(q_BLHE, k_BLKE, v_BLKE, None, dropout)

    def select(self, selection: Selection) -> CausalRows:
        """See `Layout.select`: selected tokens keep their order, and each sees those up to itself."""
        return CausalRows(selection.index_BS.shape[1])

    def rows(self, rows_R: Tensor) -> CausalRows:
        """See `Layout.rows`."""
        return self


def attend_in_rows(
    q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, sees_B1LL: Tensor | None, dropout: float
) -> Tensor:
    """Causal attention within rows [B, L, H, E], over the keys that `sees_B1LL` allows."""
    q_BHLE, k_BKLE, v_BKLE = (x.transpose(1, 2) for x in (q_BLHE, k_BLKE, v_BLKE))
    return fused_attention(q_BHLE, k_BKLE, v_BKLE, sees_B1LL, dropout).transpose(1, 2)
