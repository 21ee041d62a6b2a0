"""The rolling state that a killed run resumes from, outside every declared output of the engines."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stlm.errors import UserError
from stlm.files import atomic_path
from stlm.model.transformer import Transformer


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)


def fingerprint(content: dict[str, Any]) -> str:
    """A hash of everything that decides a run's weights; a state of another fingerprint is not resumed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_state(
    path: Path, mark: str, model: Transformer, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write weights, optimizer and progress to one file, atomically: the previous one stays until then."""
    state = {
        "fingerprint": mark,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": json.dumps(vars(progress)),
    }
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's writer tells no more of a failing disk
            raise UserError(f"{path}: cannot write the state: is the disk full? ({error})") from None


def load_state(
    path: Path, mark: str, model: Transformer, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Restore ``model`` and ``optimizer`` from ``path``; None where there is no state, or of another mark.

    Only tensors and plain values are read (``weights_only``). Raises ``UserError`` for a damaged file.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != mark:
            return None
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return Progress(**json.loads(state["progress"]))
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: the saved state is damaged ({reason}); delete {path.parent} to train from the start"
        ) from None
