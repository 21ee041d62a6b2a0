"""The state of training, saved every some steps and resumed by the same command."""

from __future__ import annotations

import shutil
import sys

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.files import remove_leftovers
from stlm.provenance import code_version, processor_name
from stlm.training.checkpoints import check_checkpoints
from stlm.training.setup import Setup
from stlm.training.state import Progress, load_state, save_state
from stlm.training.watch import Watch


class TrainingState:
    """The state of training after a step: its progress, and what is on the device but in no row of the curve.

    `losses`: of each step since the last row, summed over the objective's parts; `part_losses`: those of each
    part, if there are several. `norm`: the last step's gradient norm.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.path = setup.run.state_folder / "state.pt"
        self.output = setup.run.state_folder / "output"
        # What computes from now on: the code as it is now, even if another version is checked out later.
        self.environment = {
            "device": setup.device.name,
            "processor": processor_name(),
            "code": code_version(),
        }
        # What was spent for this run before its first step counts as its own time.
        spent = float(sum(record["seconds"] for record in setup.prepared.values()))
        self.take(Progress(seconds=spent, kernels=setup.device.kernels, compiled=setup.device.compiled))

    def take(self, progress: Progress, watched: bool = True) -> None:
        """Continue from `progress`; `watched`: whether the leader watches the layers."""
        setup = self.setup
        device = setup.device.device
        self.progress = progress
        self.losses = [torch.tensor(loss, device=device) for loss in progress.losses]
        self.part_losses = {
            name: [torch.tensor(loss, device=device) for loss in losses]
            for name, losses in progress.part_losses.items()
        }
        self.norm = torch.tensor(progress.grad_norm)
        every = setup.config.watch_every if setup.group.leads and watched else 0
        self.watch = Watch(setup.model, every, setup.eager_hidden, progress.watch)

    def add(self, loss: Tensor, parts: dict[str, Tensor], norm: Tensor) -> None:
        """Keep the losses and the gradient norm of one more step."""
        self.losses.append(loss)
        for name, part in parts.items():
            self.part_losses.setdefault(name, []).append(part)
        self.norm = norm

    def take_losses(self) -> dict[str, float]:
        """The mean losses since the last row of the curve, by column; clears them for the next row."""
        means = {"train_loss": self.losses}
        parts = {f"train_{name}": losses for name, losses in self.part_losses.items()}
        # A part that becomes the only one keeps its column.
        if len(parts) > 1 or any(parts.keys() & row.keys() for row in self.progress.rows[-1:]):
            means |= parts
        self.losses, self.part_losses = [], {}
        return {name: round(torch.stack(losses).mean().item(), 6) for name, losses in means.items()}

    def save(self) -> None:
        """Save everything that a resumed run needs; possible after any step."""
        self.watch.drain()
        self.progress.losses = [loss.item() for loss in self.losses]
        self.progress.part_losses = {
            name: [loss.item() for loss in losses] for name, losses in self.part_losses.items()
        }
        self.progress.grad_norm = self.norm.item()
        setup = self.setup
        if setup.group.leads:
            save_state(self.path, setup.fingerprint, setup.model, setup.optimizer, self.progress)


def resume(state: TrainingState) -> bool:
    """Continue from the last saved state of this run, if there is one.

    A state with other parameters is set aside, in case it is still wanted. All processes of a group read the
    same state, after the leader has cleaned up.
    """
    setup, group = state.setup, state.setup.group
    _check_agreement(setup)
    progress = _tidy_up(state) if group.leads else None
    group.wait()
    if not group.leads:
        progress = load_state(state.path, setup.fingerprint, setup.model, setup.optimizer)
    if not group.agrees(progress.step if progress else -1):
        raise UserError(
            f"{state.path}: not all processes find the same state: the folder must be on a file "
            "system that they share"
        )
    if progress is None:
        return False
    _note_arithmetic(setup, progress)
    state.take(progress)
    return True


def _check_agreement(setup: Setup) -> None:
    """Refuse processes of a group that would train different runs, or with different precision."""
    if not setup.group.agrees(int(setup.fingerprint[:15], 16)):
        raise UserError(f"run {setup.run.name}: the processes found different parameters, data or precision")
    if not setup.group.agrees(setup.device.kernels):
        raise UserError(
            f"run {setup.run.name}: some processes have kernels in C, others not "
            f"({setup.device.arithmetic} here); install a C compiler for all, or set STLM_KERNELS=0 for all"
        )


def _tidy_up(state: TrainingState) -> Progress | None:
    """Read the state; set aside or delete what cannot be used. Called by the leader only."""
    setup, folder = state.setup, state.setup.run.state_folder
    progress = load_state(state.path, setup.fingerprint, setup.model, setup.optimizer)
    if progress is None:
        if state.path.exists():
            aside = folder.with_name(f"{folder.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)
            print(
                f"{setup.run.name}: the state in {folder} is of other parameters or data: "
                f"set aside as {aside}, training from the start",
                file=sys.stderr,
            )
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remove_leftovers(folder)
        remove_leftovers(state.output / "checkpoints")
        check_checkpoints(state.output / "checkpoints", progress.checkpoints)
    return progress


def _note_arithmetic(setup: Setup, progress: Progress) -> None:
    """Record that a run continues with other arithmetic than before, and warn that rounding differs."""
    device, going_on = setup.device, progress.step < setup.config.steps
    if progress.compiled is None:  # a state of an earlier version
        progress.compiled = device.compiled
    if progress.compiled != device.compiled and going_on:
        so_far = "compiled" if progress.compiled else "not, or not all, compiled"
        now = "compiled" if device.compiled else "not"
        progress.compiled = progress.kernels = False
    elif progress.kernels != device.kernels and going_on:
        so_far = "with kernels in C" if progress.kernels else "not, or not all, with kernels in C"
        now = "with" if device.kernels else "without"
        progress.kernels = False
    else:
        return
    if setup.group.leads:
        print(f"{setup.run.name}: so far {so_far}, now {now}: rounding differs", file=sys.stderr)
