"""The loss on a teacher's kept answers, and on the next token, in one pass over the logits.

With sampled tokens (1 / K each) the divergence and its gradient are unbiased estimates of those of the
teacher's whole distribution. With the K most likely tokens and the mass r of the rest, the rest counts as
one outcome: sum q (log q - log p) + r (log r - log p_rest). That is a lower bound of the divergence (its
data-processing inequality), zero where the student is the teacher: it is biased in that it does not teach how
the teacher divides the rest; the student keeps its own proportions there.

Shapes: N positions, C of them at a time, D width, V vocabulary, K tokens kept, J = K + 1 with the target.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stlm.kernels.library import kernels_for

# Logits computed at once, and the least mass of a rest, below which float32 tells nothing.
_LOGITS = {"cpu": 2**24, "cuda": 2**27}
_LEAST = 1e-6


class TaughtLoss(NamedTuple):
    """`loss`, to be differentiated, and its parts without gradients, each the mean over positions in nats."""

    loss: Tensor
    next_token: Tensor
    divergence: Tensor


def taught_loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ids_NK: Tensor,
    log_q_NK: Tensor,
    log_rest_N: Tensor | None,
    share: float = 1.0,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> TaughtLoss:
    """(1 - share) times the cross-entropy of the targets plus share times the divergence, at a temperature.

    `ids_NK` and `log_q_NK` (any float type): tokens sampled from the teacher where `log_rest_N` is None, or
    its most likely ones, each once. Products are in the arithmetic of autocast, all else in float32.
    """
    wanted = torch.is_grad_enabled()  # inside of a Function it is not
    return TaughtLoss(
        *_TaughtLoss.apply(
            x_ND, weight_VD, targets_N, ids_NK, log_q_NK, log_rest_N, share, temperature, softcap, wanted
        )
    )


class _TaughtLoss(torch.autograd.Function):
    """As in `stlm.model.head_loss`, gradients are computed in the forward pass, replacing the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        ids_NK: Tensor,
        log_q_NK: Tensor,
        log_rest_N: Tensor | None,
        share: float,
        temperature: float,
        softcap: float,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, N = x_ND.device.type, len(x_ND)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        wants_x, wants_weight = (wanted and needs for needs in ctx.needs_input_grad[:2])
        dx_ND = torch.empty_like(x_ND) if wants_x else None
        dweight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        sums = torch.zeros(2, dtype=torch.float32, device=x_ND.device)
        with torch.autocast(device, enabled=False):
            x_in_ND, weight_in_VD = x_ND.to(dtype), weight_VD.to(dtype)
            # Of pairs of a position's tokens there are J^2.
            positions = max(1, _LOGITS[device] // max(len(weight_VD), (ids_NK.shape[1] + 1) ** 2))
            for begin in range(0, N, positions):
                here = slice(begin, begin + positions)
                logits_CV = x_in_ND[here] @ weight_in_VD.T
                taught = _Taught.of(targets_N[here], ids_NK[here], log_q_NK[here], log_rest_N, here, share)
                sums += _losses(logits_CV, taught, temperature, softcap, wants_x or wants_weight)
                if wants_x:
                    dx_ND[here] = (logits_CV @ weight_in_VD).to(dx_ND.dtype)
                if wants_weight:
                    dweight_VD += logits_CV.T @ x_in_ND[here]
            for gradient in (dx_ND, dweight_VD):
                if gradient is not None:
                    gradient.mul_(1 / N)
        next_token, divergence = sums / N
        ctx.save_for_backward(dx_ND, dweight_VD)
        ctx.mark_non_differentiable(next_token, divergence)
        return (1 - share) * next_token + share * divergence, next_token, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if gradient is None else gradient * dloss for gradient in ctx.saved_tensors]
        return *gradients, *[None] * 8


class _Taught(NamedTuple):
    """Tokens [C, J], the target first, and of each the weight in the loss's cross-entropy.

    `q_CK`, `log_q_CK`: shares of the kept tokens in the divergence, and what they are compared with;
    `rest_C`: the mass of the rest, or None.
    """

    ids_CJ: Tensor
    weights_CJ: Tensor
    q_CK: Tensor
    log_q_CK: Tensor
    rest_C: Tensor | None
    share: float

    @classmethod
    def of(
        cls,
        targets_C: Tensor,
        ids_CK: Tensor,
        log_q_CK: Tensor,
        log_rest_N: Tensor | None,
        here: slice,
        share: float,
    ) -> _Taught:
        log_q_CK, rest_C = log_q_CK.float(), None
        if log_rest_N is None:
            q_CK = torch.full_like(log_q_CK, 1 / ids_CK.shape[1])
        else:
            # Rounded to float16, the masses no longer add up to one.
            log_all_CJ = torch.cat([log_rest_N[here].float()[:, None], log_q_CK], dim=1).log_softmax(dim=1)
            log_q_CK, rest_C = log_all_CJ[:, 1:], log_all_CJ[:, 0].exp()
            q_CK = log_q_CK.exp()
        ids_CJ = torch.cat([targets_C.reshape(-1, 1), ids_CK.long()], dim=1)
        target_C1 = q_CK.new_full((len(q_CK), 1), 1 - share)
        return cls(ids_CJ, torch.cat([target_C1, share * q_CK], dim=1), q_CK, log_q_CK, rest_C, share)


def _losses(logits_CV: Tensor, taught: _Taught, temperature: float, softcap: float, gradient: bool) -> Tensor:
    """The sums over positions of cross-entropy and divergence; with `gradient`, that of their weighted sum
    replaces the logits."""
    ids_CJ = taught.ids_CJ
    z_CJ, slope_CJ = _bounded(logits_CV.gather(1, ids_CJ).float(), softcap)
    log_sum_C = _softmax(logits_CV, ids_CJ[:, 0], z_CJ[:, 0], temperature, softcap, gradient)
    log_p_CJ = z_CJ / temperature - log_sum_C[:, None]
    p_CJ = log_p_CJ.exp()
    divergence = (taught.q_CK * (taught.log_q_CK - log_p_CJ[:, 1:])).sum()
    others_C1 = None
    if (rest_C := taught.rest_C) is not None:
        rest_C = rest_C.clamp(min=_LEAST)
        p_rest_C = (1 - p_CJ[:, 1:].sum(dim=1)).clamp(min=_LEAST)
        divergence += (rest_C * (rest_C.log() - p_rest_C.log())).sum()
        others_C1 = (1 - taught.share * rest_C / p_rest_C)[:, None]
    if gradient:
        # A token that is there several times, as a target or drawn again, has the sum of its weights.
        total_CJ = ((ids_CJ[:, :, None] == ids_CJ[:, None]) * taught.weights_CJ[:, None]).sum(dim=2)
        if others_C1 is not None:
            logits_CV.mul_(others_C1.to(logits_CV.dtype))
            kept_C1 = (ids_CJ[:, 1:] == ids_CJ[:, :1]).any(dim=1, keepdim=True)
            p_CJ[:, :1] *= torch.where(kept_C1, 1.0, others_C1)
        gradient_CJ = (p_CJ - total_CJ) * slope_CJ / temperature
        logits_CV.scatter_(1, ids_CJ, gradient_CJ.to(logits_CV.dtype))
    return torch.stack([-log_p_CJ[:, 0].sum(), divergence])


def _bounded(z: Tensor, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Logits c tanh(z / c) where there is a softcap c, and their slope."""
    if not softcap:
        return z, 1.0
    bounded = torch.tanh(z / softcap)
    return bounded * softcap, 1 - bounded.square()


def _softmax(
    logits_CV: Tensor, targets_C: Tensor, z_C: Tensor, temperature: float, softcap: float, gradient: bool
) -> Tensor:
    """log sum exp(z / T) [C]; with `gradient`, p times the slope of z / T replaces the logits, but at the
    targets, where it is undefined."""
    if temperature == 1 and (kernels := kernels_for(logits_CV)) is not None:
        losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
        kernels.cross_entropy(
            *logits_CV.shape, logits_CV, targets_C.contiguous(), softcap, gradient, losses_C
        )
        return losses_C + z_C
    z_CV, slope_CV = _bounded(logits_CV.float(), softcap)
    log_sum_C = torch.logsumexp(z_CV / temperature, dim=1)
    if gradient:
        p_CV = z_CV.div_(temperature).sub_(log_sum_C[:, None]).exp_()
        logits_CV.copy_(p_CV.mul_(slope_CV).div_(temperature))
    return log_sum_C
