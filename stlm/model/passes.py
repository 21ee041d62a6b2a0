"""Rows whose places are computed in several passes, each of which sees the keys and values of those before.

Unlike a cache they have gradients, and a pass may compute other places in each row.

Shapes: B rows, M places of a row, S of them in a pass, C of this pass and those before, H query heads, K
key/value heads, E head width, X any width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stlm.model.fused_attention import fused_attention
from stlm.model.layout import Layout, Selection


class Passes:
    """The passes over some rows. A place sees those of its sequence up to itself, which must be computed
    before it or with it.

    `positions_BM`: of each place in its sequence, from 0. `sequences_BM`: the number of its sequence, a
    consecutive part of the row.
    """

    def __init__(self, positions_BM: Tensor, sequences_BM: Tensor) -> None:
        self.positions_BM, self.sequences_BM = positions_BM, sequences_BM
        # Of the computed places: their indices in the row, and whether they are no padding of a pass.
        self.index_BC = positions_BM[:, :0]
        self.kept_BC = self.index_BC.bool()
        # For each place that was computed, where it stands in `index_BC`.
        self.column_BM = torch.zeros_like(positions_BM)
        # What layers keep of the computed places, [B, C, ...]: keys, values, and what a shift needs.
        self.held: dict[tuple[int, str], Tensor] = {}

    def next(self, selection: Selection) -> Pass:
        """The layout of a pass over the selected places, none of which was computed before."""
        return Pass(self, selection)

    def hold(self, layer: int, what: str, x_BSX: Tensor) -> Tensor:
        """Keep a layer's tensor of the current pass; returns those of all passes so far [B, C, ...]."""
        held = self.held.get((layer, what))
        self.held[layer, what] = x_BSX if held is None else torch.cat([held, x_BSX], dim=1)
        return self.held[layer, what]


class Pass(Layout):
    """Some places of the rows of `Passes`, [B, S]."""

    def __init__(self, passes: Passes, selection: Selection) -> None:
        index_BS, kept_BS = selection.index_BS, selection.kept_BS
        if kept_BS is None:
            kept_BS = torch.ones_like(index_BS, dtype=torch.bool)
        self.passes = passes
        self.positions = passes.positions_BM.gather(1, index_BS)
        begin, S = passes.index_BC.shape[1], index_BS.shape[1]
        own_S = torch.arange(begin, begin + S, device=index_BS.device)
        earlier_BS = passes.column_BM.gather(1, index_BS)
        passes.column_BM = passes.column_BM.scatter(1, index_BS, own_S.where(kept_BS, earlier_BS))
        passes.index_BC = torch.cat([passes.index_BC, index_BS], dim=1)
        passes.kept_BC = torch.cat([passes.kept_BC, kept_BS], dim=1)
        same_BSC = _same(passes.sequences_BM, index_BS, passes.index_BC)
        sees_BSC = same_BSC & passes.kept_BC[:, None] & (passes.index_BC[:, None] <= index_BS[..., None])
        # Padding, which nothing else sees, sees itself: over no key at all, the softmax is not defined.
        itself_SC = torch.arange(begin + S, device=index_BS.device) == own_S[:, None]
        self.sees_B1SC = (sees_BSC | itself_SC)[:, None]
        self.before_BS = passes.column_BM.gather(1, (index_BS - 1).clamp(min=0))

    def layer(self, number: int) -> _PassLayer:
        """See `Layout.layer`."""
        return _PassLayer(self, number)

    def before(self, x_BLX: Tensor) -> Tensor:
        """Not defined for the whole pass: see `layer`."""
        raise NotImplementedError("a pass has keys and values of each layer: use layer(number)")

    attend = before


class _PassLayer(Layout):
    """A layer's part of a `Pass`."""

    def __init__(self, one: Pass, number: int) -> None:
        self._pass, self._number = one, number
        self.positions = one.positions

    def before(self, x_BSX: Tensor) -> Tensor:
        """See `Layout.before`."""
        x_BCX = self._pass.passes.hold(self._number, "shift", x_BSX)
        before_BSX = x_BCX.gather(1, self._pass.before_BS[..., None].expand_as(x_BSX))
        return before_BSX * (self.positions > 0)[..., None]

    def attend(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`. Keeps the keys and values."""
        k_BCKE = self._pass.passes.hold(self._number, "keys", k_BSKE)
        v_BCKE = self._pass.passes.hold(self._number, "values", v_BSKE)
        q_BHSE, k_BKCE, v_BKCE = (x.transpose(1, 2) for x in (q_BSHE, k_BCKE, v_BCKE))
        return fused_attention(q_BHSE, k_BKCE, v_BKCE, self._pass.sees_B1SC, dropout).transpose(1, 2)


def _same(sequences_BM: Tensor, one_BS: Tensor, other_BC: Tensor) -> Tensor:
    """[B, S, C]: whether two places are of one sequence."""
    return sequences_BM.gather(1, one_BS)[..., None] == sequences_BM.gather(1, other_BC)[:, None]
