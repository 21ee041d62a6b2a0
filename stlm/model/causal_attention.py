"""Causal attention for training on a CPU: one kernel (stlm.kernels), or block products in torch.

torch's fused attention on a CPU keeps its working set in the cache, but its tiles are too small for the
processor's matrix products: with 16 heads of 32 over 512 tokens it takes four times as long, forward and
backward. Here the queries of a block, taken from all heads that share a key/value head, are multiplied with
all keys up to the block's end at once. The attention weights (half of the squared length, for each head) are
kept for the backward pass.

The kernel computes the same without leaving the cache.

Shapes: B batch, L length, H query heads, K key/value heads, G = H / K query heads a group, E head width,
N = B K, Q queries of a block, X = G Q rows of a block's products, C keys up to the block's end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stlm.kernels.library import kernels_for
from stlm.model.rotary import Rotary, rotate, rotate_back

# Queries in a block: small blocks compute fewer masked scores, large ones make larger products.
_BLOCK = 64


def causal_attention(
    qkv_BLSE: Tensor, heads: int, sees_B1LL: Tensor | None = None, rope: Rotary | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over each position and those before it [B, L, H, E] (Vaswani et al. 2017).

    `qkv_BLSE` has S = H + 2 K heads: first H = `heads` queries, then K keys, then K values. Each key/value
    head serves H / K consecutive query heads (Ainslie et al. 2023). `sees_B1LL` says which of the keys a
    query may see, its own position included; None: all. `rope` rotates queries and keys.
    """
    kernels = kernels_for(qkv_BLSE)
    if kernels is not None and kernels.attention is not None:
        return _Kernel.apply(qkv_BLSE, heads, sees_B1LL, rope)
    return _CausalAttention.apply(qkv_BLSE, heads, sees_B1LL, rope)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BLSE: Tensor, heads: int, sees_B1LL: Tensor | None, rope: Rotary | None
    ) -> Tensor:
        qkv_BLSE = qkv_BLSE.contiguous()
        B, L, S, E = qkv_BLSE.shape
        K, rest = divmod(S - heads, 2)
        if rest or K < 1 or heads % K:
            raise ValueError(f"{S} heads: {heads} of queries, and as many of keys as of values, do not fit")
        if sees_B1LL is not None:
            if sees_B1LL.shape != (B, 1, L, L) or sees_B1LL.dtype != torch.bool:
                found = f"{tuple(sees_B1LL.shape)} of {sees_B1LL.dtype}"
                raise ValueError(
                    f"expected which keys are seen as {(B, 1, L, L)} of torch.bool, found {found}"
                )
            sees_B1LL = sees_B1LL.contiguous()
        ctx.shape = B, L, heads, K, E
        ctx.angles = _angles(rope, B, L, E)
        y_BLHE = qkv_BLSE.new_empty(B, L, heads, E)
        kernels = kernels_for(qkv_BLSE)
        weights = qkv_BLSE.new_empty(B * heads, kernels.attention_weights(L))
        kernels.attention(*ctx.shape, qkv_BLSE, *ctx.angles, sees_B1LL, y_BLHE, weights)
        ctx.save_for_backward(qkv_BLSE, weights)
        return y_BLHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHE: Tensor) -> tuple[Tensor, None, None, None]:
        qkv_BLSE, weights = ctx.saved_tensors
        dqkv_BLSE = torch.empty_like(qkv_BLSE)
        kernels_for(dy_BLHE).attention_backward(
            *ctx.shape, qkv_BLSE, *ctx.angles, dy_BLHE.contiguous(), weights, dqkv_BLSE
        )
        return dqkv_BLSE, None, None, None


def _angles(rope: Rotary | None, B: int, L: int, E: int) -> tuple[Tensor | None, Tensor | None, int]:
    """Cosines and sines, float32, and the stride between the batch's rows in them (0: shared by all rows)."""
    if rope is None:
        return None, None, 0
    cos, sin = (table.float().contiguous() for table in rope)
    per_row = cos.dim() == 4 and len(cos) > 1
    if cos.shape != sin.shape or cos.numel() != (B if per_row else 1) * L * E:
        raise ValueError(f"expected angles of {L} positions and {E} dimensions, found {tuple(cos.shape)}")
    return cos, sin, L * E if per_row else 0


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BLSE: Tensor, heads: int, sees_B1LL: Tensor | None, rope: Rotary | None
    ) -> Tensor:
        B, L, S, E = qkv_BLSE.shape
        K = (S - heads) // 2
        qk_BLSE, v_BLKE = qkv_BLSE.split([heads + K, K], dim=2)
        if rope is not None:
            qk_BLSE = rotate(qk_BLSE, *rope)
        q_BLHE, k_BLKE = qk_BLSE.split([heads, K], dim=2)
        k_NLE, v_NLE = (x.transpose(1, 2).reshape(B * K, L, E) for x in (k_BLKE, v_BLKE))
        q_BKGLE = _grouped(q_BLHE, K)
        y_BLHE = q_BLHE.new_empty(B, L, heads, E)
        y_BKGLE = _grouped(y_BLHE, K)
        later_QQ = q_BLHE.new_full((_BLOCK, _BLOCK), -torch.inf).triu(1)
        none_1 = q_BLHE.new_empty(1)
        queries, weights = [], []
        with torch.autocast(qkv_BLSE.device.type, enabled=False):
            for begin, end in _blocks(L):
                Q = end - begin
                q_NXE = _rows(q_BKGLE, begin, end)
                score_NXC = torch.baddbmm(
                    none_1, q_NXE, k_NLE[:, :end].transpose(1, 2), beta=0, alpha=1 / math.sqrt(E)
                )
                score_NXC.view(B * K, -1, Q, end)[..., begin:].add_(later_QQ[:Q, :Q])
                if sees_B1LL is not None:
                    unseen_B11QC = ~sees_B1LL[:, :, None, begin:end, :end]
                    score_NXC.view(B, K, -1, Q, end).masked_fill_(unseen_B11QC, -torch.inf)
                weight_NXC = torch.softmax(score_NXC, dim=-1)
                y_BKGLE[:, :, :, begin:end] = torch.bmm(weight_NXC, v_NLE[:, :end]).view(B, K, -1, Q, E)
                queries.append(q_NXE)
                weights.append(weight_NXC)
        ctx.rope = rope
        ctx.save_for_backward(k_NLE, v_NLE, *queries, *weights)
        return y_BLHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHE: Tensor) -> tuple[Tensor, None, None, None]:
        k_NLE, v_NLE, *kept = ctx.saved_tensors
        B, L, H, E = dy_BLHE.shape
        K = len(k_NLE) // B
        blocks = _blocks(L)
        dy_BKGLE = _grouped(dy_BLHE, K)
        dqkv_BLSE = k_NLE.new_empty(B, L, H + 2 * K, E)
        dq_BLHE, dk_BLKE, dv_BLKE = dqkv_BLSE.split([H, K, K], dim=2)
        dq_BKGLE = _grouped(dq_BLHE, K)
        # Sums over blocks stay in float32, whatever the precision.
        dk_NLE, dv_NLE = (torch.zeros_like(k_NLE, dtype=_sum_type(k_NLE)) for _ in range(2))
        none_1, scale = k_NLE.new_empty(1), 1 / math.sqrt(E)
        for (begin, end), q_NXE, weight_NXC in zip(
            blocks, kept[: len(blocks)], kept[len(blocks) :], strict=True
        ):
            dy_NXE = _rows(dy_BKGLE, begin, end)
            dv_NLE[:, :end] += torch.bmm(weight_NXC.transpose(1, 2), dy_NXE)
            dweight_NXC = torch.bmm(dy_NXE, v_NLE[:, :end].transpose(1, 2))
            dscore_NXC = torch._softmax_backward_data(dweight_NXC, weight_NXC, -1, weight_NXC.dtype)
            dq_NXE = torch.baddbmm(none_1, dscore_NXC, k_NLE[:, :end], beta=0, alpha=scale)
            dq_BKGLE[:, :, :, begin:end] = dq_NXE.view(B, K, -1, end - begin, E)
            dk_NLE[:, :end] += torch.bmm(dscore_NXC.transpose(1, 2), q_NXE)
        dk_BLKE.copy_(dk_NLE.mul_(scale).view(B, K, L, E).transpose(1, 2))
        dv_BLKE.copy_(dv_NLE.view(B, K, L, E).transpose(1, 2))
        if ctx.rope is not None:
            dqk_BLSE = dqkv_BLSE[:, :, : H + K]
            dqk_BLSE.copy_(rotate_back(dqk_BLSE, *ctx.rope))
        return dqkv_BLSE, None, None, None


def _blocks(length: int) -> list[tuple[int, int]]:
    """The first position of each block of queries, and the position after its last."""
    return [(begin, min(begin + _BLOCK, length)) for begin in range(0, length, _BLOCK)]


def _grouped(x_BLHE: Tensor, kv_heads: int) -> Tensor:
    """The same elements as [B, K, G, L, E], with the heads of a group together."""
    return x_BLHE.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _rows(x_BKGLE: Tensor, begin: int, end: int) -> Tensor:
    """A copy of the block's rows [N, X, E], with the heads of a group together."""
    return x_BKGLE[:, :, :, begin:end].flatten(2, 3).flatten(0, 1)


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
