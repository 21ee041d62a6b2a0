"""What a study found, in three sentences and a short table: the front page of the HTML report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stlm.report.names import count, difference_text, some
from stlm.report.results import RunResult
from stlm.report.table import Cell, Table, html_table
from stlm.study.runs import Study

# Rows of the table at most: the baseline, the best variants and the worst.
_MOST_ROWS = 6
# Variants that a sentence names at most.
_MOST_NAMES = 6


@dataclass(frozen=True)
class Finding:
    """A variant's bits per byte of test text, and its difference from the baseline on the same text.

    `difference` is None for the baseline and for variants measured on other text. `interval`: 95%, of the
    difference; over seeds where there are several, else over documents; None where neither is known.
    `certain`: the intervals over seeds and over documents, as far as known, exclude zero.
    """

    label: str
    parameters: int
    bits: float
    difference: float | None
    interval: tuple[float, float] | None
    over: str
    certain: bool

    @property
    def in_words(self) -> str:
        """The difference and its interval."""
        text = f"difference {difference_text(self.difference)}"
        if self.interval is None:
            return text
        return f"{text}, 95% interval over {self.over} {' to '.join(map(difference_text, self.interval))}"


def findings(results: Mapping[str, RunResult], records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A finding for each variant, from the records of the table of bits per byte.

    The baseline is the first, and the others follow by their bits per byte, those on other text last.
    """
    variants: dict[str, RunResult] = {}
    for result in results.values():
        variants.setdefault(result.train.variant, result)
    # Published models follow the variants in the records: the study does not compare them.
    found = [_finding(result, record) for result, record in zip(variants.values(), records, strict=False)]
    return [
        found[0],
        *sorted(found[1:], key=lambda one: (one.difference is None, one.difference or 0.0, one.bits)),
    ]


def _finding(result: RunResult, record: Mapping[str, Any]) -> Finding:
    difference, half = record.get("difference"), record.get("difference_half_width_seeds")
    low, high = record.get("difference_low"), record.get("difference_high")
    intervals = {}
    if difference is not None and half is not None:
        intervals["seeds"] = (difference - half, difference + half)
    if difference is not None and low is not None:
        intervals["documents"] = (low, high)
    over = next(iter(intervals), "")
    return Finding(
        label=result.train.label,
        parameters=result.train.parameters.total,
        bits=record["bits_per_byte"],
        difference=difference,
        interval=intervals.get(over),
        over=over,
        certain=bool(intervals) and not any(low <= 0 <= high for low, high in intervals.values()),
    )


def sentences(found: Sequence[Finding]) -> list[str]:
    """Which model is the best, which the worst, and which cannot be distinguished from the baseline."""
    base, *others = found
    compared = [one for one in others if one.difference is not None]
    lines = [_best(base, compared)]
    if len(compared) > 1:
        worst = compared[-1]
        if worst.difference < 0:
            name = _named(base)
            lines.append(f"{name[0].upper()}{name[1:]} has the most.")
        else:
            lines.append(f"{worst.label} has the most: {worst.bits:.3f} ({worst.in_words}).")
    unsure = [one.label for one in compared if not one.certain]
    if any(one.interval for one in compared):
        text = f"{some(unsure, _MOST_NAMES)} cannot" if unsure else "Every other model can"
        text += f" be distinguished from {_named(base)}."
        if not any(one.over == "seeds" for one in compared):
            text += " With one seed each, how far another seed would move these numbers is not known."
        lines.append(text)
    elif compared:
        lines.append("No intervals are known: another seed, or other text, could reverse this order.")
    if elsewhere := [one.label for one in others if one.difference is None]:
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
    name = _named(base)
    if best.difference == 0:
        return f"No model has fewer bits per byte of test text than {name}: {base.bits:.3f}."
    return (
        f"{name[0].upper()}{name[1:]} has the fewest bits per byte of test text {among}: {base.bits:.3f}; "
        f"{best.label} follows with {best.bits:.3f} ({best.in_words})."
    )


def _named(base: Finding) -> str:
    return "the baseline" if base.label.lower() == "baseline" else f"{base.label} (the baseline)"


def headline_table(study: Study, found: Sequence[Finding]) -> Table:
    """The baseline, the best variants and the worst, by bits per byte; the sentences are its notes."""
    base, *others = found
    compared = shown = [one for one in others if one.difference is not None]
    notes = sentences(found)
    if len(compared) >= _MOST_ROWS:
        shown = [*compared[: _MOST_ROWS - 2], compared[-1]]
        notes.append(
            f"The table has the baseline, the best {len(shown) - 1} other models and the worst; "
            f"bits-per-byte has all {len(compared)}. The intervals are not adjusted for their number."
        )
    rows, records = [], []
    for one in (base, *shown):
        text = "" if one.difference is None else difference_text(one.difference)
        text += "" if one.interval is None else " [{}, {}]".format(*map(difference_text, one.interval))
        sizes = [Cell(count(one.parameters)), Cell(f"{one.bits:.3f}")]
        rows.append([Cell(one.label), *sizes, Cell(text, bold=one.certain)])
        record = {"label": one.label, "parameters": one.parameters, "bits_per_byte": one.bits}
        low, high = one.interval or (None, None)
        record |= {"difference": one.difference, "low": low, "high": high, "interval_over": one.over or None}
        records.append({key: round(x, 6) if isinstance(x, float) else x for key, x in record.items()})
    title = f"Bits per byte of test text (lower is better), study {study.name}"
    header = ["", "parameters", "bits per byte", f"difference from {base.label}\n[95% interval]"]
    return Table("headline", title, header, rows, notes, records)


def front_page(table: Table) -> str:
    """The sentences and the table in reStructuredText, for workflow/report/workflow.rst to include."""
    sentences = [f"<p>{html.escape(note)}</p>" for note in table.notes]
    lines = [*sentences, *html_table(replace(table, notes=()))]
    return ".. raw:: html\n\n" + "".join(f"   {line}\n" for line in lines)
