"""The decoder of the paper's Table 1 and its variants, top to bottom.

Tensor names carry their shape: B batch, L length, D width, H query heads, K key/value heads, G = H / K query
heads a group, E head width, F feed-forward width, V vocabulary. ``x_BLD`` is [batch, length, width].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.causal_attention import causal_attention
from stlm.model.config import ModelConfig
from stlm.model.head_loss import head_loss
from stlm.model.segments import Segments


class SwiGLU(nn.Module):
    """Feed-forward network silu(x W_gate) * (x W_up), projected down (Shazeer 2020)."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        # One product computes gate and up: larger products run nearer to the hardware's peak.
        self.gate_up = nn.Linear(width, 2 * ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.gate_up(x_BLD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BLF) * up_BLF)


class GELU(nn.Module):
    """Feed-forward network gelu(x W_up), projected down (Vaswani et al. 2017, with GELU as in GPT-2)."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BLD)))


# RMSNorm (Zhang and Sennrich 2019) has a gain, LayerNorm (Ba et al. 2016) a gain and a bias.
NORMS: dict[str, type[nn.Module]] = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}
FFNS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "gelu": GELU}


def rope_tables(context: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [L, E] of rotary positions (Su et al. 2021, eq. 34; halves rotated)."""
    wavelengths_e = theta ** (torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle_Le = torch.arange(context, dtype=torch.float64)[:, None] / wavelengths_e
    cos_LE = angle_Le.cos().repeat(1, 2)
    # The sign of the rotation's second row lives in the table, so that applying it needs no negation.
    sin_LE = torch.cat([-angle_Le.sin(), angle_Le.sin()], dim=1)
    return cos_LE.float(), sin_LE.float()


def rotate(x_BLHE: Tensor, cos_L1E: Tensor, sin_L1E: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) of each head by the position's angles."""
    first, second = x_BLHE.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return torch.addcmul(x_BLHE * cos_L1E, swapped, sin_L1E).to(x_BLHE.dtype)


def sinusoidal_table(context: int, width: int) -> Tensor:
    """Fixed positions [L, D] (Vaswani et al. 2017, section 3.5): sines at even, cosines at odd dimensions."""
    wavelengths_d = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_Ld = torch.arange(context, dtype=torch.float64)[:, None] / wavelengths_d
    return torch.stack([angle_Ld.sin(), angle_Ld.cos()], dim=-1).flatten(1).float()


class Attention(nn.Module):
    """Causal self-attention, with G query heads to each key/value head (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.dropout = config.attention_dropout

    def forward(
        self,
        x_BLD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        segments: Segments | None = None,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D], or [N, D] of the flat positions `rows_N`; the rest as in `Transformer.hidden`."""
        B, L, D = x_BLD.shape
        qkv_BLHE = self.qkv(x_BLD).view(B, L, -1, self.head_width)
        qk_BLHE, v_BLKE = qkv_BLHE.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if rope is not None:
            qk_BLHE = rotate(qk_BLHE, *rope)
        q_BLHE, k_BLKE = qk_BLHE.split([self.heads, self.kv_heads], dim=2)
        if segments is not None:
            y_BLHE = segments.attend(q_BLHE, k_BLKE, v_BLKE)
        elif self.training and x_BLD.device.type == "cpu" and not self.dropout:
            y_BLHE = causal_attention(q_BLHE, k_BLKE, v_BLKE)
        else:
            y_BLHE = F.scaled_dot_product_attention(
                q_BLHE.transpose(1, 2),
                k_BLKE.transpose(1, 2),
                v_BLKE.transpose(1, 2),
                is_causal=True,
                dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=self.kv_heads != self.heads,
            ).transpose(1, 2)
        y_BLD = y_BLHE.reshape(B, L, D)
        return self.out(y_BLD if rows_N is None else y_BLD.flatten(0, 1)[rows_N])


class Block(nn.Module):
    """Attention and feed-forward network, each on a normalized input, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = norm(config.width, eps=config.norm_eps)
        self.ffn = FFNS[config.ffn](config.width, config.ffn_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BLD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        segments: Segments | None = None,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        mixed = self.attention(self.attention_norm(x_BLD), rope, segments, rows_N)
        x = x_BLD if rows_N is None else x_BLD.flatten(0, 1)[rows_N]
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Transformer(nn.Module):
    """A decoder-only language model: token ids in, next-token logits out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("a Transformer needs a config with its vocab_size")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        elif config.positions == "sinusoidal":
            table_LD = sinusoidal_table(config.context, config.width)
            self.register_buffer("sinusoids_LD", table_LD, persistent=False)
        else:
            cos_LE, sin_LE = rope_tables(config.context, config.head_width, config.rope_theta)
            self.register_buffer("cos_LE", cos_LE, persistent=False)
            self.register_buffer("sin_LE", sin_LE, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.embedding.weight
        self._initialize()

    def _initialize(self) -> None:
        """Normal(0, 0.02), the projections into the residual stream scaled by 1/sqrt(2 layers) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
                scale = 1 / math.sqrt(2 * self.config.layers) if into_residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def hidden(
        self, tokens_BL: Tensor, segments: Segments | None = None, rows_N: Tensor | None = None
    ) -> Tensor:
        """The residual stream after the last norm, [B, L, D], of token ids [B, L], L at most the context.

        With `segments`, the one row of tokens [1, L], of any length, holds several sequences, none longer
        than the context. With `rows_N`, indices into the flat [B L], only their residuals are returned,
        [N, D], and the last block's feed-forward network works on no others.
        """
        L, longest = tokens_BL.shape[1], self.config.context
        assert segments is not None or L <= longest, f"{L} tokens do not fit the context of {longest}"
        places = slice(L) if segments is None else segments.positions_1N
        x_BLD = self.embedding(tokens_BL)
        rope = None
        if self.config.positions == "rope":
            # [L, 1, E] or [1, L, 1, E]: the same for all heads.
            rope = self.cos_LE[places].unsqueeze(-2), self.sin_LE[places].unsqueeze(-2)
        elif self.config.positions == "learned":
            x_BLD = x_BLD + self.positions.weight[places]
        else:
            # The embedding starts at a standard deviation of 0.02, the sinusoids at 0.7: unscaled they
            # drown it. Vaswani et al. multiply the embedding by sqrt(width) for the same reason.
            x_BLD = x_BLD * math.sqrt(self.config.width) + self.sinusoids_LD[places]
        x_BLD = self.dropout(x_BLD)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, rope, segments, rows_N if number == last else None)
        return self.norm(x_BLD)

    def head(self, x_BLD: Tensor, vocabulary: slice | None = None) -> Tensor:
        """Logits [..., V] of residual vectors [..., D], at any positions, or of a part of the vocabulary."""
        return self.output(x_BLD) if vocabulary is None else F.linear(x_BLD, self.output.weight[vocabulary])

    def logit(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """The logit [N] of one token for each residual vector [N, D]."""
        return (x_ND * self.output.weight[tokens_N]).sum(dim=-1)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each of ``tokens_BL`` [B, L]."""
        return self.head(self.hidden(tokens_BL))

    def loss(self, tokens_BL: Tensor, targets_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, float32: the mean over all targets, or the sum over those of a mask."""
        x_ND = self.hidden(tokens_BL).flatten(0, 1)
        if mask_BL is None:
            return head_loss(x_ND, self.output.weight, targets_BL.flatten())
        losses_N = F.cross_entropy(self.head(x_ND).float(), targets_BL.flatten(), reduction="none")
        return (losses_N * mask_BL.flatten()).sum()
