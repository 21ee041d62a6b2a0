"""Estimates the memory of a training step before anything is allocated, and reads the machine's memory.

There are two estimates. `least` is a lower bound: a run that needs more is refused. `likely` is about what a
process takes: a run that exceeds it gets a warning. Measured peaks are in docs/training.md.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from stlm.model.activations import block_activations
from stlm.study.runs import Run

# Bytes of the process: Python, torch and its libraries. Left out of `least`, as it varies between builds.
PROCESS = 250 << 20
# Peaks are about this multiple of what the backward pass needs, with temporaries, gradients of activations,
# and memory that the allocator keeps for reuse.
_OVER_LEAST = 3
# Bytes of one layer's Python modules and tensors, whatever its width.
_LAYER_OBJECTS = 16 << 10
# A compiled graph may recompute values instead of keeping them.
_COMPILED_KEEPS = 0.5


class Memory(NamedTuple):
    """A lower bound on a process's bytes.

    `weights`: with the optimizer's moments, and what techniques hold. `sequence`: what the backward pass
    needs of the forward pass for each of the `sequences` processed at once. `validation`: the logits of one
    validation batch.
    """

    weights: int
    gradients: int
    sequence: int
    sequences: int
    validation: int

    @property
    def least(self) -> int:
        """The lower bound of a step: activations are freed while gradients grow, so the larger counts."""
        return self.weights + max(self.gradients, self.sequence * self.sequences)

    @property
    def likely(self) -> int:
        """About the peak memory of the process."""
        step = self.gradients + _OVER_LEAST * self.sequence * self.sequences
        return PROCESS + self.weights + max(step, self.validation)

    def sequences_that_fit(self, total: int) -> int:
        """The largest micro-batch that could fit into `total` bytes."""
        return max(0, total - self.weights) // self.sequence


def training_memory(run: Run, precision: str, compiled: bool, sequences: int) -> Memory:
    """The memory of a training step in a process that handles `sequences` of a micro-batch at once."""
    parameters = run.parameters.in_training
    # AdamW has two moments in float32, Muon's matrices have one; they exist from the second step on.
    moments = 0 if run.training.steps <= 1 else 8 if run.training.optimizer == "adamw" else 4
    narrow = 2 if precision == "bfloat16" else 4
    per_token = run.model.layers * block_activations(run.model, narrow)
    per_token += sum(one.extra_bytes_per_token(run, narrow) for one in run.techniques.values())
    if compiled:
        per_token *= _COMPILED_KEEPS
    # The batch itself holds integers of 8 bytes.
    sequence = int(run.model.context * (per_token + 8))
    held = parameters * (4 + moments) + run.model.layers * _LAYER_OBJECTS
    held += int(sum(one.extra_bytes(run) for one in run.techniques.values()))
    if not run.training.steps:  # no backward pass
        return Memory(held, 0, sequence, 0, _validation(run))
    return Memory(held, 4 * parameters, sequence, sequences, _validation(run))


def _validation(run: Run) -> int:
    """Bytes of a validation batch's logits and their log-softmax, both complete and in float32."""
    training, model = run.training, run.model
    if model.bytes is not None:
        return 0
    # A token of the largest vocabularies holds about five bytes: assume the fewest windows, as a lower bound.
    text = training.validation_bytes // (1 if run.tokenizer == "bytes" else 5)
    windows = min(training.batch_size, max(1, text // model.context))
    return 8 * windows * model.context * model.vocab_size


class Room(NamedTuple):
    """Bytes of memory: total, and currently free."""

    total: int
    free: int
    what: str


def machine_room() -> Room | None:
    """This machine's memory with its swap, or what the process may use of it; None if unknown."""
    found = _read_meminfo()
    if "MemTotal" in found:
        total, free = found["MemTotal"] + found.get("SwapTotal", 0), found.get("MemAvailable", 0)
    else:
        try:
            total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    what = "this machine has"
    if (limit := _control_group_limit()) is not None and limit < total:
        total, free, what = limit, min(free, limit), "this process's control group may use"
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY and 0 <= soft < total:
            total, free, what = soft, min(free, soft), "this process may use (ulimit)"
    return Room(total, free, what)


def _read_meminfo() -> dict[str, int]:
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return {
            name: int(rest.split()[0]) << 10
            for name, _, rest in (line.partition(":") for line in lines)
            if name in ("MemTotal", "MemAvailable", "SwapTotal")
        }
    return {}


def _control_group_limit() -> int | None:
    """The smallest limit of the control groups that contain the process, version 2 or 1."""
    limits = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            root = Path("/sys/fs/cgroup")
            name = "memory.max"
            if number != "0" or controllers:
                if "memory" not in controllers.split(","):
                    continue
                root, name = root / "memory", "memory.limit_in_bytes"
            group = root / path.lstrip("/")
            # A container may show the path of the machine outside; then the file at the root applies.
            for folder in (root, group, *group.parents):
                if folder.is_relative_to(root):
                    limits += _limit(folder / name)
    return min(limits, default=None)


def _limit(file: Path) -> list[int]:
    with suppress(OSError, ValueError):
        return [int(file.read_text())]
    return []
