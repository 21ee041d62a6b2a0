"""A cache of keys and values for rows of different lengths, some of which read on in each forward pass.

Shapes: B rows of the cache, R of them in a pass, P positions of the context, C keys up to the last new token,
N tokens of a packed pass, H query heads, K key/value heads, G = H / K query heads a group, E head width,
X = (H + 2 K) E.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.layout import Layout
from stlm.model.segments import Segments


class RowCache:
    """Memory for the keys and values of B rows: [layers, 2, B, K, context, E], allocated once."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        self.kv = torch.zeros(
            config.layers, 2, batch, config.kv_heads, config.context, config.head_width, device=device
        )
        # See `stlm.model.cache.Cache`.
        width = config.width + 2 * config.kv_heads * config.head_width
        kept = config.context if config.qkv_shift else 0
        self.unshifted = torch.zeros(config.layers, batch, kept, width, device=device)

    def extend(self, rows_R: Tensor, begin_R: Tensor) -> RowPass:
        """The layout of a forward pass of one more token of some rows, which hold `begin_R`: [R, 1]."""
        return RowPass(self, rows_R, begin_R)

    def begin(self, rows: Sequence[int], lengths: Sequence[int]) -> PackedPass:
        """The layout of a forward pass of the first tokens of some rows, one after the other in one row.

        `lengths`: how many of each. What the rows held is overwritten.
        """
        return PackedPass(self, rows, lengths)


class RowPass(Layout):
    """A new token of some rows of a `RowCache`, [R, 1]: each sees those of its row up to itself."""

    def __init__(self, cache: RowCache, rows_R: Tensor, begin_R: Tensor) -> None:
        self._cache = cache
        self.positions = begin_R[:, None]
        self.rows_R1 = rows_R[:, None]
        # All of them at once, in order: then keys need not be copied.
        B = cache.kv.shape[2]
        self.all_rows = len(rows_R) == B and bool((rows_R == torch.arange(B, device=rows_R.device)).all())
        end = int(begin_R.max()) + 1
        self.sees_R11C = (torch.arange(end, device=begin_R.device) <= self.positions)[:, None, None]

    def layer(self, number: int) -> _LayerPass:
        """See `Layout.layer`."""
        return _LayerPass(self, self._cache.kv[number], self._cache.unshifted[number])

    def before(self, x_BLX: Tensor) -> Tensor:
        """Not defined for the whole cache: see `layer`."""
        raise NotImplementedError("a cache is each layer's own: use layer(number)")

    attend = before


class _LayerPass(Layout):
    """A layer's part of a `RowPass`."""

    def __init__(self, rows: RowPass, kv_2BKPE: Tensor, unshifted_BPX: Tensor) -> None:
        self._rows, self.positions = rows, rows.positions
        self._k_BKPE, self._v_BKPE = kv_2BKPE
        self._unshifted_BPX = unshifted_BPX

    def before(self, x_R1X: Tensor) -> Tensor:
        """See `Layout.before`."""
        rows_R1 = self._rows.rows_R1
        before_R1X = self._unshifted_BPX[rows_R1, (self.positions - 1).clamp(min=0)]
        self._unshifted_BPX[rows_R1, self.positions] = x_R1X
        return before_R1X * (self.positions > 0)[..., None]

    def attend(self, q_R1HE: Tensor, k_R1KE: Tensor, v_R1KE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`. Stores the new tokens' keys and values."""
        assert not dropout, "a cache is for generation, which drops nothing"
        rows = self._rows
        # The indices are of the first and third dimension: [R, 1, K, E].
        self._k_BKPE[rows.rows_R1, :, self.positions] = k_R1KE
        self._v_BKPE[rows.rows_R1, :, self.positions] = v_R1KE
        R, _, H, E = q_R1HE.shape
        C = rows.sees_R11C.shape[-1]
        k_RKCE, v_RKCE = self._k_BKPE[:, :, :C], self._v_BKPE[:, :, :C]
        if not rows.all_rows:
            k_RKCE, v_RKCE = k_RKCE[rows.rows_R1[:, 0]], v_RKCE[rows.rows_R1[:, 0]]
        # The query heads of a group become queries of one head, as in `stlm.model.cache`.
        q_RKGE = q_R1HE.view(R, k_RKCE.shape[1], -1, E)
        y_RKGE = F.scaled_dot_product_attention(q_RKGE, k_RKCE, v_RKCE, attn_mask=rows.sees_R11C)
        return y_RKGE.reshape(R, 1, H, E)


class PackedPass(Layout):
    """The first tokens of some rows of a `RowCache`, consecutive and without padding: [1, N]."""

    def __init__(self, cache: RowCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        self._cache, device = cache, cache.kv.device
        ends = np.cumsum(lengths)
        positions_N = np.concatenate([np.arange(length) for length in lengths])
        paths = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self.segments = Segments(positions_N, list(zip(lengths, paths, strict=True)), device)
        self.positions = self.segments.positions
        self.rows_1N = torch.tensor(rows, device=device).repeat_interleave(
            torch.tensor(lengths, device=device)
        )[None]

    def layer(self, number: int) -> _PackedLayer:
        """See `Layout.layer`."""
        return _PackedLayer(self, self._cache.kv[number], self._cache.unshifted[number])

    def before(self, x_BLX: Tensor) -> Tensor:
        """Not defined for the whole cache: see `layer`."""
        raise NotImplementedError("a cache is each layer's own: use layer(number)")

    attend = before


class _PackedLayer(Layout):
    """A layer's part of a `PackedPass`."""

    def __init__(self, packed: PackedPass, kv_2BKPE: Tensor, unshifted_BPX: Tensor) -> None:
        self._segments, self._rows_1N, self.positions = packed.segments, packed.rows_1N, packed.positions
        self._k_BKPE, self._v_BKPE = kv_2BKPE
        self._unshifted_BPX = unshifted_BPX

    def before(self, x_1NX: Tensor) -> Tensor:
        """See `Layout.before`."""
        self._unshifted_BPX[self._rows_1N, self.positions] = x_1NX
        return self._segments.before(x_1NX)

    def attend(self, q_1NHE: Tensor, k_1NKE: Tensor, v_1NKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`. Stores the tokens' keys and values."""
        # The indices are of the first and third dimension: [1, N, K, E].
        self._k_BKPE[self._rows_1N, :, self.positions] = k_1NKE
        self._v_BKPE[self._rows_1N, :, self.positions] = v_1NKE
        return self._segments.attend(q_1NHE, k_1NKE, v_1NKE, dropout)
