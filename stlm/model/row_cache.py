"""A cache of keys and values for rows of different lengths, some of which read on in each forward pass.

Shapes: B rows of the cache, R of them in a pass, L new tokens, N positions of the context, C keys up to the
last new token, H query heads, K key/value heads, G = H / K query heads a group, E head width,
X = (H + 2 K) E.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.fused_attention import fused_attention
from stlm.model.layout import Layout


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

    def extend(self, rows_R: Tensor, begin_R: Tensor, tokens: int) -> RowPass:
        """The layout of a forward pass of `tokens` more tokens of some rows, which hold `begin_R`.

        Rows with fewer new tokens end with padding, which later passes overwrite.
        """
        return RowPass(self, rows_R, begin_R, tokens)


class RowPass(Layout):
    """The new tokens [R, L] of some rows of a `RowCache`: each sees those of its row up to itself."""

    def __init__(self, cache: RowCache, rows_R: Tensor, begin_R: Tensor, tokens: int) -> None:
        self._cache = cache
        self.positions = begin_R[:, None] + torch.arange(tokens, device=begin_R.device)
        self.rows_R1 = rows_R[:, None]
        self.begin_R11 = begin_R[:, None, None]
        # All of them at once, in order: then keys need not be copied.
        B = cache.kv.shape[2]
        self.all_rows = len(rows_R) == B and bool((rows_R == torch.arange(B, device=rows_R.device)).all())
        self.from_start = not bool(begin_R.any())
        end = int(begin_R.max()) + tokens
        self.sees_R1LC = (torch.arange(end, device=begin_R.device) <= self.positions[..., None])[:, None]

    def layer(self, number: int) -> _LayerPass:
        """See `Layout.layer`."""
        return _LayerPass(self, self._cache.kv[number], self._cache.unshifted[number])

    def before(self, x_BLX: Tensor) -> Tensor:
        """Not defined for the whole cache: see `layer`."""
        raise NotImplementedError("a cache is each layer's own: use layer(number)")

    attend = before


class _LayerPass(Layout):
    """A layer's part of a `RowPass`."""

    def __init__(self, rows: RowPass, kv_2BKNE: Tensor, unshifted_BNX: Tensor) -> None:
        self._rows, self.positions = rows, rows.positions
        self._k_BKNE, self._v_BKNE = kv_2BKNE
        self._unshifted_BNX = unshifted_BNX

    def before(self, x_RLX: Tensor) -> Tensor:
        """See `Layout.before`."""
        rows = self._rows
        first_R1X = self._unshifted_BNX[rows.rows_R1, (self.positions[:, :1] - 1).clamp(min=0)]
        self._unshifted_BNX[rows.rows_R1, self.positions] = x_RLX
        return torch.cat([first_R1X * (rows.begin_R11 > 0), x_RLX[:, :-1]], dim=1)

    def attend(self, q_RLHE: Tensor, k_RLKE: Tensor, v_RLKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`. Stores the new tokens' keys and values."""
        assert not dropout, "a cache is for generation, which drops nothing"
        rows = self._rows
        # The indices are of the first and third dimension: [R, L, K, E].
        self._k_BKNE[rows.rows_R1, :, self.positions] = k_RLKE
        self._v_BKNE[rows.rows_R1, :, self.positions] = v_RLKE
        R, L, H, E = q_RLHE.shape
        if rows.from_start:
            new = (x.transpose(1, 2) for x in (q_RLHE, k_RLKE, v_RLKE))
            return fused_attention(*new).transpose(1, 2)
        C = rows.sees_R1LC.shape[-1]
        k_RKCE, v_RKCE = self._k_BKNE[:, :, :C], self._v_BKNE[:, :, :C]
        if not rows.all_rows:
            k_RKCE, v_RKCE = k_RKCE[rows.rows_R1[:, 0]], v_RKCE[rows.rows_R1[:, 0]]
        if L == 1:
            # The query heads of a group become queries of one head, as in `stlm.model.cache`.
            q_RKGE = q_RLHE.view(R, k_RKCE.shape[1], -1, E)
            y_RKGE = F.scaled_dot_product_attention(q_RKGE, k_RKCE, v_RKCE, attn_mask=rows.sees_R1LC)
            return y_RKGE.reshape(R, L, H, E)
        return fused_attention(q_RLHE.transpose(1, 2), k_RKCE, v_RKCE, rows.sees_R1LC).transpose(1, 2)
