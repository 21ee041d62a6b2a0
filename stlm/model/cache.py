"""Keys and values of the tokens read so far, so that one more token costs one token's work.

Shapes: B batch, L new tokens, N tokens read, new ones included, H query heads, K key/value heads, G = H / K
query heads a group, E head width, X = (H + 2 K) E.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.fused_attention import fused_attention


class Cache:
    """Memory for the keys and values of a context's tokens: [layers, 2, B, K, context, E], allocated once.

    `extend(n)` before a forward pass makes room for the n tokens that it brings; `Transformer.hidden` then
    takes the cache for its `segments`, numbers the tokens on from those before, and hands each layer its own
    part, by the layer's number: layers may share their weights, never their keys. Nothing here is for
    gradients.
    """

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        shape = (config.layers, 2, batch, config.kv_heads, config.context, config.head_width)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        width = config.width + 2 * config.kv_heads * config.head_width
        # What the shift of queries, keys and values needs of the last token, before that shift.
        before = torch.zeros(config.layers, batch, 1, width, dtype=dtype, device=device)
        self._layers = [LayerCache(self, *own) for own in zip(self.kv, before, strict=True)]
        self.positions = slice(0, 0)  # of the tokens of the forward pass to come

    @property
    def length(self) -> int:
        """Tokens held, at most the context."""
        return self.positions.stop

    def extend(self, tokens: int) -> Cache:
        """Make room for `tokens` more, which the next forward pass must bring. Returns the cache."""
        context = self.kv.shape[4]
        assert self.length + tokens <= context, f"{self.length} + {tokens} tokens, context {context}"
        self.positions = slice(self.length, self.length + tokens)
        return self

    def clear(self) -> None:
        """Forget all tokens."""
        self.positions = slice(0, 0)

    def layer(self, number: int) -> LayerCache:
        """The part of layer `number`, from 0."""
        return self._layers[number]


class LayerCache:
    """One layer's keys and values in a `Cache`, and attention over them."""

    def __init__(self, cache: Cache, kv_2BKNE: Tensor, before_B1X: Tensor) -> None:
        self._cache, self._before_B1X = cache, before_B1X
        self._k_BKNE, self._v_BKNE = kv_2BKNE

    def before(self, x_BLX: Tensor) -> Tensor:
        """What `x_BLX` has at the token before each new one; zeros at the context's first token."""
        if self._cache.positions.start == 0:
            before_BLX = F.pad(x_BLX[:, :-1], (0, 0, 1, 0))
        else:
            before_BLX = torch.cat([self._before_B1X, x_BLX[:, :-1]], dim=1)
        self._before_B1X.copy_(x_BLX[:, -1:])
        return before_BLX

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        """Hold the new tokens' keys and values; what they mix [B, L, H, E] of theirs and of earlier ones."""
        begin, end = self._cache.positions.start, self._cache.positions.stop
        B, L, H, E = q_BLHE.shape
        self._k_BKNE[:, :, begin:end] = k_BLKE.transpose(1, 2)
        self._v_BKNE[:, :, begin:end] = v_BLKE.transpose(1, 2)
        k_BKNE, v_BKNE = self._k_BKNE[:, :, :end], self._v_BKNE[:, :, :end]
        if L == 1:
            # A group's query heads are as many queries of one head: no copy of keys, and no mask.
            q_BKGE = q_BLHE.view(B, k_BKNE.shape[1], -1, E)
            return F.scaled_dot_product_attention(q_BKGE, k_BKNE, v_BKNE).reshape(B, L, H, E)
        sees_LN = None
        if begin:
            sees_LN = torch.ones(L, end, dtype=torch.bool, device=q_BLHE.device).tril(begin)
        y_BHLE = fused_attention(q_BLHE.transpose(1, 2), k_BKNE, v_BKNE, sees_LN)
        return y_BHLE.transpose(1, 2)
