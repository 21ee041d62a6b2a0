"""The first pass over a corpus: which documents are kept, and in which split each goes.

The pass over the text (`stlm.tokens.scan`) leaves on disk, for every row, its declared split, its digests,
its size, and hashes of its words in sequence. From these follow exact duplicates, near-duplicates, the splits
(`stlm.tokens.splits`) and how much of the held-out text stands in train (`stlm.tokens.leaks`). Memory does
not grow with the text: some tens of bytes a document, and `memory_bytes` while hashes are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stlm.errors import UserError
from stlm.files import disk_errors, read_json, write_json
from stlm.tokens import leaks, near_duplicates
from stlm.tokens.raw import RawComponent
from stlm.tokens.scan import FILES, Scan, scan_text
from stlm.tokens.shards import SPLITS
from stlm.tokens.shingles import DocumentHashes
from stlm.tokens.splits import (
    DROPPED,
    FEW_UNITS,
    Units,
    assign,
    clusters_of,
    contiguous,
    held_out,
    names,
)

MEMORY = 256 << 20  # bytes, of the search for near-duplicates
_PARTITION_ROWS = 1 << 20  # about 50 MB while duplicates are looked for
_PASSAGE_BYTES = 16 << 10  # of a long text that is cut
_PASSAGES = 100  # of a shorter one
_SHORTEST_PASSAGE = 200  # bytes


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
    scan = scan_text(components, folder, progress)
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
    for name in FILES:
        if name != "splits":
            (folder / name).unlink()
    return record


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
    components: Sequence[RawComponent], scan: Scan, folder: Path, splits_N: np.ndarray, memory_bytes: int
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
