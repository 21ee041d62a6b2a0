"""What tests of techniques do with runs: train one in parts or in two processes, and read what it wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from forked import in_processes
from torch import Tensor

from stlm.errors import Interrupted
from stlm.study.runs import Run
from stlm.techniques.registry import load_techniques
from stlm.training.checkpoints import checkpoint_name, load_checkpoint
from stlm.training.loop import Trainer, train


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV without wall-clock times."""
    with path.open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def curve_of(run: Run) -> list[dict[str, str]]:
    """The rows of a run's curve without wall-clock times."""
    return rows_of(run.folder / "curve.csv")


def last_checkpoint(run: Run) -> Path:
    """The folder of a run's last checkpoint."""
    return run.folder / "checkpoints" / checkpoint_name(run.training.steps)


def weights_of(run: Run) -> dict[str, Tensor]:
    """The weights of a run's last checkpoint, by name."""
    return load_checkpoint(last_checkpoint(run))[0].state_dict()


def same_weights(one: Run, other: Run) -> bool:
    """Whether the weights of two runs' last checkpoints are equal, to the bit."""
    files = [(last_checkpoint(run) / "model.safetensors").read_bytes() for run in (one, other)]
    return files[0] == files[1]


def train_in_parts(run: Run, last: int) -> None:
    """Train until after step `last`, stop, and go on."""
    whole_step = Trainer.step

    def step(self: Trainer) -> None:
        whole_step(self)
        if self.state.progress.step == last:
            raise Interrupted("stopped", 15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Interrupted):
            train(run)
    train(run)


def train_in_two_processes(run: Run) -> None:
    """Train a run by two processes, each with one thread, in the working directory."""
    statuses, said = in_processes(_train, run.model_dump_json())
    assert statuses == [0, 0], said


def _train(run: str) -> None:
    content = json.loads(run)
    techniques = load_techniques(content.pop("techniques"), "run", "techniques")
    train(Run.model_validate(content).model_copy(update={"techniques": techniques}))
