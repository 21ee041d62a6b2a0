"""A block of the transformer: attention and feed-forward network, and the norms before them.

Tensor names carry their shape: B batch, L length, D width, H query heads, K key/value heads, E head width, N
flat positions, X any width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.causal_attention import causal_attention
from stlm.model.config import ModelConfig
from stlm.model.dropout import Dropout
from stlm.model.feed_forward import FFNS, hidden_numbers, is_plain
from stlm.model.flops import children_flops
from stlm.model.fused import RMSNorm, add_and_norm, add_to
from stlm.model.graphs import outside_graphs
from stlm.model.layout import Layout
from stlm.model.projection import projection
from stlm.model.rotary import Rotary, rotate

# Bytes of hidden units that a feed-forward network holds at once in scoring on a CPU.
_PART_BYTES = 2**23

# RMSNorm (Zhang and Sennrich 2019) has a gain, LayerNorm (Ba et al. 2016) a gain and a bias.
NORMS: dict[str, type[nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}


class Attention(nn.Module):
    """Causal self-attention, with G query heads to each key/value head (Ainslie et al. 2023)."""

    parameter_groups: ClassVar[dict[str, str]] = {"q_gain": "norms", "k_gain": "norms", "shift": "shifts"}
    # Share of the pairs of positions that attention covers: the causal half.
    attended = 0.5

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        key_value = config.kv_heads * config.head_width
        self.joint_rows = {"qkv": (config.width, key_value, key_value)}
        self.qkv = projection(config, "attention", "qkv")
        self.out = projection(config, "attention", "out")
        # Gains of the normalization of queries and keys (Henry et al. 2020; Dehghani et al. 2023, section
        # 2.2), shared by the heads: the products cannot grow with the weights.
        self.q_gain = self.k_gain = None
        if config.qk_norm:
            self.q_gain = nn.Parameter(torch.ones(self.head_width))
            self.k_gain = nn.Parameter(torch.ones(self.head_width))
        self.norm_eps = config.norm_eps
        # A causal depthwise convolution of width two (So et al. 2021, "Primer", section 4: width three),
        # zero at first: attention compares and mixes pairs of tokens from the first layer on.
        self.shift = None
        if config.qkv_shift:
            self.shift = nn.Parameter(torch.zeros(self.qkv.out_features))
        self.dropout = config.attention_dropout
        self.scheduled, self.dropout_now = False, self.dropout

    def flops(self, length: float) -> float:
        """Forward FLOPs of a sequence: the projections, and two products over the visible positions."""
        pairs = self.attended * length * length
        return children_flops(self, length) + 4 * pairs * self.heads * self.head_width

    def _normalize(self, qk_BLHE: Tensor) -> Tensor:
        """Queries and keys [B, L, H + K, E], each head's root mean square set to one, times the gains."""
        gain_HE = torch.cat([self.q_gain.expand(self.heads, -1), self.k_gain.expand(self.kv_heads, -1)])
        normal_BLHE = F.rms_norm(qk_BLHE, (self.head_width,), eps=self.norm_eps)
        return (normal_BLHE * gain_HE).to(qk_BLHE.dtype)

    def _shift(self, qkv_BLX: Tensor, layout: Layout) -> Tensor:
        """Queries, keys and values [B, L, X], plus the weighted ones of the token before, if there is one."""
        return torch.addcmul(qkv_BLX, layout.before(qkv_BLX), self.shift.to(qkv_BLX.dtype))

    def _in_blocks(self, x_BLD: Tensor, layout: Layout) -> bool:
        """Whether attention in blocks is faster; unrolled in a graph, it would take minutes to compile."""
        on_cpu = x_BLD.device.type == "cpu" and not torch.compiler.is_compiling()
        return layout.in_rows and self.training and on_cpu and not self.dropout

    def _is_scoring(self, x_BLD: Tensor) -> bool:
        """Whether kernels for scoring may be used, which have no gradients."""
        return x_BLD.device.type == "cpu" and not self.training and not torch.is_grad_enabled()

    @outside_graphs
    def _attend_scheduled(self, layout: Layout, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        """Attention [B, L, H, E] with scheduled dropout.

        It stays out of the compiled graph for two reasons: the graph would be compiled anew for each value of
        the probability, and without dropout torch's implementation returns another memory order.
        """
        dropout = self.dropout_now if self.training else 0.0
        return layout.attend(q_BLHE, k_BLKE, v_BLKE, dropout).contiguous()

    def forward(
        self,
        x_BLD: Tensor,
        rope: Rotary | None,
        layout: Layout,
        rows_N: Tensor | None = None,
        added_BLX: Tensor | None = None,
    ) -> Tensor:
        """Outputs [B, L, D], or [N, D] at the flat positions `rows_N`; arguments as in `Transformer.hidden`.

        `added_BLX`, X = K E, is added to the values.
        """
        B, L, D = x_BLD.shape
        qkv_BLX = self.qkv(x_BLD)
        if self.shift is not None:
            qkv_BLX = self._shift(qkv_BLX, layout)
        qkv_BLHE = qkv_BLX.view(B, L, -1, self.head_width)
        qk_BLHE, v_BLKE = qkv_BLHE.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if added_BLX is not None:
            v_BLKE = v_BLKE + added_BLX.view(v_BLKE.shape).to(v_BLKE.dtype)
        if self.q_gain is not None:
            qk_BLHE = self._normalize(qk_BLHE)
        in_blocks, scoring = self._in_blocks(x_BLD, layout), self._is_scoring(x_BLD)
        if (in_blocks or scoring) and (added_BLX is not None or self.q_gain is not None):
            qkv_BLHE = torch.cat([qk_BLHE, v_BLKE], dim=2)
        if scoring:
            y_BLHE = layout.attend_projections(qkv_BLHE, self.heads, rope, rows_N)
            if y_BLHE is not None:
                return self.out(y_BLHE.flatten(-2))
        if rope is not None and not in_blocks:
            qk_BLHE = rotate(qk_BLHE, *rope)
        if in_blocks:
            y_BLHE = causal_attention(qkv_BLHE, self.heads, layout.sees, rope)
        else:
            qkv = *qk_BLHE.split([self.heads, self.kv_heads], dim=2), v_BLKE
            if self.scheduled:
                y_BLHE = self._attend_scheduled(layout, *qkv)
            else:
                y_BLHE = layout.attend(*qkv, self.dropout if self.training else 0.0)
        y_BLD = y_BLHE.reshape(B, L, D)
        return self.out(y_BLD if rows_N is None else y_BLD.flatten(0, 1)[rows_N])


class Block(nn.Module):
    """Attention and feed-forward network; each reads a normalized input and adds to the residual stream."""

    parameter_groups: ClassVar[dict[str, str]] = {
        "attention_norm": "norms",
        "attention": "attention",
        "ffn_norm": "norms",
        "ffn": "FFN",
    }
    # Not inherited: a subclass says it if it changes nothing but training (see `stlm.model.inference`).
    plain_in_evaluation: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = norm(config.width, eps=config.norm_eps)
        self.ffn = FFNS[config.ffn](config)
        self.dropout = Dropout(config.dropout)
        # Only matrix products read the outputs of a block's norms.
        self.attention_norm.narrow = self.ffn_norm.narrow = True

    def forward(
        self,
        x_BLD: Tensor,
        rope: Rotary | None,
        layout: Layout,
        rows_N: Tensor | None = None,
        added_BLX: Tensor | None = None,
    ) -> Tensor:
        """As `Attention.forward`."""
        x = x_BLD if rows_N is None else x_BLD.flatten(0, 1)[rows_N]
        mixed = self.attention(self.attention_norm(x_BLD), rope, layout, rows_N, added_BLX)
        if not torch.is_grad_enabled():
            return self._add_ffn(x, mixed)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

    def _add_ffn(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The stream plus attention's output `mixed` and the feed-forward network's; without gradients."""
        size = self._part_tokens(x)
        if size is None:
            return self._add_to_rows(x, mixed)
        total = x.new_empty(x.shape)  # without gaps, as its parts are written
        parts = [rows.flatten(0, -2).split(size) for rows in (x, mixed, total)]
        for x_ND, mixed_ND, total_ND in zip(*parts, strict=True):
            added_ND = self._add_to_rows(x_ND, mixed_ND, total_ND)
            if added_ND is not total_ND:
                total_ND.copy_(added_ND)
        return total

    def _add_to_rows(self, x: Tensor, mixed: Tensor, total: Tensor | None = None) -> Tensor:
        """As `_add_ffn`, all rows at once; `total`: where the sum may be kept."""
        x, normal = add_and_norm(x, self.dropout(mixed), self.ffn_norm, total)
        return add_to(x, self.dropout(self.ffn(normal)))

    def _part_tokens(self, x: Tensor) -> int | None:
        """How many tokens at a time the feed-forward network processes in scoring on a CPU; None: all.

        So few that its hidden units stay in the processor's cache, and that the allocator keeps their memory.
        A network with hooks gets all tokens, since the hooks see its output.
        """
        if x.device.type != "cpu" or not is_plain(self.ffn) or self.ffn._forward_hooks:
            return None
        hidden = hidden_numbers(self.ffn) * (2 if torch.is_autocast_enabled("cpu") else 4)
        size = max(64, _PART_BYTES // hidden // 64 * 64)
        return size if x.numel() > size * x.shape[-1] else None
