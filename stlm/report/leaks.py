"""The table of leaks: how much of the held-out text of each corpus stands in its training text."""

from __future__ import annotations

from collections.abc import Sequence

from stlm.report.contamination import Contamination
from stlm.report.table import Cell, Section, Table
from stlm.study.runs import Study


def leaks_table(study: Study, contamination: Contamination) -> Table | None:
    """A row a held-out split. None where no corpus was measured (tokenized by an earlier version)."""
    rows: list[Sequence[Cell] | Section] = []
    records: list[dict[str, object]] = []
    words = 0
    for corpus, own in contamination.corpora.items():
        if own.held_out is None:
            continue
        words = own.held_out.words
        size = f"{own.documents:,} documents, {own.bytes / 1e6:,.1f} MB"
        drawn = "" if own.held_out.one_in == 1 else f"; one in {own.held_out.one_in} sequences looked at"
        rows.append(Section(f"{corpus}, train split: {size}{drawn}"))
        for split, leak in (("val", own.held_out.val), ("test", own.held_out.test)):
            cells = [
                split,
                f"{leak.documents:,}",
                f"{leak.ngrams:,}",
                "–" if leak.share is None else f"{leak.share:.2%}",
                f"{leak.above_half:,}",
                f"{leak.above_fifth:,}",
                "–" if leak.worst is None else f"{leak.worst:.0%}",
            ]
            rows.append([Cell(text) for text in cells])
            records.append({"corpus": corpus, "split": split, **leak.model_dump()})
    if not rows:
        return None
    notes = [
        "Words as in the table of contamination. Near-duplicate documents are in one split, unless the "
        "source declares its splits; what is left are quotations, set phrases and what the source repeats."
    ]
    return Table(
        name="leaks",
        title=f"Held-out text that stands in the training text; study {study.name}",
        header=[
            "",
            "documents",
            f"sequences of\n{words} words",
            "of these\nin train",
            "documents\nabove a half",
            "above\na fifth",
            "most of\na document",
        ],
        rows=rows,
        notes=notes,
        records=records,
    )
