"""The head and the cross-entropy in one operation, for some of the positions at a time.

With a vocabulary of 50,257, the logits of a micro-batch and their gradients are by far the largest tensors of
a training step. Here the logits of some positions are replaced by their gradients in place, and these are
added to the gradients of residuals and weights, before the next positions' logits are computed. This
happens in the forward pass: the loss is the last operation, so its gradients need nothing else (as in Liger
kernels, Hsu et al. 2024).

Shapes: N positions, C of them at a time, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stlm.kernels.library import kernels_for

# The number of logits held at once, and of those in one softmax; on a CPU the latter is small enough for the
# float32 probabilities to stay in its cache.
_LOGITS = {"cpu": 2**25, "cuda": 2**28}
_PROBABILITIES = {"cpu": 2**20, "cuda": 2**28}


def head_loss(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats, float32, of the logits x W^T: `F.cross_entropy(x W^T, targets)`.

    Products and the gradients of logits use autocast's dtype where autocast is on; the softmax and sums over
    positions are in float32. Memory is bounded, whatever N. With `softcap` c (0: none), logits z become
    c tanh(z / c) (Gemma 2, 2024).
    """
    wanted = torch.is_grad_enabled()  # always False inside of a Function
    return _HeadLoss.apply(x_ND, weight_VD, targets_N, softcap, wanted)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float, wanted: bool
    ) -> Tensor:
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        wants_x, wants_weight = (wanted and needs for needs in ctx.needs_input_grad[:2])
        N = len(x_ND)
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        dx_ND = torch.empty_like(x_ND) if wants_x else None
        dweight_VD = None
        with torch.autocast(device, enabled=False):
            x_in_ND, weight_in_VD = x_ND.to(dtype), weight_VD.to(dtype)
            positions = _even_part(N, _LOGITS[device] // len(weight_VD))
            for begin in range(0, N, positions):
                here = slice(begin, begin + positions)
                x_CD = x_in_ND[here]
                logits_CV = x_CD @ weight_in_VD.T
                loss += _losses(logits_CV, targets_N[here], N, softcap, wants_x or wants_weight)
                if wants_x:
                    dx_ND[here] = logits_CV @ weight_in_VD
                if wants_weight:
                    part_VD = logits_CV.T @ x_CD
                    dweight_VD = part_VD.to(weight_VD.dtype) if begin == 0 else dweight_VD.add_(part_VD)
            # Divide by N here, in one pass over few elements, instead of dividing all logits.
            for gradient in (dx_ND, dweight_VD):
                if gradient is not None:
                    gradient.mul_(1 / N)
        ctx.save_for_backward(dx_ND, dweight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # Reading the value would make a GPU wait and break a graph; a CPU has it, and it is mostly 1.
        if dloss.device.type != "cpu" or torch.compiler.is_compiling() or dloss != 1:
            gradients = [None if gradient is None else gradient * dloss for gradient in gradients]
        return *gradients, None, None, None


def _even_part(count: int, most: int) -> int:
    """The size of equal parts of `count`, at most about `most`: a multiple of 64, for fast products."""
    parts = -(-count // max(1, most))
    return -(-count // (64 * parts)) * 64


def _losses(logits_CV: Tensor, targets_C: Tensor, count: int, softcap: float, gradient: bool) -> Tensor:
    """The sum of the losses divided by `count`; with `gradient`, the sum's gradient replaces the logits."""
    if (kernels := kernels_for(logits_CV)) is not None:
        (C, V), targets_C = logits_CV.shape, targets_C.long().contiguous()
        least, most = (bound.item() for bound in targets_C.aminmax())
        if least < 0 or most >= V:
            raise IndexError(f"targets from {least} to {most}, expected from 0 to {V - 1}")
        losses_C = logits_CV.new_empty(C, dtype=torch.float32)
        kernels.cross_entropy(C, V, logits_CV, targets_C, softcap, gradient, losses_C)
        return losses_C.sum() / count
    total = torch.zeros((), dtype=torch.float32, device=logits_CV.device)
    rows = max(1, _PROBABILITIES[logits_CV.device.type] // logits_CV.shape[1])
    if torch.compiler.is_compiling():
        rows = len(logits_CV)  # compiled code stays in the cache by itself, and a loop would be unrolled
    for logits_RV, targets_R in zip(logits_CV.split(rows), targets_C.split(rows), strict=True):
        p_RV = logits_RV.float() if not softcap else torch.tanh(logits_RV.float() / softcap)
        slope_RV = None
        if softcap:
            slope_RV = 1 - p_RV.square() if gradient else None
            p_RV.mul_(softcap)
        target_R1 = targets_R[:, None]
        wanted_R, largest_R = p_RV.gather(1, target_R1)[:, 0], p_RV.amax(dim=-1)
        p_RV = torch.softmax(p_RV, dim=-1, out=p_RV)
        # -log p of the target would be infinite if p underflows; the largest p never underflows.
        total += (largest_R - p_RV.amax(dim=-1).log() - wanted_R).sum() / count
        if gradient:
            p_RV.scatter_add_(1, target_R1, p_RV.new_full((1, 1), -1.0).expand(len(targets_R), 1))
            if slope_RV is not None:
                p_RV.mul_(slope_RV)
            logits_RV.copy_(p_RV)
    return total
