"""Keeping the records of Snakemake and DVC in step with each other and with the files on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from stlm.errors import UserError
from stlm.files import write_text
from stlm.manifests import Manifests, changed_sources
from stlm.pipeline import DVC_FILE, WATCH, active_study, check_active, fetched, use
from stlm.study import load_study
from stlm.validation import read_yaml


def _engine(module: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Run an engine of this Python's environment, its output captured."""
    # The engines start `stlm` by name: let them find the one that belongs to this Python.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=root,
        env={**os.environ, "PATH": path},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


def record_in_dvc(root: Path = Path()) -> str:
    """Tell DVC that the outputs in place belong to the inputs in place, after Snakemake made them all.

    Not where the local files that the study is made from are others by now: `dvc commit` would take what was
    made from the old ones as made from the new. Returns what was done, for people. Never an error: the
    results are there, whatever DVC says.
    """
    if not (root / ".dvc").is_dir() or not (root / ".git").exists():
        return "DVC: nothing recorded, this folder is not a clone of a git repository with DVC"
    if changed := _changed(root):
        return changed
    lock = root / "dvc.lock"
    before = lock.read_text(encoding="utf-8") if lock.exists() else None
    done = _engine("dvc", "commit", "--force", "--quiet", root=root)
    if done.returncode:
        return f"DVC: nothing recorded, `dvc commit --force` failed:\n{done.stderr.strip()}"
    if changed := _changed(root):
        # Edited while DVC read them.
        if before is None:
            lock.unlink(missing_ok=True)
        else:
            write_text(lock, before)
        return changed
    return "DVC: results recorded in dvc.lock; `dvc status` is clean"


def _changed(root: Path) -> str:
    """Why nothing may be recorded, where local files are not those that the results are made from."""
    try:
        name = active_study(root)
        if name is None:
            return "DVC: nothing recorded, there is no dvc.yaml; run `stlm use STUDY`"
        study = load_study(name, root=root)
        changed = changed_sources(study, fetched(study, root), root)
    except UserError as error:
        return f"DVC: nothing recorded: {error}"
    if not changed:
        return ""
    return (
        f"DVC: nothing recorded, the files of {', '.join(changed)} are not those that the results are made "
        "from; run `snakemake all` again, with the mirror named where they are in one"
    )


def after_fetch(name: str, mirror: Path | None, root: Path = Path()) -> None:
    """Write the manifest of what was just fetched; say so where DVC does not watch its files yet."""
    manifests = Manifests(root, mirror)
    manifests.after_fetch(name)
    study = active_study(root)
    stages = {} if study is None else read_yaml(root / DVC_FILE).get("stages") or {}
    if f"fetch-{name}" in stages and f"{WATCH}{name}" not in stages and manifests.watched(name):
        print(f"{name}: DVC does not watch its files yet; `stlm use {study}` lets it", file=sys.stderr)


def sync(root: Path = Path()) -> str:
    """Bring Snakemake's records in line with results that DVC made or pulled; returns the study's name.

    Snakemake is told to take every output as made by today's parameters, so this is refused where
    ``dvc status`` finds that one is not.
    """
    name = active_study(root)
    if name is None:
        raise UserError("there is no dvc.yaml: run `stlm use STUDY`")
    check_active(load_study(name, root=root), root)
    use(name, root)  # the manifests of today, and no stage that watches what is not on this machine
    status = _engine("dvc", "status", "--json", root=root)
    if status.returncode:
        raise UserError(f"`dvc status` failed:\n{status.stderr.strip()}")
    changed = json.loads(status.stdout)
    if changed:
        raise UserError(
            f"`dvc status` is not clean: {', '.join(changed)}. Bring the results in line first, with "
            "`dvc repro` (make them) or `dvc pull` (get them)."
        )
    # Forced, so that every job gets a record, those too that no time stamp gives away.
    command = ("--touch", "--forceall", "--cores", "1", "--no-hooks", "all", "--config", f"study={name}")
    touched = _engine("snakemake", *command, root=root)
    if touched.returncode:
        raise UserError(f"`snakemake --touch all` failed:\n{touched.stderr.strip()}")
    return name
