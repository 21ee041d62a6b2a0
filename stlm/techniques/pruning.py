"""Pruning: weights of the matrices that are zero, and stay zero.

What is chosen and how: `stlm.model.pruning`. No mask is stored: the mask is the zeros of the weights, so that
a checkpoint, a resumed run and an exported model have it without more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stlm.errors import UserError
from stlm.model.counts import build_on_meta
from stlm.model.pruning import (
    Choice,
    Matrix,
    cubic,
    keep_lists,
    matrices,
    measuring_flops,
    prune_measured,
    prune_smallest,
    read_pattern,
    sparsity_record,
)
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.model.transformer import Transformer
    from stlm.study.runs import Run

_SPARSITY = 0.5
# Parts of a model beside which zeros would not stay, and why.
_REFUSED = {
    "lora": "an adapter's product would fill the zeros",
    "low_rank": "a product of two factors has no zeros of its own",
}


class Pruning(Technique):
    """A share of the weights of the blocks' matrices is set to zero and stays zero: in checkpoints, further
    training and what is exported. At once, by magnitude, Wanda or SparseGPT, where a run starts from other
    weights; gradually during training (Zhu and Gupta 2017); or as a lottery ticket, whose zeros are those of
    a trained run and whose other weights are its early ones (Frankle et al. 2020). Zeros save neither bytes
    nor time by themselves."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "batches", "cache", "compile", "drafts", "export", "packing", "start_from"}
    )
    figures: ClassVar[tuple[str, ...]] = ("sparsity",)

    method: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        "magnitude",
        description="What goes first: `magnitude`, the weights nearest to zero; `wanda`, those times the "
        "root mean square of their inputs (Sun et al. 2023); `sparsegpt`, those whose loss costs least, and "
        "the others are changed to make up for it (Frantar and Alistarh 2023). The last two measure, at the "
        "start, on `training.inherit.bytes` of the training text, the same for all seeds.",
    )
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="Share of zeros. null: 0.5, or what `pattern` says; 0: none."
    )
    pattern: str | None = Field(
        None,
        description="`N:M`: of M successive weights of a row N stay, such as 2:4. null: wherever they are.",
    )
    scope: Literal["row", "matrix", "global"] = Field(
        "row",
        description="Among which weights the share is chosen: those of each row (an output's), of each "
        "matrix (queries, keys and values are three), or of all matrices together, which then "
        "differ in sparsity.",
    )
    matrices: tuple[str, ...] = Field(
        ("attention", "ffn"),
        description="What is pruned: `attention`, `ffn`, one matrix of them (`attention.qkv`, "
        "`attention.out`, `ffn.gate_up` or `ffn.up`, `ffn.down`), `embedding`, `head`.",
    )
    begin: int | None = Field(
        None,
        ge=0,
        description="Gradual pruning: the step at which the sparsity leaves zero, on its cubic way to `end`. "
        "null: all at once, at the start.",
    )
    end: int | None = Field(None, ge=1, description="The step after which the sparsity is reached.")
    every: int = Field(100, ge=1, description="Steps between prunings from `begin` on; `end` is one, too.")
    ticket: str | None = Field(
        None,
        description="Lottery ticket: the variant whose last weights decide, by magnitude, what is zero. It "
        "has the run's model, text and seed.",
    )
    rewind: int = Field(
        0,
        ge=0,
        description="The step whose weights a ticket begins with: one of the checkpoints of `rewind_of`; 0: "
        "those that the run starts with without pruning.",
    )
    rewind_of: str | None = Field(
        None,
        description="The variant whose checkpoint `rewind` names, where it is not `ticket`: the first run of "
        "repeated prunings.",
    )

    # Settings

    @model_validator(mode="after")
    def _keys_fit(self) -> Pruning:
        if self.pattern is not None:
            kept, group = read_pattern(self.pattern)
            if self.sparsity not in (None, 1 - kept / group):
                raise ValueError(f"sparsity: {self.sparsity}: pattern {self.pattern} is {1 - kept / group:g}")
            if self.scope != "row":
                raise ValueError(f"scope: {self.scope}: a pattern is chosen in each row; expected row")
        if (self.begin is None) != (self.end is None):
            raise ValueError(f"{'end' if self.end is None else 'begin'}: gradual pruning needs begin and end")
        if self.begin is not None and self.begin >= self.end:
            raise ValueError(f"end: {self.end} is not above begin: {self.begin}")
        for key, applies, why in (
            ("begin", self.begin is not None and self.ticket is not None, "a ticket is pruned at the start"),
            ("pattern", self.begin is not None and self.pattern is not None, "gradual pruning has none"),
            ("rewind", self.ticket is None and self.rewind > 0, "only a ticket is rewound"),
            ("rewind_of", self.ticket is None and self.rewind_of is not None, "only a ticket is rewound"),
            ("rewind_of", self.rewind_of is not None and not self.rewind, "with rewind: 0 it is not read"),
        ):
            if applies:
                raise ValueError(f"{key}: {getattr(self, key)}: {why}")
        self._check_method()
        if not self.matrices:
            raise ValueError("matrices: []: expected at least one")
        return self

    def _check_method(self) -> None:
        if self.method == "magnitude":
            return
        if self.begin is not None or self.ticket is not None:
            how = "gradual pruning" if self.ticket is None else "a ticket"
            raise ValueError(f"method: {self.method}: {how} is by magnitude; expected magnitude")
        if outer := {"embedding", "head"} & set(self.matrices):
            raise ValueError(
                f"method: {self.method}: matrices: {min(outer)}: only matrices of the blocks are measured; "
                "expected magnitude"
            )
        if self.method == "sparsegpt" and self.scope == "global":
            raise ValueError("scope: global: sparsegpt prunes matrix by matrix; expected row or matrix")

    @property
    def choice(self) -> Choice:
        """How many weights go, and among which."""
        if self.pattern is not None:
            kept, group = read_pattern(self.pattern)
            return Choice(1 - kept / group, "row", (kept, group))
        return Choice(_SPARSITY if self.sparsity is None else self.sparsity, self.scope)

    def neutral(self) -> bool:
        """See `Technique.neutral`."""
        return self.choice.sparsity == 0

    def depends(self) -> dict[str, str]:
        """The run that decides, and the one whose early weights are taken."""
        roles = {"ticket": self.ticket, "rewind_of": self.rewind_of}
        return {role: name for role, name in roles.items() if name is not None}

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        for key, why in _REFUSED.items():
            if getattr(run.model, key) is not None:
                raise ValueError(f"sparsity: model.{key}: {why}; expected null")
        if run.model.embedding_rank is not None and {"embedding", "head"} & set(self.matrices):
            raise ValueError("matrices: model.embedding_rank: a factorized embedding is not pruned")
        if run.model.tied and "head" in self.matrices:
            raise ValueError("matrices: head: model.tied: it is the embedding; name that")
        chosen = matrices(build_on_meta(run.model), self.matrices)
        if self.pattern is not None:
            group = read_pattern(self.pattern)[1]
            for matrix in chosen:
                if matrix.weight.shape[1] % group:
                    raise ValueError(
                        f"pattern: {self.pattern}: {matrix.name} has rows of {matrix.weight.shape[1]}, which "
                        f"{group} does not divide"
                    )
        if self.end is not None and self.end > run.training.steps:
            raise ValueError(f"end: {self.end} is above training.steps: {run.training.steps}")
        if self.ticket is not None:
            self._check_ticket(run)
        elif self.begin is None and run.training.start_from is None and not self.neutral():
            raise ValueError(
                "begin: new weights are not pruned at once; set training.start_from, begin and end, or ticket"
            )

    def _check_ticket(self, run: Run) -> None:
        for role in self.depends():
            if role in run.sources:
                raise ValueError(f"{role}: {run.sources[role]!r} is a published model; expected a variant")
            other = self.others[role]
            for key, ours, theirs in (
                ("model", run.model, other.model),
                ("corpus", run.corpus, other.corpus),
                ("tokenizer", run.tokenizer, other.tokenizer),
            ):
                if ours != theirs:
                    raise ValueError(f"{role}: {other.variant!r} has another {key}; they must be the same")
            if further := other.techniques.keys() - {self.key()}:
                raise ValueError(f"{role}: {other.variant!r} has techniques.{min(further)}; expected none")
        if not self.rewind:
            if run.model.zero_init:
                raise ValueError("rewind: 0: model.zero_init: weights that begin at zero tell no mask")
            theirs = self.others["ticket"].training.start_from
            if theirs != run.training.start_from:
                raise ValueError(
                    f"rewind: 0: training.start_from: {run.training.start_from}, that of {self.ticket!r} is "
                    f"{theirs}; they must be the same"
                )
            return
        early = self.others.get("rewind_of", self.others["ticket"])
        if self.rewind not in early.training.checkpoint_steps:
            listed = ", ".join(map(str, early.training.checkpoint_steps))
            raise ValueError(
                f"rewind: {self.rewind}: {early.variant!r} keeps checkpoints of {listed} "
                "(training.checkpoints)"
            )
        if run.training.start_from is not None:
            raise ValueError(f"rewind: {self.rewind}: its weights replace those of training.start_from")

    # The start

    def changes_start(self) -> bool:
        """See `Technique.changes_start`."""
        return not self.neutral() and self.begin is None

    def change_start(self, model: Transformer, run: Run) -> dict[str, Any]:
        """See `Technique.change_start`."""
        chosen = matrices(model, self.matrices)
        if self.ticket is not None:
            self._take_ticket(model, chosen, run)
            return {}
        if self.method == "magnitude":
            prune_smallest(chosen, self.choice)
            return {}
        from stlm.training.inherited import calibration_rows

        rows_NM = calibration_rows(run).to(model.embedding.weight.device)
        prune_measured(model, self.method, chosen, self.choice, rows_NM)
        return {
            "measured_on_tokens": rows_NM[:, 1:].numel(),
            "extra_flops": measuring_flops(model, self.choice, rows_NM),
        }

    @torch.no_grad()
    def _take_ticket(self, model: Transformer, chosen: list[Matrix], run: Run) -> None:
        """The zeros of the ticket's last weights, and the early weights elsewhere."""
        from stlm.training.checkpoints import checkpoint_name, load_checkpoint
        from stlm.training.dependencies import Dependency

        trained = Dependency.read(run, "ticket")
        if self.rewind:
            early = Dependency.read(run, "rewind_of") if self.rewind_of else trained
            folder = early.folder.with_name(checkpoint_name(self.rewind))
            if not folder.is_dir():
                raise UserError(f"{folder}: no such checkpoint, which techniques.pruning.rewind names")
            model.load_state_dict(load_checkpoint(folder)[0].state_dict())
        scores = [matrix.weight.abs() for matrix in matrices(trained.load(), self.matrices)]
        for matrix, keep_YX in zip(chosen, keep_lists(chosen, self.choice, scores), strict=True):
            matrix.weight.masked_fill_(~keep_YX.to(matrix.weight.device), 0.0)

    # Training

    def prunes_after(self, step: int) -> bool:
        """Whether gradual pruning prunes after a step."""
        if self.begin is None or not self.begin < step <= self.end:
            return False
        return step == self.end or (step - self.begin) % self.every == 0

    def before_step(self, model: Transformer, step: int, steps: int) -> None:
        """Mark the weights that are not zero: the optimizer trains no others (`stlm.training.optimizers`)."""
        if self.neutral():
            return
        first = 0 if self.begin is None else min(self.begin + self.every, self.end)
        for matrix in matrices(model, self.matrices):
            matrix.weight.kept = matrix.weight.detach() != 0 if step > first else None

    def after_step(self, model: Transformer, step: int, steps: int) -> None:
        """Prune, gradually, to the sparsity of the step."""
        if self.prunes_after(step) and not self.neutral():
            now = cubic(step, self.begin, self.end, self.choice.sparsity)
            prune_smallest(matrices(model, self.matrices), self.choice._replace(sparsity=now))

    # Records

    def validated(
        self, model: Transformer, tokens_BL: Tensor, targets_BL: Tensor, counted_BL: Tensor
    ) -> dict[str, Tensor]:
        """See `Technique.validated`: the share of zeros of the pruned matrices."""
        weights = [matrix.weight for matrix in matrices(model, self.matrices)]
        zeros = sum((weight == 0).sum() for weight in weights)
        count = sum(weight.numel() for weight in weights)
        return {"sparsity": torch.stack([zeros.double(), torch.full_like(zeros, count).double()])}

    def measured(self, model: Transformer) -> dict[str, Any]:
        """See `Technique.measured`."""
        chosen = matrices(model, self.matrices)
        return {"sparsity": sparsity_record(model, chosen, lambda number: f"block {number + 1}")}

    def extra_bytes(self, run: Run) -> float:
        """See `Technique.extra_bytes`: a byte for each weight's mark."""
        chosen = matrices(build_on_meta(run.model), self.matrices)
        return 0.0 if self.neutral() else float(sum(matrix.weight.numel() for matrix in chosen))
