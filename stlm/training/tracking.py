"""Weights & Biases: a check before training that a run can log there, and the logging itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stlm.errors import UserError
from stlm.study.runs import Run

# Modes that send nothing and therefore need no login.
_LOCAL = ("offline", "dryrun", "disabled")
_INSTEAD = "set WANDB_MODE=offline to log to files, or training.wandb to false"


def check_tracking() -> str | None:
    """A message about the mode, shown before training; None if runs are sent as usual.

    Does not import wandb, which takes a second. Raises UserError if the package or a login is missing.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "training.wandb: true needs the package wandb: install it (pip install wandb), or set "
            "training.wandb to false"
        )
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in _LOCAL:
        kept = "nothing is logged" if mode == "disabled" else "`wandb sync wandb/offline-run-*` sends it"
        return f"training.wandb: WANDB_MODE={mode}: {kept}"
    if not _has_login():
        raise UserError(
            f"training.wandb: true, but Weights & Biases has no login here: run `wandb login`, {_INSTEAD}"
        )
    return None


def _has_login() -> bool:
    """Whether there may be an API key: in a variable, or in the files where `wandb login` writes one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(os.path.expanduser("~"))
    config = Path(os.environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    return (
        any(
            _file_contains(file, "password")
            for file in (os.environ.get("NETRC"), home / ".netrc", home / "_netrc")
            if file
        )
        or _file_contains(config / "settings", "api_key")
        or _file_contains(Path("wandb") / "settings", "api_key")
    )


def _file_contains(file: str | Path, word: str) -> bool:
    try:
        return word in Path(file).read_text(errors="replace")
    except OSError:
        return False


@contextmanager
def _without_terminal() -> Iterator[None]:
    """Hide the terminal, so that a training that nobody watches does not wait for an answer."""
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


def start_tracking(run: Run, fingerprint: str) -> Any:
    """A run of Weights & Biases, the same for a resumed run. Raises UserError if it cannot start."""
    check_tracking()
    import wandb

    try:
        with _without_terminal():
            return wandb.init(
                project=f"stlm-{run.study}",
                name=run.name,
                # A resumed run continues the same record; another recipe gets another one.
                id=f"{run.study}-{run.name}-{fingerprint[:8]}",
                resume="allow",
                config=run.model_dump(mode="json"),
            )
    except (wandb.errors.Error, TimeoutError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"training.wandb: true, but Weights & Biases cannot start: {reason[:300]}; mend that, {_INSTEAD}"
        ) from None
