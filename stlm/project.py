"""Where commands are run: in the project's top folder, which holds params/."""

from __future__ import annotations

from pathlib import Path


def where_to_stand(root: Path = Path()) -> str:
    """What to append to an error about a file of the project that is not there.

    Empty where `root` is a project's top folder; else the folder to go to, if one above is a project's.
    """
    if (root / "params").is_dir():
        return ""
    here = root.resolve()
    for folder in here.parents:
        if (folder / "params" / "corpora.yaml").is_file():
            return f"; this is {here}: run it in the project's top folder, {folder}"
    return f"; this is {here}, which has no folder params/: run it in the project's top folder"
