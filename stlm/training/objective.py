"""The training objective: named parts of the loss, from the plain model and from the run's techniques.

Shapes: B rows, L positions, N = B L, C chosen positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.model.layout import Layout
from stlm.model.rows import Rows
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.techniques.base import Technique
from stlm.training.distributed import Group
from stlm.training.schedules import dropout_factor

NEXT_TOKEN = "next_token"
Parts = dict[str, Tensor]


class Forward:
    """One micro-batch of a training step; its properties are computed when they are first used.

    `layout`: how sequences lie in the rows; None: one in each row. `step`: from 1, of `steps`.
    `loss`: computes the whole next-token loss of (tokens, targets, layout), as `Transformer.loss` does; used
    if nothing else needs the hidden states. `hidden`: the model's method, possibly compiled. `sum_over_rows`:
    sums a tensor over the processes that have other rows of the micro-batch. `counted_BL`: the positions
    whose targets count; None: all.
    """

    def __init__(
        self,
        model: Transformer,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        layout: Layout | None,
        step: int,
        steps: int,
        loss: Callable[..., Tensor] | None = None,
        hidden: Callable[..., Tensor] | None = None,
        sum_over_rows: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        counted_BL: Tensor | None = None,
    ) -> None:
        self.model, self.tokens_BL, self.targets_BL, self.layout = model, tokens_BL, targets_BL, layout
        self.step, self.steps = step, steps
        self._loss, self._hidden = loss, hidden or model.hidden
        self.sum_over_rows = sum_over_rows
        self.counted_BL = counted_BL

    @cached_property
    def hidden_ND(self) -> Tensor:  # noqa: N802, as it is a tensor
        """The head's input (`Transformer.hidden`), computed once."""
        return self._hidden(self.tokens_BL, self.layout).flatten(0, 1)

    def residuals(self, after: Collection[int]) -> list[Tensor]:
        """The residual stream [B, L, D] after the given blocks and the last one (`Transformer.residuals`).

        Call it before `hidden_ND`, which then reuses the result instead of running a second forward pass.
        """
        kept = self.model.residuals(self.tokens_BL, self.layout, after=after)
        self.hidden_ND = self.model.finish(kept[-1]).flatten(0, 1)
        return kept

    def next_token_loss(self) -> Tensor:
        """Mean cross-entropy in nats, float32, of the counted targets; a byte-level model reads them as
        chunks."""
        if self.counted_BL is not None:
            return self.mean_loss(self.counted_BL)
        if self._loss is not None:
            return self._loss(self.tokens_BL, self.targets_BL, layout=self.layout)
        return self.model.hidden_loss(self.hidden_ND, self.tokens_BL, self.targets_BL)

    def mean_loss(self, chosen_BL: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float32, of the targets at the chosen positions alone; 0 for none.

        A GPU is waited for, since the number of positions is needed.
        """
        chosen_C = chosen_BL.flatten().nonzero()[:, 0]
        if not len(chosen_C):
            return self.hidden_ND.float().sum() * 0.0  # with gradients, which are zero
        # Not by indexing, whose gradient a CPU adds number by number.
        x_CD = self.hidden_ND.index_select(0, chosen_C)
        tokens_C, targets_C = self.tokens_BL.flatten()[chosen_C], self.targets_BL.flatten()[chosen_C]
        return self.model.hidden_loss(x_CD, tokens_C, targets_C)


class Objective:
    """Named, weighted parts of the loss, whose sum is minimized; called with a `Forward`.

    The plain objective is the part `next_token`. The run's techniques add parts, or replace it
    (`replaces_next_token`): see `stlm.techniques.base.Technique`.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._techniques = list(run.techniques.values())
        self._extra = [one for one in self._techniques if type(one).objective is not Technique.objective]
        self._changing_rows = [one for one in self._techniques if type(one).rows is not Technique.rows]
        self._compiled: Callable[..., Tensor] | None = None
        self._group = Group()

    @property
    def plain(self) -> bool:
        """Whether only the next-token loss of the text is minimized."""
        return not self._extra and not self._changing_rows

    def prepare(self, device: torch.device, group: Group) -> None:
        """Let techniques load what they need. `group`: the processes that share the steps."""
        self._group = group
        for technique in self._techniques:
            technique.prepare(self._run, device, group)

    def compile(self, model: Transformer) -> None:
        """From now on, compile the whole loss of the plain objective, or `hidden` of any other."""
        self._compiled = torch.compile(model.loss if self.plain else model.hidden)

    def run_eagerly(self) -> None:
        """From now on, compute without torch.compile."""
        self._compiled = None

    def before_step(self, model: Transformer, step: int) -> None:
        """Apply the schedules for step `step`, from 1."""
        config = self._run.training
        if config.dropout_schedule != "constant":
            model.schedule_dropout(dropout_factor(config, step))
        for technique in self._techniques:
            technique.before_step(model, step, config.steps)

    def step_sums(self, model: Transformer) -> list[Tensor]:
        """The techniques' sums over a step, of this process."""
        return [tensor for technique in self._techniques for tensor in technique.step_sums(model)]

    def after_step(self, model: Transformer, step: int) -> None:
        """Let techniques update what no gradient trains, after step `step`, from 1."""
        for technique in self._techniques:
            technique.after_step(model, step, self._run.training.steps)

    def forward(self, model: Transformer, tokens_BM: Tensor, layout: Layout | None, step: int) -> Forward:
        """The micro-batch of tokens [B, L + 1], as techniques change it."""
        return self.read(model, self.rows(tokens_BM, layout, step), step)

    def rows(self, tokens_BM: Tensor, layout: Layout | None, step: int) -> Rows:
        """What techniques have a micro-batch of tokens [B, L + 1] read and predict; they may draw it."""
        rows = Rows.of(tokens_BM, layout)
        for technique in self._changing_rows:
            rows = technique.rows(rows, step, self._run.training.steps)
        return rows

    def read(self, model: Transformer, rows: Rows, step: int, alone: bool = False) -> Forward:
        """The micro-batch of these rows. `alone`: one process repeats a step, without torch.compile, as
        graphs hold no hooks, and no other process takes part."""
        compiled = None if alone else self._compiled
        loss, hidden = (compiled or model.loss, None) if self.plain else (None, compiled)
        group = Group() if alone else self._group
        share = group.share(self._run.training)
        return Forward(
            model,
            rows.tokens_BL,
            rows.targets_BL,
            rows.layout,
            step,
            self._run.training.steps,
            loss,
            hidden,
            lambda tensor: group.sum_over_rows(tensor, share),
            rows.counted_BL,
        )

    def __call__(self, forward: Forward) -> Parts:
        parts: Parts = {}
        for technique in self._extra:
            further = technique.objective(forward)
            twice = parts.keys() & further.keys()
            if NEXT_TOKEN in further and not technique.replaces_next_token:
                twice = {NEXT_TOKEN}
            if twice:
                raise UserError(
                    f"run {self._run.name}: techniques.{technique.key()}: the loss has a part {min(twice)!r} "
                    "already; name it otherwise, or declare replaces_next_token"
                )
            parts |= further
        # Add the plain part, too, unless a technique replaced it at this step.
        return parts if NEXT_TOKEN in parts else {NEXT_TOKEN: forward.next_token_loss(), **parts}


def total(parts: Parts) -> Tensor:
    """The sum of the parts, which is minimized."""
    return reduce(add, parts.values())
