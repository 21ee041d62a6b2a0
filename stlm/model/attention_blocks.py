"""Heads of queries, keys and values, laid out for products of blocks, and the softmax between them.

Each in one pass over memory where there are kernels (stlm.kernels), by torch's operations elsewhere.

Shapes: B batch, L length, H query heads, K key/value heads, S = H + 2 K, G = H / K query heads a group, E
head width, N = B K, Q queries of a block, X = G Q rows of a block's products, C keys up to the block's end.
"Blocks" [B L H, E] are the rows [N, X, E] of the first block of queries, then those of the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stlm.kernels.library import kernels_for
from stlm.model.rotary import Rotary, rotate, rotate_back

# Queries of a block: smaller ones look at fewer keys in vain, larger ones make larger products.
BLOCK = 64


def places(length: int) -> list[tuple[int, int]]:
    """First and last position (exclusive) of each block of queries."""
    return [(begin, min(begin + BLOCK, length)) for begin in range(0, length, BLOCK)]


def views(blocks: Tensor, length: int, groups: int) -> list[Tensor]:
    """The rows [N, X, E] of each block, N = `groups`."""
    E, rows = blocks.shape[1], len(blocks) // length * BLOCK
    return [block.view(groups, -1, E) for block in blocks.split(rows)]


def split_heads(qkv_BLSE: Tensor, heads: int, rope: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of queries, and keys and values [N, L, E]; with `rope` queries and keys are rotated."""
    B, L, S, E = qkv_BLSE.shape
    K = (S - heads) // 2
    if (kernels := kernels_for(qkv_BLSE)) is None:
        qk_BLSE, v_BLKE = qkv_BLSE.split([heads + K, K], dim=2)
        if rope is not None:
            qk_BLSE = rotate(qk_BLSE, *rope)
        q_BLHE, k_BLKE = qk_BLSE.split([heads, K], dim=2)
        k_NLE, v_NLE = (x.transpose(1, 2).reshape(B * K, L, E) for x in (k_BLKE, v_BLKE))
        return to_blocks(q_BLHE, K), k_NLE, v_NLE
    q_blocks = qkv_BLSE.new_empty(B * L * heads, E)
    k_NLE, v_NLE = (qkv_BLSE.new_empty(B * K, L, E) for _ in range(2))
    kernels.split_heads(
        B, L, heads, K, E, BLOCK, qkv_BLSE.contiguous(), *_angles(rope), q_blocks, k_NLE, v_NLE
    )
    return q_blocks, k_NLE, v_NLE


def join_heads(dq_blocks: Tensor, dk_NLE: Tensor, dv_NLE: Tensor, batch: int, rope: Rotary | None) -> Tensor:
    """Gradients [B, L, S, E] of what `split_heads` took; those of keys and values are sums, of their type."""
    B, (N, L, E) = batch, dk_NLE.shape
    H, K = len(dq_blocks) // (B * L), N // B
    dqkv_BLSE = dq_blocks.new_empty(B, L, H + 2 * K, E)
    if (kernels := kernels_for(dq_blocks)) is not None:
        kernels.join_heads(B, L, H, K, E, BLOCK, dq_blocks, dk_NLE, dv_NLE, *_angles(rope), dqkv_BLSE)
        return dqkv_BLSE
    dq_BLHE, dk_BLKE, dv_BLKE = dqkv_BLSE.split([H, K, K], dim=2)
    dq_BLHE.copy_(from_blocks(dq_blocks, B, L, K))
    dk_BLKE.copy_(dk_NLE.view(B, K, L, E).transpose(1, 2))
    dv_BLKE.copy_(dv_NLE.view(B, K, L, E).transpose(1, 2))
    if rope is not None:
        dqk_BLSE = dqkv_BLSE[:, :, : H + K]
        dqk_BLSE.copy_(rotate_back(dqk_BLSE, *rope))
    return dqkv_BLSE


def to_blocks(x_BLHE: Tensor, kv_heads: int) -> Tensor:
    """Blocks of the heads [B, L, H, E], those that share one of `kv_heads` together."""
    B, L, H, E = x_BLHE.shape
    blocks = x_BLHE.new_empty(B * L * H, E)
    if (kernels := kernels_for(x_BLHE)) is not None:
        kernels.block_heads(B, L, H, kv_heads, E, BLOCK, x_BLHE.contiguous(), blocks, False)
        return blocks
    x_BKGLE = _grouped(x_BLHE, kv_heads)
    for (begin, end), rows_NXE in zip(places(L), views(blocks, L, B * kv_heads), strict=True):
        own_BKGQE = x_BKGLE[:, :, :, begin:end]
        rows_NXE.view(own_BKGQE.shape).copy_(own_BKGQE)
    return blocks


def from_blocks(blocks: Tensor, batch: int, length: int, kv_heads: int) -> Tensor:
    """The heads [B, L, H, E] of blocks."""
    H, E = len(blocks) // (batch * length), blocks.shape[1]
    x_BLHE = blocks.new_empty(batch, length, H, E)
    if (kernels := kernels_for(blocks)) is not None:
        kernels.block_heads(batch, length, H, kv_heads, E, BLOCK, x_BLHE, blocks, True)
        return x_BLHE
    x_BKGLE = _grouped(x_BLHE, kv_heads)
    for (begin, end), rows_NXE in zip(places(length), views(blocks, length, batch * kv_heads), strict=True):
        own_BKGQE = x_BKGLE[:, :, :, begin:end]
        own_BKGQE.copy_(rows_NXE.view(own_BKGQE.shape))
    return x_BLHE


def causal_softmax(score_NXC: Tensor, queries: int, sees_B1LL: Tensor | None) -> Tensor:
    """softmax of the scores of a block of Q = `queries` over each query's own and earlier keys; it may take
    the scores' place. `sees_B1LL`: which of these keys count."""
    (N, X, C), Q = score_NXC.shape, queries
    if (kernels := kernels_for(score_NXC)) is not None:
        K, L = (1, C) if sees_B1LL is None else (N // len(sees_B1LL), sees_B1LL.shape[-1])
        kernels.causal_softmax(N, X // Q, Q, C, sees_B1LL, K, L, score_NXC)
        return score_NXC
    later_QQ = score_NXC.new_full((Q, Q), -torch.inf).triu(1)
    score_NXC.view(N, -1, Q, C)[..., C - Q :].add_(later_QQ)
    if sees_B1LL is not None:
        unseen_B11QC = ~sees_B1LL[:, :, None, C - Q : C, :C]
        score_NXC.view(len(sees_B1LL), -1, X // Q, Q, C).masked_fill_(unseen_B11QC, -torch.inf)
    return torch.softmax(score_NXC, dim=-1)


def causal_softmax_backward(weight_NXC: Tensor, dweight_NXC: Tensor, queries: int) -> Tensor:
    """Gradients of the scores; they may take the place of those of the weights."""
    if (kernels := kernels_for(weight_NXC)) is not None:
        N, X, C = weight_NXC.shape
        kernels.causal_softmax_backward(N, X // queries, queries, C, weight_NXC, dweight_NXC)
        return dweight_NXC
    return torch._softmax_backward_data(dweight_NXC, weight_NXC, -1, weight_NXC.dtype)


def _angles(rope: Rotary | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Cosines and sines, float32, and how many elements a row of the batch has of its own."""
    if rope is None:
        return None, None, 0
    cos, sin = (table.float().contiguous() for table in rope)
    return cos, sin, cos[0].numel() if cos.dim() == 4 else 0


def _grouped(x_BLHE: Tensor, kv_heads: int) -> Tensor:
    """The same elements as [B, K, G, L, E]: the heads of a group together."""
    return x_BLHE.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
