"""The divergence from a teacher that is asked at every step (`stlm.techniques.distillation`).

Logits of all positions never exist together. Products are in the arithmetic of autocast, all else in float32.

Shapes: N positions, C of them at a time, D the student's width, E the teacher's, V vocabulary, W the
teacher's, S sampled tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stlm.teaching.loss import taught_loss
from stlm.teaching.subset import Subset

# Logits computed at once, of the student and of the teacher each; several tensors of this size coexist.
_LOGITS = {"cpu": 2**23, "cuda": 2**26}
# The least probability of a token that a projection may leave without any.
_LEAST = 1e-30


def divergence(
    x_ND: Tensor,
    weight_VD: Tensor,
    teacher_NE: Tensor,
    teacher_WE: Tensor,
    softcaps: tuple[float, float],
    temperature: float,
    sampled: int | None,
    subset: Subset | None,
) -> Tensor:
    """KL(teacher || student) at a temperature in nats, float32: the mean over positions.

    `softcaps`: the student's, the teacher's. `sampled`: tokens drawn from the teacher's distribution at each
    position, which stand for it; None: the whole of it. The loss on drawn tokens is that of kept answers.
    The whole distribution has its own: in the form of kept tokens it would be V ids and probabilities for
    each position, where here two matrices of logits replace one another in place.
    """
    if sampled is None:
        wanted = torch.is_grad_enabled()  # inside of a Function it is not
        return _WholeDivergence.apply(
            x_ND, weight_VD, teacher_NE, teacher_WE, softcaps, temperature, subset, wanted
        )
    ids_NS, log_q_NS = _draw(teacher_NE, teacher_WE, softcaps[1], temperature, sampled, subset)
    # At a share of one nothing of the loss is the next token's: any target will do.
    return taught_loss(
        x_ND, weight_VD, ids_NS[:, 0], ids_NS, log_q_NS, None, 1.0, temperature, softcaps[0]
    ).loss


class _WholeDivergence(torch.autograd.Function):
    """The divergence from the teacher's whole distribution.

    As in `stlm.model.head_loss`, gradients are computed in the forward pass, for some of the positions at a
    time: logits of all of them never exist together. Products are in the arithmetic of autocast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        teacher_NE: Tensor,
        teacher_WE: Tensor,
        softcaps: tuple[float, float],
        temperature: float,
        subset: Subset | None,
        wanted: bool,
    ) -> Tensor:
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        wants_x, wants_weight = (wanted and needs for needs in ctx.needs_input_grad[:2])
        N = len(x_ND)
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        dx_ND = torch.empty_like(x_ND) if wants_x else None
        dweight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        with torch.autocast(device, enabled=False):
            x_ND, weight_VD, teacher_NE, teacher_WE = (
                x.to(dtype) for x in (x_ND, weight_VD, teacher_NE, teacher_WE)
            )
            positions = max(1, _LOGITS[device] // max(len(weight_VD), len(teacher_WE)))
            for begin in range(0, N, positions):
                here = slice(begin, begin + positions)
                log_q_CV = _teachers(teacher_NE[here], teacher_WE, softcaps[1], temperature, subset)
                log_p_CV, slope_CV = _log_softmax(x_ND[here] @ weight_VD.T, softcaps[0], temperature)
                q_CV = log_q_CV.exp()
                loss += (q_CV * log_q_CV.sub_(log_p_CV)).sum() / N
                if not (wants_x or wants_weight):
                    continue
                gradient_CV = log_p_CV.exp_().sub_(q_CV).mul_(slope_CV / (temperature * N)).to(dtype)
                if wants_x:
                    dx_ND[here] = gradient_CV @ weight_VD
                if wants_weight:
                    dweight_VD += gradient_CV.T @ x_ND[here]
        ctx.save_for_backward(dx_ND, dweight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if gradient is None else gradient * dloss for gradient in ctx.saved_tensors]
        return *gradients, *[None] * 6


def _log_softmax(logits_CV: Tensor, softcap: float, temperature: float) -> tuple[Tensor, Tensor | float]:
    """log softmax(z / T) in float32 of logits z, bounded where there is a softcap, and the bound's slope."""
    logits_CV, slope_CV = logits_CV.float(), 1.0
    if softcap:
        bounded_CV = torch.tanh(logits_CV / softcap)
        logits_CV, slope_CV = bounded_CV * softcap, 1 - bounded_CV.square()
    return torch.log_softmax(logits_CV / temperature, dim=1), slope_CV


def _teachers(
    teacher_CE: Tensor, teacher_WE: Tensor, softcap: float, temperature: float, subset: Subset | None
) -> Tensor:
    """The logarithms of the teacher's probabilities of the student's tokens [C, V], float32."""
    log_q_CV, _ = _log_softmax(teacher_CE @ teacher_WE.T, softcap, temperature)
    if subset is None:
        return log_q_CV
    return subset.project(log_q_CV.exp_()).clamp_(min=_LEAST).log_()


@torch.no_grad()
def _draw(
    teacher_NE: Tensor,
    teacher_WE: Tensor,
    softcap: float,
    temperature: float,
    sampled: int,
    subset: Subset | None,
) -> tuple[Tensor, Tensor]:
    """Tokens [N, S] drawn from the teacher's distribution, and the logarithms of their probabilities."""
    device, parts = teacher_NE.device.type, []
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else teacher_NE.dtype
    with torch.autocast(device, enabled=False):
        teacher_WE = teacher_WE.to(dtype)
        for teacher_CE in teacher_NE.to(dtype).split(max(1, _LOGITS[device] // len(teacher_WE))):
            log_q_CV = _teachers(teacher_CE, teacher_WE, softcap, temperature, subset)
            ids_CS = torch.multinomial(log_q_CV.exp(), sampled, replacement=True)
            parts.append((ids_CS, log_q_CV.gather(1, ids_CS)))
    ids_NS, log_q_NS = map(torch.cat, zip(*parts, strict=True))
    return ids_NS, log_q_NS
