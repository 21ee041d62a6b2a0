"""Commands are run in the project's top folder, which contains params/."""

from __future__ import annotations

from pathlib import Path


def folder_hint(root: Path = Path()) -> str:
    """The hint to append to an error about a missing file of the project.

    Empty if `root` is a project's top folder; otherwise it names the top folder, if a parent is one.
    """
    if (root / "params").is_dir():
        return ""
    here = root.resolve()
    for folder in here.parents:
        if (folder / "params" / "corpora.yaml").is_file():
            return f"; this is {here}: run it in the project's top folder, {folder}"
    return f"; this is {here}, which has no folder params/: run it in the project's top folder"
