"""The decoder of the paper's Table 1 and its variants, top to bottom.

Tensor names carry their shape: B batch, L length, D width, H query heads, K key/value heads, G = H / K query
heads a group, E head width, F feed-forward width, V vocabulary. ``x_BLD`` is [batch, length, width].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.config import ModelConfig


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


def rotate(x_BHLE: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) of each head by the position's angles."""
    first, second = x_BHLE.chunk(2, dim=-1)
    return (x_BHLE * cos_LE + torch.cat([second, first], dim=-1) * sin_LE).to(x_BHLE.dtype)


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

    def forward(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        B, L, D = x_BLD.shape
        qkv_BHLE = self.qkv(x_BLD).view(B, L, -1, self.head_width).transpose(1, 2)
        q_BHLE, k_BKLE, v_BKLE = qkv_BHLE.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if rope is not None:
            q_BHLE, k_BKLE = rotate(q_BHLE, *rope), rotate(k_BKLE, *rope)
        y_BHLE = F.scaled_dot_product_attention(
            q_BHLE,
            k_BKLE,
            v_BKLE,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.out(y_BHLE.transpose(1, 2).reshape(B, L, D))


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

    def forward(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.attention(self.attention_norm(x_BLD), rope))
        return x_BLD + self.dropout(self.ffn(self.ffn_norm(x_BLD)))


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

    def hidden(self, tokens_BL: Tensor) -> Tensor:
        """The residual stream after the last norm, [B, L, D], of token ids [B, L], L at most the context."""
        L, longest = tokens_BL.shape[1], self.config.context
        assert L <= longest, f"{L} tokens do not fit the context of {longest}"
        x_BLD = self.embedding(tokens_BL)
        rope = None
        if self.config.positions == "rope":
            rope = self.cos_LE[:L], self.sin_LE[:L]
        elif self.config.positions == "learned":
            x_BLD = x_BLD + self.positions.weight[:L]
        else:
            # The embedding starts at a standard deviation of 0.02, the sinusoids at 0.7: unscaled they
            # drown it. Vaswani et al. multiply the embedding by sqrt(width) for the same reason.
            x_BLD = x_BLD * math.sqrt(self.config.width) + self.sinusoids_LD[:L]
        x_BLD = self.dropout(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD, rope)
        return self.norm(x_BLD)

    def head(self, x_BLD: Tensor) -> Tensor:
        """Logits [..., V] of residual vectors [..., D], at any positions chosen."""
        return self.output(x_BLD)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each of ``tokens_BL`` [B, L]."""
        return self.head(self.hidden(tokens_BL))

    def loss(self, tokens_BL: Tensor, targets_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, float32: the mean over all targets, or the sum over those of a mask."""
        logits_NV = self.head(self.hidden(tokens_BL)).flatten(0, 1)
        if mask_BL is None:
            return F.cross_entropy(logits_NV.float(), targets_BL.flatten())
        losses_N = F.cross_entropy(logits_NV.float(), targets_BL.flatten(), reduction="none")
        return (losses_N * mask_BL.flatten()).sum()
