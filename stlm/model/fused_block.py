"""The two halves of a block, each in one operation on a CPU in float32 (stlm.kernels, products.c).

The matrix products then run with what surrounds them (RMSNorm, SwiGLU, the residual stream) while the rows
are in the processor's cache. Only the plain block is fused: `fuses` and `Block` say when. Others run their
modules, with the same result up to rounding.

Shapes: B batch, L length, D width, N = B L, X = (H + 2 K) E, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stlm.kernels.library import kernels_for
from stlm.model.causal_attention import angles_of, checked_sees
from stlm.model.fused import RMSNorm, weight_gradient
from stlm.model.projection import Dense
from stlm.model.rotary import Rotary

# The most weights of a fused matrix: each thread reads all of them for every 120 rows. At 1.6 million, the
# products of torch's library are faster.
_LARGEST = 2**19


def fuses(norm: nn.Module, part: nn.Module, matrices: tuple[nn.Module, ...], x_BLD: Tensor) -> bool:
    """Whether one operation can compute a block's half: `norm`, then `part`, whose products are `matrices`.

    Modules with hooks are called as such, since the hooks see their outputs.
    """
    if torch.is_autocast_enabled(x_BLD.device.type) or x_BLD.dtype != torch.float32:
        return False
    kernels = kernels_for(x_BLD)
    if kernels is None or kernels.product is None or type(norm) is not RMSNorm:
        return False
    if not all(type(matrix) is Dense and matrix.adapter is None for matrix in matrices):
        return False
    if max(matrix.weight.numel() for matrix in matrices) > _LARGEST:
        return False
    weights = (norm.weight, *(matrix.weight for matrix in matrices))
    plain = all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights)
    return plain and not any(_hooked(module) for module in (norm, part, *matrices))


def _hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def attention_half(
    x_BLD: Tensor,
    norm: RMSNorm,
    qkv: Dense,
    out: Dense,
    heads: tuple[int, int],
    sees_B1LL: Tensor | None,
    rope: Rotary | None,
    residual: bool,
) -> Tensor:
    """Causal attention over the normalized stream [B, L, D], plus the stream if `residual`.

    `heads`: the numbers of query and of key/value heads; the others as in `causal_attention`.
    """
    return _AttentionHalf.apply(
        x_BLD, norm.weight, qkv.weight, out.weight, norm.eps, heads, sees_B1LL, rope, residual
    )


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        gain_D: Tensor,
        qkv_XD: Tensor,
        out_DY: Tensor,
        eps: float,
        heads: tuple[int, int],
        sees_B1LL: Tensor | None,
        rope: Rotary | None,
        residual: bool,
    ) -> Tensor:
        x_BLD = x_BLD.contiguous()
        (B, L, D), (H, K) = x_BLD.shape, heads
        X, E = len(qkv_XD), len(qkv_XD) // (H + 2 * K)
        kernels, N = kernels_for(x_BLD), B * L
        h_BLD, inverse_N, qkv_BLX = torch.empty_like(x_BLD), x_BLD.new_empty(N), x_BLD.new_empty(B, L, X)
        kernels.norm_product(N, D, X, x_BLD, gain_D, eps, inverse_N, h_BLD, qkv_XD, qkv_BLX)
        ctx.shape, ctx.angles, ctx.residual = (B, L, H, K, E), angles_of(rope, B, L, E), residual
        mixed_BLY = x_BLD.new_empty(B, L, H * E)
        weights = x_BLD.new_empty(B * H, kernels.attention_weights(L))
        sees_B1LL = checked_sees(sees_B1LL, B, L)
        kernels.attention(*ctx.shape, qkv_BLX, *ctx.angles, sees_B1LL, mixed_BLY, weights)
        y_BLD = torch.empty_like(x_BLD)
        kernels.product(N, H * E, D, mixed_BLY, out_DY, 0, x_BLD if residual else None, y_BLD)
        ctx.save_for_backward(x_BLD, gain_D, qkv_XD, out_DY, h_BLD, inverse_N, qkv_BLX, mixed_BLY, weights)
        return y_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, gain_D, qkv_XD, out_DY, h_BLD, inverse_N, qkv_BLX, mixed_BLY, weights = ctx.saved_tensors
        dy_BLD = dy_BLD.contiguous()
        kernels, N, D, Y = kernels_for(dy_BLD), inverse_N.numel(), len(gain_D), out_DY.shape[1]
        dmixed_BLY, dqkv_BLX = torch.empty_like(mixed_BLY), torch.empty_like(qkv_BLX)
        kernels.product(N, D, Y, dy_BLD, out_DY, 1, None, dmixed_BLY)
        kernels.attention_backward(*ctx.shape, qkv_BLX, *ctx.angles, dmixed_BLY, weights, dqkv_BLX)
        dx_BLD, threads = torch.empty_like(x_BLD), torch.get_num_threads()
        dgain_XD = gain_D.new_zeros(threads, D)
        rest_BLD = dy_BLD if ctx.residual else None
        X = len(qkv_XD)
        kernels.norm_product_backward(
            N, D, X, dqkv_BLX, qkv_XD, x_BLD, gain_D, inverse_N, rest_BLD, dx_BLD, dgain_XD, threads
        )
        dqkv_XD = _weight_gradient(dqkv_BLX, h_BLD, qkv_XD) if ctx.needs_input_grad[2] else None
        dout_DY = _weight_gradient(dy_BLD, mixed_BLY, out_DY) if ctx.needs_input_grad[3] else None
        return dx_BLD, dgain_XD.sum(dim=0), dqkv_XD, dout_DY, None, None, None, None, None


def feed_forward_half(x_BLD: Tensor, norm: RMSNorm, gate_up: Dense, down: Dense, residual: bool) -> Tensor:
    """SwiGLU of the normalized stream [..., D] (Shazeer 2020), plus the stream if `residual`."""
    return _FeedForwardHalf.apply(x_BLD, norm.weight, gate_up.weight, down.weight, norm.eps, residual)


class _FeedForwardHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain_D: Tensor, gate_up_FD: Tensor, down_DF: Tensor, eps: float, residual: bool
    ) -> Tensor:
        x = x.contiguous()
        D, F = down_DF.shape
        N = x.numel() // D
        h, inverse_N = torch.empty_like(x), x.new_empty(N)
        gate_up, hidden, y = x.new_empty(N, 2 * F), x.new_empty(N, F), torch.empty_like(x)
        kernels_for(x).feed_forward(
            N, D, F, x, gain_D, eps, inverse_N, h, gate_up_FD, gate_up, hidden, down_DF, residual, y
        )
        ctx.residual = residual
        ctx.save_for_backward(x, gain_D, gate_up_FD, down_DF, h, inverse_N, gate_up, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain_D, gate_up_FD, down_DF, h, inverse_N, gate_up, hidden = ctx.saved_tensors
        dy, (D, F), threads = dy.contiguous(), down_DF.shape, torch.get_num_threads()
        dx, dgate_up, dgain_XD = torch.empty_like(x), torch.empty_like(gate_up), gain_D.new_zeros(threads, D)
        kernels_for(dy).feed_forward_backward(
            *(len(inverse_N), D, F, dy, x, gain_D, inverse_N, gate_up_FD, gate_up, down_DF, ctx.residual),
            *(dgate_up, dx, dgain_XD, threads),
        )
        dgate_up_FD = _weight_gradient(dgate_up, h, gate_up_FD) if ctx.needs_input_grad[2] else None
        ddown_DF = _weight_gradient(dy, hidden, down_DF) if ctx.needs_input_grad[3] else None
        return dx, dgain_XD.sum(dim=0), dgate_up_FD, ddown_DF, None, None


def _weight_gradient(dy: Tensor, x: Tensor, weight_YX: Tensor) -> Tensor:
    """dy^T x [Y, X], given dy [..., Y] and x [..., X]."""
    Y, X = weight_YX.shape
    return weight_gradient(dy, x, Y, X) if Y >= X else weight_gradient(x, dy, X, Y).T
