"""torch's fused attention for grouped queries, called so that it is fused on every device.

Shapes: B batch, L length, C keys, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fused_attention(
    q_BHLE: Tensor,
    k_BKCE: Tensor,
    v_BKCE: Tensor,
    sees: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Mixed values [B, H, L, E]: causal, or over the keys that `sees` [..., L, C] allows."""
    grouped = q_BHLE.shape[1] != k_BKCE.shape[1]
    if grouped and copies_heads(q_BHLE, sees):
        k_BKCE, v_BKCE = (_for_each_query_head(x, q_BHLE.shape[1]) for x in (k_BKCE, v_BKCE))
        grouped = False
    return F.scaled_dot_product_attention(
        q_BHLE,
        k_BKCE,
        v_BKCE,
        attn_mask=sees,
        is_causal=sees is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=grouped,
    )


def copies_heads(q_BHLE: Tensor, sees: Tensor | None) -> bool:
    """Whether to copy the key/value heads, one copy for each query head.

    On CUDA, flash attention takes groups, but neither a mask nor float32; memory-efficient attention takes
    both, but no groups. Without copies torch would compute all scores [B, H, L, C] one operation at a time.
    `make gpu-check` compares the ways.
    """
    return q_BHLE.is_cuda and (sees is not None or q_BHLE.dtype == torch.float32)


def _for_each_query_head(x_BKCE: Tensor, heads: int) -> Tensor:
    B, K, C, E = x_BKCE.shape
    return x_BKCE[:, :, None].expand(B, K, heads // K, C, E).reshape(B, heads, C, E)
