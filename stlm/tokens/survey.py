"""The first pass over a corpus: which documents are kept, and the split of each.

The pass over the text (`stlm.tokens.scan`) writes to disk, for every row, its declared split, digests, size,
and hashes of its word n-grams. From these the survey computes exact duplicates, near-duplicates, the
splits (`stlm.tokens.splits`) and how much of the held-out text is in train (`stlm.tokens.leaks`). Memory does
not grow with the text: about a hundred bytes a document, and `memory_bytes` while hashes are sorted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stlm.errors import UserError
from stlm.files import disk_errors, read_json, write_record
from stlm.tokens import leaks, near_duplicates
from stlm.tokens.near_duplicates import Clusters
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

MEMORY = 256 << 20  # bytes for the search for near-duplicates
_PARTITION_ROWS = 1 << 20  # about 50 MB during the search for duplicates
_PASSAGE_BYTES = 16 << 10  # of a passage of a long text
_PASSAGES = 50  # number of passages of a shorter text
_SHORTEST_PASSAGE = 200  # bytes
_FEWEST_PASSAGES = 20


@dataclass(frozen=True)
class Survey:
    """`splits`: for each row of each component, in reading order, an index of SPLITS or DROPPED."""

    splits: np.ndarray
    rows: list[int]  # rows of each component
    counts: dict[str, int]  # read, duplicates, empty, invalid_utf8, nul, kept
    text_bytes: int
    train_bytes: list[int]  # of each component, without duplicates
    splitting: dict[str, Any]  # how each component was split, and what was joined
    leaks: dict[str, Any]  # of val and test: the shares that are in train


def survey(
    components: Sequence[RawComponent], folder: Path, progress: bool, memory_bytes: int = MEMORY
) -> Survey:
    """Survey `components` and keep the result in `folder`; an existing result is read."""
    if not (folder / "survey.json").exists():
        with disk_errors(folder):
            write_record(
                folder / "survey.json", _survey(components, folder, progress, memory_bytes), lists=["splits"]
            )
    record = read_json(folder / "survey.json")
    return Survey(splits=np.memmap(folder / "splits", np.uint8, mode="r"), **record)


def in_passages(components: Sequence[RawComponent]) -> list[RawComponent]:
    """The components; those with few long texts are read in passages, because hashing could empty a split.

    Passages have 16 kB, or a fiftieth of a shorter text.
    """
    return [replace(component, cut=_passage_bytes(component)) for component in components]


def _passage_bytes(component: RawComponent) -> int:
    """Bytes of a passage; 0 if texts are not cut."""
    declared = component.declared
    units = component.train_units(FEW_UNITS)
    if 0 not in declared or declared == {0, 1, 2} or units == FEW_UNITS:
        return 0
    mean = component.train_bytes // max(units, 1)
    if mean < _SHORTEST_PASSAGE * _FEWEST_PASSAGES:
        return 0
    return min(max(mean // _PASSAGES, _SHORTEST_PASSAGE), _PASSAGE_BYTES)


def _survey(
    components: Sequence[RawComponent], folder: Path, progress: bool, memory_bytes: int
) -> dict[str, Any]:
    scan = scan_text(components, folder, progress)
    splits_N = np.memmap(folder / "splits", np.uint8, mode="r+")
    digests_N2 = np.memmap(folder / "digests", np.uint64, mode="r").reshape(-1, 2)
    usable = [int(np.count_nonzero(splits_N[span] != DROPPED)) for span in scan.slices]
    scan.counts["duplicates"] = mark_duplicates(digests_N2, splits_N)
    scan.counts["kept"] = int(np.count_nonzero(splits_N != DROPPED))
    if scan.counts["kept"] == 0:
        raise UserError(
            f"{components[0].folder}: the corpus is empty: of {scan.counts['read']} documents, "
            f"{scan.counts['empty']} are empty and {scan.counts['invalid_utf8']} are not UTF-8"
        )
    splitting = _split(components, scan, folder, splits_N, memory_bytes)
    splits_N.flush()
    for component, rows, span in zip(components, usable, scan.slices, strict=True):
        kept = int(np.count_nonzero(splits_N[span] != DROPPED))
        splitting["components"][component.name] |= {"documents": rows, "duplicates": rows - kept}
    grams = DocumentHashes.of_lengths(folder / "grams", _lengths(folder)[:, 1], scan.gram_rate)
    sizes_N = np.memmap(folder / "sizes", np.uint32, mode="r")
    train_bytes = [int(sizes_N[span][splits_N[span] == 0].sum()) for span in scan.slices]
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
    """Set every repeat of a kept row to DROPPED, in place; returns how many. Exact, in bounded memory.

    Among equal rows, one that is declared test is kept rather than one of val, and one of val rather than one
    of train: held-out text is not trained on. Otherwise the earliest is kept.
    """
    parts = -(-len(splits_N) // partition)
    found = 0
    for part in range(parts):
        mine = []
        for start in range(0, len(splits_N), partition):
            span = slice(start, start + partition)
            chosen = (digests_N2[span, 0] % np.uint64(parts) == part) & (splits_N[span] != DROPPED)
            mine.append(start + np.flatnonzero(chosen))
        rows = np.concatenate(mine)
        rows = rows[np.argsort(-splits_N[rows].astype(np.int8), kind="stable")]
        keys = digests_N2[rows]
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: keeps the order of equal rows
        keys = keys[order]
        repeats = order[1:][(keys[1:] == keys[:-1]).all(axis=1)]
        splits_N[rows[repeats]] = DROPPED
        found += len(repeats)
    return found


def _lengths(folder: Path) -> np.ndarray:
    """[rows, 2]: the number of hashes of 5 and of 13 words of each row."""
    return np.memmap(folder / "lengths", np.uint32, mode="r").reshape(-1, 2)


def _split(
    components: Sequence[RawComponent], scan: Scan, folder: Path, splits_N: np.ndarray, memory_bytes: int
) -> dict[str, Any]:
    """Turn declared splits into final ones, in place; returns a description for each component."""
    keys_N = np.memmap(folder / "keys", np.uint64, mode="r")
    sizes_N = np.memmap(folder / "sizes", np.uint32, mode="r")
    sketches = DocumentHashes.of_lengths(folder / "sketches", _lengths(folder)[:, 0], scan.sketch_rate)
    plans = [
        _Plan.of(component, span, splits_N) for component, span in zip(components, scan.slices, strict=True)
    ]
    units = []
    of_row_N = np.full(len(splits_N), -1, np.int64)
    first = 0
    for plan in plans:
        unit_set = Units.of(keys_N[plan.free], sizes_N[plan.free], plan.grouped)
        units.append(unit_set)
        if plan.by == "hash":
            of_row_N[plan.free] = first + unit_set.of_row
        first += len(unit_set.keys)
    links = near_duplicates.linked(sketches, of_row_N, memory_bytes)
    clusters, assigned, least = _assigned(plans, units, links)
    described = {}
    first = 0
    for plan, unit_set, split, span in zip(plans, units, assigned, scan.slices, strict=True):
        if plan.by == "contiguous":
            splits_N[plan.free] = contiguous(unit_set, sizes_N[plan.free], plan.missing)
        elif plan.by == "hash":
            splits_N[plan.free] = split[unit_set.of_row]
        counts = clusters.counts(first, first + len(unit_set.keys))
        _check_splits(plan, splits_N[span], counts)
        described[plan.component.name] = {
            **plan.described(),
            "units": len(unit_set.keys),
            **counts,
            "splits": _sizes(splits_N[span], keys_N[span], sizes_N[span]),
        }
        first += len(unit_set.keys)
    return {"near_duplicate_pairs": len(links), "least_containment": least, "components": described}


@dataclass(frozen=True)
class _Plan:
    """How a component is split: as declared, by hash, or by position (few long texts); `free`: its rows."""

    component: RawComponent
    by: str
    declared: frozenset[int]
    free: np.ndarray
    shares: tuple[float, float]

    @classmethod
    def of(cls, component: RawComponent, span: slice, splits_N: np.ndarray) -> _Plan:
        declared = component.declared
        if 0 not in declared:
            raise UserError(
                f"{component.folder}: no train split: the source declares {names(declared)} alone; to train "
                "on one of them, name its files under `train` in params/corpora.yaml"
            )
        missing = {1, 2} - declared
        free = span.start + np.flatnonzero(splits_N[span] == 0)
        by = "declared" if not missing else "contiguous" if component.cut else "hash"
        share = held_out(component.group is not None, len(free)) if by == "hash" else 0.0
        return cls(
            component, by, declared, free, (share if 1 in missing else 0.0, share if 2 in missing else 0.0)
        )

    @property
    def missing(self) -> frozenset[int]:
        """The splits that are made from train."""
        return frozenset({1, 2} - self.declared)

    @property
    def grouped(self) -> bool:
        """Whether a unit may have several rows."""
        return self.component.group is not None or self.component.cut > 0

    def described(self) -> dict[str, Any]:
        """The plan's entry in meta.json."""
        group = self.component.group
        return {
            "by": self.by,
            "declared": [SPLITS[index] for index in sorted(self.declared)],
            "unit": "file" if self.component.pieces else "document" if group is None else group,
        }


def _assigned(
    plans: Sequence[_Plan], units: list[Units], links: list[tuple[float, int, int]]
) -> tuple[Clusters, list[np.ndarray], float | None]:
    """Clusters, the split of each component's units, and the least containment that joined documents.

    A text that occurs in most documents (a licence, a form) links them all, and all would stay in train. If
    that leaves val or test empty, or most of a component in train, only documents that share more than a half
    are joined, or none.
    """
    for least in (near_duplicates.CONTAINMENT, near_duplicates.SHORT_CONTAINMENT, None):
        clusters = clusters_of(units, [link for link in links if least is not None and link[0] >= least])
        assigned = assign(units, clusters, [plan.shares for plan in plans])
        stays = np.isin(clusters.roots, clusters.refused)
        first, fits = 0, True
        for plan, unit_set, split in zip(plans, units, assigned, strict=True):
            in_train = stays[first : first + len(unit_set.keys)]
            if plan.by == "hash" and in_train.any():
                fits &= bool(unit_set.sizes[in_train].sum() <= unit_set.sizes.sum() / 2)
                fits &= all((split == index).any() for index in plan.missing)
            first += len(unit_set.keys)
        if fits:
            break
    return clusters, assigned, least


def _sizes(rows: np.ndarray, keys: np.ndarray, sizes: np.ndarray) -> dict[str, dict[str, int]]:
    """For each split: documents, units, and bytes of text."""
    found = {}
    for index, name in enumerate(SPLITS):
        mask = rows == index
        found[name] = {
            "documents": int(mask.sum()),
            "units": len(np.unique(keys[mask])),
            "bytes": int(sizes[mask].sum(dtype=np.int64)),
        }
    return found


def _check_splits(plan: _Plan, rows: np.ndarray, counts: Mapping[str, int]) -> None:
    for index, split in enumerate(SPLITS):
        if not np.any(rows == index):
            component = plan.component
            kept = int(np.count_nonzero(rows != DROPPED))
            how = {
                "hash": f"split by hash of its {plan.described()['unit']}s, "
                f"{counts['kept_in_train']} of which may not leave train",
                "contiguous": f"split in contiguous parts of passages of {component.cut} bytes",
                "declared": "as the source declares it",
            }[plan.by]
            raise UserError(
                f"corpus {component.name!r}: split {split!r} has no documents: {kept} kept, {how}; "
                "use a corpus with more text"
            )
