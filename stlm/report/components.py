"""Bits per byte on the test text of each component of a mix: what runs learned that read different parts."""

from __future__ import annotations

from collections.abc import Mapping

from stlm.report.documents import (
    FEW_NOTE,
    Difference,
    Documents,
    amount_note,
    compare,
    documents_of,
    interval_text,
)
from stlm.report.names import difference_text
from stlm.report.results import Perplexity, RunResult, run_label
from stlm.report.table import Cell, Table
from stlm.study.runs import Study


def component_table(study: Study, results: Mapping[str, RunResult]) -> Table | None:
    """A row a run, a column a component, each with the difference from the baseline; None: no run has any."""
    texts = {name: _texts(result.last.perplexity) for name, result in results.items()}
    components = list(dict.fromkeys(key for own in texts.values() for key in own))
    if len(components) < 2:
        return None
    base = texts[study.baseline]
    kept = {name: documents_of(result) for name, result in results.items()}
    sizes = _sizes(results[study.baseline].last.perplexity)
    # Runs of another tokenizer or mix may lack a component: they are no rival there.
    best = {key: min(own[key] for own in texts.values() if key in own) for key in components}
    rows, records = [], []
    for name, own in texts.items():
        label = run_label(results[name], results)
        cells = [Cell(label)]
        record: dict[str, object] = {"run": name, "label": label} | {k: round(v, 5) for k, v in own.items()}
        for key in components:
            if key not in own:
                cells.append(Cell("–"))
                continue
            lines = [f"{own[key]:.3f}"]
            compared = None if name == study.baseline else _compared(kept[name], kept[study.baseline], key)
            if name != study.baseline and key in base:
                lines.append(difference_text(own[key] - base[key]))
            if compared is not None and compared.interval is not None:
                lines.append(interval_text(compared.interval, compared.few, signed=True))
                low, high = (round(bound, 5) for bound in compared.interval)
                record |= {f"{key}_difference_low": low, f"{key}_difference_high": high}
            cells.append(Cell("\n".join(lines), bold_line=0 if own[key] == best[key] else None))
        rows.append(cells)
        records.append(record)
    return Table(
        name="components",
        title=f"Bits per byte on the test text of each component, study {study.name}",
        header=["", *(key.replace("_", " ") + sizes.get(key, "") for key in components)],
        rows=rows,
        notes=[
            f"Below each: the difference from {results[study.baseline].train.label}, in brackets its 95% "
            "interval over documents, paired, where both kept the scores of their documents. Bold: the "
            "lowest of the column. `all` weighs the components by their test bytes. Another seed may move "
            "these figures by more than some of the differences.",
            amount_note((run_label(own, results), own.last.perplexity) for own in results.values()),
            *([FEW_NOTE] if any(own is not None and own.few for own in kept.values()) else []),
        ],
        records=records,
    )


def _compared(own: Documents | None, base: Documents | None, component: str) -> Difference | None:
    """The paired difference on one component, or on `all` of the text; None where it is not of the same."""
    if own is None or base is None:
        return None
    if component == "all":
        return compare(own, base)
    return compare(own.of(component), base.of(component))


def _sizes(measured: Perplexity) -> dict[str, str]:
    """How many documents each component's figures are of, for the head of its column."""
    parts = {"all": measured, **measured.components}
    return {
        name: f"\n{own.documents:,} document{'s'[: own.documents > 1]}"
        for name, own in parts.items()
        if own.documents is not None
    }


def _texts(perplexity: Perplexity) -> dict[str, float]:
    """Bits per byte by component, of all of the text first; empty where the corpus has one component."""
    if not perplexity.components:
        return {}
    parts = {name: own.bits_per_byte for name, own in perplexity.components.items()}
    return {"all": perplexity.bits_per_byte} | parts
