"""Finds the files that a user names, the splits that they declare, and the column that holds the text."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from stlm.corpora.compression import split_compression
from stlm.corpora.encodings import detect_encoding, open_text
from stlm.corpora.finding import is_hidden, list_files, match_names
from stlm.corpora.formats import SUFFIXES, DataFile, Tally, known_suffix
from stlm.corpora.tables import column_type, is_text, table_schema
from stlm.errors import UserError, nearest

# Words in the name of a file or folder that declare a split -> the output.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_GLOB = re.compile(r"[*?\[]")
TABLES = ("parquet", "arrow")
_LISTED = 50  # files of a split that are listed by name


@dataclass(frozen=True)
class Sources:
    """`root`: the folder that contains all files; `patterns`: output -> paths and globs below it.

    `files` are those that match the patterns; `unknown` counts unknown suffixes; `hidden` counts the files
    that globs skip; `unmarked` counts the files that declare no split although others do: they go to train.
    """

    root: Path
    patterns: Mapping[str, tuple[str, ...]]
    files: Mapping[str, tuple[Path, ...]]
    unknown: Counter[str]
    hidden: int
    unmarked: int

    @property
    def all_files(self) -> list[Path]:
        """The files of all splits."""
        return [path for paths in self.files.values() for path in paths]


def find_sources(paths: Sequence[str]) -> Sources:
    """The files that `--text PATH...` names: files, folders, globs. Raises UserError if there is no text."""
    starts = [_start(Path(os.path.expanduser(path))) for path in paths]
    root = Path(os.path.commonpath([base for base, _ in starts]))
    if len(starts) > 1 and (root == root.parent or root in (Path.home(), Path.home().parent)):
        raise UserError(
            f"--text: the folders lie far apart, all that they have in common is {root}; put them, "
            "or links to them, into one folder and name that"
        )
    unknown: Counter[str] = Counter()
    by_pattern: dict[str, list[str]] = {}
    hidden = 0
    for base, pattern in starts:
        inside = base.relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        if pattern is not None and (base / pattern).exists():
            DataFile.of(base / pattern)  # names a suffix that is unknown
            by_pattern.setdefault(prefix + pattern, []).append(prefix + pattern)
            continue
        below = list_files(base)
        if pattern is None:
            chosen = [path for path in below if not is_hidden(path)]
            hidden += len(below) - len(chosen)
        else:
            chosen = match_names(pattern, below, f"--text {base}")
        known = [path for path in chosen if known_suffix(Path(path)) is not None]
        unknown.update(Path(path).suffix or "none" for path in chosen if known_suffix(Path(path)) is None)
        for path in known:
            if pattern is None:
                matching = _glob_for(prefix, path)
            else:
                # A glob that also matches unknown suffixes is narrowed to the known files.
                matching = prefix + (pattern if len(known) == len(chosen) else path)
            by_pattern.setdefault(matching, []).append(prefix + path)
    if not by_pattern:
        found = ", ".join(f"{count:,} with suffix {name}" for name, count in unknown.most_common(5))
        raise UserError(
            f"--text {' '.join(paths)}: no file of a known format ({', '.join(SUFFIXES)}, plain or "
            f"compressed); found {found or 'no file at all'}"
        )
    patterns, files, unmarked = _splits(by_pattern)
    outputs = {out: tuple(root / path for path in names) for out, names in files.items()}
    return Sources(root, patterns, outputs, unknown, hidden, unmarked)


def _start(path: Path) -> tuple[Path, str | None]:
    """An absolute folder, and the file or glob below it; None for everything in the folder."""
    if path.is_dir():
        return Path(os.path.abspath(path)), None
    if path.exists():
        return Path(os.path.abspath(path.parent)), path.name
    if not _GLOB.search(str(path)):
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if len(siblings) < _LISTED else ""
        raise UserError(f"--text {path}: no such file or folder{hint}")
    parts = Path(os.path.abspath(path)).parts
    first = next(number for number, part in enumerate(parts) if _GLOB.search(part))
    base = Path(*parts[:first])
    if not base.is_dir():
        raise UserError(f"--text {path}: {base} is no folder")
    return base, "/".join(parts[first:])


def _glob_for(prefix: str, path: str) -> str:
    """The glob for files with the suffixes of `path` in a folder: `**/*.jsonl.gz`."""
    name = path.rpartition("/")[2]
    suffixes = Path(name).suffixes[-2:] if known_suffix(Path(Path(name).stem)) else Path(name).suffixes[-1:]
    return f"{glob.escape(prefix)}**/*{glob.escape(''.join(suffixes))}"


def split_of(path: str) -> str | None:
    """The split that a file's name or folder declares: `wiki.valid.txt`, `test/a.txt`, `train-1.csv`."""
    *folders, name = path.lower().split("/")
    stem = split_compression(name)[0].rpartition(".")[0]
    parts = re.split(r"[-_.]", stem)
    # Only at an end of the name: a book with "test" in its title is not held out.
    for word in (parts[0], parts[-1], *reversed(folders)):
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    return None


def _splits(
    by_pattern: Mapping[str, list[str]],
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]], int]:
    """Patterns and files by split; and the number of files that declare none although others do."""
    every = sorted({path for paths in by_pattern.values() for path in paths})
    declared = {path: split_of(path) for path in every}
    if not {"val", "test"} & set(declared.values()):
        return {"train": tuple(by_pattern)}, {"train": tuple(every)}, 0
    outputs: dict[str, list[str]] = {}
    for path in every:
        outputs.setdefault(declared[path] or "train", []).append(path)
    if "train" not in outputs:
        # Only held-out files: they are text like any other.
        return {"train": tuple(by_pattern)}, {"train": tuple(every)}, 0
    # A file of val or test is not part of train, even if a glob of train matches it. The globs also match
    # files that are added later.
    mine = set(outputs["train"])
    patterns = {
        "train": tuple(pattern for pattern, matched in by_pattern.items() if mine.intersection(matched))
    }
    patterns |= {split: _patterns(outputs[split], every) for split in ("val", "test") if split in outputs}
    unmarked = sum(split is None for split in declared.values())
    return patterns, {split: tuple(outputs[split]) for split in patterns}, unmarked


def _patterns(names: Sequence[str], every: Sequence[str]) -> tuple[str, ...]:
    """The names of few files; for many the globs of their folders, if these match exactly the same files."""
    if len(names) > _LISTED:
        globs = dict.fromkeys(_glob_for(f"{path.rpartition('/')[0]}/", path) for path in names if "/" in path)
        if globs and match_names(tuple(globs), every, "splits") == sorted(names):
            return tuple(globs)
    return tuple(names)


def text_column(files: Sequence[Path], wanted: str | None) -> tuple[str, str]:
    """(the column that holds the text, a note about it); `text` if no file has columns."""
    columns = _columns(files)
    if not columns:
        return wanted or "text", ""
    named = ", ".join(f"{name} ({length:,.0f} characters)" for name, length in columns.items())
    if wanted:
        if wanted.partition(".")[0] not in columns and wanted not in columns:
            raise UserError(f"--column {wanted}: no column of text has this name{nearest(wanted, columns)}")
        return wanted, f"text is taken from the column {wanted!r}, of {named}"
    chosen = "text" if "text" in columns else max(columns, key=lambda name: columns[name])
    why = {True: "", False: ", the longest" if len(columns) > 1 else ", the only one"}[chosen == "text"]
    return chosen, f"text is taken from the column {chosen!r}{why} (columns of text, by mean length: {named})"


def _text_columns(schema: pa.Schema, file: DataFile) -> list[str]:
    """The columns of strings, without names that occur several times."""
    names = [name for name in schema.names if schema.names.count(name) == 1]
    found = [name for name in names if is_text(column_type(schema, name, file.name))]
    if not found:
        raise UserError(f"{file.name}: no column holds text; found {', '.join(schema.names) or 'none'}")
    return found


def _header(path: Path, kind: str) -> list[str]:
    """The columns of a CSV file: its first line, split by the delimiter that gives most columns."""
    with open_text(path, detect_encoding(path), newline="") as text:
        first = text.readline()
    cuts = [
        next(csv.reader([first], delimiter=delimiter), [])
        for delimiter in ("\t" if kind == "tsv" else ",;\t")
    ]
    names = max(cuts, key=len)
    return [name for name in names if names.count(name) == 1]


def _columns(files: Sequence[Path], rows: int = 200) -> dict[str, float]:
    """The text columns of the first file of each format: name -> mean characters in the first rows."""
    first: dict[str, Path] = {}
    for path in files:
        kind = known_suffix(path)
        if kind and kind != "text" and path.stat().st_size:
            first.setdefault(kind, path)
    lengths: dict[str, list[int]] = {}
    for kind, path in first.items():
        file = DataFile.of(path)
        names = []
        if kind in TABLES:
            names = _text_columns(table_schema(path, kind, file.name), file)
        elif kind in ("csv", "tsv"):
            names = _header(path, kind)
        found = 0
        for _, row in islice(file.rows(names, Tally()), rows):
            for name, value in row.items():
                if isinstance(value, str):
                    lengths.setdefault(name, []).append(len(value))
            found += 1
        if found and not lengths:
            raise UserError(f"{file.name}: no column holds text; found {', '.join(row) or 'no column'}")
    means = {name: sum(values) / max(len(values), 1) for name, values in lengths.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))
