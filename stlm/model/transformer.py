"""The decoder of the paper's Table 1 and its variants, top to bottom.

Tensor names carry their shape: B batch, L length, D width, H query heads, K key/value heads, G = H / K query
heads a group, E head width, R rank of a factorized embedding, V vocabulary. ``x_BLD`` is [batch, length,
width].
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.causal_attention import causal_attention
from stlm.model.config import ModelConfig
from stlm.model.dropout import Dropout
from stlm.model.feed_forward import FFNS
from stlm.model.flops import children_flops
from stlm.model.fused import RMSNorm
from stlm.model.graphs import outside_graphs
from stlm.model.head_loss import head_loss
from stlm.model.layout import CausalRows, Layout
from stlm.model.projection import INITIAL_STD, projection, projections, share
from stlm.model.rotary import Rotary, rope_tables, rotate

# RMSNorm (Zhang and Sennrich 2019) has a gain, LayerNorm (Ba et al. 2016) a gain and a bias.
NORMS: dict[str, type[nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}


def sinusoidal_table(context: int, width: int) -> Tensor:
    """Fixed positions [L, D] (Vaswani et al. 2017, section 3.5): sines at even, cosines at odd dimensions."""
    if torch.get_default_device().type == "meta":  # no values: arithmetic without them would take time
        return torch.empty(context, width)
    wavelengths_d = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_Ld = torch.arange(context, dtype=torch.float64)[:, None] / wavelengths_d
    return torch.stack([angle_Ld.sin(), angle_Ld.cos()], dim=-1).flatten(1).float()


class Attention(nn.Module):
    """Causal self-attention, with G query heads to each key/value head (Ainslie et al. 2023)."""

    parameter_groups: ClassVar[dict[str, str]] = {"q_gain": "norms", "k_gain": "norms", "shift": "shifts"}
    # Share of the pairs of positions that are attended to: the causal half.
    attended = 0.5

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.qkv = projection(config, "attention", "qkv")
        self.out = projection(config, "attention", "out")
        # Gains of a normalization each (Henry et al. 2020; Dehghani et al. 2023, section 2.2), over a head's
        # dimensions and shared by the heads: products cannot grow with the weights.
        self.q_gain = self.k_gain = None
        if config.qk_norm:
            self.q_gain = nn.Parameter(torch.ones(self.head_width))
            self.k_gain = nn.Parameter(torch.ones(self.head_width))
        self.norm_eps = config.norm_eps
        # A causal depthwise convolution of width two (So et al. 2021, "Primer", section 4: width three) that
        # starts as none: attention compares and mixes pairs of tokens from the first layer on.
        self.shift = None
        if config.qkv_shift:
            self.shift = nn.Parameter(torch.zeros(self.qkv.out_features))
        self.dropout = config.attention_dropout
        self.scheduled, self.dropout_now = False, self.dropout

    def flops(self, length: float) -> float:
        """Forward FLOPs of a sequence: the projections, and two products over the positions attended to."""
        pairs = self.attended * length * length
        return children_flops(self, length) + 4 * pairs * self.heads * self.head_width

    def _normalize(self, qk_BLHE: Tensor) -> Tensor:
        """Queries and keys [B, L, H + K, E], each head's root mean square one, times the gains."""
        gain_HE = torch.cat([self.q_gain.expand(self.heads, -1), self.k_gain.expand(self.kv_heads, -1)])
        normal_BLHE = F.rms_norm(qk_BLHE, (self.head_width,), eps=self.norm_eps)
        return (normal_BLHE * gain_HE).to(qk_BLHE.dtype)

    def _shift(self, qkv_BLX: Tensor, layout: Layout) -> Tensor:
        """Queries, keys and values [B, L, X], plus the weighted ones of the token before if there is one."""
        return torch.addcmul(qkv_BLX, layout.before(qkv_BLX), self.shift.to(qkv_BLX.dtype))

    def _in_blocks(self, x_BLD: Tensor, layout: Layout) -> bool:
        """Whether attention by blocks is the faster one; unrolled in a graph it takes minutes to compile."""
        on_cpu = x_BLD.device.type == "cpu" and not torch.compiler.is_compiling()
        return layout.in_rows and self.training and on_cpu and not self.dropout

    @outside_graphs
    def _attend_scheduled(self, layout: Layout, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        """Attention [B, L, H, E] whose dropout a schedule changes.

        It stays out of the compiled graph, which would be compiled anew at each value of the number; and, as
        torch computes it by other means without dropout, at another order of the result in memory.
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
        """[B, L, D], or [N, D] of the flat positions `rows_N`; the rest as in `Transformer.hidden`.

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
        in_blocks = self._in_blocks(x_BLD, layout)
        if rope is not None and not in_blocks:
            qk_BLHE = rotate(qk_BLHE, *rope)
        if in_blocks:
            if added_BLX is not None or self.q_gain is not None:
                qkv_BLHE = torch.cat([qk_BLHE, v_BLKE], dim=2)
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
    """Attention and feed-forward network, each on a normalized input, each added to the residual stream."""

    parameter_groups: ClassVar[dict[str, str]] = {
        "attention_norm": "norms",
        "attention": "attention",
        "ffn_norm": "norms",
        "ffn": "FFN",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = norm(config.width, eps=config.norm_eps)
        self.ffn = FFNS[config.ffn](config)
        self.dropout = Dropout(config.dropout)
        # What reads a block's norms are products of matrices.
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
        mixed = self.attention(self.attention_norm(x_BLD), rope, layout, rows_N, added_BLX)
        x = x_BLD if rows_N is None else x_BLD.flatten(0, 1)[rows_N]
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


def _in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x W whatever the arithmetic: the residual stream and what scores read of it stay float32."""
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ weight


def block_matrices(blocks: nn.Module, config: ModelConfig) -> dict[tuple[int, ...], list[nn.Parameter]]:
    """The matrices of blocks, those of all layers together, by the rows of the matrices that each holds.

    The key is empty for a parameter that is one matrix. Shared ones are there once.
    """
    key_value = config.kv_heads * config.head_width
    joint = {
        "attention.qkv": (config.width, key_value, key_value),
        "ffn.gate_up": (config.ffn_width, config.ffn_width),
    }
    parts: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 2:
            rows = next((own for of, own in joint.items() if f".{of}." in name), ())
            # A low-rank pair's input factor counts as one matrix: its rows are the rank.
            parts.setdefault(rows if len(parameter) == sum(rows) else (), []).append(parameter)
    return parts


class Transformer(nn.Module):
    """A decoder-only language model: token ids in, next-token logits out."""

    parameter_groups: ClassVar[dict[str, str]] = {
        "embedding": "token embedding",
        "embedding_up": "token embedding",
        "positions": "positions",
        "value_embeddings": "value embeddings",
        "norm": "norms",
        "output_down": "head",
        "output": "head",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("a Transformer needs a config with its vocab_size")
        self.config = config
        # What `stlm.model.build.build_model` adds to the model.
        self.techniques: tuple[Any, ...] = ()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_rank or config.width)
        # What maps a factorized table to the residual stream, and for an untied head back.
        self.embedding_up = self.output_down = None
        if config.embedding_rank is not None:
            self.embedding_up = nn.Parameter(torch.empty(config.embedding_rank, config.width))
            if not config.tied:
                self.output_down = nn.Parameter(torch.empty(config.width, config.embedding_rank))
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        elif config.positions == "sinusoidal":
            table_LD = sinusoidal_table(config.context, config.width)
            self.register_buffer("sinusoids_LD", table_LD, persistent=False)
        else:
            cos_LE, sin_LE = rope_tables(config.context, config.head_width, config.rope_theta)
            self.register_buffer("cos_LE", cos_LE, persistent=False)
            self.register_buffer("sin_LE", sin_LE, persistent=False)
        # Tables that the last layers' values read (Zhou et al. 2024, "Value Residual Learning", and Jordan et
        # al. 2024, modded-nanogpt): what a token is reaches attention past the blocks before.
        self.value_embeddings = nn.ModuleList(
            [
                nn.Embedding(config.vocab_size, config.kv_heads * config.head_width)
                for _ in range(config.value_embeddings)
            ]
        )
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        for part, homes in config.homes.items():
            for block, home in zip(self.blocks, homes, strict=True):
                share(getattr(self.blocks[home], part), getattr(block, part))
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.output = nn.Linear(self.embedding.embedding_dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.embedding.weight
        self._initialize()

    def _initialize(self) -> None:
        """Normal(0, 0.02), the projections into the residual stream scaled by 1/sqrt(2 layers) (GPT-2).

        With `zero_init` these are zero (Zhang et al. 2019, "Fixup"; Yang et al. 2022, muP). Tables of values
        are zero: a model with them starts as the one without, as does one with adapters. Factors are such
        that their products start with the variance of a dense matrix.
        """
        if self.norm.weight.is_meta:  # no values, which factors would be computed from
            return
        matrices, started = dict(projections(self)), set()
        for name, parameter in self.named_parameters():
            owner = name.removesuffix(".weight").removesuffix(".left").removesuffix(".right")
            if owner in matrices and owner not in started:
                started.add(owner)
                scale = 1.0
                if owner.endswith(("attention.out", "ffn.down")):
                    scale = 0.0 if self.config.zero_init else 1 / math.sqrt(2 * self.config.layers)
                matrices[owner].initialize(INITIAL_STD * scale)
            elif name in ("embedding_up", "output_down"):
                nn.init.normal_(parameter, std=1 / math.sqrt(self.config.embedding_rank))
            elif parameter.dim() == 2 and not name.startswith("blocks."):
                scale = 0.0 if name.startswith("value_embeddings.") else 1.0
                nn.init.normal_(parameter, std=INITIAL_STD * scale)
        for matrix in matrices.values():
            if matrix.adapter is not None:
                matrix.adapter.initialize()

    def flops(self, length: float) -> float:
        """Forward FLOPs of a sequence of so many tokens, its logits included."""
        factors = 0
        if self.embedding_up is not None:
            # Once after the look-up, once before the head, by its transpose or by `output_down`.
            factors = 4 * self.embedding_up.numel() * length
        return factors + children_flops(self, length)

    def matrix_parts(self) -> dict[tuple[int, ...], list[nn.Parameter]]:
        """The blocks' matrices: see `block_matrices`."""
        return block_matrices(self.blocks, self.config)

    def schedule_dropout(self, factor: float) -> None:
        """From now on drop with `factor`, between 0 and 1, times the configured probabilities."""
        for module in self.modules():
            if isinstance(module, Dropout) and module.p:
                module.schedule(factor, self.embedding.weight.device)
            elif isinstance(module, Attention) and module.dropout:
                module.scheduled, module.dropout_now = True, module.dropout * factor

    def hidden(self, tokens_BL: Tensor, layout: Layout | None = None, rows_N: Tensor | None = None) -> Tensor:
        """What the head reads of token ids [B, L], [B, L, D]: the residual stream after the last norm, or its
        image [B, L, R] where the embedding is factorized.

        `layout` says how sequences lie in the rows, each no longer than the context; None: one a row. A
        `Cache` must have been extended by L. With `rows_N`, indices into the flat [B L], only theirs is
        returned, [N, D] or [N, R], and the last block's feed-forward network works on no others.
        """
        return self.finish(self.residuals(tokens_BL, layout, rows_N)[-1])

    def finish(self, x_BLD: Tensor) -> Tensor:
        """What the head reads of the residual stream [..., D], after whichever block."""
        x_BLD = self.norm(x_BLD)
        if self.embedding_up is None:
            return x_BLD
        return _in_float32(x_BLD, self.embedding_up.T if self.output_down is None else self.output_down)

    def residuals(
        self,
        tokens_BL: Tensor,
        layout: Layout | None = None,
        rows_N: Tensor | None = None,
        after: Collection[int] = (),
    ) -> list[Tensor]:
        """The residual stream [B, L, D] after each block of `after`, numbered from 0, and after the last.

        The rest as in `hidden`; `rows_N` is for the last block.
        """
        L, longest = tokens_BL.shape[1], self.config.context
        assert layout is not None or L <= longest, f"{L} tokens do not fit the context of {longest}"
        layout = CausalRows(L) if layout is None else layout
        x_BLD, rope = self._embed(tokens_BL, layout)
        last = len(self.blocks) - 1
        without = len(self.blocks) - len(self.value_embeddings)
        kept = []
        for number, block in enumerate(self.blocks):
            added_BLX = self.value_embeddings[number - without](tokens_BL) if number >= without else None
            x_BLD = block(x_BLD, rope, layout.layer(number), rows_N if number == last else None, added_BLX)
            if number in after and number < last:
                kept.append(x_BLD)
        return [*kept, x_BLD]

    def _embed(self, tokens_BL: Tensor, layout: Layout) -> tuple[Tensor, Rotary | None]:
        """The residual stream [B, L, D] before the first block, and the rotary angles of its positions."""
        positions = layout.positions
        x_BLD = self.embedding(tokens_BL)
        if self.embedding_up is not None:
            x_BLD = _in_float32(x_BLD, self.embedding_up)
        rope = None
        if self.config.positions == "rope":
            # [L, 1, E] or [B, L, 1, E]: the same for all heads.
            rope = self.cos_LE[positions].unsqueeze(-2), self.sin_LE[positions].unsqueeze(-2)
        elif self.config.positions == "learned":
            x_BLD = x_BLD + self.positions.weight[positions]
        else:
            # The embedding starts at a standard deviation of 0.02, the sinusoids at 0.7: unscaled they
            # drown it. Vaswani et al. multiply the embedding by sqrt(width) for the same reason.
            x_BLD = x_BLD * math.sqrt(self.config.width) + self.sinusoids_LD[positions]
        return self.dropout(x_BLD), rope

    def head(self, x_BLD: Tensor, vocabulary: slice | None = None) -> Tensor:
        """Logits [..., V] of residual vectors [..., D], at any positions, or of a part of the vocabulary."""
        if vocabulary is None:
            return self.cap(self.output(x_BLD))
        return self.cap(F.linear(x_BLD, self.output.weight[vocabulary]))

    def logit(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """The logit [N] of one token for each residual vector [N, D]."""
        return self.cap((x_ND * self.output.weight[tokens_N]).sum(dim=-1))

    def cap(self, logits: Tensor) -> Tensor:
        """Logits, of any shape, within the configured bound (Gemma 2, 2024, section 2): c tanh(logit / c)."""
        bound = self.config.logit_softcap
        return torch.tanh(logits / bound) * bound if bound else logits

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each of ``tokens_BL`` [B, L]."""
        return self.head(self.hidden(tokens_BL))

    def hidden_loss(self, x_ND: Tensor, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float32, given what the head reads: `hidden` of the tokens, flat."""
        return head_loss(x_ND, self.output.weight, targets_BL.flatten(), self.config.logit_softcap)

    def loss(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        mask_BL: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, float32: the mean over all targets, or the sum over those of a mask."""
        x_ND = self.hidden(tokens_BL, layout).flatten(0, 1)
        if mask_BL is None:
            return self.hidden_loss(x_ND, tokens_BL, targets_BL)
        losses_N = F.cross_entropy(self.head(x_ND).float(), targets_BL.flatten(), reduction="none")
        return (losses_N * mask_BL.flatten()).sum()
