"""The first pass over a corpus: which documents are kept, and in which split each goes.

The pass over the text (`stlm.tokens.scan`) leaves on disk, for every row, its declared split, its digests,
its size, and hashes of its words in sequence. From these follow exact duplicates, near-duplicates, the splits
(`stlm.tokens.splits`) and how much of the held-out text stands in train (`stlm.tokens.leaks`). Memory does
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

MEMORY = 256 << 20  # bytes, of the search for near-duplicates
_PARTITION_ROWS = 1 << 20  # about 50 MB while duplicates are looked for
_PASSAGE_BYTES = 16 << 10  # of a long text that is cut
_PASSAGES = 50  # of a shorter one
_SHORTEST_PASSAGE = 200  # bytes
_FEWEST_PASSAGES = 20


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
            write_record(
                folder / "survey.json", _survey(components, folder, progress, memory_bytes), beside=["splits"]
            )
    record = read_json(folder / "survey.json")
    return Survey(splits=np.memmap(folder / "splits", np.uint8, mode="r"), **record)


def in_passages(components: Sequence[RawComponent]) -> list[RawComponent]:
    """The components, those of few long texts to be read in passages: hashing some books would empty a split.

    Passages are of 16 kB, or of a fiftieth of shorter texts.
    """
    return [replace(own, cut=_passage_bytes(own)) for own in components]


def _passage_bytes(component: RawComponent) -> int:
    """Bytes of a passage; 0 where texts are not cut."""
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
    usable = [int(np.count_nonzero(splits_N[here] != DROPPED)) for here in scan.slices]
    scan.counts["duplicates"] = mark_duplicates(digests_N2, splits_N)
    scan.counts["kept"] = int(np.count_nonzero(splits_N != DROPPED))
    if scan.counts["kept"] == 0:
        raise UserError(
            f"{components[0].folder}: the corpus is empty: of {scan.counts['read']} documents, "
            f"{scan.counts['empty']} are empty and {scan.counts['invalid_utf8']} are not UTF-8"
        )
    splitting = _split(components, scan, folder, splits_N, memory_bytes)
    splits_N.flush()
    for component, rows, here in zip(components, usable, scan.slices, strict=True):
        kept = int(np.count_nonzero(splits_N[here] != DROPPED))
        splitting["components"][component.name] |= {"documents": rows, "duplicates": rows - kept}
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
    plans = [_Plan.of(own, here, splits_N) for own, here in zip(components, scan.slices, strict=True)]
    units = []
    of_row_N = np.full(len(splits_N), -1, np.int64)
    first = 0
    for plan in plans:
        own = Units.of(keys_N[plan.free], sizes_N[plan.free], plan.grouped)
        units.append(own)
        if plan.by == "hash":
            of_row_N[plan.free] = first + own.of_row
        first += len(own.keys)
    links = near_duplicates.linked(sketches, of_row_N, memory_bytes)
    clusters, assigned, least = _assigned(plans, units, links)
    described = {}
    first = 0
    for plan, own, split, here in zip(plans, units, assigned, scan.slices, strict=True):
        if plan.by == "contiguous":
            splits_N[plan.free] = contiguous(own, sizes_N[plan.free], plan.missing)
        elif plan.by == "hash":
            splits_N[plan.free] = split[own.of_row]
        counts = clusters.counts(first, first + len(own.keys))
        _check_splits(plan, splits_N[here], counts)
        described[plan.component.name] = {
            **plan.described(),
            "units": len(own.keys),
            **counts,
            "splits": _sizes(splits_N[here], keys_N[here], sizes_N[here]),
        }
        first += len(own.keys)
    return {"near_duplicate_pairs": len(links), "least_containment": least, "components": described}


@dataclass(frozen=True)
class _Plan:
    """How a component is split: as declared, by hash, or few long texts by place; `free`: rows to split."""

    component: RawComponent
    by: str
    declared: frozenset[int]
    free: np.ndarray
    shares: tuple[float, float]

    @classmethod
    def of(cls, component: RawComponent, here: slice, splits_N: np.ndarray) -> _Plan:
        declared = component.declared
        if 0 not in declared:
            raise UserError(
                f"{component.folder}: no train split: the source declares {names(declared)} alone; to train "
                "on one of them, name its files under `train` in params/corpora.yaml"
            )
        missing = {1, 2} - declared
        free = here.start + np.flatnonzero(splits_N[here] == 0)
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
        """What meta.json says of it."""
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

    A text that stands in most documents (a licence, a form) links them all, and all would stay in train.
    Where that leaves val or test empty, or most of a component in train, only documents that share more than
    a half are joined, or none.
    """
    for least in (near_duplicates.CONTAINMENT, near_duplicates.SHORT_CONTAINMENT, None):
        clusters = clusters_of(units, [link for link in links if least is not None and link[0] >= least])
        assigned = assign(units, clusters, [plan.shares for plan in plans])
        stays = np.isin(clusters.roots, clusters.refused)
        first, fits = 0, True
        for plan, own, split in zip(plans, units, assigned, strict=True):
            here = stays[first : first + len(own.keys)]
            if plan.by == "hash" and here.any():
                fits &= bool(own.sizes[here].sum() <= own.sizes.sum() / 2)
                fits &= all((split == index).any() for index in plan.missing)
            first += len(own.keys)
        if fits:
            break
    return clusters, assigned, least


def _sizes(rows: np.ndarray, keys: np.ndarray, sizes: np.ndarray) -> dict[str, dict[str, int]]:
    """Of each split: documents, units, and bytes of text."""
    found = {}
    for index, name in enumerate(SPLITS):
        here = rows == index
        found[name] = {
            "documents": int(here.sum()),
            "units": len(np.unique(keys[here])),
            "bytes": int(sizes[here].sum(dtype=np.int64)),
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
