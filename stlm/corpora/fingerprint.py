"""Fingerprints of the local files that data are read from: by content, at the cost of one `stat` a file.

A file's SHA-256 is kept together with its `stat`. A touched file is read again and has the same fingerprint.
A file that was edited in place has another, even if its size and modification time were set back, because its
change time (ctime) cannot be set back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stlm.corpora.config import CorpusEntry, Entry, FolderSource, MirrorSource, VocabularyEntry
from stlm.corpora.errors import SourceError, shown
from stlm.corpora.sources import local_root, matched_files
from stlm.integrity import Digests

LOCAL_KINDS = ("mirror", "folder")
LocalSource = MirrorSource | FolderSource


class Fingerprint(NamedTuple):
    """The content of a set of files: how many there are, and a digest of their paths and contents."""

    files: int
    sha256: str


def of_contents(contents: Mapping[str, str]) -> Fingerprint:
    """The fingerprint of files given as path -> SHA-256, as source.json lists them."""
    lines = (f"{path}\0{digest}\n" for path, digest in sorted(contents.items()))
    return Fingerprint(
        len(contents), hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    )


def of_record(record: Mapping[str, Any] | None) -> Fingerprint | None:
    """The fingerprint of the fetched files, according to source.json; None if they were not local."""
    used = (record or {}).get("source") or {}
    if used.get("kind") not in LOCAL_KINDS:
        return None
    return of_contents(used["files"])


def local_sources(entry: Entry) -> list[LocalSource]:
    """The sources of ``entry`` that are local files."""
    return [source for source in entry.sources if isinstance(source, LocalSource)]


class Found(NamedTuple):
    """The present content of a local source."""

    source: LocalSource
    root: Path
    fingerprint: Fingerprint


def look(
    entry: Entry,
    record: Mapping[str, Any] | None,
    mirror: Path | None,
    project: Path,
    digests: Digests,
    last: Path | None = None,
) -> Found | None:
    """The files that fetching ``entry`` would read now, from the first local source that can give them.

    ``record`` is the source.json of the last fetch; ``last`` is the folder that it used, checked if no mirror
    is named. Returns None if the last fetch used another kind of source (a hub, a wheel), or if no
    local source exists. A source that was used and now lacks a file is returned with an empty fingerprint.
    """
    used = ((record or {}).get("source") or {}).get("kind")
    if used is not None and used not in LOCAL_KINDS:
        return None
    partial = None
    for source in local_sources(entry):
        root = local_root(source, mirror, project)
        if root is None and used == source.kind:
            root = last
        if root is None or not root.exists():
            continue
        try:
            matched = matched_files(source, root)
        except SourceError:
            if used == source.kind:
                partial = partial or Found(source, root, of_contents({}))
            continue
        contents = {
            shown(path): digest
            for each in matched.values()
            for path, file in each
            if (digest := digests.sha256(file)) is not None
        }
        if _as_pinned(entry, source, matched, contents):
            return Found(source, root, of_contents(contents))
    return partial


def _as_pinned(
    entry: Entry,
    source: LocalSource,
    matched: Mapping[str, list[tuple[str, Path]]],
    contents: Mapping[str, str],
) -> bool:
    """Whether the files have the digests that params/ pins; if not, fetch skips the source."""
    pinned = dict(source.sha256)
    if isinstance(entry, VocabularyEntry):
        pinned |= {
            shown(path): entry.sha256[output]
            for output, each in matched.items()
            if output in entry.sha256
            for path, _ in each
        }
    return all(contents.get(path, digest) == digest for path, digest in pinned.items())


def components(entry: Entry, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries whose sources are read for ``entry``: those of a mix, or itself."""
    mix = entry.mix if isinstance(entry, CorpusEntry) else None
    return {name: entries[name] for name in mix} if mix else {entry.name: entry}


def of_folder(folder: Path, patterns: tuple[str, ...], digests: Digests) -> Fingerprint | None:
    """The fingerprint of the files directly in ``folder`` that match globs; None if there is no folder."""
    if not folder.is_dir():
        return None
    files = {file.name: file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    contents = {name: digests.sha256(file) for name, file in files.items()}
    return of_contents({shown(name): digest for name, digest in contents.items() if digest is not None})
