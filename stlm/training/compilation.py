"""Compiles the objective before training; if that fails, training continues without torch.compile."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from stlm.errors import UserError
from stlm.training.devices import compiler_error
from stlm.training.resume import TrainingState
from stlm.training.setup import Setup


def compile_objective(state: TrainingState) -> None:
    """Compile the loss, if the recipe asks for it, in a forward and backward pass of the first micro-batch.

    If that fails in one process, for example because a compiler is missing, all processes train without it
    and the leader warns. Call it before a state is resumed; its time does not count as training time.
    """
    setup, why_not = state.setup, None
    if setup.device.compiled:
        setup.objective.compile(setup.model)
        why_not = _failure(setup)
    if not setup.group.largest(int(why_not is not None)):
        return
    setup.device = replace(setup.device, compiled=False)
    setup.objective.run_eagerly()
    state.progress.compiled, state.progress.kernels = False, setup.device.kernels
    if setup.group.leads:
        reason = why_not or "another process could not"
        print(
            f"{setup.run.name}: torch.compile failed, training without it, more slowly: {reason}",
            file=sys.stderr,
        )


def _failure(setup: Setup) -> str | None:
    """Why the first use of the compiled objective failed, in one line; None if it succeeded."""
    setup.model.train()
    setup.objective.before_step(setup.model, 1)
    tokens = next(setup.micro_batches.of_step(1, setup.share))
    try:
        setup.loss(tokens, 1).backward()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the compiler raises many kinds; training shows errors of any other cause
        return compiler_error(error)
    finally:
        setup.optimizer.zero_grad(set_to_none=True)
    return None
