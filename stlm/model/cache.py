"""A cache of the keys and values of all tokens read so far: one more token costs one token's work.

Shapes: B batch, L new tokens, N tokens read, new ones included, H query heads, K key/value heads, G = H / K
query heads a group, E head width, X = (H + 2 K) E.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.fused_attention import fused_attention
from stlm.model.layout import Layout, Selection, Stretched, token_places

if TYPE_CHECKING:
    from stlm.model.encoder_decoder import Encoded
    from stlm.model.transformer import Transformer


class Cache(Layout):
    """Memory for the keys and values of a context's tokens: [layers, 2, B, K, places, E], allocated once.

    `of` makes it for a model. `layers`: the length of `model.blocks`, where each pass of a block counts;
    None: those of `config`. `places`: of a row as long as the context, with what is inserted into it; None:
    the context.

    Call `extend(n)` before a forward pass of n tokens, to make room for them. `Transformer.hidden` takes the
    cache as its `layout`; it continues the positions and gives each layer its part of the cache. Layers may
    share weights, but they never share keys. The first layers may read tokens before the others do
    (`revisit`), and the last tokens may be removed (`crop`). The cache supports no gradients.
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
        # Queries, keys and values before the shift, of which the next token's shift needs the last. All are
        # kept, since any token may become the last when the tokens after it are removed.
        width = config.width + 2 * config.kv_heads * config.head_width
        kept = places if config.qkv_shift else 0
        self.unshifted = torch.zeros(layers, batch, kept, width, dtype=dtype, device=device)
        self._layers = [LayerCache(self, *tensors) for tensors in zip(self.kv, self.unshifted, strict=True)]
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

    def revisit(self, begin: int, end: int) -> Cache:
        """The next forward pass brings the tokens at positions `begin` to `end` - 1 for some of the layers,
        which hold those before `begin`, as after a pass of the first layers alone. Returns the cache.

        As `crop`, it is for models that insert nothing, so that tokens lie at their positions.
        """
        assert self.places == self.positions, "what is inserted between tokens would be lost"
        self.positions = self.places = slice(begin, end)
        return self

    def crop(self, length: int) -> None:
        """Remove all tokens after the first `length`; layers that hold fewer tokens stay as they are."""
        assert self.places == self.positions, "what is inserted between tokens would be lost"
        self.positions = self.places = slice(length, length)
        for layer in self._layers:
            layer.crop(length)

    def skip(self, tokens: int) -> None:
        """The first `tokens` of the next forward pass, the first of a text, reach no layer that keeps them:
        an encoder reads them. Positions count them."""
        assert self.positions.start == 0, "only a text's first tokens are encoded"
        self.positions = slice(tokens, self.positions.stop)
        self.places = slice(0, self.places.stop - tokens)

    def clear(self) -> None:
        """Remove all tokens."""
        self.encoded = None
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
        assert bool((inserted_BL == inserted_BL[:1]).all()), "rows of a cache are equally long"
        place_BL, last_BL = token_places(inserted_BL)
        length = 1 + int(last_BL[0, -1])
        self.places = slice(self.places.start, self.places.start + length)
        return Stretched(_StretchedCache(self), length, place_BL, last_BL)

    def at(self, begin: int, end: int) -> Layout:
        """The layout of a pass over these places alone, of those that new tokens and what is inserted take.

        Such passes follow one another; the next tokens go on where the last of them ends.
        """
        self.places = slice(begin, end)
        return _StretchedCache(self)


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

    def __init__(self, cache: Cache, kv_2BKNE: Tensor, unshifted_BNX: Tensor) -> None:
        # A weak reference: a cycle would keep the memory until Python's collector happens to run.
        self._cache: Cache = weakref.proxy(cache)
        self._unshifted_BNX = unshifted_BNX
        self._k_BKNE, self._v_BKNE = kv_2BKNE
        # For a layer that gets only some of the tokens: how many it holds in each row, and their positions.
        B, _, N, _ = self._k_BKNE.shape
        self._held_B = torch.zeros(B, dtype=torch.int64, device=unshifted_BNX.device)
        self._positions_BN = torch.zeros(B, N, dtype=torch.int64, device=unshifted_BNX.device)
        self._selects = False

    @property
    def positions(self) -> slice:
        """See `Layout`."""
        return self._cache.places

    @property
    def encoded(self) -> Encoded | None:
        """See `Layout`."""
        return self._cache.encoded

    def before(self, x_BLX: Tensor) -> Tensor:
        """What `x_BLX` has at the token before each new one; zeros at the context's first token."""
        begin, end = self.positions.start, self.positions.stop
        self._unshifted_BNX[:, begin:end] = x_BLX
        if begin == 0:
            return F.pad(x_BLX[:, :-1], (0, 0, 1, 0))
        return self._unshifted_BNX[:, begin - 1 : end - 1]

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
        self._selects = True
        if self.positions.start == 0:
            self._held_B.zero_()
        return _SelectedCache(self, selection)

    def crop(self, length: int) -> None:
        """See `Cache.crop`."""
        if self._selects:  # otherwise tokens lie at their positions
            N = self._positions_BN.shape[1]
            held_BN = torch.arange(N, device=self._held_B.device) < self._held_B[:, None]
            self._held_B.copy_((held_BN & (self._positions_BN < length)).sum(dim=1))


class _SelectedCache(Layout):
    """The selected new tokens of a layer, which see the stored tokens of their row."""

    def __init__(self, layer: LayerCache, selection: Selection) -> None:
        B, S = selection.index_BS.shape
        begin, index_BS = layer.positions.start, selection.index_BS
        self.positions = index_BS + begin
        self._keys, self._values, self._unshifted_BNX = layer._k_BKNE, layer._v_BKNE, layer._unshifted_BNX
        kept_BS = selection.kept_BS
        if kept_BS is None:
            kept_BS = torch.ones(B, S, dtype=torch.bool, device=index_BS.device)
        count_B = kept_BS.sum(dim=1)
        held_B = layer._held_B
        self._place_BS = (held_B[:, None] + torch.arange(S, device=index_BS.device)).clamp(
            max=self._keys.shape[2] - 1
        )
        self._kept = kept_BS.nonzero(as_tuple=True)
        layer._positions_BN[self._kept[0], self._place_BS[self._kept]] = self.positions[self._kept]
        self._end = int((held_B + count_B).max())
        places_N = torch.arange(self._end, device=index_BS.device)
        self._sees_B1SN = (places_N <= self._place_BS[..., None])[:, None]
        self._before_B = held_B - 1
        held_B += count_B

    def before(self, x_BSX: Tensor) -> Tensor:
        """`x_BSX` at the selected token before each; zeros at the first token that the layer gets."""
        last_B11 = self._before_B.clamp(min=0)[:, None, None]
        last_B1X = self._unshifted_BNX.gather(1, last_B11.expand(-1, 1, x_BSX.shape[2]))
        last_B1X = last_B1X * (self._before_B >= 0)[:, None, None]
        self._unshifted_BNX[self._kept[0], self._place_BS[self._kept]] = x_BSX[self._kept]
        return torch.cat([last_B1X, x_BSX[:, :-1]], dim=1)

    def attend(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`. Stores the kept tokens' keys and values."""
        assert not dropout, "a cache is for generation, which drops nothing"
        target = (self._kept[0], slice(None), self._place_BS[self._kept])
        self._keys[target], self._values[target] = k_BSKE[self._kept], v_BSKE[self._kept]
        k_BKNE, v_BKNE = self._keys[:, :, : self._end], self._values[:, :, : self._end]
        return fused_attention(q_BSHE.transpose(1, 2), k_BKNE, v_BKNE, self._sees_B1SN).transpose(1, 2)
