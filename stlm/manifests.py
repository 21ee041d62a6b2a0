"""Manifests: the fingerprints of the local files that a study is made from, as inputs of both engines.

``data/sources/NAME.json`` has the fingerprint of the files that ``stlm fetch NAME`` reads; the manifest of a
published model is in its results folder. Manifests are small, belong into git, and are inputs of the stages
that read the files, in Snakemake and in DVC. ``data/sources/NAME/`` has links to the folders on this machine,
which DVC watches; git ignores them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stlm.corpora.config import Entry
from stlm.corpora.errors import SourceError
from stlm.corpora.fingerprint import (
    Digests,
    Fingerprint,
    Found,
    LocalSource,
    components,
    local_sources,
    look,
    of_folder,
    of_record,
)
from stlm.corpora.sources import matched_files
from stlm.errors import UserError, nearest
from stlm.files import disk_errors, read_json, write_json
from stlm.study.catalogues import load_benchmarks, load_corpora, load_models, load_vocabularies
from stlm.study.load import load_study
from stlm.study.runs import PublishedModel, Study

FOLDER = Path("data/sources")
RAW = Path("data/raw")
CACHE = Path(".state/fingerprints.json")
# The files that loading a published model reads (stlm.evaluation.hf_model).
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")


def named_mirror() -> Path | None:
    """The mirror that STLM_MIRROR names, if it exists."""
    named = os.environ.get("STLM_MIRROR")
    mirror = Path(named).expanduser() if named else None
    return mirror if mirror is not None and mirror.is_dir() else None


class Manifests:
    """The manifests of a project's data, and the local files that they describe."""

    def __init__(self, root: Path = Path(), mirror: Path | None = None) -> None:
        self.root = root
        self.mirror = mirror
        self._digests = Digests(root / CACHE)
        self._corpora = load_corpora(root)
        self._entries: dict[str, Entry] = {
            **self._corpora,
            **load_benchmarks(root),
            **load_vocabularies(root),
            **load_models(root),
        }

    def path(self, name: str) -> Path | None:
        """The path of the manifest of ``name`` in the project; None if no source is local."""
        if any(local_sources(entry) for entry in self._parts(name).values()):
            return FOLDER / f"{name}.json"
        return None

    def refresh(self, name: str) -> bool:
        """Write the manifest of ``name`` and its links for the present files; whether it changed."""
        path = self.path(name)
        if path is None:
            return False
        old = _read(self.root / path)
        content = {}
        for part, entry in self._parts(name).items():
            found, fingerprint = self._look(name, part, entry)
            content[part] = _json(fingerprint) if fingerprint else old.get(part)
            if found is not None:
                _link(self._link(name, part), found.root)
        self._digests.save()
        return _write(self.root / path, content)

    def after_fetch(self, name: str) -> None:
        """Write the manifest of ``name`` for the files that ``stlm fetch`` has just read, and the links."""
        path = self.path(name)
        if path is None:
            return
        content = {}
        for part, entry in self._parts(name).items():
            fetched = of_record(self._record(name, part))
            content[part] = _json(fetched) if fetched else None
            if (found := self._look(name, part, entry)[0]) is not None:
                _link(self._link(name, part), found.root)
        self._digests.save()
        _write(self.root / path, content)

    def changed(self, name: str) -> bool:
        """Whether the files of ``name`` differ from its manifest, or from its source.json.

        If no mirror is named, the last folder is checked.
        """
        path = self.path(name)
        if path is None:
            return False
        manifest = _read(self.root / path)
        for part, entry in self._parts(name).items():
            fetched = of_record(self._record(name, part))
            _, now = self._look(name, part, entry, remembered=True)
            recorded = manifest.get(part)
            if (now and _json(now) != recorded) or (fetched and _json(fetched) != recorded):
                return True
        self._digests.save()
        return False

    def out_of_reach(self, name: str) -> bool:
        """Whether files of ``name`` have changed in a mirror that is not named, so that fetch would fail."""
        for part, entry in self._parts(name).items():
            if self._look(name, part, entry)[0] is None:
                found, _ = self._look(name, part, entry, remembered=True)
                if found is not None and found.fingerprint != of_record(self._record(name, part)):
                    return True
        self._digests.save()
        return False

    def watched(self, name: str) -> list[str]:
        """The files and folders that DVC watches for ``name``, through the links; none without links."""
        paths = []
        for part, entry in self._parts(name).items():
            link = self._link(name, part)
            if link.exists():
                paths += _watched(link, local_sources(entry))
        return [Path(os.path.relpath(path, self.root)).as_posix() for path in paths]

    def folders(self, name: str) -> str:
        """The local folders that ``name`` was last read from."""
        links = [self._link(name, part) for part in self._parts(name)]
        return ", ".join(os.readlink(link) for link in links if link.is_symlink())

    def refresh_model(self, model: PublishedModel) -> bool:
        """Write the manifest of a published model's folder for its present files; whether it changed."""
        if model.model is not None:
            return False  # fetched like the data, whose sources have manifests of their own
        path = self.root / model_manifest(model)
        now = self._of_model(model)
        return _write(path, _json(now) if now else _read(path) or None)

    def model_changed(self, model: PublishedModel) -> bool:
        """Whether the files of a published model differ from its manifest."""
        now = self._of_model(model)
        return now is not None and _json(now) != _read(self.root / model_manifest(model))

    def _of_model(self, model: PublishedModel) -> Fingerprint | None:
        if model.model is not None:
            return None
        now = of_folder(self.root / model.place, MODEL_FILES, self._digests)
        self._digests.save()
        return now

    def _parts(self, name: str) -> dict[str, Entry]:
        if name not in self._entries:
            raise UserError(
                f"{name!r} is in none of params/{{corpora,benchmarks,vocabularies,models}}.yaml"
                f"{nearest(name, self._entries)}"
            )
        return components(self._entries[name], self._corpora)

    def _look(
        self, name: str, part: str, entry: Entry, remembered: bool = False
    ) -> tuple[Found | None, Fingerprint | None]:
        """The local files of a part and their fingerprint; without local files, that of the last fetch."""
        record = self._record(name, part)
        last = self._link(name, part) if remembered else None
        found = look(entry, record, self.mirror, self.root, self._digests, last)
        return found, found.fingerprint if found else of_record(record)

    def _link(self, name: str, part: str) -> Path:
        return self.root / FOLDER / name / part

    def _record(self, name: str, part: str) -> dict[str, Any] | None:
        folder = self.root / RAW / name
        path = (folder if part == name else folder / part) / "source.json"
        try:
            record = read_json(path)
        except UserError:
            return None  # not fetched yet, or incomplete: fetched again
        return record if isinstance(record, dict) else None


def model_manifest(model: PublishedModel) -> Path:
    """The path of the manifest of a published model."""
    return model.results_folder / "files.json"


def write_manifest(name: str, model: str | None = None, root: Path = Path()) -> bool:
    """Write the manifest of the data ``name``, or of the study ``name``'s published ``model``.

    Returns whether it changed. `UserError` for an unknown name, and if files of a mirror have changed but no
    mirror is named: fetching them again would fail.
    """
    manifests = Manifests(root, named_mirror())
    if model is not None:
        study = load_study(name, root=root)
        if model not in study.published:
            raise UserError(
                f"study {name!r} has no published model {model!r}{nearest(model, study.published)}"
            )
        return manifests.refresh_model(study.published[model])
    changed = manifests.refresh(name)
    if manifests.out_of_reach(name):
        raise UserError(
            f"{name}: the files in {manifests.folders(name)} have changed, and no mirror is named to fetch "
            "them from: set STLM_MIRROR"
        )
    return changed


def refresh_all(study: Study, names: Iterable[str], root: Path = Path()) -> None:
    """Write the manifests of a study's data and published models for the present files."""
    manifests = Manifests(root, named_mirror())
    for name in names:
        manifests.refresh(name)
    for model in study.published.values():
        manifests.refresh_model(model)


def changed_sources(study: Study, names: Iterable[str], root: Path = Path()) -> list[str]:
    """The data and published models of a study whose files differ from their manifests."""
    manifests = Manifests(root, named_mirror())
    data = [name for name in names if manifests.changed(name)]
    return data + [name for name, model in study.published.items() if manifests.model_changed(model)]


def _json(fingerprint: Fingerprint) -> dict[str, Any]:
    return fingerprint._asdict()


def _read(path: Path) -> dict[str, Any]:
    """A manifest; empty if it is missing or damaged, because it is then written again."""
    try:
        content = read_json(path)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Any) -> bool:
    """Write a manifest unless it is unchanged, so that its time stamp is that of the last change."""
    try:
        if read_json(path) == content:
            return False
    except UserError:
        pass
    write_json(path, content)
    return True


def _link(link: Path, target: Path) -> None:
    """Make ``link`` point to ``target``; a correct link is not touched."""
    wanted = os.path.abspath(target)
    if link.is_symlink() and os.readlink(link) == wanted:
        return
    with disk_errors(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(wanted)


def _watched(link: Path, sources: Iterable[LocalSource]) -> list[Path]:
    """The paths below ``link`` that DVC hashes: the paths of the sources up to the first wildcard.

    DVC does not enter a linked folder below another folder, so such folders with files of a source are listed
    too.
    """
    named: set[Path] = set()
    linked: set[Path] = set()
    for source in sources:
        for patterns in source.files.values():
            named |= {
                _before_wildcards(link, pattern)
                for pattern in ([patterns] if isinstance(patterns, str) else patterns)
            }
        try:
            files = [link / path for each in matched_files(source, link).values() for path, _ in each]
        except SourceError:
            continue
        folders = {above for file in files for above in file.relative_to(link).parents}
        linked |= {link / above for above in folders if above.parts and (link / above).is_symlink()}
    return sorted({path for path in named if not any(above in named for above in path.parents)} | linked)


def _before_wildcards(folder: Path, pattern: str) -> Path:
    """The deepest existing file or folder below ``folder`` on a path or glob, before any wildcard."""
    for part in Path(pattern).parts:
        if set(part) & set("*?[") or not (folder / part).exists():
            break
        folder /= part
    return folder
