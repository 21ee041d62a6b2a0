"""The part of `stlm compare` that is of text: bits per byte of two models on the same documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stlm.evaluation.statistics import Interval
from stlm.integrity import check_beside
from stlm.report.documents import (
    FEW,
    FEW_NOTE,
    Difference,
    Documents,
    compare,
    interval_text,
    read_documents,
    size_text,
)
from stlm.report.names import difference_text

_FILE = "documents.parquet"


@dataclass(frozen=True)
class TextComparison:
    """Two models' documents, which are the same, and B against A."""

    a: Documents
    b: Documents
    difference: Difference


def compare_text(a: tuple[Path, int], b: tuple[Path, int]) -> TextComparison | str | None:
    """Compare the documents.parquet beside two items.parquet, each at a step; or why that cannot be.

    None where neither is there: both were evaluated by an earlier version. Raises UserError where one is
    unreadable or damaged.
    """
    files = [items.with_name(_FILE) for items, _ in (a, b)]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        return f"bits per byte are not compared: no {missing[0]} (evaluated by an earlier version of STLM)"
    for file in files:
        check_beside(file.with_name("evaluation.json"), _FILE)
    own, other = (read_documents(file, step) for file, (_, step) in zip(files, (a, b), strict=True))
    found = compare(other, own)
    if found is None:
        sizes = f"{len(own):,} against {len(other):,}"
        return f"bits per byte are not compared: measured on other documents ({sizes})"
    return TextComparison(own, other, found)


def text_lines(found: TextComparison) -> list[str]:
    """The comparison for the terminal."""
    documents, n_bytes = len(found.a), int(found.a.n_bytes.sum())
    parts = [
        f"{name} {own.bits_per_byte:.4f} {interval_text(own.interval, own.few)}"
        for name, own in (("A", found.a), ("B", found.b))
    ]
    difference = found.difference
    shown = interval_text(difference.interval, difference.few, signed=True)
    lines = [
        "",
        f"bits per byte of test text ({documents:,} document{'s'[: documents > 1]}, {size_text(n_bytes)})",
        f"{'; '.join(parts)}; B - A {difference_text(difference.value, 4)} {shown}",
        "with 95% intervals over documents, of B - A paired: not over seeds.",
    ]
    return [*lines, FEW_NOTE] if any(FEW in line for line in lines) else lines


def text_json(found: TextComparison) -> dict[str, Any]:
    """The comparison for programs."""
    difference = found.difference
    return {
        "documents": len(found.a),
        "bytes": int(found.a.n_bytes.sum()),
        "few_documents": difference.few,
        "a": {"bits_per_byte": found.a.bits_per_byte, **_bounds(found.a.interval)},
        "b": {"bits_per_byte": found.b.bits_per_byte, **_bounds(found.b.interval)},
        "difference": difference.value,
        **_bounds(difference.interval),
    }


def _bounds(interval: Interval | None) -> Mapping[str, float | None]:
    return {"low": None, "high": None} if interval is None else interval._asdict()
