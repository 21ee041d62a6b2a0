"""List the files of a folder, and match them with paths and globs."""

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
    """Whether globs skip ``path``: hidden files and folders, checkpoints, files that systems create."""
    return any(part.startswith(".") or part in _NOT_DATA for part in PurePosixPath(path).parts)


def list_files(root: Path) -> list[str]:
    """Paths of all files under ``root``, relative to it and sorted. Links are followed.

    Each folder is entered once, so that circular links end. A folder that is also reached by a link keeps its
    real name.
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
    """``list_files``, and the files that a pattern names exactly by another path, through a link."""
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
    """Add the files below ``start`` to ``found``, and linked folders, which are not entered, to ``links``."""
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


def match_names(patterns: str | Sequence[str], paths: Iterable[str], origin: str) -> list[str]:
    """The ``paths`` that match the paths and globs, sorted. Exact names precede globs and may be hidden.

    Raises `SourceError` for the first pattern without a match, and says if only hidden files match.
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
            raise SourceError(f"{origin}: no file {shown(pattern)}{_why_none(pattern, every, paths)}")
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
    """The files under ``root`` that match the paths and globs, sorted; ``root`` itself if it is a file.

    Globs skip hidden files and folders; links are followed. A pattern without a match adds nothing.
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
