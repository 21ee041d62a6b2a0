"""Parts of a block whose backward pass is written by hand, for training on a CPU.

A CPU runs torch's operations one by one, each a pass over memory, and autograd derives more of them than are
needed. A compiler fuses them better: under torch.compile and on a GPU the plain operations are used.

Shapes: D width, F feed-forward width; "..." any positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def by_hand(x: Tensor) -> bool:
    """Whether the passes written by hand are the faster ones for `x`."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class RMSNorm(nn.RMSNorm):
    """x / rms(x) times a gain, over the last dimension (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps) if by_hand(x) else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        # The norm is one pass, a mean of squares two.
        exact = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, gain_D)
        return (normal * gain_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, inverse, gain_D = ctx.saved_tensors
        D = len(gain_D)
        product_ND = (dy * normal).reshape(-1, D)
        along = (product_ND @ gain_D.to(product_ND.dtype)).div_(-D).view(inverse.shape)
        dx = (dy.to(normal.dtype) * gain_D).addcmul_(normal, along).mul_(inverse)
        return dx.to(dy.dtype), product_ND.sum(dim=0).to(gain_D.dtype), None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [..., F] of both side by side [..., 2 F] (Shazeer 2020)."""
    if by_hand(gate_up):
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(gate_up, opened)
        return opened * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        gate_up, opened = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        # Both gradients where the product before wants them, side by side.
        gradient = torch.empty_like(gate_up)
        dgate, dup = gradient.chunk(2, dim=-1)
        torch.mul(dy, opened, out=dup)
        torch.mul(dy, up, out=dgate)
        torch.ops.aten.silu_backward(dgate, gate, grad_input=dgate)
        return gradient
