"""The first pass over a corpus: which documents are kept, and in which split each goes.

A document's split follows from a hash of its text alone, or of its group (a book's title), so that it stays
where it is when documents are added. The pass leaves one byte a document on disk; duplicates are found from
16-byte hashes on disk, sorted a partition at a time: memory is bounded whatever the corpus' size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stlm.errors import UserError
from stlm.files import disk_errors, read_json, write_json
from stlm.tokens.raw import RawComponent
from stlm.tokens.shards import SPLITS

DROPPED = 255  # beside the indices of SPLITS
_FEW = 1000  # documents
_PARTITION_ROWS = 1 << 20  # about 50 MB while duplicates are looked for


@dataclass(frozen=True)
class Survey:
    """`splits`: for each row of each component, in reading order, an index of SPLITS or DROPPED."""

    splits: np.ndarray
    rows: list[int]  # rows of each component
    counts: dict[str, int]  # read, duplicates, empty, invalid_utf8, nul, kept
    text_bytes: int
    train_bytes: list[int]  # of each component, duplicates included


def held_out(component: RawComponent) -> float:
    """The share of val, and of test: 1% of documents; 5% of groups (books), or of fewer than 1,000 documents.

    1% of so few might be none. A corpus that grows past them keeps in val and test a part of what was there.
    """
    return 0.05 if component.group or component.rows < _FEW else 0.01


def digest(content: bytes) -> bytes:
    """128 bits: the first half decides the split, the second whether a vocabulary is trained on it."""
    return hashlib.blake2b(content, digest_size=16).digest()


def split_of(key: bytes, share: float) -> int:
    """The split (index of SPLITS) of a digest: val at the bottom of the hash's range, test at the top."""
    place = int.from_bytes(key[:8], "little") / 2**64
    if place < share:
        return 1
    return 2 if place >= 1 - share else 0


def survey(components: Sequence[RawComponent], folder: Path, progress: bool) -> Survey:
    """Survey `components`, keeping the result in `folder`; one that is there already is read."""
    if not (folder / "survey.json").exists():
        with disk_errors(folder):
            write_json(folder / "survey.json", _scan(components, folder, progress))
    record = read_json(folder / "survey.json")
    splits = np.memmap(folder / "splits.u8", np.uint8, mode="r")
    return Survey(splits, record["rows"], record["counts"], record["text_bytes"], record["train_bytes"])


def _scan(components: Sequence[RawComponent], folder: Path, progress: bool) -> dict[str, Any]:
    counts = dict.fromkeys(("read", "duplicates", "empty", "invalid_utf8", "nul", "kept"), 0)
    rows, train_bytes, text_bytes = [], [], 0
    total = sum(component.rows for component in components)
    with (
        (folder / "splits.u8").open("wb") as split_file,
        (folder / "digests").open("wb") as digest_file,
        tqdm(total=total, desc="survey", unit=" documents", unit_scale=True, disable=not progress) as bar,
    ):
        for component in components:
            share = held_out(component)
            before, component_train = counts["read"], 0
            for batch in component.batches():
                splits, digests = bytearray(), []
                for text, group in zip(batch.texts, batch.groups, strict=True):
                    keep = _usable(text, counts)
                    own = digest(text or b"")
                    split = split_of(digest(group) if group else own, share) if keep else DROPPED
                    splits.append(split)
                    digests.append(own)
                    text_bytes += len(text or b"")
                    component_train += len(text) if split == 0 else 0
                split_file.write(splits)
                digest_file.write(b"".join(digests))
                counts["read"] += len(splits)
                bar.update(len(splits))
            rows.append(counts["read"] - before)
            train_bytes.append(component_train)
    if counts["read"] == 0:
        raise UserError(f"{components[0].folder}: the corpus is empty: no document in {components[0].files}")
    splits_N = np.memmap(folder / "splits.u8", np.uint8, mode="r+")
    digests_N2 = np.memmap(folder / "digests", np.uint64, mode="r").reshape(-1, 2)
    counts["duplicates"] = mark_duplicates(digests_N2, splits_N)
    splits_N.flush()
    (folder / "digests").unlink()
    counts["kept"] = int(np.count_nonzero(splits_N != DROPPED))
    _check_splits(components, rows, splits_N, counts)
    return {"rows": rows, "counts": counts, "text_bytes": text_bytes, "train_bytes": train_bytes}


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
    """Set every repeat of an earlier, kept row to DROPPED, in place; how many. Exact, in bounded memory."""
    parts = -(-len(splits_N) // partition)
    found = 0
    for part in range(parts):
        mine = []
        for start in range(0, len(splits_N), partition):
            here = slice(start, start + partition)
            chosen = (digests_N2[here, 0] % np.uint64(parts) == part) & (splits_N[here] != DROPPED)
            mine.append(start + np.flatnonzero(chosen))
        rows = np.concatenate(mine)
        keys = digests_N2[rows]
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the earliest row comes first
        keys = keys[order]
        repeats = order[1:][(keys[1:] == keys[:-1]).all(axis=1)]
        splits_N[rows[repeats]] = DROPPED
        found += len(repeats)
    return found


def _check_splits(
    components: Sequence[RawComponent], rows: list[int], splits_N: np.ndarray, counts: dict[str, int]
) -> None:
    if counts["kept"] == 0:
        raise UserError(
            f"{components[0].folder}: the corpus is empty: of {counts['read']} documents, {counts['empty']} "
            f"are empty and {counts['invalid_utf8']} are not UTF-8"
        )
    start = 0
    for component, length in zip(components, rows, strict=True):
        here = splits_N[start : start + length]
        kept = int(np.count_nonzero(here != DROPPED))
        for index, split in enumerate(SPLITS):
            if not np.any(here == index):
                share = held_out(component)
                what = f"groups (column {component.group!r})" if component.group else "documents"
                raise UserError(
                    f"corpus {component.name!r}: split {split!r} has no documents: {kept} kept, split by "
                    f"{what} into {1 - 2 * share:.0%}/{share:.0%}/{share:.0%} train/val/test by hash; "
                    "use a corpus with more of them"
                )
        start += length
