"""A cache of the keys and values of all tokens read so far: one more token costs one token's work.

Shapes: B batch, L new tokens, N tokens read, new ones included, H query heads, K key/value heads, G = H / K
query heads a group, E head width, X = (H + 2 K) E.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.fused_attention import fused_attention
from stlm.model.layout import Layout, Selection, Stretched, token_places

if TYPE_CHECKING:
    from stlm.model.transformer import Transformer


class Cache(Layout):
    """Memory for the keys and values of a context's tokens: [layers, 2, B, K, places, E], allocated once.

    `of` makes it for a model. `layers`: as many as tokens pass, each pass of a block is one; None: those of
    `config`. `places`: of a row as long as the context, with what is inserted into it; None: the context.

    Call `extend(n)` before a forward pass of n tokens, to make room for them. `Transformer.hidden` takes the
    cache as its `layout`; it continues the positions and gives each layer its part of the cache. Layers may
    share weights, but they never share keys. The cache supports no gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        layers: int | None = None,
        places: int | None = None,
    ) -> None:
        layers, places = layers or config.layers, places or config.context
        shape = (layers, 2, batch, config.kv_heads, places, config.head_width)
        # Zeros, since a layer that gets some of the tokens also reads unwritten entries, with weight zero.
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        width = config.width + 2 * config.kv_heads * config.head_width
        # The last token's queries, keys and values before the shift, which the next token's shift needs.
        before = torch.zeros(layers, batch, 1, width, dtype=dtype, device=device)
        self._layers = [LayerCache(self, *tensors) for tensors in zip(self.kv, before, strict=True)]
        self._context = config.context
        self.clear()

    @classmethod
    def of(cls, model: Transformer, batch: int, device: torch.device) -> Cache:
        """A cache with as many layers and places as the model needs, whatever techniques made of it."""
        config = model.config
        return cls(config, batch, device, layers=len(model.blocks), places=model.most_places)

    @property
    def length(self) -> int:
        """The number of tokens held, at most the context."""
        return self.positions.stop

    def extend(self, tokens: int, answers: Tensor | None = None) -> Cache:
        """Make room for `tokens` more, which the next forward pass must bring. Returns the cache.

        `answers`: see `Layout`, among the new tokens.
        """
        context = self._context
        assert self.length + tokens <= context, f"{self.length} + {tokens} tokens, context {context}"
        self.positions = slice(self.length, self.length + tokens)
        self.places = slice(self.places.stop, self.places.stop + tokens)
        self.answers = answers
        return self

    def clear(self) -> None:
        """Remove all tokens."""
        # Of the tokens of the next forward pass: their positions in the text, and where layers keep them.
        self.positions = self.places = slice(0, 0)

    def layer(self, number: int) -> LayerCache:
        """The part of layer `number`, from 0."""
        return self._layers[number]

    def before(self, x_BLX: Tensor) -> Tensor:
        """Not defined for the whole cache: see `layer`."""
        raise NotImplementedError("a cache is each layer's own: use layer(number)")

    attend = before

    def stretch(self, inserted_BL: Tensor, length: int | None = None) -> Stretched:
        """See `Layout.stretch`: as many in each row. The cache keeps what is inserted like tokens."""
        place_BL, last_BL = token_places(inserted_BL)
        length = 1 + int(last_BL[0, -1])
        self.places = slice(self.places.start, self.places.start + length)
        return Stretched(_StretchedCache(self), length, place_BL, last_BL)


class _StretchedCache(Layout):
    """A cache whose positions are those of tokens and inserted places."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self.positions = cache, cache.places

    def layer(self, number: int) -> LayerCache:
        """See `Cache.layer`."""
        return self._cache.layer(number)

    before = attend = Cache.before


class LayerCache(Layout):
    """One layer's keys and values in a `Cache`: a new token sees all tokens held, up to itself."""

    def __init__(self, cache: Cache, kv_2BKNE: Tensor, before_B1X: Tensor) -> None:
        self._cache, self._before_B1X = cache, before_B1X
        self._k_BKNE, self._v_BKNE = kv_2BKNE
        # For a layer that gets only some of the tokens: how many it holds in each row.
        self._held_B = torch.zeros(len(before_B1X), dtype=torch.int64, device=before_B1X.device)

    @property
    def positions(self) -> slice:
        """See `Layout`."""
        return self._cache.places

    def before(self, x_BLX: Tensor) -> Tensor:
        """What `x_BLX` has at the token before each new one; zeros at the context's first token."""
        if self.positions.start == 0:
            before_BLX = F.pad(x_BLX[:, :-1], (0, 0, 1, 0))
        else:
            before_BLX = torch.cat([self._before_B1X, x_BLX[:, :-1]], dim=1)
        self._before_B1X.copy_(x_BLX[:, -1:])
        return before_BLX

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`. Stores the new tokens' keys and values."""
        assert not dropout, "a cache is for generation, which drops nothing"
        begin, end = self.positions.start, self.positions.stop
        B, L, H, E = q_BLHE.shape
        self._k_BKNE[:, :, begin:end] = k_BLKE.transpose(1, 2)
        self._v_BKNE[:, :, begin:end] = v_BLKE.transpose(1, 2)
        k_BKNE, v_BKNE = self._k_BKNE[:, :, :end], self._v_BKNE[:, :, :end]
        if L == 1:
            # The query heads of a group become queries of one head: this copies no keys and needs no mask.
            q_BKGE = q_BLHE.view(B, k_BKNE.shape[1], -1, E)
            return F.scaled_dot_product_attention(q_BKGE, k_BKNE, v_BKNE).reshape(B, L, H, E)
        sees_LN = None
        if begin:
            sees_LN = torch.ones(L, end, dtype=torch.bool, device=q_BLHE.device).tril(begin)
        y_BHLE = fused_attention(q_BLHE.transpose(1, 2), k_BKNE, v_BKNE, sees_LN)
        return y_BHLE.transpose(1, 2)

    def select(self, selection: Selection) -> _SelectedCache:
        """See `Layout.select`. The layer must get a selection of all tokens, and stores only the selected."""
        if self.positions.start == 0:
            self._held_B.zero_()
            self._before_B1X.zero_()
        return _SelectedCache(self, selection)


class _SelectedCache(Layout):
    """The selected new tokens of a layer, which see the stored tokens of their row."""

    def __init__(self, layer: LayerCache, selection: Selection) -> None:
        B, S = selection.index_BS.shape
        begin, index_BS = layer.positions.start, selection.index_BS
        self.positions = index_BS + begin
        self._keys, self._values, self._before_B1X = layer._k_BKNE, layer._v_BKNE, layer._before_B1X
        kept_BS = selection.kept_BS
        if kept_BS is None:
            kept_BS = torch.ones(B, S, dtype=torch.bool, device=index_BS.device)
        self._count_B = kept_BS.sum(dim=1)
        held_B = layer._held_B
        self._place_BS = (held_B[:, None] + torch.arange(S, device=index_BS.device)).clamp(
            max=self._keys.shape[2] - 1
        )
        self._kept_BS = kept_BS
        self._end = int((held_B + self._count_B).max())
        places_N = torch.arange(self._end, device=index_BS.device)
        self._sees_B1SN = (places_N <= self._place_BS[..., None])[:, None]
        held_B += self._count_B

    def before(self, x_BSX: Tensor) -> Tensor:
        """`x_BSX` at the selected token before each; zeros at the first token that the layer gets."""
        rows_BSX = torch.cat([self._before_B1X, x_BSX], dim=1)
        last_B11 = self._count_B[:, None, None].expand(-1, 1, x_BSX.shape[2])
        self._before_B1X.copy_(rows_BSX.gather(1, last_B11))
        return rows_BSX[:, :-1]

    def attend(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`. Stores the kept tokens' keys and values."""
        assert not dropout, "a cache is for generation, which drops nothing"
        rows_BS, places_BS = self._kept_BS.nonzero(as_tuple=True)
        target = (rows_BS, slice(None), self._place_BS[rows_BS, places_BS])
        self._keys[target] = k_BSKE[rows_BS, places_BS]
        self._values[target] = v_BSKE[rows_BS, places_BS]
        k_BKNE, v_BKNE = self._keys[:, :, : self._end], self._values[:, :, : self._end]
        return fused_attention(q_BSHE.transpose(1, 2), k_BKNE, v_BKNE, self._sees_B1SN).transpose(1, 2)
