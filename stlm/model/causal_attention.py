"""Causal attention for training on a CPU, by products of blocks.

torch's fused attention on a CPU keeps its working set in the cache, but multiplies in tiles too small for the
processor's products of matrices: with 16 heads of 32 over 512 tokens it takes four times as long, forward and
backward. Here a block of queries, those of all heads that share a key/value head together, is multiplied with
all keys up to it at once. The weights (half of a length's square, for each head) are kept for the backward
pass.

Shapes as in stlm.model.attention_blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stlm.model.attention_blocks import (
    causal_softmax,
    causal_softmax_backward,
    from_blocks,
    join_heads,
    places,
    split_heads,
    to_blocks,
    views,
)
from stlm.model.rotary import Rotary


def causal_attention(
    qkv_BLSE: Tensor, heads: int, sees_B1LL: Tensor | None = None, rope: Rotary | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over a position's own and earlier ones [B, L, H, E] (Vaswani et al. 2017).

    Of the S = H + 2 K heads of `qkv_BLSE` the first H = `heads` are queries, then come K keys and K values;
    each key/value head serves H / K query heads that follow one another (Ainslie et al. 2023). `sees_B1LL`:
    which of these keys a query may look at, its own among them; None: all. `rope` rotates queries and keys.
    """
    return _CausalAttention.apply(qkv_BLSE, heads, sees_B1LL, rope)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BLSE: Tensor, heads: int, sees_B1LL: Tensor | None, rope: Rotary | None
    ) -> Tensor:
        B, L, S, E = qkv_BLSE.shape
        K = (S - heads) // 2
        q_blocks, k_NLE, v_NLE = split_heads(qkv_BLSE, heads, rope)
        y_blocks, weights = torch.empty_like(q_blocks), []
        none_1, scale = qkv_BLSE.new_empty(1), 1 / math.sqrt(E)
        with torch.autocast(qkv_BLSE.device.type, enabled=False):
            for (begin, end), q_NXE, y_NXE in zip(
                places(L), views(q_blocks, L, B * K), views(y_blocks, L, B * K), strict=True
            ):
                keys_NEC = k_NLE[:, :end].transpose(1, 2)
                score_NXC = torch.baddbmm(none_1, q_NXE, keys_NEC, beta=0, alpha=scale)
                weight_NXC = causal_softmax(score_NXC, end - begin, sees_B1LL)
                torch.bmm(weight_NXC, v_NLE[:, :end], out=y_NXE)
                weights.append(weight_NXC)
        ctx.rope = rope
        ctx.save_for_backward(q_blocks, k_NLE, v_NLE, *weights)
        return from_blocks(y_blocks, B, L, K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHE: Tensor) -> tuple[Tensor, None, None, None]:
        q_blocks, k_NLE, v_NLE, *weights = ctx.saved_tensors
        B, L, _, E = dy_BLHE.shape
        N = len(k_NLE)
        dy_blocks, dq_blocks = to_blocks(dy_BLHE, N // B), torch.empty_like(q_blocks)
        # Sums over blocks, in float32 whatever the arithmetic.
        dk_NLE, dv_NLE = (torch.zeros_like(k_NLE, dtype=_sum_type(k_NLE)) for _ in range(2))
        none_1, scale = k_NLE.new_empty(1), 1 / math.sqrt(E)
        rows = (views(blocks, L, N) for blocks in (q_blocks, dy_blocks, dq_blocks))
        for (begin, end), q_NXE, dy_NXE, dq_NXE, weight_NXC in zip(places(L), *rows, weights, strict=True):
            dv_NLE[:, :end].add_(torch.bmm(weight_NXC.transpose(1, 2), dy_NXE))
            dweight_NXC = torch.bmm(dy_NXE, v_NLE[:, :end].transpose(1, 2))
            dscore_NXC = causal_softmax_backward(weight_NXC, dweight_NXC, end - begin)
            torch.baddbmm(none_1, dscore_NXC, k_NLE[:, :end], beta=0, alpha=scale, out=dq_NXE)
            dk_NLE[:, :end].add_(torch.bmm(dscore_NXC.transpose(1, 2), q_NXE))
        return join_heads(dq_blocks, dk_NLE.mul_(scale), dv_NLE, B, ctx.rope), None, None, None


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
