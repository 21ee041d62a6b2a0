"""torch.compile of the objective, tried once before training, which goes on without it where it fails."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from stlm.errors import UserError
from stlm.training.devices import compiler_error
from stlm.training.resume import TrainingState
from stlm.training.setup import Setup


def compile_objective(state: TrainingState) -> None:
    """Compile the loss, if the recipe wants it, by the first micro-batch's forward and backward pass.

    Where that fails in one process, for want of a compiler say, the whole group trains without, and the
    leader warns. Comes before a state is resumed, and is no part of the training time.
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
    """Why the first use of the compiled objective failed, in a line; None where it did not."""
    setup.model.train()
    setup.objective.before_step(setup.model, 1)
    tokens = next(setup.micro_batches.of_step(1, setup.share))
    try:
        setup.loss(tokens, 1).backward()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the compiler's many; training shows what it was not to blame for
        return compiler_error(error)
    finally:
        setup.optimizer.zero_grad(set_to_none=True)
    return None
