"""Distillation: a model teaches a run (Hinton et al. 2015; the paper's section 2.2).

Shapes: B rows, L positions, N = B L, E the teacher's width, R rows with answers, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from stlm.errors import UserError
from stlm.files import fingerprint, read_record, record_sha256
from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.flops import forward_flops
from stlm.study.reading import check_reader
from stlm.teaching.config import TaughtConfig
from stlm.teaching.divergence import divergence
from stlm.teaching.loss import taught_loss
from stlm.teaching.names import settings, taught_folder
from stlm.teaching.shards import META, AnswersMeta, TaughtText
from stlm.teaching.states import StateProjections, imitation
from stlm.teaching.subset import Subset
from stlm.techniques.base import Technique, refuse

if TYPE_CHECKING:
    from pathlib import Path

    from stlm.model.config import ModelConfig
    from stlm.model.transformer import Transformer
    from stlm.study.runs import Run
    from stlm.training.distributed import Group
    from stlm.training.objective import Forward


class Distillation(Technique):
    """The loss is (1 - weight) times the next token's cross-entropy, plus weight times T^2 times the
    Kullback-Leibler divergence of the student's distribution from the teacher's, both at temperature T.

    The teacher is another run of the study, trained before, or a published model. Its forward pass is
    counted, and the training of a run. The student's vocabulary may be a part of a published teacher's.
    With `taught` a stage of its own asks it before training, once for each part of the text.
    """

    supports = frozenset(
        {"attention_within", "batches", "cache", "drafts", "export", "packing", "sharing", "start_from"}
    )
    replaces_next_token: ClassVar[bool] = True

    teacher: str = Field(
        description="What teaches: a variant, or a model in params/models.yaml. It has the run's tokenizer, "
        "or the whole of which that is a part (`hf:NAME:N` of `hf:NAME`), and a context at least as long."
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

    # Omitted from records when null, so that records of earlier runs, without this key, compare equal.
    taught: TaughtConfig | None = Field(
        None,
        exclude_if=lambda taught: taught is None,
        description="What `stlm teach` keeps of the teacher's answers, which training then reads instead of "
        "asking: see `techniques.distillation.taught`. null: training asks the teacher at every step.",
    )

    _teacher: Transformer | None = PrivateAttr(default=None)
    _subset: Subset | None = PrivateAttr(default=None)
    _answers: TaughtText | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Distillation:
        if self.begin >= self.end:
            raise ValueError(f"end: {self.end} is not above begin: {self.begin}")
        if self.taught is not None and self.sampled_tokens is not None:
            raise ValueError(
                f"sampled_tokens: {self.sampled_tokens} tokens are drawn where training asks the teacher; "
                "with taught, set taught.tokens instead"
            )
        return self

    def neutral(self) -> bool:
        """Whether the divergence has no weight."""
        return self.weight == 0

    def depends(self) -> dict[str, str]:
        """The teacher."""
        return {"teacher": self.teacher}

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """The teacher reads the run's tokens, as many of them, and predicts tokens of its vocabulary."""
        teacher = self.others["teacher"]
        if run.data.attention == "within":
            refuse(
                teacher.techniques.values(),
                "attention_within",
                lambda what: ValueError(f"teacher: its {what}"),
            )
        try:
            check_reader(self.teacher, teacher, run)
        except ValueError as error:
            raise ValueError(f"teacher: {error}") from None
        if not self._share(run.training.steps):
            raise ValueError(
                f"end: between {self.begin} and {self.end} of {run.training.steps} steps there is none"
            )
        if self.taught is not None:
            self._check_taught(run, teacher.model)

    def _check_taught(self, run: Run, teacher: ModelConfig) -> None:
        """What is kept of the teacher's answers must exist, and fit the student."""
        taught, context = self.taught, run.model.context
        kept, size = "tokens" if taught.top_k is None else "top_k", run.model.vocab_size
        if taught.kept >= size:
            raise ValueError(f"taught.{kept}: {taught.kept} of a vocabulary of {size}; expected fewer")
        if (window := taught.context) is not None:
            if window % context:
                near = max(1, round(window / context)) * context
                raise ValueError(
                    f"taught.context: {window} is no multiple of the run's context, {context}; nearest: "
                    f"{near}"
                )
            if window > teacher.context:
                raise ValueError(f"taught.context: {window} is above the teacher's, {teacher.context}")
        if (states := taught.states) is None:
            return
        for whose, layers, most in (
            ("the teacher", states.teachers, teacher.layers),
            ("the run", states.students, run.model.layers),
        ):
            if max(layers) > most:
                raise ValueError(f"taught.states.layers: {max(layers)}: {whose} has {most} layers")
        if (states.width or run.model.width) != teacher.width:
            raise ValueError(
                f"taught.states.width: {states.width} is not the teacher's width; expected {teacher.width}"
            )

    def build(self, model: Transformer) -> None:
        """Add the matrices that map the student's states to the teacher's, where the widths differ."""
        states = None if self.taught is None else self.taught.states
        if states is not None and states.width is not None and not self.neutral():
            model.state_projections = StateProjections(states.students, model.config.width, states.width)

    def inputs(self, run: Run) -> list[Path]:
        """The folder of the teacher's answers, if a stage of its own asks for them."""
        folder = taught_folder(run)
        return [] if folder is None else [folder]

    def load_teacher(self, run: Run, device: torch.device) -> tuple[Transformer, Subset | None]:
        """The teacher in evaluation mode, without gradients, and how it reads a part of its vocabulary.

        Raises ``UserError`` where it is missing or damaged, or of another vocabulary.
        """
        # Training comes after techniques: what it has is imported where it is used.
        from stlm.training.dependencies import Dependency

        dependency = Dependency.read(run, "teacher")
        subset = Subset.of(dependency, run.tokens_folder)
        return dependency.load(device).eval().requires_grad_(False), subset

    def prepare(self, run: Run, device: torch.device, group: Group) -> None:
        """Load the teacher, or the answers that it has given."""
        if (folder := taught_folder(run)) is None:
            self._teacher, self._subset = self.load_teacher(run, device)
        else:
            self.check_answers(run)
            self._answers = TaughtText(folder)

    def check_answers(self, run: Run) -> None:
        """Raise ``UserError`` if the kept answers are those of another teacher, text or setting."""
        from stlm.training.dependencies import read_dependencies

        folder = taught_folder(run)
        plan = read_record(folder / META, AnswersMeta).plan
        expected = {
            **settings(run, self),
            "weights_sha256": read_dependencies(run)["teacher"].weights_sha256,
            "tokens_sha256": record_sha256(run.tokens_folder / "meta.json"),
        }
        names = {"weights_sha256": "the teacher's weights", "tokens_sha256": "the text's tokens"}
        for key, value in expected.items():
            if plan.get(key) != value:
                raise UserError(
                    f"{folder / META}: {names.get(key, key)} changed since the teacher was asked: found "
                    f"{plan.get(key)}, expected {value}; run: stlm teach {run.study} {run.name}"
                )

    def prepared(self, run: Run) -> dict[str, Any]:
        """What asking the teacher has cost, whole, even if other runs read the same answers."""
        folder = taught_folder(run)
        if folder is None:
            return {}
        meta = read_record(folder / META, AnswersMeta)
        costs = meta.model_dump(include={"positions", "tokens", "flops", "seconds"})
        # Not of the whole record: its seconds differ where the teacher is asked again and says the same.
        content = {"plan": meta.plan, "answers": [shard.answers for shard in meta.shards]}
        return {"folder": str(folder), "sha256": fingerprint(content), **costs}

    def taught_steps(self, steps: int) -> range:
        """The steps, from 1, of `steps` at which the teacher is asked."""
        return range(round(self.begin * steps) + 1, round(self.end * steps) + 1)

    def taught_rows(self, run: Run) -> tuple[int, int]:
        """The first of the training's rows that are taught, and the one after the last."""
        training = run.training
        steps, rows = self.taught_steps(training.steps), training.accumulation * training.batch_size
        return (steps.start - 1) * rows, (steps.stop - 1) * rows

    def _share(self, steps: int) -> float:
        return len(self.taught_steps(steps)) / steps

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The parts `next_token` and `distillation`, and `states` where hidden states are imitated; where the
        teacher is not asked, all but the first are zero."""
        zero = torch.zeros((), device=forward.tokens_BL.device)
        states = {} if self.taught is None or self.taught.states is None else {"states": zero}
        if self.neutral() or forward.step not in self.taught_steps(forward.steps):
            return {"next_token": forward.next_token_loss(), "distillation": zero, **states}
        if self.taught is not None:
            return self._from_answers(forward)
        next_token = (1 - self.weight) * forward.next_token_loss() if self.weight < 1 else zero
        student, teacher = forward.model, self._teacher
        with torch.no_grad():
            tokens_BL = forward.tokens_BL if self._subset is None else self._subset.read(forward.tokens_BL)
            teacher_NE = teacher.hidden(tokens_BL, forward.layout).flatten(0, 1)
        loss = divergence(
            forward.hidden_ND,
            student.output.weight,
            teacher_NE,
            teacher.output.weight,
            (student.config.logit_softcap, teacher.config.logit_softcap),
            self.temperature,
            self.sampled_tokens,
            self._subset,
        )
        return {"next_token": next_token, "distillation": self.weight * self.temperature**2 * loss}

    def _from_answers(self, forward: Forward) -> dict[str, Tensor]:
        """The parts, of what the teacher has said about these rows."""
        tokens_BL = forward.tokens_BL
        answers = self._answers.answers(tokens_BL.cpu().numpy())

        def flat(values_RLX: np.ndarray) -> Tensor:
            return torch.from_numpy(values_RLX.reshape(tokens_BL.numel(), -1)).to(tokens_BL.device)

        states = {}
        if self.taught.states is not None:  # before the head: both read one pass through the blocks
            theirs = {layer: flat(state) for layer, state in answers.states.items()}
            states["states"] = imitation(self.taught.states, forward, theirs)
        ids_NK, log_q_NK = flat(answers.ids_RLK.astype(np.int64)), flat(answers.log_q_RLK)
        log_rest_N = None if answers.log_rest_RL is None else flat(answers.log_rest_RL)[:, 0]
        student, targets_N = forward.model, forward.targets_BL.reshape(-1)
        head = (forward.hidden_ND, student.output.weight, targets_N, ids_NK, log_q_NK, log_rest_N)
        softcap = student.config.logit_softcap
        if self.temperature == 1:
            # One pass over the logits has both parts, and the gradient of their sum.
            loss, next_token, _ = taught_loss(*head, self.weight, 1.0, softcap)
            next_token = (1 - self.weight) * next_token
            return {"next_token": next_token, "distillation": loss - next_token, **states}
        loss = taught_loss(*head, 1.0, self.temperature, softcap).loss
        next_token = torch.zeros_like(loss)
        if self.weight < 1:
            next_token = (1 - self.weight) * forward.next_token_loss()
        return {"next_token": next_token, "distillation": self.weight * self.temperature**2 * loss, **states}

    def extra_flops_per_token(self, run: Run) -> float:
        """The teacher's forward pass, and the student's head once more, in the steps that are taught.

        Of kept answers: what the teacher's passes cost as recorded, or, before it was asked, at most.
        """
        if self.neutral():
            return 0.0
        share, flops = self._share(run.training.steps), self._teacher_flops(run)
        joint = self.taught is not None and self.temperature == 1
        if self.weight < 1 and not joint:
            # Both parts of the loss compute the student's logits and their gradients.
            student = build_on_meta(run.model, tuple(run.techniques.values()))
            flops += share * TRAINING_PASSES * forward_flops(student.output, 1)
        if self.taught is not None and (states := self.taught.states) and states.width is not None:
            matrices = len(states.layers) * run.model.width * states.width
            flops += share * TRAINING_PASSES * 2 * matrices
        return flops

    def _teacher_flops(self, run: Run) -> float:
        """FLOPs of the teacher's forward passes, for each token that the run trains on."""
        folder = taught_folder(run)
        if folder is not None and (folder / META).is_file():
            return read_record(folder / META, AnswersMeta).flops / run.tokens
        context = run.model.context if folder is None else self.taught.context or run.model.context
        teacher = self.others["teacher"]
        network = build_on_meta(teacher.model, tuple(teacher.techniques.values()))
        return self._share(run.training.steps) * forward_flops(network, context) / context

    def extra_bytes(self, run: Run) -> float:
        """See `Technique.extra_bytes`: the teacher's weights, in float32; kept answers are mapped."""
        return 0 if self.taught is not None else 4 * self.others["teacher"].parameters.total
