"""Trains one run: from token shards to checkpoints, a curve and a summary."""

from __future__ import annotations

import math
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from stlm.errors import Interrupted
from stlm.files import disk_errors
from stlm.study.runs import Run
from stlm.training.compilation import compile_objective
from stlm.training.curve import Curve, summary
from stlm.training.distributed import Group, processes
from stlm.training.finite import check_finite
from stlm.training.objective import total
from stlm.training.optimizers import mask_gradients
from stlm.training.publish import publish
from stlm.training.records import NoRecords, Records
from stlm.training.resume import TrainingState, resume
from stlm.training.schedules import learning_rate
from stlm.training.setup import Setup
from stlm.training.signals import StopSignals
from stlm.training.state import locked


class Trainer:
    """The steps of one process that trains a run, alone or in a group."""

    def __init__(self, run: Run, group: Group | None = None) -> None:
        self.setup = Setup(run, group or Group())
        self.state = TrainingState(self.setup)
        self.curve = Curve(self.state)

    def step(self) -> None:
        """Take one optimizer step; the losses and the gradient's norm stay on the device."""
        setup, state = self.setup, self.state
        step, watch = state.progress.step + 1, state.watch
        for group in setup.optimizer.param_groups:
            group["lr"] = learning_rate(setup.config, step) * group["scale"]
        setup.objective.before_step(setup.model, step)
        tokens, mean, parts = self._backward(step)
        parameters = [parameter for parameter in setup.model.parameters() if parameter.grad is not None]
        sums = setup.objective.step_sums(setup.model)
        setup.group.sum([*(parameter.grad for parameter in parameters), mean, *parts.values(), *sums])
        mask_gradients(parameters)
        watch.before_update(step, tokens)
        norm = nn.utils.clip_grad_norm_(parameters, setup.config.clip or math.inf)
        state.add(mean, parts, norm)
        watch.record(step, mean, norm)
        if setup.device.device.type == "cpu":
            # On a GPU this check would wait for the device at every step; there, a row that is due checks.
            check_finite(state, step, self.step)
        setup.optimizer.step()
        setup.objective.after_step(setup.model, step)
        watch.after_update(step)
        setup.optimizer.zero_grad(set_to_none=True)
        state.progress.step = step

    def _backward(self, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Accumulate the gradients of this process's micro-batches.

        Returns the last micro-batch's tokens, the mean loss, and the mean of each part if there are several.
        """
        setup = self.setup
        count, device = setup.config.accumulation * setup.share.parts, setup.device.device
        mean = torch.zeros((), device=device)
        means: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        for tokens in setup.micro_batches.of_step(step, setup.share):
            parts = setup.losses(tokens, step)
            loss = total(parts)
            (loss / count).backward()
            mean += loss.detach()
            if not setup.objective.plain:
                for name, part in parts.items():
                    means[name] += part.detach()
        mean /= count
        for part in means.values():
            part /= count
        if setup.run.techniques:
            # A parameter that a technique skipped in this step gets a zero gradient, in every process.
            for parameter in setup.model.parameters():
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        return tokens, mean, means

    def fit(self, signals: StopSignals) -> None:
        """Train to the last step, and save, validate, record and keep checkpoints on the way.

        Raises ``Interrupted`` after the step in which a signal came, with the state saved.
        """
        setup, state, curve = self.setup, self.state, self.curve
        progress, records = state.progress, NoRecords()
        if progress.step < setup.config.steps:  # the state of a finished run needs no further step
            progress.parts = [part for part in progress.parts if part != state.environment] + [
                state.environment
            ]
        if setup.group.leads:
            records = Records(setup.run, state.output / "dvclive", progress, setup.fingerprint)
        setup.model.train()
        curve.start_clock()
        stopped = 0
        while not stopped and (curve.row_due() or progress.step < setup.config.steps):
            if curve.row_due():
                check_finite(state, progress.step, self.step)
                records.log(curve.add_row())
                curve.start_clock()
            else:
                self.step()
                records.advance()
            stopped = setup.group.largest(signals.received)
        if stopped:
            curve.take_time()
            if state.losses:
                # A GPU's steps are checked when a row is due: do not save a diverged state.
                check_finite(state, progress.step, self.step)
            state.save()
            setup.group.wait()  # if one process ended early, torchrun would end all
        records.close()
        if stopped:
            raise Interrupted(
                f"{setup.run.name}: stopped by {signal.Signals(stopped).name} after step {progress.step} of "
                f"{setup.config.steps}, saved in {state.path}; the same command goes on from there",
                stopped,
            )


def train(run: Run, check: Callable[[], None] = lambda: None) -> None:
    """Train ``run``; write ``checkpoints/``, {curve,watch}.csv and train.json to its folder.

    If the training is killed at any time, a second call resumes from the last saved state; the same holds
    after ``Interrupted``, which is raised when a signal asked to stop. All processes that `torchrun` starts
    train the run together. Each calls ``check`` first; a ``UserError`` that all of them raise is reported
    once.

    Raises ``UserError`` for missing or damaged tokens or state, for a loss that is not finite, and while
    another process is training the same run.
    """
    with processes() as group:
        check()
        with StopSignals(verbose=group.leads) as signals, locked(run) if group.leads else nullcontext():
            _train(run, group, signals)


def _train(run: Run, group: Group, signals: StopSignals) -> None:
    trainer = Trainer(run, group)
    setup, state = trainer.setup, trainer.state
    compile_objective(state)
    resumed = resume(state)
    if group.leads:
        besides = f" and {more:,} in training alone" if (more := run.parameters.training_only) else ""
        print(
            f"{run.name}: {run.parameters.total:,} parameters{besides}, {run.tokens:,} tokens, "
            f"{setup.device.name}, {setup.device.arithmetic}"
            + (f", {group.size} processes" if group.size > 1 else "")
            + (f", resuming after step {state.progress.step}" if resumed else ""),
            file=sys.stderr,
        )
    with disk_errors(run.folder):
        trainer.fit(signals)
        if group.leads:
            record = summary(state, trainer.curve.validation)
            publish(run, state.output, state.path, state.progress.rows, state.watch.rows, record)
    if group.leads:
        for remark in record.get("remarks", ()):
            print(f"{run.name}: {remark}", file=sys.stderr)
        print(
            f"{run.name}: {state.progress.rows[-1]['val_bits_per_byte']:.4f} bits per byte on validation "
            f"text after {state.progress.seconds:,.0f} s of training; {run.folder}",
            file=sys.stderr,
        )
