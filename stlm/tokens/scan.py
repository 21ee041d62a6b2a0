"""The pass over a corpus's text that writes to disk what the survey needs to know of every row.

For each row: its declared split, its digest and that of its unit, its size, and hashes of its word n-grams.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stlm.errors import UserError
from stlm.tokens import leaks, near_duplicates
from stlm.tokens.ahead import ahead
from stlm.tokens.raw import RawBatch, RawComponent
from stlm.tokens.shingles import sample, shingles, word_hashes
from stlm.tokens.splits import DROPPED, digest

_BYTES_PER_WORD = 5.5
# Files with one value, or several hashes, for each row.
FILES = {"splits": np.uint8, "digests": np.uint64, "keys": np.uint64, "sizes": np.uint32}
FILES |= {"lengths": np.uint32, "sketches": np.uint64, "grams": np.uint64}


@dataclass
class Scan:
    """The counts of the pass over the text."""

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
    """Sampling rates (one in so many) of 5-grams for near-duplicates, 13-grams for leaks: powers of two.

    Some hundred 5-grams of each document suffice; both are limited by the disk.
    """
    words = sum(component.text_bytes for component in components) / _BYTES_PER_WORD
    documents = max(sum(component.rows for component in components), 1)
    sketch = min(words / documents / near_duplicates.ENOUGH_HASHES, 8)
    sketch = max(sketch, words / near_duplicates.MOST_HASHES, 1)
    return _power_of_two(sketch), _power_of_two(max(words / leaks.MOST_HASHES, 1))


def _power_of_two(rate: float) -> int:
    return 1 << int(np.floor(np.log2(rate)))


def scan_text(components: Sequence[RawComponent], folder: Path, progress: bool) -> Scan:
    """Read every document once and write the files of `FILES`."""
    sketch_rate, gram_rate = _rates(components)
    scan = Scan(sketch_rate, gram_rate)
    total = sum(component.text_bytes for component in components)
    workers = len(os.sched_getaffinity(0))
    with (
        ExitStack() as stack,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, desc="survey", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        files = {name: stack.enter_context((folder / name).open("wb")) for name in FILES}
        for component in components:
            before = scan.counts["read"]
            numbered = _numbered(component)
            tasks = (
                pool.submit(_read_batch, component, first, batch, sketch_rate, gram_rate)
                for first, batch in numbered
            )
            for task in ahead(tasks, workers + 1):
                read = task.result()
                for name, array in read.arrays.items():
                    files[name].write(np.ascontiguousarray(array, FILES[name]))
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
    splits, digests, keys, sizes = [], [], [], []
    words: list[np.ndarray] = []
    name = component.name.encode()
    for row, (text, group, split) in enumerate(
        zip(batch.texts, batch.groups, batch.splits, strict=True), first
    ):
        kept = _usable(text, counts)
        splits.append(split if kept else DROPPED)
        # A line or passage that is repeated in a text is a part of the text, not a duplicate.
        is_part = component.pieces or (component.cut and split == 0)
        row_digest = digest(b"%b %d %b" % (name, row, text or b"") if is_part else text or b"")
        digests.append(row_digest)
        keys.append((row_digest if group is None else digest(component.unit_of(group)))[:8])
        sizes.append(len(text or b""))
        words.append(word_hashes(text if kept else b""))
    if component.pieces and not component.cut:
        words = _joined(words, batch.groups, batch.splits)
    sketches = [np.unique(sample(shingles(hashes, near_duplicates.WORDS), sketch_rate)) for hashes in words]
    grams = [sample(shingles(hashes, leaks.WORDS), gram_rate) for hashes in words]
    nothing = np.empty(0, np.uint64)
    arrays = {
        "splits": splits,
        "digests": np.frombuffer(b"".join(digests), np.uint64),
        "keys": np.frombuffer(b"".join(keys), np.uint64),
        "sizes": sizes,
        "lengths": [(len(sketch), len(gram)) for sketch, gram in zip(sketches, grams, strict=True)],
        "sketches": np.concatenate([nothing, *sketches]),
        "grams": np.concatenate([nothing, *grams]),
    }
    return _Read(arrays, counts, sum(sizes))


def _joined(
    words: Sequence[np.ndarray], groups: Sequence[bytes | None], splits: Sequence[int]
) -> list[np.ndarray]:
    """The words of consecutive pieces of one file, all at the first piece; a single line says too little."""
    joined: list[np.ndarray] = []
    for _, run in groupby(range(len(words)), lambda row: (groups[row], splits[row])):
        rows = list(run)
        joined.append(np.concatenate([words[row] for row in rows]))
        joined += [np.empty(0, np.uint64)] * (len(rows) - 1)
    return joined


def _usable(text: bytes | None, counts: dict[str, int]) -> bool:
    """Whether a document is kept. NUL is a character like any other: it is kept, and counted."""
    try:
        content = (text or b"").decode()
    except UnicodeDecodeError:  # also for lone surrogates, which UTF-8 cannot encode
        counts["invalid_utf8"] += 1
        return False
    if not content or content.isspace():
        counts["empty"] += 1
        return False
    counts["nul"] += "\0" in content
    return True
