"""An encoder-decoder: its first blocks read the beginning of a row in both directions, the others the rest.

Vaswani et al. (2017), section 3.1; Elfeki et al. (2025), "Return of the Encoder: Maximizing Parameter
Efficiency for SLMs", arXiv 2501.16273.

Tensor names as in stlm.model.transformer; P places of the encoder, S of the decoder, N flat positions.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.block import NORMS, Attention, Block
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.flops import children_flops, forward_flops
from stlm.model.fused_attention import fused_attention
from stlm.model.layout import CausalRows, Layout
from stlm.model.prefixes import Prefixes
from stlm.model.projection import INITIAL_STD, Dense, output_scale
from stlm.model.rotary import Rotary, rotate
from stlm.model.transformer import Transformer


class PrefixRows(CausalRows):
    """Rows of L tokens that begin with a prefix of `prefix_B` [B] tokens, at least one each.

    `encoded` and `decoded`: the places of the encoder and of the decoder, at least the longest prefix and one
    more than the longest rest. They make the work independent of the prefixes, which are then not read off
    the device.
    """

    def __init__(self, length: int, prefix_B: Tensor, encoded: int, decoded: int) -> None:
        super().__init__(length, prefix_B - 1)
        self.prefix_B, self.encoded_places, self.decoded_places = prefix_B, encoded, decoded

    @classmethod
    def of(cls, layout: Layout | None, tokens_BL: Tensor) -> PrefixRows:
        """The rows in which what is before an answer (`Layout.answers`) is the prefix, or the first token
        where there is no answer. Raises NotImplementedError if rows are not one sequence each."""
        if isinstance(layout, cls):
            return layout
        if layout is not None and type(layout) is not CausalRows:
            raise NotImplementedError(
                f"an encoder-decoder reads one sequence in each row, not {type(layout).__name__}"
            )
        B, L = tokens_BL.shape
        if layout is None or layout.answers is None:
            return cls(L, torch.ones(B, dtype=torch.int64, device=tokens_BL.device), 1, L)
        prefix_B = layout.answers.clamp(min=0) + 1
        shortest, longest = (int(bound) for bound in prefix_B.aminmax())
        return cls(L, prefix_B, longest, L - shortest + 1)

    def rows(self, rows_R: Tensor) -> PrefixRows:
        """See `Layout.rows`."""
        length = self.positions.stop
        return PrefixRows(length, self.prefix_B[rows_R], self.encoded_places, self.decoded_places)


class Encoded:
    """The residual stream [B, P, D] after the encoder, as the decoder's cross-attention reads it.

    A row's places after its `prefix_B` [B] tokens are padding, which is not seen. `kept`: the keys and values
    of each cross-attention that has read the stream, which later tokens read again.
    """

    def __init__(self, x_BPD: Tensor, rope: Rotary | None, prefix_B: Tensor) -> None:
        self.x_BPD, self.rope = x_BPD, rope
        place_P = torch.arange(x_BPD.shape[1], device=x_BPD.device)
        self.sees_B11P = (place_P < prefix_B[:, None])[:, None, None]
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}


class DecodedRows(CausalRows):
    """The decoder's places [B, S]: their `positions` in the rows, and what they see of the encoder."""

    def __init__(self, positions_BS: Tensor, encoded: Encoded) -> None:
        super().__init__(positions_BS.shape[1])
        self.positions, self.encoded = positions_BS, encoded


class CrossAttention(Attention):
    """Attention of the decoder's places to the encoder's outputs, at the positions that they have in the row.

    Its matrices are dense, and its own in each block, whatever `model.low_rank`, `lora` and `sharing` are.
    """

    parameter_group: ClassVar[str] = "cross-attention"
    parameter_groups: ClassVar[dict[str, str]] = {"norm": "norms", "q_gain": "norms", "k_gain": "norms"}

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # Attention's makes the matrices of tokens that see one another
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        key_value = config.kv_heads * config.head_width
        self.joint_rows = {"kv": (key_value, key_value)}
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.norm.narrow = True
        self.q = Dense(config.width, config.width)
        self.kv = Dense(config.width, 2 * key_value)
        self.out = Dense(config.width, config.width)
        for matrix, scale in ((self.q, 1.0), (self.kv, 1.0), (self.out, output_scale(config))):
            matrix.initialize(INITIAL_STD * scale)
        self.q_gain = self.k_gain = None
        if config.qk_norm:
            self.q_gain = nn.Parameter(torch.ones(self.head_width))
            self.k_gain = nn.Parameter(torch.ones(self.head_width))
        self.norm_eps = config.norm_eps
        self.dropout = config.attention_dropout
        self.scheduled, self.dropout_now = False, self.dropout

    def flops(self, length: float) -> float:
        """Forward FLOPs with a prefix of one token, as text without a context has it."""
        return self.flops_between(1, length)

    def flops_between(self, encoded: float, decoded: float) -> float:
        """Forward FLOPs for so many places of the encoder and of the decoder."""
        products = 4 * encoded * decoded * self.heads * self.head_width
        reading = forward_flops(self.q, decoded) + forward_flops(self.out, decoded)
        return reading + forward_flops(self.kv, encoded) + products

    def forward(self, x_BSD: Tensor, rope: Rotary | None, encoded: Encoded) -> Tensor:
        """Outputs [B, S, D]. `rope`: the angles of the decoder's places."""
        B, S, D = x_BSD.shape
        q_BSHE = self.q(x_BSD).view(B, S, -1, self.head_width)
        q_BSHE = self._at_positions(q_BSHE, self.q_gain, rope)
        if self not in encoded.kept:
            kv_BPX = self.kv(self.norm(encoded.x_BPD))
            k_BPKE, v_BPKE = kv_BPX.view(B, -1, 2 * self.kv_heads, self.head_width).chunk(2, dim=2)
            encoded.kept[self] = self._at_positions(k_BPKE, self.k_gain, encoded.rope), v_BPKE
        q_BHSE, k_BKPE, v_BKPE = (x.transpose(1, 2) for x in (q_BSHE, *encoded.kept[self]))
        dropout = self.dropout_now if self.training else 0.0
        sees_B1SP = encoded.sees_B11P.expand(-1, -1, S, -1)
        y_BHSE = fused_attention(q_BHSE, k_BKPE, v_BKPE, sees_B1SP, dropout)
        return self.out(y_BHSE.transpose(1, 2).reshape(B, S, D))

    def _at_positions(self, x_BLHE: Tensor, gain_E: Tensor | None, rope: Rotary | None) -> Tensor:
        """Queries or keys, normalized if there are gains, and rotated by the angles of their positions."""
        if gain_E is not None:
            normal_BLHE = F.rms_norm(x_BLHE, (self.head_width,), eps=self.norm_eps)
            x_BLHE = (normal_BLHE * gain_E).to(x_BLHE.dtype)
        return x_BLHE if rope is None else rotate(x_BLHE, *rope)


class DecoderBlock(Block):
    """A block with cross-attention between its attention and its feed-forward network.

    It is made of the modules of another block, under the same names.
    """

    parameter_groups: ClassVar[dict[str, str]] = {**Block.parameter_groups, "cross_norm": "norms"}

    def __init__(self, block: Block, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # Block's would draw new weights
        self.attention_norm, self.attention = block.attention_norm, block.attention
        self.cross_norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.cross_norm.narrow = True
        self.cross = CrossAttention(config)
        self.ffn_norm, self.ffn, self.dropout = block.ffn_norm, block.ffn, block.dropout

    def forward(
        self,
        x_BLD: Tensor,
        rope: Rotary | None,
        layout: Layout,
        rows_N: Tensor | None = None,
        added_BLX: Tensor | None = None,
    ) -> Tensor:
        """As `Block.forward`, at the decoder's places; `layout` has what they see of the encoder."""
        mixed_BLD = self.attention(self.attention_norm(x_BLD), rope, layout, None, added_BLX)
        x = x_BLD + self.dropout(mixed_BLD)
        crossed = self.cross(self.cross_norm(x), rope, layout.encoded)
        if rows_N is not None:
            x, crossed = (y.flatten(0, 1)[rows_N] for y in (x, crossed))
        if not torch.is_grad_enabled():
            return self._add_ffn(x, crossed)
        x = x + self.dropout(crossed)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class _Places(NamedTuple):
    """Indices into the decoder's places, and where there is none: before the last token of a prefix."""

    index: Tensor
    before: Tensor


class EncoderDecoderTransformer(Transformer):
    """A transformer whose first `encoder` blocks read a prefix of each row, and the others the rest.

    The encoder reads the prefix in both directions; the decoder reads the prefix's last token and all that
    follow, each of which sees those up to itself and the encoder's outputs. So it predicts the tokens after
    the prefix, each from earlier ones alone. Both use one embedding, and the positions of the row. What is
    before an answer (`Layout.answers`) is the prefix; without an answer it is the first token.
    """

    reads_prefixes = True

    def __init__(self, model: Transformer, encoder: int) -> None:
        """Take over the modules of `model`; its later blocks get cross-attention, with new weights."""
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self.encoder = encoder
        assert 1 <= encoder < len(self.blocks), "both halves need a block"
        for block in self.blocks[:encoder]:
            block.attention.attended = 1.0
        for number in range(encoder, len(self.blocks)):
            self.blocks[number] = DecoderBlock(self.blocks[number], self.config)

    def flops(self, length: float) -> float:
        """Forward FLOPs of `length` tokens of a text without context, including their logits."""
        return self.flops_of(1, length, length)

    def flops_of(self, encoded: float, decoded: float, predicted: float) -> float:
        """Forward FLOPs for so many places of the encoder, places of the decoder and logits."""
        factors = 0
        if self.embedding_up is not None:
            factors = 2 * self.embedding_up.numel() * (encoded + 2 * decoded)
        blocks = forward_flops(self.blocks[: self.encoder], encoded)
        for block in self.blocks[self.encoder :]:
            blocks += children_flops(block, decoded, without=("cross",))
            blocks += block.cross.flops_between(encoded, decoded)
        return factors + blocks + children_flops(self, predicted, without=("blocks",))

    def hidden(self, tokens_BL: Tensor, layout: Layout | None = None, rows_N: Tensor | None = None) -> Tensor:
        """As `Transformer.hidden`, NaN before a prefix's last token, where nothing is predicted.

        Raises NotImplementedError for layouts other than a cache and rows of one sequence each.
        """
        if isinstance(layout, Cache):
            return self._continue(tokens_BL, layout, rows_N)
        L, longest = tokens_BL.shape[1], self.config.context
        assert L <= longest, f"{L} tokens do not fit the context of {longest}"
        rows = PrefixRows.of(layout, tokens_BL)
        encoded = self.encode(tokens_BL[:, : rows.encoded_places], rows.prefix_B)
        S, first_B = rows.decoded_places, rows.prefix_B - 1
        # Places beyond the end of a row are padding, which none of its tokens sees.
        place_S = torch.arange(S, device=tokens_BL.device)
        index_BS = (first_B[:, None] + place_S).clamp(max=L - 1)
        read_BS, decoded = tokens_BL.gather(1, index_BS), DecodedRows(index_BS, encoded)
        if rows_N is not None:
            row_N = rows_N // L
            places = _places(rows_N % L - first_B[row_N], S)
            x_ND = self.decode(read_BS, decoded, row_N * S + places.index)
            return x_ND.masked_fill(places.before[:, None], math.nan)
        places = _places(torch.arange(L, device=tokens_BL.device) - first_B[:, None], S)
        x_BSD = self.decode(read_BS, decoded)
        x_BLD = x_BSD.gather(1, places.index[..., None].expand(-1, -1, x_BSD.shape[2]))
        return x_BLD.masked_fill(places.before[..., None], math.nan)

    def encode(self, tokens_BP: Tensor, prefix_B: Tensor) -> Encoded:
        """Read the first `prefix_B` [B] tokens of each row; the rest of the P is padding."""
        layout = Prefixes(prefix_B, tokens_BP.shape[1])
        x_BPD, rope = self._embed(tokens_BP, layout, None)
        (x_BPD,) = self._through(0, x_BPD, rope, tokens_BP, layout, end=self.encoder)
        return Encoded(x_BPD, rope, prefix_B)

    def decode(self, tokens_BS: Tensor, layout: Layout, rows_N: Tensor | None = None) -> Tensor:
        """The head's inputs [B, S, D], or [N, D] at the flat places `rows_N`, after the last block.

        `layout`: `DecodedRows`, or a `Cache` that holds what was encoded.
        """
        x_BSD, rope = self._embed(tokens_BS, layout, None)
        return self.finish(self._through(self.encoder, x_BSD, rope, tokens_BS, layout, rows_N)[-1])

    def _continue(self, tokens_BL: Tensor, cache: Cache, rows_N: Tensor | None) -> Tensor:
        """`hidden` with a cache: the first tokens of a text bring the prefix, and later ones are decoded."""
        B, L = tokens_BL.shape
        first = 0
        if cache.positions.start == 0:
            if cache.answers is not None:
                first = max(0, int(cache.answers[0]))
                assert bool((cache.answers.clamp(min=0) == first).all()), "rows of a cache are alike"
            prefix_B = torch.full((B,), first + 1, device=tokens_BL.device)
            cache.encoded = self.encode(tokens_BL[:, : first + 1], prefix_B)
            cache.skip(first)
        S = L - first
        if rows_N is None:
            return F.pad(self.decode(tokens_BL[:, first:], cache), (0, 0, first, 0), value=math.nan)
        places = _places(rows_N % L - first, S)
        x_ND = self.decode(tokens_BL[:, first:], cache, rows_N // L * S + places.index)
        return x_ND.masked_fill(places.before[:, None], math.nan)

    def residuals(
        self,
        tokens_BL: Tensor,
        layout: Layout | None = None,
        rows_N: Tensor | None = None,
        after: Collection[int] = (),
    ) -> list[Tensor]:
        """Not defined: the encoder's stream has other places than the decoder's."""
        raise NotImplementedError("an encoder-decoder has no stream that passes all blocks")

    def continued(self, x_BLD: Tensor, tokens_BL: Tensor, layout: Layout, block: int) -> Tensor:
        """Not defined: see `residuals`."""
        return self.residuals(tokens_BL, layout)[-1]


def _places(place: Tensor, count: int) -> _Places:
    """The decoder's places, of `count`, for those that are counted from a prefix's last token."""
    return _Places(place.clamp(min=0, max=count - 1), place < 0)
