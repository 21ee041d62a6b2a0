"""How sequences lie in rows of tokens: what each token may attend to, and which token comes before it.

All layouts have the same methods, so attention and the blocks work with any of them: rows of one sequence
each (`CausalRows`), consecutive documents (`stlm.model.documents`), a trie of sequences with shared prefixes
(`stlm.model.segments`), chunks of bytes (`stlm.model.packed_chunks`), tokens that follow the tokens in a
cache (`stlm.model.cache`), and rows with a prefix that is visible in both directions (`stlm.model.prefixes`).

Shapes: B batch, L length, X any width, H query heads, K key/value heads, E head width; S selected tokens of
a row; M the length of rows with inserted places, C vectors inserted at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.fused_attention import fused_attention
from stlm.model.rotary import Rotary
from stlm.model.trie_attention import Sequences, attend_sequences

if TYPE_CHECKING:
    from stlm.model.encoder_decoder import Encoded


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


class Stretched:
    """Rows of L tokens that were made longer, to M places: after some of the tokens others are inserted.

    `layout`: that of the longer rows. `place_BL`: the index in them of each token; `last_BL`: of the last
    place inserted after it, or of the token itself if there is none. Where all rows are alike, their B is 1.
    Rows with less to insert than others end with padding.
    """

    def __init__(self, layout: Layout, length: int, place_BL: Tensor, last_BL: Tensor) -> None:
        self.layout, self.length = layout, length
        self.place_BL, self.last_BL = place_BL, last_BL

    def spread(self, x_BLX: Tensor, inserted_CX: Tensor | None = None) -> Tensor:
        """The longer rows [B, M, X]: `x_BLX` at the tokens, elsewhere zeros, or the C inserted vectors in
        turn, from the first one after each token."""
        B, _, X = x_BLX.shape
        if inserted_CX is None:
            rows_BMX = x_BLX.new_zeros(B, self.length, X)
        else:
            _, after_BM = owners(self.place_BL, self.length)
            which_BM = (after_BM - 1).clamp(min=0, max=len(inserted_CX) - 1)
            rows_BMX = F.embedding(which_BM, inserted_CX.to(x_BLX.dtype)).expand(B, -1, -1)
        return rows_BMX.scatter(1, self.place_BL[..., None].expand(B, -1, X), x_BLX)

    def take(self, x_BMX: Tensor) -> Tensor:
        """The vectors [B, L, X] at the last place after each token."""
        B, _, X = x_BMX.shape
        return x_BMX.gather(1, self.last_BL[..., None].expand(B, -1, X))

    def rows(self, rows_N: Tensor | None) -> Tensor | None:
        """The indices in the flattened [B M] that `take` reads for the indices `rows_N` in [B L]."""
        if rows_N is None:
            return None
        L = self.place_BL.shape[1]
        row_N = rows_N // L
        last_N = self.last_BL[row_N if len(self.last_BL) > 1 else 0, rows_N % L]
        return row_N * self.length + last_N


def token_places(inserted_BL: Tensor) -> tuple[Tensor, Tensor]:
    """`place_BL` and `last_BL` of `Stretched`, given how many places are inserted after each token."""
    last_BL = (inserted_BL + 1).cumsum(dim=1) - 1
    return last_BL - inserted_BL, last_BL


def owners(place_BL: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For each of `length` places [B, M]: the token that it belongs to, itself or the last one before, and
    how far it is after that token."""
    token_BL = torch.arange(place_BL.shape[1], device=place_BL.device).expand_as(place_BL)
    owner_BM = token_BL.new_zeros(len(place_BL), length).scatter(1, place_BL, token_BL).cummax(dim=1).values
    return owner_BM, torch.arange(length, device=place_BL.device) - place_BL.gather(1, owner_BM)


class Layout(ABC):
    """What the tokens [B, L] of some rows may see of one another.

    `positions`: the tokens' positions in their sequences, a slice (the same for all rows) or [B, L].
    `in_rows`: whether each token attends to the tokens of its row up to itself, except those that `sees`
    [B, 1, L, L] excludes (None: none), and to no others; the training kernels compute this case only. Where
    it does not, `sees` may allow later tokens.
    `answers` [B]: of each row, the index of the token after which an answer begins, -1 for none; None: no row
    has an answer. `encoded`: what an encoder made of a prefix, for the cross-attention of a decoder.
    """

    in_rows: ClassVar[bool] = False
    positions: slice | Tensor
    sees: Tensor | None = None
    answers: Tensor | None = None
    encoded: Encoded | None = None

    @abstractmethod
    def before(self, x_BLX: Tensor) -> Tensor:
        """`x_BLX` at the token before each in its sequence; zeros at a sequence's first token."""

    @abstractmethod
    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, dropout: float = 0.0) -> Tensor:
        """Values [B, L, H, E], mixed by attention over the tokens that each token may see."""

    def attend_projections(
        self, qkv_BLSE: Tensor, heads: int, rope: Rotary | None, rows_N: Tensor | None = None
    ) -> Tensor | None:
        """Attention for scoring, of H = `heads` queries, keys and values [B, L, S = H + 2 K, E] as projected.

        `rope`, the angles of the tokens, rotates queries and keys. Returns the mixed values [B, L, H, E], or
        [N, H, E] at the flat positions `rows_N`. None: there is no kernel for this layout, device or type, or
        gradients are wanted.
        """
        return None

    def layer(self, number: int) -> Layout:
        """The layout for layer `number`, from 0: a cache holds separate keys and values for each layer."""
        return self

    def select(self, selection: Selection) -> Layout:
        """The layout of the selected tokens only [B, S]. Raises NotImplementedError if there is none."""
        raise NotImplementedError(f"{type(self).__name__} selects no tokens")

    def rows(self, rows_R: Tensor) -> Layout:
        """The layout of the batch's rows `rows_R` [R]. Raises NotImplementedError if there is none."""
        raise NotImplementedError(f"{type(self).__name__} selects no rows")

    def stretch(self, inserted_BL: Tensor, length: int | None = None) -> Stretched:
        """The rows with so many places inserted after each token; they have positions, as tokens do.

        `length`: what the longest row will have, or more; None: the tensor's values are read, for which a GPU
        waits. B may be 1 if all rows are alike. Raises NotImplementedError if there is no such layout.
        """
        raise NotImplementedError(f"{type(self).__name__} has no room for inserted places")


class CausalRows(Layout):
    """One sequence in each row, from its first token on: each token sees those up to itself."""

    in_rows = True

    def __init__(self, length: int, answers: Tensor | None = None) -> None:
        self.positions, self.answers = slice(length), answers

    def before(self, x_BLX: Tensor) -> Tensor:
        """See `Layout.before`."""
        return F.pad(x_BLX[:, :-1], (0, 0, 1, 0))

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`."""
        return attend_in_rows(q_BLHE, k_BLKE, v_BLKE, None, dropout)

    def attend_projections(
        self, qkv_BLSE: Tensor, heads: int, rope: Rotary | None, rows_N: Tensor | None = None
    ) -> Tensor | None:
        """See `Layout.attend_projections`: each row is a sequence of its own."""
        B, L = qkv_BLSE.shape[:2]
        own_B = torch.full((B,), L)
        if rope is not None:
            rope = tuple(table.expand(B, L, 1, -1) for table in rope)
        return attend_sequences(qkv_BLSE, heads, Sequences(own_B, torch.zeros_like(own_B)), rope, rows_N)

    def select(self, selection: Selection) -> CausalRows:
        """See `Layout.select`: selected tokens keep their order, and each sees those up to itself."""
        return CausalRows(selection.index_BS.shape[1])

    def rows(self, rows_R: Tensor) -> CausalRows:
        """See `Layout.rows`."""
        return self

    def stretch(self, inserted_BL: Tensor, length: int | None = None) -> Stretched:
        """See `Layout.stretch`."""
        place_BL, last_BL = token_places(inserted_BL)
        length = 1 + int(last_BL.max()) if length is None else length
        return Stretched(CausalRows(length), length, place_BL, last_BL)


def attend_in_rows(
    q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, sees_B1LL: Tensor | None, dropout: float
) -> Tensor:
    """Attention within rows [B, L, H, E], over the keys that `sees_B1LL` allows; None: causal."""
    q_BHLE, k_BKLE, v_BKLE = (x.transpose(1, 2) for x in (q_BLHE, k_BLKE, v_BLKE))
    return fused_attention(q_BHLE, k_BKLE, v_BKLE, sees_B1LL, dropout).transpose(1, 2)
