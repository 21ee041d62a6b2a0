"""Distillation: a run of the study teaches another (Hinton et al. 2015; paper, section 2.2).

Shapes: B rows, L positions, N = B L, C of them at a time, D the student's width, T the teacher's, V vocabulary,
S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from stlm.errors import UserError
from stlm.model.flops import forward_flops
from stlm.model.head_loss import head_loss
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.techniques.base import Technique
from stlm.training.checkpoints import last_checkpoint, load_checkpoint
from stlm.training.distributed import Group
from stlm.training.objective import Forward

# Logits held at once, of the teacher and of the student each.
_LOGITS = {"cpu": 2**23, "cuda": 2**27}


class Distillation(Technique):
    """The loss is (1 - weight) times the cross-entropy of the next token plus weight times T^2 times the
    Kullback-Leibler divergence of the student's distribution from the teacher's, both at temperature T.

    The teacher is another run of the study, trained before. Its forward pass, and its training, are counted.
    """

    supports = frozenset({"attention_within", "cache", "export", "packing", "sharing", "start_from"})
    replaces_next_token: ClassVar[bool] = True

    teacher: str = Field(description="The variant that teaches; it has the run's corpus and tokenizer.")
    weight: float = Field(0.5, ge=0, le=1, description="Weight of the divergence; the next token's is the rest.")
    temperature: float = Field(1.0, gt=0, description="Temperature T of both distributions.")
    sampled_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens drawn from the teacher's distribution at each position, an unbiased estimate of the "
        "divergence but for the teacher's entropy, which has no gradient (Anshumann et al. 2025, "
        "arXiv 2503.16870). null: the whole distribution.",
    )
    begin: float = Field(0.0, ge=0, le=1, description="Share of the steps after which the teacher begins.")
    end: float = Field(
        1.0, ge=0, le=1, description="Share of the steps after which it ends: early alone, as in SALT (2024)."
    )

    _teacher: Transformer | None = PrivateAttr(default=None)
    _steps: tuple[int, int] = PrivateAttr(default=(0, 0))

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Distillation:
        if self.begin >= self.end:
            raise ValueError(f"end: {self.end} is not after begin: {self.begin}")
        return self

    def depends(self) -> dict[str, str]:
        """The teacher."""
        return {"teacher": self.teacher}

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """The teacher reads the same tokens, as many of them, and its distribution is over them."""
        teacher = self.others["teacher"]
        if teacher.model.bytes is not None:
            raise ValueError(f"teacher: {self.teacher!r} is a byte-level model, which has no tokens to teach")
        for key in ("tokenizer", "corpus"):
            ours, theirs = getattr(run, key), getattr(teacher, key)
            # A published vocabulary, or one of bytes, is the same for every corpus.
            if ours != theirs and (key == "tokenizer" or run.tokenizer.startswith("bpe-")):
                raise ValueError(
                    f"teacher: {self.teacher!r} has the {key} {theirs}, the run {ours}; they must be the same"
                )
        if teacher.model.context < run.model.context:
            raise ValueError(
                f"teacher: {self.teacher!r} has a context of {teacher.model.context}, shorter than the run's "
                f"{run.model.context}"
            )

    def prepare(self, run: Run, device: torch.device, group: Group) -> None:
        """Load the teacher's last checkpoint, without gradients and dropout."""
        folder = last_checkpoint(run, run.depends["teacher"])
        teacher, _ = load_checkpoint(folder, device)
        if teacher.config.vocab_size != run.model.vocab_size:
            raise UserError(
                f"{folder}: the teacher has {teacher.config.vocab_size:,} tokens, the run "
                f"{run.model.vocab_size:,}; they must be the same"
            )
        self._teacher = teacher.eval().requires_grad_(False)

    def teaches(self, step: int, steps: int) -> bool:
        """Whether the teacher is asked at `step`, from 1, of `steps`."""
        return self.begin * steps < step <= self.end * steps

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The parts `next_token` and `distillation`; where the teacher is off, the plain loss alone."""
        if not self.weight or not self.teaches(forward.step, forward.steps):
            zero = torch.zeros((), device=forward.tokens_BL.device)
            return {"next_token": forward.next_token_loss(), "distillation": zero}
        parts = {}
        if self.weight < 1:
            parts["next_token"] = (1 - self.weight) * forward.next_token_loss()
        else:
            parts["next_token"] = torch.zeros((), device=forward.tokens_BL.device)
        with torch.no_grad():
            teacher_NT = self._teacher.hidden(forward.tokens_BL, forward.layout).flatten(0, 1)
        student, teacher = forward.model, self._teacher
        divergence = _Divergence.apply(
            forward.hidden_ND,
            student.output.weight,
            teacher_NT,
            teacher.output.weight,
            (student.config.logit_softcap, teacher.config.logit_softcap),
            self.temperature,
            self.sampled_tokens,
            torch.is_grad_enabled(),
        )
        parts["distillation"] = self.weight * self.temperature**2 * divergence
        return parts

    def extra_flops_per_token(self, run: Run) -> float:
        """The teacher's forward pass, and the student's head once more, in the share of steps that it teaches."""
        from stlm.model.counts import build_on_meta

        steps = run.training.steps
        share = sum(self.teaches(step, steps) for step in range(1, steps + 1)) / steps if self.weight else 0.0
        teacher = self.others["teacher"]
        network = build_on_meta(teacher.model, tuple(teacher.techniques.values()))
        context = run.model.context
        forward = forward_flops(network, context) / context
        student = build_on_meta(run.model, tuple(run.techniques.values()))
        # The divergence makes the student's logits, and their gradients, besides those of the next token's loss.
        heads = 1 if self.weight < 1 else 0
        return share * (forward + 3 * heads * 2 * student.output.weight.numel())


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) at a temperature, the mean over positions, a part of the positions at a time.

    As in `stlm.model.head_loss`, gradients are computed in the forward pass: no [N, V] is ever whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        teacher_NT: Tensor,
        teacher_VT: Tensor,
        softcaps: tuple[float, float],
        temperature: float,
        sampled: int | None,
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
            x_ND, weight_VD, teacher_NT, teacher_VT = (
                x.to(dtype) for x in (x_ND, weight_VD, teacher_NT, teacher_VT)
            )
            positions = max(1, _LOGITS[device] // len(weight_VD))
            for begin in range(0, N, positions):
                here = slice(begin, begin + positions)
                logits_CV, slope_CV = _capped(x_ND[here] @ weight_VD.T, softcaps[0])
                taught_CV, _ = _capped(teacher_NT[here] @ teacher_VT.T, softcaps[1])
                log_p_CV = torch.log_softmax(logits_CV / temperature, dim=1)
                log_q_CV = torch.log_softmax(taught_CV / temperature, dim=1)
                share_CV = _shares(log_q_CV, sampled)
                loss += (share_CV * (log_q_CV - log_p_CV)).sum() / N
                if wants_x or wants_weight:
                    gradient_CV = (log_p_CV.exp() - share_CV) / (temperature * N)
                    if slope_CV is not None:
                        gradient_CV *= slope_CV
                    gradient_CV = gradient_CV.to(dtype)
                if wants_x:
                    dx_ND[here] = gradient_CV @ weight_VD
                if wants_weight:
                    dweight_VD += gradient_CV.T @ x_ND[here]
        ctx.save_for_backward(dx_ND, dweight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if own is None else own * dloss for own in ctx.saved_tensors), *[None] * 6


def _capped(logits_CV: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Logits in float32, within the softcap, and the slope that it gives them (None without one)."""
    logits_CV = logits_CV.float()
    if not softcap:
        return logits_CV, None
    bounded_CV = torch.tanh(logits_CV / softcap)
    return bounded_CV * softcap, 1 - bounded_CV.square()


def _shares(log_q_CV: Tensor, sampled: int | None) -> Tensor:
    """The teacher's distribution, or each token's share of so many draws from it, whose mean it is."""
    q_CV = log_q_CV.exp()
    if sampled is None:
        return q_CV
    drawn_CS = torch.multinomial(q_CV, sampled, replacement=True)
    share = torch.full(drawn_CS.shape, 1 / sampled, device=q_CV.device)
    return torch.zeros_like(q_CV).scatter_add_(1, drawn_CS, share)
