"""Atomic writes: a file or folder is complete, or as it was before. Records: JSON with a checksum.

Each write goes to a temporary file next to its target, is flushed to the disk and renamed. A failure of the
disk (full, read-only, not permitted) becomes a :class:`~stlm.errors.UserError` that names the path, and
leaves nothing half-written.

A *record* is a JSON object with a key `checksum`: the SHA-256 of the rest, and of other files of its folder.
Reading compares it. It covers the content and not the bytes: neither git's line ends nor indentation change
it. Files of earlier versions have no checksum, and are read as they are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stlm.errors import UserError, shortened
from stlm.remedy import next_command, remedy

Record = TypeVar("Record", bound=BaseModel)

CHECKSUM = "checksum"
_TEXTS = (".csv", ".md")  # git may change their line ends

_DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk; free some and run again",
    errno.EDQUOT: "the disk quota is used up; free some and run again",
    errno.EFBIG: "the file grew past the size limit set for this process",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EIO: "the disk reported an input/output error",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file stands where a folder should be",
    errno.EISDIR: "a folder stands where the file should be",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into a ``UserError`` that names ``path``; other errors pass through.

    For a copied tree, whose errors are collected, the first one is reported.
    """
    try:
        yield
    except OSError as error:
        reason = _first_cause(error) if isinstance(error, shutil.Error) else _DISK_ERRORS.get(error.errno)
        if reason is None:
            raise
        raise UserError(f"{path}: cannot write: {reason}. Nothing was half-written.") from error


def _first_cause(error: shutil.Error) -> str:
    """The first of the errors (source, target, why) that `copytree` collects; others are a text."""
    if error.args and isinstance(error.args[0], list) and error.args[0]:
        source, _, why = error.args[0][0]
        return f"{source} could not be copied ({why})"
    return str(error)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` on success, remove it on any error."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(descriptor)
        # mkstemp makes files private; set the permissions that a plain open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        temporary = Path(name)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``path``; it replaces ``path``, or is removed on any error."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            replace_directory(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(source: Path, target: Path) -> None:
    """Rename the folder ``source`` to ``target``; an existing target is removed after that."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        os.replace(target, old / "content")
    os.replace(source, target)
    _fsync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove temporary files of killed atomic writes to `name` (default: anything) in `folder`."""
    for suffix in ("partial", "old"):
        for left in folder.glob(f".{name}.*.{suffix}"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON with a final newline, atomically. NaN and infinity are rejected."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_record(
    path: Path, content: Mapping[str, Any], lists: Iterable[str] = (), files: Mapping[str, str] | None = None
) -> None:
    """Write a JSON object with its checksum, atomically; `lists` names files of its folder to list in it.

    `files` are other files to list: name -> SHA-256, as returned by `content_sha256`.
    """
    assert CHECKSUM not in content
    listed = {**{name: content_sha256(Path(path).parent / name) for name in lists}, **(files or {})}
    # In the form in which it will be read: keys are texts, tuples are lists.
    as_read = json.loads(json.dumps(content, allow_nan=False))
    checksum = {"sha256": _digest(as_read, listed), **({"files": listed} if listed else {})}
    write_json(path, {**content, CHECKSUM: checksum})


def read_json(path: Path) -> Any:
    """Read a JSON file that a stage wrote, without its checksum. Raises `UserError` if it is damaged.

    NaN and infinity are rejected, as in `write_json`.
    """
    return _read_checked(path)[0]


def recorded_files(path: Path) -> dict[str, str]:
    """The files that a record lists: name -> SHA-256. Empty for a record of an earlier version."""
    return _read_checked(path)[1]


def record_sha256(path: Path) -> str:
    """The SHA-256 of a record's content, with or without a checksum."""
    content, _ = _read_checked(path)
    return _digest(content, {})


def _read_checked(path: Path) -> tuple[Any, dict[str, str]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
        found = _checksum(content)
        if found is None:
            return content, {}
        files = found.get("files", {})
        digest = _digest(content, files)
    except FileNotFoundError:
        command = next_command(path) or "the stage that writes it has not run"
        raise UserError(f"{path}: no such file; {command}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {remedy(path)}") from None
    if digest != found.get("sha256"):
        differs = differing(digest, found["sha256"]) if found else f"its key {CHECKSUM!r} is damaged"
        raise UserError(f"{path}: damaged, or changed by hand: {differs}; {remedy(path)}")
    return content, files


def _checksum(content: Any) -> dict[str, Any] | None:
    """Take the checksum out of a record; None if it has none, empty if it is damaged."""
    if not isinstance(content, dict) or not content:
        return None
    if CHECKSUM not in content:
        # A letter of the key may have changed; without this check the rest would pass as an earlier version.
        return {} if _is_checksum(content[next(reversed(content))]) else None
    value = content.pop(CHECKSUM)
    return value if _is_checksum(value) else {}


def _is_checksum(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= {"sha256", "files"}
        and isinstance(value.get("sha256"), str)
        and isinstance(value.get("files", {}), dict)
    )


def _digest(content: Any, files: Mapping[str, str]) -> str:
    """The SHA-256 of a record's content and of its list of files."""
    text = json.dumps([content, files] if files else content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a JSON file that a stage wrote, with the keys of ``kind``; the error names a wrong key."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole file"
        raise UserError(
            f"{path}: not what its stage writes ({key}: {first['msg']}); {remedy(path)}"
        ) from None


def fingerprint(content: Mapping[str, Any]) -> str:
    """A hash of everything a result depends on: a result with another fingerprint is not reused."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. `UserError` if it exists and cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None


def differing(found: str, expected: str) -> str:
    """Two SHA-256 for a message, shortened so that they still differ."""
    shown = 12 if found[:12] != expected[:12] else max(len(found), len(expected))
    return f"its SHA-256 is {found[:shown]}, expected {expected[:shown]}"


def content_sha256(path: Path) -> str:
    """The SHA-256 of a file; for texts that git may keep (CSV, Markdown), independent of line ends."""
    path = Path(path)
    if path.suffix not in _TEXTS:
        return sha256(path)
    try:
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> UserError:
    """The exception to raise after reading ``path`` failed with ``error``."""
    return UserError(f"{path}: cannot be read: {reason(error)}")


def of_the_machine(error: Exception) -> str | None:
    """The message for an error that the system raised, not the program; None for any other.

    The message names the file, if there is one. An OSError without an errno comes from a library.
    """
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename or error.filename2
        if name is None:
            writing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
            return f"{'the output cannot be written: ' if writing else ''}{reason(error)}"
        return f"{shortened(os.fsdecode(name), 200)}: {reason(error)}"
    message = str(error)
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in message
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory):
        asked = f" ({shortened(message.splitlines()[0], 200)})" if message else ""
        return f"not enough memory{asked}; choose smaller numbers: of the model, its batches or its context"
    return None


def reason(error: OSError) -> str:
    """The reason for which the system refused, in words."""
    return _DISK_ERRORS.get(error.errno) or error.strerror or str(error)
