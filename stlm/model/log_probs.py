"""Log-probabilities of given tokens, with gradients, for some of the positions at a time.

The gradient of a function of several log-probabilities is not known in the forward pass, as that of
`stlm.model.head_loss` is. So logits are computed a second time in the backward pass, and never kept.

Shapes: N positions, C of them at a time, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The number of logits held at once; a few tensors of this size coexist.
_LOGITS = {"cpu": 2**23, "cuda": 2**26}


def token_log_probs(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float = 0.0) -> Tensor:
    """log p [N] of a token at each position, float32, given the logits x W^T.

    Products use autocast's dtype where autocast is on. With `softcap` c (0: none), logits z become
    c tanh(z / c). The head's product costs four times a forward pass with gradients, instead of three times.
    """
    return _TokenLogProbs.apply(x_ND, weight_VD, targets_N, softcap)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float) -> Tensor:
        device = x_ND.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        ctx.softcap = softcap
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        log_p_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            weight_in_VD = weight_VD.to(ctx.dtype)
            for here in _parts(x_ND, weight_VD):
                logits_CV, _ = _logits(x_ND[here].to(ctx.dtype), weight_in_VD, softcap)
                chosen_C1 = logits_CV.gather(1, targets_N[here, None])
                log_p_N[here] = chosen_C1[:, 0] - logits_CV.logsumexp(dim=1)
        return log_p_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlog_p_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        dx_ND = torch.empty_like(x_ND) if wants_x else None
        dweight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        with torch.autocast(x_ND.device.type, enabled=False):
            weight_in_VD = weight_VD.to(ctx.dtype)
            for here in _parts(x_ND, weight_VD):
                x_CD, dlog_p_C1 = x_ND[here].to(ctx.dtype), dlog_p_N[here, None]
                logits_CV, slope_CV = _logits(x_CD, weight_in_VD, ctx.softcap)
                gradient_CV = logits_CV.softmax(dim=1).mul_(-dlog_p_C1)
                gradient_CV.scatter_add_(1, targets_N[here, None], dlog_p_C1)
                gradient_CV = gradient_CV.mul_(slope_CV).to(ctx.dtype)
                if wants_x:
                    dx_ND[here] = gradient_CV @ weight_in_VD
                if wants_weight:
                    dweight_VD += gradient_CV.T @ x_CD
        return dx_ND, dweight_VD, None, None


def _parts(x_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    """The positions that are computed at a time."""
    size = max(1, _LOGITS[x_ND.device.type] // len(weight_VD))
    return [slice(begin, begin + size) for begin in range(0, len(x_ND), size)]


def _logits(x_CD: Tensor, weight_VD: Tensor, softcap: float) -> tuple[Tensor, Tensor | float]:
    """The logits [C, V] in float32, bounded where there is a softcap, and the bound's slope."""
    logits_CV = (x_CD @ weight_VD.T).float()
    if not softcap:
        return logits_CV, 1.0
    bounded_CV = torch.tanh(logits_CV / softcap)
    return bounded_CV * softcap, 1 - bounded_CV.square()
