"""The files of a folder, and which of them a path or glob means."""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from stlm.corpora.errors import SourceError, shown
from stlm.errors import nearest

_NOT_DATA = {"__pycache__", "__MACOSX", "node_modules", "lost+found", "Thumbs.db", "desktop.ini"}


def is_hidden(path: str) -> bool:
    """Whether a glob leaves ``path`` out: hidden files and folders, checkpoints, what systems leave lying."""
    return any(part.startswith(".") or part in _NOT_DATA for part in PurePosixPath(path).parts)


def list_files(root: Path) -> list[str]:
    """Paths of all files under ``root``, relative to it and sorted. Links are followed.

    Each folder is entered once, so that links in a circle end; a folder that is also reached by a link keeps
    its own name.
    """
    found: list[str] = []
    entered: set[tuple[int, int]] = set()
    waiting = [(root, "")]
    while waiting:
        links: list[tuple[Path, str]] = []
        for start, prefix in waiting:
            _walk(start, prefix, entered, found, links)
        waiting = sorted(links, key=lambda link: link[1])
    return sorted(found)


def list_named(root: Path, patterns: Iterable[str]) -> list[str]:
    """``list_files``, with those files that are named exactly by a second path, over a link."""
    paths = list_files(root)
    known = set(paths)
    for pattern in patterns:
        within = not pattern.startswith("/") and ".." not in PurePosixPath(pattern).parts
        if pattern not in known and within and (root / pattern).is_file():
            paths.append(pattern)
    return sorted(paths)


def _walk(
    start: Path, prefix: str, entered: set[tuple[int, int]], found: list[str], links: list[tuple[Path, str]]
) -> None:
    """Add the files below ``start`` to ``found``, and the linked folders, not entered yet, to ``links``."""
    folders = [(start, prefix)]
    while folders:
        folder, before = folders.pop()
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in entered:
                continue
            entered.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise SourceError(f"{shown(str(folder))}: cannot be read: {error.strerror}") from None
        for entry in entries:
            path = before + entry.name
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append((Path(entry.path), path + "/"))
            elif entry.is_file():
                found.append(path)


@functools.lru_cache(maxsize=256)
def _pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression: `*` crosses folders, and `**/` also means the folder itself."""
    parts = [fnmatch.translate(part)[:-2] for part in glob.split("**/")]  # without the end, `\\Z`
    return re.compile("(?:.*/)?".join(parts))


def match_names(patterns: str | Sequence[str], paths: Iterable[str], where: str) -> list[str]:
    """Which of ``paths`` the paths and globs mean, sorted. Exact names come before globs and may be hidden.

    Raises `SourceError` for the first pattern that means none, saying why where only hidden files match.
    """
    paths = sorted(paths)
    known = set(paths)
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern in known:
            matched.add(pattern)
            continue
        every = [path for path in paths if _pattern(pattern).fullmatch(path)]
        visible = [path for path in every if not is_hidden(path)]
        if not visible:
            raise SourceError(f"{where}: no file {shown(pattern)}{_why_none(pattern, every, paths)}")
        matched.update(visible)
    return sorted(matched)


def _why_none(pattern: str, hidden: Sequence[str], paths: Sequence[str]) -> str:
    if hidden:
        example = shown(hidden[0])
        return f" but hidden ones, which a glob leaves out ({example}); name a hidden file by its whole path"
    names = [shown(path) for path in paths if not is_hidden(path)]
    if not names:
        return "; there is no file at all"
    return nearest(pattern, names) if len(names) < 40 else f" among {len(names):,} files"


def find_files(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The files under ``root`` that the paths and globs mean, sorted; of a ``root`` that is a file, itself.

    Globs leave out hidden files and folders; links are followed. A pattern that means no file adds none.
    """
    if root.is_file():
        return [root]
    paths = list_named(root, patterns)
    found: set[str] = set()
    for pattern in patterns:
        try:
            found.update(match_names(pattern, paths, str(root)))
        except SourceError:
            continue
    return [root / path for path in sorted(found)]
