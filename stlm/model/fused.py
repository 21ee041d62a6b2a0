"""Parts of a block that a CPU kernel computes in one pass over memory, forward and backward (stlm.kernels).

On a CPU, each torch operation is a pass over memory, and autograd derives more operations than are needed.
Without kernels, on a GPU and under torch.compile, the plain operations are used.

Shapes: D width, F feed-forward width; "..." any positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stlm.kernels.library import TYPES, kernels_for


class RMSNorm(nn.RMSNorm):
    """x / rms(x) times a gain, over the last dimension (Zhang and Sennrich 2019).

    `narrow`: returns autocast's dtype where autocast is on, as only matrix products read the result;
    otherwise the argument's dtype.
    """

    narrow = False

    def forward(self, x: Tensor) -> Tensor:
        types = {x.dtype, self.weight.dtype}
        if types != {torch.float32} or x.shape[-1:] != self.weight.shape or kernels_for(x) is None:
            return super().forward(x)
        narrow = self.narrow and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if narrow else x.dtype
        return _RMSNorm.apply(x, self.weight, self.eps, dtype if dtype in TYPES else x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x, dtype=dtype)
        inverse = x.new_empty(x.shape[:-1])
        kernels_for(y).rms_norm(inverse.numel(), x.shape[-1], x, gain_D, eps, y, inverse)
        ctx.save_for_backward(x, inverse, gain_D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, gain_D = ctx.saved_tensors
        D, threads = len(gain_D), torch.get_num_threads()
        dx, parts_XD = torch.empty_like(x), gain_D.new_zeros(threads, D)
        kernels_for(dy).rms_norm_backward(
            inverse.numel(), D, dy.contiguous(), x, gain_D, inverse, dx, parts_XD, threads
        )
        return dx, parts_XD.sum(dim=0), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [..., F], given gate and up concatenated [..., 2 F] (Shazeer 2020)."""
    if kernels_for(gate_up) is not None:
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        F = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], F)
        kernels_for(y).swiglu(y.numel() // F, F, gate_up, y)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gradient, F = torch.empty_like(gate_up), dy.shape[-1]
        kernels_for(dy).swiglu_backward(dy.numel() // F, F, dy.contiguous(), gate_up, gradient)
        return gradient


def weight_gradient(dy: Tensor, x: Tensor, Y: int, X: int) -> Tensor:
    """dy^T x [Y, X], computed in rows that the threads share: fastest with Y the longer side."""
    gradient_YX = dy.new_empty(Y, X)
    kernels_for(dy).product_weight(dy.numel() // Y, X, Y, dy, x, gradient_YX)
    return gradient_YX
