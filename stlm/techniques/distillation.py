"""Distillation: a run of the study teaches another (Hinton et al. 2015; the paper's section 2.2).

Shapes: B rows, L positions, N = B L, C of them at a time, D the student's width, E the teacher's, V
vocabulary, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.flops import forward_flops
from stlm.techniques.base import Technique, refuse
from stlm.tokens.tokenizer import check_tokenizer

if TYPE_CHECKING:
    from stlm.model.transformer import Transformer
    from stlm.study.runs import Run
    from stlm.training.distributed import Group
    from stlm.training.objective import Forward

# Logits computed at once, of the student and of the teacher each; several tensors of this size coexist.
_LOGITS = {"cpu": 2**23, "cuda": 2**26}


class Distillation(Technique):
    """The loss is (1 - weight) times the next token's cross-entropy, plus weight times T^2 times the
    Kullback-Leibler divergence of the student's distribution from the teacher's, both at temperature T.

    The teacher is another run of the study, trained before. Its training and its forward pass are counted.
    """

    supports = frozenset(
        {"attention_within", "batches", "cache", "drafts", "export", "packing", "sharing", "start_from"}
    )
    replaces_next_token: ClassVar[bool] = True

    teacher: str = Field(
        description="The variant that teaches: with the run's tokenizer, and a context at least as long."
    )
    weight: float = Field(
        0.5, ge=0, le=1, description="Weight of the divergence; the next token's is the rest."
    )
    temperature: float = Field(1.0, gt=0, description="Temperature T of both distributions.")
    sampled_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens drawn from the teacher's distribution at each position, which estimate the loss "
        "and its gradient without bias (Anshumann et al. 2025, arXiv 2503.16870). null: the whole of it.",
    )
    begin: float = Field(0.0, ge=0, le=1, description="Share of the steps after which the teacher begins.")
    end: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the steps after which it ends; the rest is plain training, as in SALT "
        "(Rawat et al. 2024).",
    )

    _teacher: Transformer | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Distillation:
        if self.begin >= self.end:
            raise ValueError(f"end: {self.end} is not above begin: {self.begin}")
        return self

    def neutral(self) -> bool:
        """Whether the divergence has no weight."""
        return self.weight == 0

    def depends(self) -> dict[str, str]:
        """The teacher."""
        return {"teacher": self.teacher}

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """The teacher reads the run's tokens, as many of them, and predicts tokens of the same vocabulary."""
        teacher = self.others["teacher"]
        if run.data.attention == "within":
            refuse(
                teacher.techniques.values(),
                "attention_within",
                lambda what: ValueError(f"teacher: its {what}"),
            )
        if teacher.model.bytes is not None:
            raise ValueError(f"teacher: {self.teacher!r} is byte-level; expected a model of tokens")
        if teacher.tokenizer != run.tokenizer:
            raise ValueError(
                f"teacher: {self.teacher!r} has the tokenizer {teacher.tokenizer}, the run {run.tokenizer}; "
                "they must be the same"
            )
        if teacher.corpus != run.corpus and run.tokenizer.startswith("bpe-"):
            raise ValueError(
                f"teacher: {self.teacher!r} was trained on {teacher.corpus}, with another vocabulary of the "
                f"name {run.tokenizer}; choose a variant on {run.corpus}"
            )
        if teacher.model.context < run.model.context:
            raise ValueError(
                f"teacher: {self.teacher!r} has a context of {teacher.model.context}, shorter than the run's "
                f"{run.model.context}"
            )
        if not self._share(run.training.steps):
            raise ValueError(
                f"end: between {self.begin} and {self.end} of {run.training.steps} steps there is none"
            )

    def prepare(self, run: Run, device: torch.device, group: Group) -> None:
        """Load the teacher's last checkpoint, without gradients and dropout.

        Raises ``UserError`` where it is missing or damaged, or of another vocabulary.
        """
        # Training comes after techniques: what it has is imported where it is used.
        from stlm.training.checkpoints import last_checkpoint, load_checkpoint

        folder = last_checkpoint(run, run.depends["teacher"])
        check_tokenizer(folder.parent / "tokenizer", check_tokenizer(run.tokens_folder / "tokenizer"))
        teacher, _ = load_checkpoint(folder, device)
        self._teacher = teacher.eval().requires_grad_(False)

    def _taught(self, steps: int) -> range:
        """The steps, from 1, of `steps` at which the teacher is asked."""
        return range(round(self.begin * steps) + 1, round(self.end * steps) + 1)

    def _share(self, steps: int) -> float:
        return len(self._taught(steps)) / steps

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The parts `next_token` and `distillation`; where the teacher is not asked, the latter is zero."""
        zero = torch.zeros((), device=forward.tokens_BL.device)
        if self.neutral() or forward.step not in self._taught(forward.steps):
            return {"next_token": forward.next_token_loss(), "distillation": zero}
        next_token = (1 - self.weight) * forward.next_token_loss() if self.weight < 1 else zero
        student, teacher = forward.model, self._teacher
        with torch.no_grad():
            teacher_NE = teacher.hidden(forward.tokens_BL, forward.layout).flatten(0, 1)
        divergence = _Divergence.apply(
            forward.hidden_ND,
            student.output.weight,
            teacher_NE,
            teacher.output.weight,
            (student.config.logit_softcap, teacher.config.logit_softcap),
            self.temperature,
            self.sampled_tokens,
            torch.is_grad_enabled(),  # inside of a Function it is not
        )
        return {"next_token": next_token, "distillation": self.weight * self.temperature**2 * divergence}

    def extra_flops_per_token(self, run: Run) -> float:
        """The teacher's forward pass, and the student's head once more, in the steps that are taught."""
        if self.neutral():
            return 0.0
        teacher, context = self.others["teacher"], run.model.context
        network = build_on_meta(teacher.model, tuple(teacher.techniques.values()))
        flops = forward_flops(network, context) / context
        if self.weight < 1:
            # Both parts of the loss compute the student's logits and their gradients.
            student = build_on_meta(run.model, tuple(run.techniques.values()))
            flops += TRAINING_PASSES * forward_flops(student.output, 1)
        return self._share(run.training.steps) * flops

    def extra_bytes(self, run: Run) -> float:
        """See `Technique.extra_bytes`: the teacher's weights, in float32."""
        return 4 * self.others["teacher"].parameters.total


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) at a temperature in nats, float32: the mean over positions.

    As in `stlm.model.head_loss`, gradients are computed in the forward pass, for some of the positions at a
    time: logits of all of them never exist together. Products are in the arithmetic of autocast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        teacher_NE: Tensor,
        teacher_VE: Tensor,
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
            x_ND, weight_VD, teacher_NE, teacher_VE = (
                x.to(dtype) for x in (x_ND, weight_VD, teacher_NE, teacher_VE)
            )
            positions = max(1, _LOGITS[device] // len(weight_VD))
            for begin in range(0, N, positions):
                here = slice(begin, begin + positions)
                log_q_CV, _ = _log_softmax(teacher_NE[here] @ teacher_VE.T, softcaps[1], temperature)
                log_p_CV, slope_CV = _log_softmax(x_ND[here] @ weight_VD.T, softcaps[0], temperature)
                q_CV = _target(log_q_CV, sampled)
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


def _target(log_q_CV: Tensor, sampled: int | None) -> Tensor:
    """The distribution q, or the shares of tokens in so many draws from it, whose expectation is q."""
    q_CV = log_q_CV.exp()
    if sampled is None:
        return q_CV
    drawn_CS = torch.multinomial(q_CV, sampled, replacement=True)
    share_11 = q_CV.new_full((1, 1), 1 / sampled)
    return q_CV.zero_().scatter_add_(1, drawn_CS, share_11.expand_as(drawn_CS))
