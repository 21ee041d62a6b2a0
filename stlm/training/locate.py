"""Checkpoints as people name them: STUDY/RUN, a run's folder or a checkpoint's, and @STEP after it."""

from __future__ import annotations

import re
from pathlib import Path

from stlm.errors import UserError, nearest
from stlm.project import where_to_stand

RESULTS = Path("results")
WEIGHTS = "model.safetensors"


def split_step(name: str) -> tuple[str, int | None]:
    """`NAME@STEP` or `NAME@step-STEP` as the name and the step; None where there is no @STEP."""
    # No step has more digits; Python refuses to read some thousand of them.
    match = re.fullmatch(r"(.+)@(?:step-)?([0-9]{1,18})", name, re.DOTALL)
    return (match[1], int(match[2])) if match else (name, None)


def find_checkpoint(name: str) -> Path:
    """The folder of the checkpoint that `name` means: of a run's, the last or the one of the step after an @.

    Raises UserError where there is none, naming the nearest run or the steps that there are.
    """
    place, step = split_step(name)
    folder = Path(place)
    if step is None and (folder / WEIGHTS).is_file():
        return folder
    study, _, run = place.partition("/")
    for candidate in (folder, RESULTS / study / "runs" / run):
        found = _steps(candidate)
        if found:
            break
    else:
        raise UserError(_nothing(place, folder, RESULTS / study / "runs" / run))
    chosen = max(found) if step is None else step
    if chosen not in found:
        listed = ", ".join(map(str, sorted(found)))
        raise UserError(f"{name}: {candidate} has no checkpoint of step {step} (found: {listed})")
    return found[chosen]


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run's folder by step."""
    found = (folder / "checkpoints").glob("step-*")
    return {int(one.name.removeprefix("step-")): one for one in found if (one / WEIGHTS).is_file()}


def _nothing(name: str, *folders: Path) -> str:
    trained = [folder for folder in folders if (folder / "train.json").is_file()]
    if trained:
        return f"{trained[0]}: has no checkpoints; `dvc pull` gets them, `stlm train` makes them"
    known = [f"{path.parts[-4]}/{path.parts[-2]}" for path in RESULTS.glob("*/runs/*/checkpoints")]
    return (
        f"{name}: neither a run's folder (results/STUDY/runs/RUN, with checkpoints/step-*), nor a "
        f"checkpoint's (with {WEIGHTS}), nor a STUDY/RUN in {RESULTS}/"
        f"{nearest(name, known) if RESULTS.is_dir() else where_to_stand()}"
    )
