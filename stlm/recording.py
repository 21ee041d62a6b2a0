"""Keeps the records of Snakemake and DVC consistent with each other and with this machine's files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stlm.engines import DVC_FILE, WATCH, active_study, check_active, dvc_stages, fetched, use
from stlm.errors import UserError
from stlm.files import read_json, read_record, write_json, write_text
from stlm.manifests import Manifests, changed_sources
from stlm.project import folder_hint
from stlm.study.load import load_study
from stlm.study.runs import Study
from stlm.study.strict import read_yaml

LOCK = Path("dvc.lock")
# This machine's memory of the last recording, one file per study.
RECORDED = Path(".state/recorded")


def _engine(module: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Run an engine of this Python's environment and capture its output."""
    # The engines start `stlm` by name: they must find the one of this Python's environment.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=root,
        env={**os.environ, "PATH": path},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


def _outputs(study: Study, root: Path) -> Iterator[Path]:
    """All files and folders that the study's stages make."""
    for stage in dvc_stages(study, root).values():
        for entry in (*stage["outs"], *stage.get("metrics", ())):
            yield root / (entry if isinstance(entry, str) else next(iter(entry)))


def _state(study: Study, root: Path) -> str | None:
    """A digest of parameters, DVC's files, and outputs by time and size; None if an output is missing."""
    digest = hashlib.sha256(study.model_dump_json().encode())
    digest.update(json.dumps(fetched(study, root)).encode())
    try:
        for name in (DVC_FILE, LOCK):
            digest.update((root / name).read_bytes())
        for path in _outputs(study, root):
            found = path.stat()
            digest.update(f"{found.st_mtime_ns} {found.st_size}".encode())
    except OSError:
        return None
    return digest.hexdigest()


def _has_dvc(root: Path) -> bool:
    return (root / ".dvc").is_dir() and (root / ".git").exists()


def _is_recorded(study: Study, root: Path) -> bool:
    try:
        remembered: Any = read_json(root / RECORDED / f"{study.name}.json")
    except UserError:
        return False
    return isinstance(remembered, dict) and remembered.get("state") == _state(study, root)


def _remember(study: Study, root: Path) -> None:
    if (state := _state(study, root)) is not None:
        write_json(root / RECORDED / f"{study.name}.json", {"state": state})


def unrecorded(study: Study, root: Path = Path()) -> bool:
    """Whether all results of the study exist, but may not be recorded in DVC, for example after a kill.

    It only looks at the outputs' time stamps, and reads no file.
    """
    if study.overrides or not _has_dvc(root) or _is_recorded(study, root):
        return False
    return all(path.exists() for path in _outputs(study, root))


def record_in_dvc(root: Path = Path()) -> str:
    """Record in DVC that the present outputs belong to the present inputs, after Snakemake made them all.

    Nothing is recorded if the study's local files or parameters have changed meanwhile: `dvc commit` would
    attribute old outputs to new inputs. Returns a message for the user. It never raises: the results are
    there, whatever DVC reports.
    """
    if not _has_dvc(root):
        return "DVC: nothing recorded, this folder is not a clone of a git repository with DVC"
    try:
        name = active_study(root)
        if name is None:
            return "DVC: nothing recorded, there is no dvc.yaml; run `stlm use STUDY`"
        study = load_study(name, root=root)
        if _is_recorded(study, root):
            return "DVC: results are recorded in dvc.lock"
        if changed := _changed(study, root):
            return changed
        _check_made(study, root)
        lock = root / LOCK
        before = lock.read_text(encoding="utf-8") if lock.exists() else None
        done = _engine("stlm.dvc_command", "commit", "--force", "--quiet", root=root)
        if done.returncode:
            return f"DVC: nothing recorded, `dvc commit --force` failed:\n{done.stderr.strip()}"
        if changed := _changed(study, root):
            # The inputs changed while DVC read them.
            if before is None:
                lock.unlink(missing_ok=True)
            else:
                write_text(lock, before)
            return changed
        _remember(study, root)
    except UserError as error:
        return f"DVC: nothing recorded: {error}"
    return "DVC: results recorded in dvc.lock; `dvc status` is clean"


def _check_made(study: Study, root: Path) -> None:
    """Refuse to record outputs of other parameters: `snakemake --touch` accepts all as made with today's."""
    from stlm.report.schema import EvaluationRecord, PublishedRecord, TrainRecord
    from stlm.report.settings_check import (
        check_dependencies,
        check_published,
        check_scored,
        check_trained,
    )

    trained = {}
    for run in study.runs.values():
        path, command = run.folder / "train.json", f"stlm train {study.name} {run.name}"
        trained[run.name] = read_record(root / path, TrainRecord)
        check_trained(run, trained[run.name], path, command)
        path, command = run.folder / "evaluation.json", f"stlm evaluate {study.name} {run.name}"
        scored = read_record(root / path, EvaluationRecord)
        check_scored(study.evaluation, scored.settings, path, command)
    check_dependencies(study, trained)
    for model in study.published.values():
        path, command = model.results_folder / "evaluation.json", f"stlm evaluate {study.name} {model.name}"
        published = read_record(root / path, PublishedRecord)
        check_scored(study.evaluation, published.settings, path, command)
        check_published(model, published.published, path, command)


def _changed(study: Study, root: Path) -> str:
    """Why nothing may be recorded, if local files differ from those that the results were made from."""
    changed = changed_sources(study, fetched(study, root), root)
    if not changed:
        return ""
    return (
        f"DVC: nothing recorded, the files of {', '.join(changed)} are not those that the results are made "
        "from; run `snakemake all` again, with the mirror named where they are in one"
    )


def after_fetch(name: str, mirror: Path | None, root: Path = Path()) -> None:
    """Write the manifest of freshly fetched data; report if DVC does not watch its files yet."""
    manifests = Manifests(root, mirror)
    manifests.after_fetch(name)
    study = active_study(root)
    if study is None or not manifests.watched(name):
        return
    stages = read_yaml(root / DVC_FILE).get("stages") or {}
    if f"fetch-{name}" in stages and f"{WATCH}{name}" not in stages:
        print(f"{name}: DVC does not watch its files yet; `stlm use {study}` lets it", file=sys.stderr)


def sync(root: Path = Path()) -> str:
    """Make Snakemake's records match results that DVC made or pulled; returns the study's name.

    Snakemake then accepts every output as made with today's parameters, so this is refused if ``dvc status``
    finds an output that was not.
    """
    name = active_study(root)
    if name is None:
        raise UserError(f"there is no dvc.yaml: run `stlm use STUDY`{folder_hint(root)}")
    study = load_study(name, root=root)
    check_active(study, root)
    use(name, root)  # today's manifests, and no stage that watches files that this machine lacks
    status = _engine("stlm.dvc_command", "status", "--json", root=root)
    if status.returncode:
        raise UserError(f"`dvc status` failed:\n{status.stderr.strip()}")
    changed = json.loads(status.stdout)
    if changed:
        raise UserError(
            f"`dvc status` is not clean: {', '.join(changed)}. Bring the results in line first, with "
            "`dvc repro` (make them) or `dvc pull` (get them)."
        )
    # Forced, so that every job gets a record, including those that time stamps do not select.
    command = ("--touch", "--forceall", "--cores", "1", "--no-hooks", "all", "--config", f"study={name}")
    touched = _engine("snakemake", *command, root=root)
    if touched.returncode:
        raise UserError(f"`snakemake --touch all` failed:\n{touched.stderr.strip()}")
    _remember(study, root)
    return name
