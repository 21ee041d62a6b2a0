"""BLiMP (Warstadt et al. 2020): the more probable sentence of a minimal pair; 67 paradigms, 12 phenomena.

As lm_eval 0.4's `blimp` (task version 1.0): no context, each sentence after its delimiting space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from stlm.evaluation.benchmarks.items import FileBenchmark, Item, Option, Row

# The paper counts the two s-selection paradigms as argument structure; the files do not.
_PHENOMENA = {"s-selection": "argument_structure"}


def minimal_pairs(rows: Iterable[Row]) -> Iterator[Item]:
    """Items from sentence pairs, the good sentence first; ids count within each paradigm (UID)."""
    seen: Counter[str] = Counter()
    for row in rows:
        paradigm, phenomenon = row["UID"], row["linguistics_term"]
        options = tuple(Option("", " " + row[key], row[key]) for key in ("sentence_good", "sentence_bad"))
        yield Item(
            f"{paradigm}-{seen[paradigm]}", options, 0, (_PHENOMENA.get(phenomenon, phenomenon), paradigm)
        )
        seen[paradigm] += 1


COLUMNS = ("sentence_good", "sentence_bad", "UID", "linguistics_term")
BLIMP = FileBenchmark(
    name="blimp",
    version="1.0",
    splits=("train",),
    columns=COLUMNS,
    read=minimal_pairs,
    group_kinds=("phenomenon", "paradigm"),
)
