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
        dtype = self.output_type(x)
        return super().forward(x) if dtype is None else _RMSNorm.apply(x, self.weight, self.eps, dtype)

    def output_type(self, x: Tensor) -> torch.dtype | None:
        """What the kernel returns for `x`; None: there is no kernel for it."""
        types = {x.dtype, self.weight.dtype}
        if types != {torch.float32} or x.shape[-1:] != self.weight.shape or kernels_for(x) is None:
            return None
        narrow = self.narrow and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if narrow else x.dtype
        return dtype if dtype in TYPES else x.dtype


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


def add_and_norm(
    x: Tensor, added: Tensor, norm: nn.Module, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + `added`, and `norm` of the sum.

    In scoring, where no gradients are wanted, this is one pass; the sum is written to `total` if it is given.
    """
    if isinstance(norm, RMSNorm) and _is_scoring(x, added) and norm.output_type(x) == added.dtype:
        total, normal = torch.empty_like(x) if total is None else total, torch.empty_like(added)
        D = x.shape[-1]
        kernels_for(added).add_norm(x.numel() // D, D, x, added, norm.weight, norm.eps, total, normal)
        return total, normal
    total = x + added
    return total, norm(total)


def add_to(x: Tensor, added: Tensor) -> Tensor:
    """x + `added`. In scoring x, which nothing else may need, becomes the sum."""
    if not _is_scoring(x, added):
        return x + added
    D = x.shape[-1]
    kernels_for(added).add_norm(x.numel() // D, D, x, added, None, 0.0, x, None)
    return x


def _is_scoring(x: Tensor, added: Tensor) -> bool:
    """Whether a kernel without gradients adds the tensors."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and x.shape == added.shape
        and x.numel() > 0
        and x.is_contiguous()
        and added.is_contiguous()
        and kernels_for(x) is not None
        and kernels_for(added) is not None
    )


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
