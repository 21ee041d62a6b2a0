"""Names of studies, variants and published models."""

from __future__ import annotations

import re
from pathlib import Path

from stlm.errors import UserError, nearest, shortened
from stlm.project import folder_hint
from stlm.study.catalogues import CATALOGUES, PARAMS

NAME = re.compile(r"[a-z][a-z0-9_]*(-[a-z0-9_]+)*")
LONGEST_NAME = 100
"""Characters of a name: file, folder and stage names are longer, and file systems allow 255 bytes."""
NOT_STUDIES = {*CATALOGUES, "active"}


def is_name(text: str) -> bool:
    """Whether a study, a variant or a published model may have this name."""
    return len(text) <= LONGEST_NAME and NAME.fullmatch(text) is not None


def check_study_name(name: str, root: Path) -> None:
    """Refuse a study's name that is invalid (a path, for example) or has no file in params/."""
    if not is_name(name):
        hint = nearest(Path(name).stem, study_names(root)) if len(name) <= LONGEST_NAME else ""
        raise UserError(
            f"{shortened(name)!r} is no study's name: lower-case letters, digits, _ and - between them, at "
            f"most {LONGEST_NAME}; without folder and suffix{hint}"
        )
    if name in NOT_STUDIES or not (root / PARAMS / f"{name}.yaml").exists():
        hint = folder_hint(root) or nearest(name, study_names(root))
        raise UserError(f"{PARAMS}/{name}.yaml: no such study{hint}")


def study_names(root: Path = Path()) -> list[str]:
    """The names of the studies in params/."""
    return sorted(path.stem for path in (root / PARAMS).glob("*.yaml") if path.stem not in NOT_STUDIES)
