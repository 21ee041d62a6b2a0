"""Stops training at a loss or gradient that is not finite, and reports its origin."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

from stlm.errors import UserError
from stlm.training.distributed import Group
from stlm.training.divergence import Part, explain
from stlm.training.resume import TrainingState
from stlm.training.setup import Setup
from stlm.training.state import load_state


def check_finite(state: TrainingState, step: int, take_step: Callable[[], None]) -> None:
    """Stop if the loss or gradient of `step` is not finite; earlier saved states are kept.

    `take_step` trains one more step; it is used to repeat steps while searching for the layer.
    """
    if not step:  # a run of no steps
        return
    if math.isfinite(state.losses[-1].item()) and math.isfinite(state.norm.item()):
        return
    setup, watch = state.setup, state.watch
    if not setup.group.leads:
        setup.group.wait()  # for the leader, which reports the origin and ends all processes
    step, loss, norm = watch.first_not_finite() or (step, state.losses[-1], state.norm)
    watch.drain()
    _rewind(state, step, take_step)
    setup.objective.before_step(setup.model, step)
    found = explain(
        setup.run,
        setup.model,
        setup.micro_batches.rows,
        step,
        lambda rows: setup.loss_again(rows, step),
        parts_of(setup, step),
        watch.rows,
    )
    kept = state.progress.checkpoints
    last = f"{state.output / 'checkpoints' / kept[-1]['folder']}" if kept else "none was due yet"
    raise UserError(
        f"run {setup.run.name}: step {step}: the loss is {loss.item()}, the gradient's norm "
        f"{norm.item()}: training diverged. Last good checkpoint: {last}. Lower "
        f"training.learning_rate (now {setup.config.learning_rate}) or raise training.warmup_steps.\n"
        f"{found}"
    )


def parts_of(setup: Setup, step: int) -> Iterator[Part]:
    """What each process read in a step, with the random numbers that it drew."""
    for rank in range(setup.group.size):
        share = Group(rank, setup.group.size).share(setup.config)
        micro_batches = setup.micro_batches.of_step(step, share)
        for micro, tokens_BM in zip(share.micros, micro_batches, strict=True):
            yield Part(micro, share.rows.start, setup.rows(tokens_BM, step))


def _rewind(state: TrainingState, step: int, take_step: Callable[[], None]) -> None:
    """Restore the weights before `step`, if a GPU updated them before the divergence was noticed.

    The steps since the last saved state are repeated. Without a state, or if other processes would have to
    take part, the weights stay as they are.
    """
    setup = state.setup
    if setup.group.size > 1 or all(bool(p.isfinite().all()) for p in setup.model.parameters()):
        return
    progress = load_state(state.path, setup.fingerprint, setup.model, setup.optimizer)
    if progress is None or progress.step >= step:
        return
    setup.optimizer.zero_grad(set_to_none=True)  # drops the gradients of the failed step
    print(
        f"{setup.run.name}: diverged at step {step}; repeating the steps since {progress.step} to find where",
        file=sys.stderr,
    )
    progress.losses, progress.part_losses, progress.watch = [], {}, {}
    state.take(progress, watched=False)
    while state.progress.step < step - 1:
        take_step()
