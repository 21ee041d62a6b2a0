"""Bits per byte on the test text of each component of a mix: what runs learned that read different parts."""

from __future__ import annotations

from collections.abc import Mapping

from stlm.report.results import Perplexity, RunResult, run_label
from stlm.report.table import Cell, Table
from stlm.study import Study


def component_table(study: Study, results: Mapping[str, RunResult]) -> Table | None:
    """A row a run, a column a component, each with the difference from the baseline; None: no run has any."""
    texts = {name: _texts(result.last.perplexity) for name, result in results.items()}
    components = list(dict.fromkeys(key for own in texts.values() for key in own))
    if len(components) < 2:
        return None
    base = texts[study.baseline]
    # Runs of another tokenizer or mix may lack a component: they are no rival there.
    best = {key: min(own[key] for own in texts.values() if key in own) for key in components}
    rows, records = [], []
    for name, own in texts.items():
        label = run_label(results[name], results)
        cells = [Cell(label)]
        for key in components:
            if key not in own:
                cells.append(Cell("–"))
                continue
            lines = [f"{own[key]:.3f}"]
            if name != study.baseline and key in base:
                lines.append(f"{own[key] - base[key]:+.3f}".replace("-", "−"))
            cells.append(Cell("\n".join(lines), bold_line=0 if own[key] == best[key] else None))
        rows.append(cells)
        records.append({"run": name, "label": label} | {key: round(v, 5) for key, v in own.items()})
    return Table(
        name="components",
        title=f"Bits per byte on the test text of each component, study {study.name}",
        header=["", *(key.replace("_", " ") for key in components)],
        rows=rows,
        notes=[
            f"Below each: the difference from {results[study.baseline].train.label}. Bold: the lowest of the "
            "column. `all` weighs the components by their test bytes. No interval: another seed may move "
            "these figures by more than some of the differences."
        ],
        records=records,
    )


def _texts(perplexity: Perplexity) -> dict[str, float]:
    """Bits per byte by component, of all of the text first; empty where the corpus has one component."""
    if not perplexity.components:
        return {}
    parts = {name: own.bits_per_byte for name, own in perplexity.components.items()}
    return {"all": perplexity.bits_per_byte} | parts
