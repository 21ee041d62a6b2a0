"""The rolling state from which a killed run resumes; it is not a declared output of the engines."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from stlm.errors import UserError
from stlm.files import atomic_path, disk_errors
from stlm.integrity import check_seal, seal
from stlm.model.transformer import Transformer
from stlm.study.runs import Run


@dataclass
class Progress:
    """The progress of a run.

    The next row needs `losses` of the steps since the last row of the curve, those of the objective's parts
    by name (`part_losses`), and the last step's `grad_norm`, if a run stops between two rows. `kernels`,
    `compiled`: whether all steps were computed this way (None: an earlier version did not record it).
    `parts`: the devices, processors and code versions that computed the run, each once, ordered by their last
    steps.
    """

    step: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    part_losses: dict[str, list[float]] = field(default_factory=dict)
    grad_norm: float = math.nan
    watch: dict[str, Any] = field(default_factory=dict)
    kernels: bool = False
    compiled: bool | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)


def draws(seed: int, step: int, micro: int, row: int) -> int:
    """The random seed for the rows from `row` on in the micro-batch `micro` of a step."""
    if micro == row == 0:
        return seed * 1_000_003 + step
    digest = hashlib.blake2b(f"{seed} {step} {micro} {row}".encode(), digest_size=7)
    return int.from_bytes(digest.digest())


def save_state(
    path: Path, fingerprint: str, model: Transformer, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write weights, optimizer and progress to one file, atomically: the previous state stays until then.

    The file is sealed: it ends with its SHA-256.
    """
    state = {
        "fingerprint": fingerprint,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": json.dumps(vars(progress)),
    }
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's writer reports a failing disk without details
            raise UserError(f"{path}: cannot write the state: is the disk full? ({error})") from None
        seal(temporary)


def load_state(
    path: Path, fingerprint: str, model: Transformer, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Restore ``model`` and ``optimizer``; returns None without a state, or with another fingerprint.

    Only tensors and plain values are read (``weights_only``), after the file's SHA-256 has been verified.
    Raises ``UserError`` for a damaged file, and for one of an earlier version, without a SHA-256.
    """
    if not path.exists():
        return None
    check_seal(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != fingerprint:
            return None
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return Progress(**json.loads(state["progress"]))
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: the saved state is damaged ({reason}); delete {path.parent} to train from the start"
        ) from None


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Prevent other processes from training the run at the same time."""
    path = run.state_folder.with_name(f"{run.name}.lock")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)  # the system releases it however the process ends
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"run {run.name}: another process is training it ({path} is held); wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()
