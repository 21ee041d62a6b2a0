"""What a study found, in three sentences and a short table: the front page of the HTML report."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stlm.report.names import bounds_record, count, difference_text, rounded, some
from stlm.report.results import Results, RunResult
from stlm.report.table import Cell, Table, html_table
from stlm.study.runs import Study

# Rows of the table at most: the baseline, the best variants and the worst.
_MOST_ROWS = 6
# Variants that a sentence names at most.
_MOST_NAMES = 6


@dataclass(frozen=True)
class Finding:
    """A variant's bits per byte of test text, and its difference from the baseline on the same text."""

    label: str
    parameters: int
    bits: float
    difference: float | None  # None for the baseline and for variants measured on other text
    interval: tuple[float, float] | None  # 95%, of the difference; None where none is known
    over: str  # "seeds" where there are several, else "documents", or ""
    certain: bool  # whether the intervals over seeds and over documents, as far as known, exclude zero

    @property
    def in_words(self) -> str:
        """The difference and its interval."""
        text = f"difference {difference_text(self.difference)}"
        if self.interval is None:
            return text
        return f"{text}, 95% interval over {self.over} {' to '.join(map(difference_text, self.interval))}"


def findings(results: Results, records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A finding for each variant, from the records of the table of bits per byte.

    The baseline is the first, and the others follow by their bits per byte, those on other text last.
    """
    base, *others = [
        # Published models follow the variants in the records: the study does not compare them.
        _finding(runs[0], record)
        for runs, record in zip(results.variants.values(), records, strict=False)
    ]
    others.sort(key=lambda finding: (finding.difference is None, finding.difference or 0.0, finding.bits))
    return [base, *others]


def _finding(run: RunResult, record: Mapping[str, Any]) -> Finding:
    difference, half = record.get("difference"), record.get("difference_half_width_seeds")
    low, high = record.get("difference_low"), record.get("difference_high")
    intervals = {}
    if difference is not None and half is not None:
        intervals["seeds"] = (difference - half, difference + half)
    if difference is not None and low is not None:
        intervals["documents"] = (low, high)
    over = next(iter(intervals), "")
    certain = bool(intervals) and not any(low <= 0 <= high for low, high in intervals.values())
    label, size, bits = run.train.label, run.train.parameters.total, record["bits_per_byte"]
    return Finding(label, size, bits, difference, intervals.get(over), over, certain)


def sentences(ranked: Sequence[Finding]) -> list[str]:
    """Which model is the best, which the worst, and which cannot be distinguished from the baseline."""
    base, *others = ranked
    compared = [finding for finding in others if finding.difference is not None]
    lines = [_best(base, compared)]
    if len(compared) > 1:
        worst = compared[-1]
        lines.append(f"{worst.label} has the most: {worst.bits:.3f} ({worst.in_words}).")
        if worst.difference < 0:
            lines[-1] = f"{_named(base, start=True)} has the most."
    unsure = [finding.label for finding in compared if not finding.certain]
    if any(finding.interval for finding in compared):
        text = f"{some(unsure, _MOST_NAMES)} cannot" if unsure else "Every other model can"
        text += f" be distinguished from {_named(base)}."
        if not any(finding.over == "seeds" for finding in compared):
            text += " With one seed each, how far another seed would move these numbers is not known."
        lines.append(text)
    elif compared:
        lines.append("No intervals are known: another seed, or other text, could reverse this order.")
    if elsewhere := [finding.label for finding in others if finding.difference is None]:
        lines.append(f"Measured on other text, and not compared: {some(elsewhere, _MOST_NAMES)}.")
    return lines


def _best(base: Finding, compared: Sequence[Finding]) -> str:
    if not compared:
        return f"{base.label} has {base.bits:.3f} bits per byte of test text."
    best, among = compared[0], f"of the {1 + len(compared)} models compared"
    if best.difference < 0:
        return (
            f"{best.label} has the fewest bits per byte of test text {among}: {best.bits:.3f}, against "
            f"{base.bits:.3f} for {_named(base)} ({best.in_words})."
        )
    if best.difference == 0:
        return f"No model has fewer bits per byte of test text than {_named(base)}: {base.bits:.3f}."
    return (
        f"{_named(base, start=True)} has the fewest bits per byte of test text {among}: {base.bits:.3f}; "
        f"{best.label} follows with {best.bits:.3f} ({best.in_words})."
    )


def _named(base: Finding, start: bool = False) -> str:
    """The baseline in a sentence, or at its start."""
    name = "the baseline" if base.label.lower() == "baseline" else f"{base.label} (the baseline)"
    return name[0].upper() + name[1:] if start else name


def headline_table(study: Study, ranked: Sequence[Finding]) -> Table:
    """The baseline, the best variants and the worst, by bits per byte; the sentences are its notes."""
    base, *others = ranked
    compared = shown = [finding for finding in others if finding.difference is not None]
    notes = sentences(ranked)
    if len(compared) >= _MOST_ROWS:
        shown = [*compared[: _MOST_ROWS - 2], compared[-1]]
        notes.append(
            f"The table has the baseline, the best {len(shown) - 1} other models and the worst; "
            f"bits-per-byte has all {len(compared)}. The intervals are not adjusted for their number."
        )
    title = f"Bits per byte of test text (lower is better), study {study.name}"
    rows = [_columns(finding, base.label) for finding in (base, *shown)]
    return Table.of_columns("headline", title, rows, notes)


def _columns(finding: Finding, baseline: str) -> Iterator[tuple]:
    yield "", finding.label, {"label": finding.label}
    yield "parameters", count(finding.parameters), {"parameters": finding.parameters}
    yield "bits per byte", f"{finding.bits:.3f}", {"bits_per_byte": round(finding.bits, 6)}
    text = "" if finding.difference is None else difference_text(finding.difference)
    text += "" if finding.interval is None else " [{}, {}]".format(*map(difference_text, finding.interval))
    record = {"difference": rounded(finding.difference, 6), **bounds_record(finding.interval, digits=6)}
    record["interval_over"] = finding.over or None
    yield f"difference from {baseline}\n[95% interval]", Cell(text, bold=finding.certain), record


def front_page(table: Table) -> str:
    """The sentences and the table in reStructuredText, for workflow/report/workflow.rst to include."""
    sentences = [f"<p>{html.escape(note)}</p>" for note in table.notes]
    lines = [*sentences, *html_table(replace(table, notes=()))]
    return ".. raw:: html\n\n" + "".join(f"   {line}\n" for line in lines)
