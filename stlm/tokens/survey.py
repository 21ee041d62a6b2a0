"""The first pass over a corpus: which documents are kept, and in which split each goes.

The pass leaves on disk, for every row, its split, its digests, its size, and hashes of its words in sequence
(`stlm.tokens.shingles`). From these follow exact duplicates, near-duplicates, splits (`stlm.tokens.splits`)
and how much of the held-out text stands in train (`stlm.tokens.leaks`). Memory does not grow with the text:
some tens of bytes a document, and `memory_bytes` while hashes are sorted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stlm.errors import UserError
from stlm.files import disk_errors, read_json, write_json
from stlm.tokens import leaks, near_duplicates
from stlm.tokens.ahead import ahead
from stlm.tokens.raw import RawBatch, RawComponent
from stlm.tokens.shards import SPLITS
from stlm.tokens.shingles import DocumentHashes, sample, shingles, word_hashes
from stlm.tokens.splits import (
    DROPPED,
    FEW_UNITS,
    Units,
    assign,
    clusters_of,
    contiguous,
    digest,
    held_out,
    names,
)
from stlm.tokens.words import normalize_title

MEMORY = 256 << 20  # bytes, of the search for near-duplicates
_PARTITION_ROWS = 1 << 20  # about 50 MB while duplicates are looked for
_PASSAGE_BYTES = 16 << 10  # of a long text that is cut
_PASSAGES = 100  # of a shorter one
_SHORTEST_PASSAGE = 200  # bytes
_BYTES_PER_WORD = 5.5
# Files of a value or of many hashes for each row, in `folder`.
_FILES = {"splits": np.uint8, "digests": np.uint64, "keys": np.uint64, "sizes": np.uint32}
_FILES |= {"lengths": np.uint32, "sketches": np.uint64, "grams": np.uint64}


@dataclass(frozen=True)
class Survey:
    """`splits`: for each row of each component, in reading order, an index of SPLITS or DROPPED."""

    splits: np.ndarray
    rows: list[int]  # rows of each component
    counts: dict[str, int]  # read, duplicates, empty, invalid_utf8, nul, kept
    text_bytes: int
    train_bytes: list[int]  # of each component, duplicates left out
    splitting: dict[str, Any]  # how each component was split, and what was joined
    leaks: dict[str, Any]  # of val and test: shares that stand in train


def survey(
    components: Sequence[RawComponent], folder: Path, progress: bool, memory_bytes: int = MEMORY
) -> Survey:
    """Survey `components`, keeping the result in `folder`; one that is there already is read."""
    if not (folder / "survey.json").exists():
        with disk_errors(folder):
            write_json(folder / "survey.json", _survey(components, folder, progress, memory_bytes))
    record = read_json(folder / "survey.json")
    return Survey(splits=np.memmap(folder / "splits", np.uint8, mode="r"), **record)


def in_passages(components: Sequence[RawComponent]) -> list[RawComponent]:
    """The components, those of few long texts to be read in passages: hashing some books would empty a split.

    Passages are of 16 kB, or of a hundredth of a shorter text.
    """
    return [
        replace(own, cut=min(max(own.text_bytes // _PASSAGES, _SHORTEST_PASSAGE), _PASSAGE_BYTES))
        if _few(own)
        else own
        for own in components
    ]


def _few(component: RawComponent) -> bool:
    return component.declared == {0} and component.units(FEW_UNITS) < FEW_UNITS


def _survey(
    components: Sequence[RawComponent], folder: Path, progress: bool, memory_bytes: int
) -> dict[str, Any]:
    scan = _scan(components, folder, progress)
    splits_N = np.memmap(folder / "splits", np.uint8, mode="r+")
    digests_N2 = np.memmap(folder / "digests", np.uint64, mode="r").reshape(-1, 2)
    scan.counts["duplicates"] = mark_duplicates(digests_N2, splits_N)
    scan.counts["kept"] = int(np.count_nonzero(splits_N != DROPPED))
    if scan.counts["kept"] == 0:
        raise UserError(
            f"{components[0].folder}: the corpus is empty: of {scan.counts['read']} documents, "
            f"{scan.counts['empty']} are empty and {scan.counts['invalid_utf8']} are not UTF-8"
        )
    splitting = _split(components, scan, folder, splits_N, memory_bytes)
    splits_N.flush()
    grams = DocumentHashes.of_lengths(folder / "grams", _lengths(folder)[:, 1], scan.gram_rate)
    sizes_N = np.memmap(folder / "sizes", np.uint32, mode="r")
    train_bytes = [int(sizes_N[here][splits_N[here] == 0].sum()) for here in scan.slices]
    record = {
        "rows": scan.rows,
        "counts": scan.counts,
        "text_bytes": scan.text_bytes,
        "train_bytes": train_bytes,
        "splitting": splitting,
        "leaks": {"words": leaks.WORDS, "one_in": scan.gram_rate, **leaks.measure_leaks(grams, splits_N)},
    }
    for name in _FILES:
        if name != "splits":
            (folder / name).unlink()
    return record


@dataclass
class _Scan:
    """What the pass over the text counted."""

    sketch_rate: int
    gram_rate: int
    rows: list[int] = field(default_factory=list)
    text_bytes: int = 0
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("read", "duplicates", "empty", "invalid_utf8", "nul", "kept"), 0
        )
    )

    @property
    def slices(self) -> list[slice]:
        """The rows of each component."""
        return [slice(begin, end) for begin, end in pairwise(accumulate(self.rows, initial=0))]


def _rates(components: Sequence[RawComponent]) -> tuple[int, int]:
    """One in how many 5-grams is kept for near-duplicates, and of 13-grams for leaks: powers of two.

    Of 5-grams, hundreds a document are enough; of both, no more than fit the disk.
    """
    words = sum(component.text_bytes for component in components) / _BYTES_PER_WORD
    documents = max(sum(component.rows for component in components), 1)
    sketch = min(words / documents / near_duplicates.ENOUGH_HASHES, 8)
    sketch = max(sketch, words / near_duplicates.MOST_HASHES, 1)
    return _power_of_two(sketch), _power_of_two(max(words / leaks.MOST_HASHES, 1))


def _power_of_two(rate: float) -> int:
    return 1 << int(np.floor(np.log2(rate)))


def _scan(components: Sequence[RawComponent], folder: Path, progress: bool) -> _Scan:
    """Read every document once; the files of `_FILES` have a value or more for each."""
    sketch_rate, gram_rate = _rates(components)
    scan = _Scan(sketch_rate, gram_rate)
    total = sum(component.text_bytes for component in components)
    workers = len(os.sched_getaffinity(0))
    with (
        ExitStack() as stack,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, desc="survey", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _FILES}
        for component in components:
            before = scan.counts["read"]
            numbered = _numbered(component)
            tasks = (
                pool.submit(_read_batch, component, first, batch, sketch_rate, gram_rate)
                for first, batch in numbered
            )
            for task in ahead(tasks, workers + 1):
                read = task.result()
                for name, own in read.arrays.items():
                    files[name].write(np.ascontiguousarray(own, _FILES[name]))
                for name, number in read.counts.items():
                    scan.counts[name] += number
                scan.text_bytes += read.text_bytes
                bar.update(read.text_bytes)
            scan.rows.append(scan.counts["read"] - before)
    if scan.counts["read"] == 0:
        raise UserError(f"{components[0].folder}: the corpus is empty: no document in {components[0].files}")
    return scan


def _numbered(component: RawComponent) -> Iterator[tuple[int, RawBatch]]:
    first = 0
    for batch in component.batches():
        yield first, batch
        first += len(batch.texts)


@dataclass
class _Read:
    """A batch's part of each file, and its counts."""

    arrays: dict[str, Any]
    counts: dict[str, int]
    text_bytes: int


def _read_batch(
    component: RawComponent, first: int, batch: RawBatch, sketch_rate: int, gram_rate: int
) -> _Read:
    counts = {"read": len(batch.texts), "empty": 0, "invalid_utf8": 0, "nul": 0}
    splits, digests, keys, sizes, lengths = [], [], [], [], []
    sketches, grams = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for row, (text, group, split) in enumerate(
        zip(batch.texts, batch.groups, batch.splits, strict=True), first
    ):
        kept = _usable(text, counts)
        splits.append(split if kept else DROPPED)
        # A line or a passage that comes again in a text is a part of it, not a copy.
        is_part = component.pieces or component.cut
        own = digest(b"%d %b" % (row, text or b"") if is_part else text or b"")
        digests.append(own)
        keys.append(_unit_digest(component, group, own)[:8])
        sizes.append(len(text or b""))
        words = word_hashes(text if kept else b"")
        sketch = np.unique(sample(shingles(words, near_duplicates.WORDS), sketch_rate))
        gram = sample(shingles(words, leaks.WORDS), gram_rate)
        lengths.append((len(sketch), len(gram)))
        sketches.append(sketch)
        grams.append(gram)
    arrays = {
        "splits": splits,
        "digests": np.frombuffer(b"".join(digests), np.uint64),
        "keys": np.frombuffer(b"".join(keys), np.uint64),
        "sizes": sizes,
        "lengths": lengths,
        "sketches": np.concatenate(sketches),
        "grams": np.concatenate(grams),
    }
    return _Read(arrays, counts, sum(sizes))


def _unit_digest(component: RawComponent, group: bytes | None, own: bytes) -> bytes:
    """What tells units apart: the group, else the document. Passages have their text's number as a group."""
    if group is None:
        return own
    return digest(group if component.pieces else normalize_title(group))


def _usable(text: bytes | None, counts: dict[str, int]) -> bool:
    """Whether a document is kept. NUL is a character like any other: kept, and counted."""
    try:
        content = (text or b"").decode()
    except UnicodeDecodeError:  # so are lone surrogates, which UTF-8 has no bytes for
        counts["invalid_utf8"] += 1
        return False
    if not content or content.isspace():
        counts["empty"] += 1
        return False
    counts["nul"] += "\0" in content
    return True


def mark_duplicates(digests_N2: np.ndarray, splits_N: np.ndarray, partition: int = _PARTITION_ROWS) -> int:
    """Set every repeat of a kept row to DROPPED, in place; how many. Exact, in bounded memory.

    Of equal rows, one that is declared test stays before one of val, and that before one of train: what is
    held out is not trained on. Among the others the earliest stays.
    """
    parts = -(-len(splits_N) // partition)
    found = 0
    for part in range(parts):
        mine = []
        for start in range(0, len(splits_N), partition):
            here = slice(start, start + partition)
            chosen = (digests_N2[here, 0] % np.uint64(parts) == part) & (splits_N[here] != DROPPED)
            mine.append(start + np.flatnonzero(chosen))
        rows = np.concatenate(mine)
        rows = rows[np.argsort(-splits_N[rows].astype(np.int8), kind="stable")]
        keys = digests_N2[rows]
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the first stays the first
        keys = keys[order]
        repeats = order[1:][(keys[1:] == keys[:-1]).all(axis=1)]
        splits_N[rows[repeats]] = DROPPED
        found += len(repeats)
    return found


def _lengths(folder: Path) -> np.ndarray:
    """[rows, 2]: how many hashes of 5 and of 13 words each row has."""
    return np.memmap(folder / "lengths", np.uint32, mode="r").reshape(-1, 2)


def _split(
    components: Sequence[RawComponent], scan: _Scan, folder: Path, splits_N: np.ndarray, memory_bytes: int
) -> dict[str, Any]:
    """Turn declared splits into final ones, in place; what was done, by component."""
    keys_N = np.memmap(folder / "keys", np.uint64, mode="r")
    sizes_N = np.memmap(folder / "sizes", np.uint32, mode="r")
    sketches = DocumentHashes.of_lengths(folder / "sketches", _lengths(folder)[:, 0], scan.sketch_rate)
    plans = [_Plan.of(own) for own in components]
    kept_N = splits_N != DROPPED
    units = []
    of_row_N = np.full(len(splits_N), -1, np.int64)
    first = 0
    for component, plan, here in zip(components, plans, scan.slices, strict=True):
        grouped = component.group is not None or component.cut > 0
        own = Units.of(keys_N[here], np.where(kept_N[here], sizes_N[here], 0), grouped)
        units.append(own)
        if plan.by == "hash":
            free = kept_N[here] & (splits_N[here] == 0)
            of_row_N[here] = np.where(free, first + own.of_row, -1)
        first += len(own.keys)
    links = near_duplicates.linked(sketches, of_row_N, memory_bytes)
    clusters = clusters_of(units, links)
    assigned = assign(units, clusters, [plan.shares for plan in plans])
    described = {}
    first = 0
    for component, plan, own, split, here in zip(
        components, plans, units, assigned, scan.slices, strict=True
    ):
        rows = splits_N[here]
        if plan.by == "contiguous":
            rows[rows != DROPPED] = contiguous(own, np.where(kept_N[here], sizes_N[here], 0))[rows != DROPPED]
        elif plan.by == "hash":
            free = rows == 0
            rows[free] = split[own.of_row[free]]
        described[component.name] = {
            **plan.described(component),
            "units": len(own.keys),
            **clusters.counts(first, first + len(own.keys)),
            "splits": _sizes(rows, own.of_row, sizes_N[here]),
        }
        _check_splits(component, plan, rows)
        first += len(own.keys)
    return {
        "near_duplicate_pairs": len(links),
        "components": described,
    }


@dataclass(frozen=True)
class _Plan:
    """How a component is split: as declared, by hash, or few long texts by place."""

    by: str
    declared: frozenset[int]
    shares: tuple[float, float]

    @classmethod
    def of(cls, component: RawComponent) -> _Plan:
        declared = component.declared
        if 0 not in declared:
            raise UserError(
                f"{component.folder}: no train split: the source declares {names(declared)} alone; to train "
                "on one of them, name its files under `train` in params/corpora.yaml"
            )
        missing = {1, 2} - declared
        if component.cut:
            return cls("contiguous", declared, (0.0, 0.0))
        share = held_out(component.group is not None, component.rows)
        shares = (share if 1 in missing else 0.0, share if 2 in missing else 0.0)
        return cls("hash" if missing else "declared", declared, shares)

    def described(self, component: RawComponent) -> dict[str, Any]:
        grouped = component.group is not None
        return {
            "by": self.by,
            "declared": [SPLITS[index] for index in sorted(self.declared)],
            "unit": "file" if component.pieces else component.group if grouped else "document",
        }


def _sizes(rows: np.ndarray, units: np.ndarray, sizes: np.ndarray) -> dict[str, dict[str, int]]:
    """Of each split: documents, units, and bytes of text."""
    found = {}
    for index, name in enumerate(SPLITS):
        here = rows == index
        found[name] = {
            "documents": int(here.sum()),
            "units": len(np.unique(units[here])),
            "bytes": int(sizes[here].sum(dtype=np.int64)),
        }
    return found


def _check_splits(component: RawComponent, plan: _Plan, rows: np.ndarray) -> None:
    for index, split in enumerate(SPLITS):
        if not np.any(rows == index):
            kept = int(np.count_nonzero(rows != DROPPED))
            how = {
                "hash": "split by hash of its "
                + (f"groups (column {component.group!r})" if component.group else "documents"),
                "contiguous": f"split in contiguous parts of passages of {component.cut} bytes",
                "declared": "as the source declares it",
            }[plan.by]
            raise UserError(
                f"corpus {component.name!r}: split {split!r} has no documents: {kept} kept, {how}; "
                "use a corpus with more text"
            )
