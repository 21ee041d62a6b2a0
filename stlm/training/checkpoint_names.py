"""Names of checkpoints: STUDY/RUN, a run's folder or a checkpoint's folder, and optionally @STEP."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from stlm.errors import UserError, nearest
from stlm.project import folder_hint

RESULTS = Path("results")
WEIGHTS = "model.safetensors"
_STEP = re.compile(r"step-([0-9]{1,18})")


def split_step(name: str) -> tuple[str, int | None]:
    """Split `NAME@STEP` or `NAME@step-STEP` into the name and the step; the step is None without @STEP."""
    # No step has more digits, and Python refuses to read numbers of some thousand digits.
    match = re.fullmatch(r"(.+)@(?:step-)?([0-9]{1,18})", name, re.DOTALL)
    return (match[1], int(match[2])) if match else (name, None)


def find_checkpoint(name: str, others: Iterable[str] = ()) -> Path:
    """The folder of the checkpoint that `name` refers to; for a run, its last or the one at @STEP.

    Raises UserError if there is none, naming the steps that exist, or the nearest run or other known name
    (`others`).
    """
    place, step = split_step(name)
    folder = Path(place)
    if step is None and is_file(folder / WEIGHTS):
        return folder
    study, _, run = place.partition("/")
    for candidate in (folder, RESULTS / study / "runs" / run):
        found = checkpoints_by_step(candidate)
        if found:
            break
    else:
        raise UserError(_nothing(place, others, folder, RESULTS / study / "runs" / run))
    chosen = max(found) if step is None else step
    if chosen not in found:
        listed = ", ".join(map(str, sorted(found)))
        raise UserError(f"{name}: {candidate} has no checkpoint of step {step} (found: {listed})")
    return found[chosen]


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by step, in order; other entries named step-* are skipped.

    A checkpoint without weights is listed too, so that no other checkpoint is used in its place.
    """
    try:
        found = [one for one in (folder / "checkpoints").glob("step-*") if one.is_dir()]
    except (OSError, ValueError):  # a name that no file system can hold
        return {}
    numbered = [(_STEP.fullmatch(one.name), one) for one in found]
    return dict(sorted((int(match[1]), one) for match, one in numbered if match))


def is_file(path: Path) -> bool:
    """Whether the file exists; False for a name that no file system can hold."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether the folder exists; False for a name that no file system can hold."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _nothing(name: str, others: Iterable[str], *folders: Path) -> str:
    # A clone has the curves of runs, and nothing else of them.
    trained = [folder for folder in folders if is_file(folder / "curve.csv")]
    if trained:
        return f"{trained[0]}: has no checkpoints; `dvc pull` gets them, `stlm train` makes them"
    known = [f"{path.parts[-4]}/{path.parts[-2]}" for path in RESULTS.glob("*/runs/*/checkpoints")]
    known += others
    return (
        f"{name}: neither a run's folder (results/STUDY/runs/RUN, with checkpoints/step-*), nor a "
        f"checkpoint's (with {WEIGHTS}), nor a STUDY/RUN in {RESULTS}/"
        f"{('' if RESULTS.is_dir() else folder_hint()) or nearest(name, known)}"
    )
