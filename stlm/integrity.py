"""Detects damage: files are compared with the SHA-256 that was recorded when they were written or fetched.

There are three kinds of files, by the place of their SHA-256 (docs/integrity.md):

- listed in a record (a folder's meta.json or source.json, a run's train.json): `check_files`, `check_listed`;
- *sealed*: files of .state/ and other single files, which end with their SHA-256 (`seal`);
- records themselves (`stlm.files.write_record`), which `read_json` checks.

Every reader checks the whole file first. A small file is hashed every time; a large one once after each
change and once a week: its digest is kept in .state/ together with its `stat`. It has to be renewed because a
disk that loses a bit changes no time stamp.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stlm.errors import UserError
from stlm.files import content_sha256, differing, read_json, recorded_files, sha256, write_record
from stlm.remedy import next_command, remedy

CACHE = Path(".state/checked.json")
LARGE = 16 << 20  # bytes; larger files are not hashed every time (16 MB take some 10 ms)
TRUSTED = 7 * 24 * 3600.0  # seconds
# A file changed this recently (seconds) may change again within one tick of its file system's clock.
_SETTLED = 2.0
_UNREADABLE = "unreadable"
_SEAL = b"stlm-sha"
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size


class Digests:
    """SHA-256 of files, cached in a JSON file so that unchanged files are not read again.

    A digest is valid for `trusted` seconds; None: for ever.
    """

    def __init__(self, path: Path, trusted: float | None = None) -> None:
        self._path, self._trusted = path, trusted
        self._changed = False
        try:
            kept = read_json(path)
        except UserError:
            kept = {}  # the file only saves time
        self._kept: dict[str, Any] = kept if isinstance(kept, dict) else {}

    def sha256(self, file: Path) -> str | None:
        """The SHA-256 of ``file``; None if it does not exist, `unreadable` if it cannot be read."""
        key = os.path.abspath(file)
        try:
            before = _state(os.stat(key))
            if (kept := self._known(key, before)) is not None:
                return kept
            digest = sha256(file)
            after = os.stat(key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UserError):
            return _UNREADABLE
        now = time.time()
        if _state(after) == before and now - max(after.st_ctime, after.st_mtime) > _SETTLED:
            self._kept[key] = [*before, int(now), digest]
            self._changed = True
        return digest

    def _known(self, key: str, state: list[int]) -> str | None:
        """The cached digest of a file in that `state`, unless it is too old."""
        match self._kept.get(key):
            case [*kept, int(when), str(digest)] if kept == state:
                if self._trusted is None or 0 <= time.time() - when < self._trusted:
                    return digest
        return None

    def save(self) -> None:
        """Write the cache, if it has changed."""
        if not self._changed:
            return
        self._changed = False
        with suppress(UserError):  # the project is read-only: computed again next time
            write_record(self._path, self._kept)


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


class Listed(NamedTuple):
    """A file and its entry in a record; `size` in bytes, None if the record has none."""

    path: Path
    sha256: str
    size: int | None = None


def check_files(files: Iterable[Listed], cache: Path = CACHE) -> None:
    """Compare files with their records.

    Raises `UserError` for the first file that is missing, truncated or changed, with the command to run.
    """
    digests = None
    try:
        for file in files:
            size = _size(file.path)
            if file.size is not None and size != file.size:
                what = "truncated" if size < file.size else "changed"
                raise UserError(
                    f"{file.path}: {what}: {size:,} bytes, expected {file.size:,}; {remedy(file.path)}"
                )
            if size >= LARGE:
                digests = digests or Digests(cache, TRUSTED)
                if digests.sha256(file.path) == file.sha256:
                    continue
            # Also if the cached digest differs: the cache may be damaged.
            _compare(file.path, content_sha256(file.path), file.sha256)
    finally:
        if digests is not None:
            digests.save()


def check_listed(record: Path, *names: str) -> None:
    """Compare files in the folder of a record with its list. Unlisted files, or no record at all, pass.

    Raises `UserError` as `check_files` does, and if the record is damaged.
    """
    if not record.is_file():
        return
    listed = recorded_files(record)
    check_files(Listed(record.parent / name, listed[name]) for name in names if name in listed)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        command = next_command(path) or "make it again"
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        )
        raise UserError(f"{path}: {reason}; {command}") from None


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{path}: damaged, or changed by hand: {differing(found, expected)}; {remedy(path)}")


def seal(path: Path) -> None:
    """Append the SHA-256 of a file to it. Readers of formats with a known length ignore it."""
    digest = bytes.fromhex(sha256(path))
    with path.open("ab") as file:
        file.write(_SEAL + digest)


def check_seal(path: Path) -> None:
    """Raise `UserError` for a file that has changed since it was sealed, or has no seal."""
    size = _size(path) - _SEAL_BYTES
    with path.open("rb") as file:
        digest, left = hashlib.sha256(), size
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        end = file.read()
    if size < 0 or not end.startswith(_SEAL):
        raise UserError(
            f"{path}: damaged: no SHA-256 at its end: it is truncated, or of an earlier version of STLM; "
            f"{remedy(path)}"
        )
    _compare(path, digest.hexdigest(), end.removeprefix(_SEAL).hex())
