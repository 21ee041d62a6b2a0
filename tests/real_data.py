"""Where the mirror of the real data lies, for the tests that read it."""

from __future__ import annotations

from pathlib import Path

import pytest


def find_mirror(root: Path, named: str | None) -> Path | None:
    """The mirror of the real data: the folder `named`, else the nearest shared/data beside or above `root`.

    None where there is none. A named folder that is no mirror is an error: the tests that need it would
    otherwise be skipped unseen.
    """
    if named:
        folder = Path(named).expanduser().resolve()
        if not (folder / "corpora").is_dir():
            raise pytest.UsageError(f"STLM_MIRROR: {folder} has no folder corpora/, so it is no mirror")
        return folder
    found = (parent / "shared" / "data" for parent in root.parents)
    return next((folder for folder in found if (folder / "corpora").is_dir()), None)
