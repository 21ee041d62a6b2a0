"""The provenance of a record: the versions of the code, and the processor. Needs no torch."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import stlm


@cache
def code_version() -> dict[str, str | None]:
    """The versions of STLM and torch, and the git commit of STLM's code (see :func:`commit_of`).

    Determined once a process. A long-running stage calls this when it begins, so that the commit is that of
    the running code, not of one that was checked out in the meantime.
    """
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = None
    return {"stlm": stlm.__version__, "torch": torch, "git": commit_of(Path(stlm.__file__).parent)}


@cache
def source_digest() -> str:
    """A SHA-256 of STLM's sources on disk, because a commit with changes does not identify them."""
    digest = hashlib.sha256()
    package = Path(stlm.__file__).parent
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".c", ".h")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def commit_of(package: Path, *more: str) -> str | None:
    """The commit (12 digits) of the repository that tracks the folder `package`; None if none does.

    With ``-dirty`` if the package, the workflow or a folder named in `more` differs from the commit; results,
    parameters and documents do not count. A package that was installed, or unpacked inside another project's
    repository, is not tracked: that repository's commit says nothing about it.
    """
    # Variables such as GIT_DIR, which git sets for its hooks, would name another repository.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", *arguments]
        try:
            done = subprocess.run(
                command, cwd=package.parent, env=env, capture_output=True, text=True, errors="replace"
            )
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", f"{package.name}/__init__.py") is None:
        return None
    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:  # nothing is committed yet
        return None
    changed = git("status", "--porcelain", "--", package.name, "workflow", "Snakefile", *more)
    # If git fails, the code is not known to be that of the commit.
    return commit if changed == "" else f"{commit}-dirty"


@cache
def processor_name() -> str:
    """The CPU's model name; its architecture if it has no name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "cpu model", "Model") and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine()
