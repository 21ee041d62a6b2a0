"""Causal attention for training on a CPU, by products of blocks.

torch's fused attention on a CPU keeps its working set in the cache, but multiplies in tiles too small for the
processor's products of matrices: with 16 heads of 32 over 512 tokens it takes four times as long, forward and
backward. Here a block of queries, those of all heads that share a key/value head together, is multiplied with
all keys up to it at once. The weights (half of a length's square, for each head) are kept for the backward
pass.

Shapes: B batch, L length, H query heads, K key/value heads, G = H / K query heads a group, E head width, Q
queries of a block, C keys up to the block's end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Queries of a block: smaller ones look at fewer keys in vain, larger ones make larger products.
_BLOCK = 64


def causal_attention(
    q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, sees_B1LL: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over a position's own and earlier ones [B, L, H, E] (Vaswani et al. 2017).

    Each key/value head serves H / K query heads that follow one another (Ainslie et al. 2023). `sees_B1LL`:
    which of these keys a query may look at, its own among them; None: all.
    """
    return _CausalAttention.apply(q_BLHE, k_BLKE, v_BLKE, sees_B1LL)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, sees_B1LL: Tensor | None) -> Tensor:
        B, L, H, E = q_BLHE.shape
        K = k_BLKE.shape[2]
        q_BKGLE = q_BLHE.view(B, L, K, H // K, E).permute(0, 2, 3, 1, 4)
        q_NGLE = q_BKGLE.reshape(B * K, H // K, L, E)
        k_NLE, v_NLE = (x.transpose(1, 2).reshape(B * K, L, E) for x in (k_BLKE, v_BLKE))
        y_NGLE = torch.empty_like(q_NGLE)
        later_QQ = q_NGLE.new_full((_BLOCK, _BLOCK), -torch.inf).triu(1)
        weights = []
        with torch.autocast(q_BLHE.device.type, enabled=False):
            for begin, end in _blocks(L):
                Q = end - begin
                score_NXC = torch.bmm(_rows(q_NGLE, begin, end), k_NLE[:, :end].transpose(1, 2))
                score_NXC.mul_(1 / math.sqrt(E))
                score_NXC.view(B * K, -1, Q, end)[..., begin:].add_(later_QQ[:Q, :Q])
                if sees_B1LL is not None:
                    unseen_B11QC = ~sees_B1LL[:, :, None, begin:end, :end]
                    score_NXC.view(B, K, -1, Q, end).masked_fill_(unseen_B11QC, -torch.inf)
                weight_NXC = torch.softmax(score_NXC, dim=-1)
                y_NGLE[:, :, begin:end] = torch.bmm(weight_NXC, v_NLE[:, :end]).view(B * K, -1, Q, E)
                weights.append(weight_NXC)
        ctx.save_for_backward(q_NGLE, k_NLE, v_NLE, *weights)
        return y_NGLE.view(B, K, -1, L, E).permute(0, 3, 1, 2, 4).reshape(B, L, H, E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NGLE, k_NLE, v_NLE, *weights = ctx.saved_tensors
        B, L, H, E = dy_BLHE.shape
        N, G = q_NGLE.shape[:2]
        dy_NGLE = dy_BLHE.view(B, L, N // B, G, E).permute(0, 2, 3, 1, 4).reshape(N, G, L, E)
        dq_NGLE = torch.empty_like(q_NGLE)
        # Sums over blocks, in float32 whatever the arithmetic.
        dk_NLE, dv_NLE = (torch.zeros_like(k_NLE, dtype=_sum_type(k_NLE)) for _ in range(2))
        for (begin, end), weight_NXC in zip(_blocks(L), weights, strict=True):
            dy_NXE = _rows(dy_NGLE, begin, end)
            dv_NLE[:, :end] += torch.bmm(weight_NXC.transpose(1, 2), dy_NXE)
            dweight_NXC = torch.bmm(dy_NXE, v_NLE[:, :end].transpose(1, 2))
            dscore_NXC = torch._softmax_backward_data(dweight_NXC, weight_NXC, -1, weight_NXC.dtype)
            dscore_NXC.mul_(1 / math.sqrt(E))
            dq_NGLE[:, :, begin:end] = torch.bmm(dscore_NXC, k_NLE[:, :end]).view(N, G, -1, E)
            dk_NLE[:, :end] += torch.bmm(dscore_NXC.transpose(1, 2), _rows(q_NGLE, begin, end))
        dq_BLHE = dq_NGLE.view(B, -1, G, L, E).permute(0, 3, 1, 2, 4).reshape(B, L, H, E)
        dk_BLKE, dv_BLKE = (x.to(k_NLE.dtype).view(B, -1, L, E).transpose(1, 2) for x in (dk_NLE, dv_NLE))
        return dq_BLHE, dk_BLKE, dv_BLKE, None


def _blocks(length: int) -> list[tuple[int, int]]:
    """First and last position (exclusive) of each block of queries."""
    return [(begin, min(begin + _BLOCK, length)) for begin in range(0, length, _BLOCK)]


def _rows(x_NGLE: Tensor, begin: int, end: int) -> Tensor:
    """The block's rows [N, G Q, E], those of a group's heads together."""
    return x_NGLE[:, :, begin:end].flatten(1, 2)


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
