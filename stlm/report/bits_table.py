"""Tables of bits per byte: their uncertainty over documents and seeds, and each component of a mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, stdev
from typing import Any

from stlm.evaluation.statistics import Interval, SeedNoise, seed_noise
from stlm.report.documents import (
    FEW_NOTE,
    Difference,
    Documents,
    amount_note,
    comparable,
    compare,
    compare_seeds,
    documents_of,
    interval_text,
    mean_over_seeds,
)
from stlm.report.names import bounds_record, difference_text, seeds_label
from stlm.report.notes import noise_note
from stlm.report.results import Perplexity, PublishedResult, RunResult, run_label
from stlm.report.table import Cell, Section, Table
from stlm.study.runs import Study

_bounds = partial(bounds_record, digits=6)


@dataclass
class _Row:
    """A variant, or a published model (`variant` None): bits per byte by seed, and of its documents."""

    variant: str | None
    label: str
    measured: Perplexity
    bits: dict[int, float] = field(default_factory=dict)
    documents: dict[int, Documents | None] = field(default_factory=dict)

    @property
    def over_documents(self) -> tuple[Interval | None, bool]:
        """The interval over documents of the mean over seeds, and whether there are too few of them."""
        kept = list(self.documents.values())
        if any(documents is None or not documents.same_text(kept[0]) for documents in kept):
            return None, False
        whole = mean_over_seeds(kept)
        return whole.interval, whole.few


@dataclass(frozen=True)
class _Compared:
    """A row's difference from the baseline: over documents, and half of its interval over seeds.

    `value` is None where the two are of different text.
    """

    value: float | None
    over_documents: Difference | None
    half: float | None

    @property
    def over_seeds(self) -> Interval | None:
        """The interval over seeds."""
        known = self.half is not None and self.value is not None
        return Interval(self.value - self.half, self.value + self.half) if known else None

    @property
    def certain(self) -> bool:
        """Whether all intervals that there are exclude zero, that over documents among them."""
        documents = self.over_documents and self.over_documents.interval
        found = [documents, *([] if self.over_seeds is None else [self.over_seeds])]
        return all(interval is not None and not interval.low <= 0 <= interval.high for interval in found)


def bits_table(
    study: Study, results: Mapping[str, RunResult], published: Mapping[str, PublishedResult] | None = None
) -> Table:
    """A row a variant, the baseline first, and a row a published model.

    Raises UserError where documents.parquet is missing or disagrees with evaluation.json.
    """
    variants: dict[str, _Row] = {}
    for result in results.values():
        train, measured = result.train, result.last.perplexity
        row = variants.setdefault(train.variant, _Row(train.variant, train.label, measured))
        row.bits[train.seed], row.documents[train.seed] = measured.bits_per_byte, documents_of(result)
    models = []
    for model in (published or {}).values():
        measured = model.checkpoint.perplexity
        bits, documents = {0: measured.bits_per_byte}, {0: documents_of(model)}
        models.append(_Row(None, model.label, measured, bits, documents))
    rows = [*variants.values(), *models]
    base, noise = rows[0], seed_noise({name: row.bits for name, row in variants.items()})
    cells: list[list[Cell] | Section] = []
    records = []
    for row in rows:
        if models and row is models[0]:
            cells.append(Section("Published models, scored here"))
        compared = None if row is base else _compare(row, base, noise)
        cells.append(_cells(row, compared))
        records.append(_record(row, compared))
    return Table(
        name="bits-per-byte",
        title=f"Bits per byte of test text, study {study.name}",
        header=[
            *("", "documents", "bits per byte", "interval over\ndocuments"),
            *(f"difference from\n{base.label}", "interval over\ndocuments", "interval over\nseeds"),
        ],
        rows=cells,
        notes=_notes(rows, noise),
        records=records,
    )


def _compare(row: _Row, base: _Row, noise: SeedNoise | None) -> _Compared:
    found = compare_seeds(row.documents, base.documents)
    shared = [row.bits[s] - base.bits[s] for s in row.bits if s in base.bits] if row.variant else []
    half = noise.half_width(shared, (row.variant, base.variant)) if noise and shared else None
    value = mean(shared) if shared else mean(row.bits.values()) - mean(base.bits.values())
    if found is not None:
        value = found.value
    elif not comparable(row.measured, base.measured):
        value = None
    return _Compared(value, found, half)


def _cells(row: _Row, compared: _Compared | None) -> list[Cell]:
    values, documents = list(row.bits.values()), row.measured.documents
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    cells = [
        Cell(seeds_label(row.label, len(values))),
        Cell("–" if documents is None else f"{documents:,}"),
        Cell(f"{mean(values):.3f}{spread}"),
        Cell(interval_text(*row.over_documents)),
    ]
    if compared is None:
        return [*cells, Cell(""), Cell(""), Cell("")]
    if compared.value is None:
        return [*cells, Cell("other text"), Cell("–"), Cell("–")]
    over, few = (None, False) if compared.over_documents is None else compared.over_documents[1:]
    return [
        *cells,
        Cell(difference_text(compared.value), bold=compared.certain),
        Cell(interval_text(over, few=few, signed=True)),
        Cell(interval_text(compared.over_seeds, signed=True)),
    ]


def _record(row: _Row, compared: _Compared | None) -> dict[str, Any]:
    interval, few = row.over_documents
    bits, measured = list(row.bits.values()), row.measured
    kept = ("documents", "documents_total", "bytes", "bytes_total", "text_sha256")
    record: dict[str, Any] = {"label": row.label, "seeds": len(bits)}
    record |= {key: getattr(measured, key) for key in kept}
    record |= {"few_documents": few, "bits_per_byte": round(mean(bits), 6)}
    record |= {"sd": round(stdev(bits), 6) if len(bits) > 1 else None, **_bounds(interval)}
    if compared is None:
        return record
    over, half = compared.over_documents, compared.half
    record["difference"] = None if compared.value is None else round(compared.value, 6)
    record |= _bounds(None if over is None else over.interval, "difference_")
    return record | {"difference_half_width_seeds": None if half is None else round(half, 6)}


def _notes(rows: list[_Row], noise: SeedNoise | None) -> list[str]:
    kept = [documents for row in rows for documents in row.documents.values()]
    notes = [amount_note((row.label, row.measured) for row in rows) + " Lower is better."]
    if all(documents is None for documents in kept):
        notes.append(
            "No intervals over documents: evaluated by an earlier version of STLM (`stlm evaluate` again)."
        )
    else:
        notes.append(
            "Intervals over documents: 95%, whole documents resampled; of differences paired, since both "
            "models read the same documents. They say how far other documents of this corpus would move a "
            "figure, not another seed."
        )
    if noise is None:
        notes.append("One seed: how far another would move these figures is not known.")
    else:
        notes.append(
            "±: standard deviation over seeds. Intervals over seeds: 95%, from the noise of the seeds of all "
            f"variants together (standard deviation {noise.sd:.4f}, {noise.dof} degree"
            f"{'s'[: noise.dof > 1]} of freedom)."
        )
        notes.append(noise_note(noise, {row.variant: row.label for row in rows if row.variant}))
    notes.append(
        "Bold: zero is outside of the interval over documents and, where there is one, outside of that over "
        "seeds; not adjusted for the number of differences."
    )
    if any(documents is not None and documents.few for documents in kept):
        notes.append(FEW_NOTE)
    return notes


def component_table(study: Study, results: Mapping[str, RunResult]) -> Table | None:
    """A row a run, a column a component, with differences from the baseline; None without a mix."""
    texts = {name: _texts(result.last.perplexity) for name, result in results.items()}
    components = list(dict.fromkeys(key for bits in texts.values() for key in bits))
    if len(components) < 2:
        return None
    base = texts[study.baseline]
    kept = {name: documents_of(result) for name, result in results.items()}
    sizes = _sizes(results[study.baseline].last.perplexity)
    # Runs of another tokenizer or mix may lack a component: they cannot be its best.
    best = {key: min(bits[key] for bits in texts.values() if key in bits) for key in components}
    rows, records = [], []
    for name, bits in texts.items():
        label = run_label(results[name], results)
        cells = [Cell(label)]
        record: dict[str, object] = {"run": name, "label": label} | {k: round(v, 5) for k, v in bits.items()}
        for key in components:
            if key not in bits:
                cells.append(Cell("–"))
                continue
            lines = [f"{bits[key]:.3f}"]
            compared = (
                None if name == study.baseline else _compare_component(kept[name], kept[study.baseline], key)
            )
            if name != study.baseline and key in base:
                lines.append(difference_text(bits[key] - base[key]))
            if compared is not None and compared.interval is not None:
                lines.append(interval_text(compared.interval, compared.few, signed=True))
                record |= bounds_record(compared.interval, f"{key}_difference_", 5)
            cells.append(Cell("\n".join(lines), bold_line=0 if bits[key] == best[key] else None))
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
            amount_note((run_label(result, results), result.last.perplexity) for result in results.values()),
            *(
                [FEW_NOTE]
                if any(documents is not None and documents.few for documents in kept.values())
                else []
            ),
        ],
        records=records,
    )


def _compare_component(
    documents: Documents | None, base: Documents | None, component: str
) -> Difference | None:
    """The paired difference on one component, or on `all` of the text; None where it is not of the same."""
    if documents is None or base is None:
        return None
    if component == "all":
        return compare(documents, base)
    return compare(documents.of(component), base.of(component))


def _sizes(measured: Perplexity) -> dict[str, str]:
    """How many documents each component's figures are of, for the head of its column."""
    parts = {"all": measured, **measured.components}
    return {
        name: f"\n{part.documents:,} document{'s'[: part.documents > 1]}"
        for name, part in parts.items()
        if part.documents is not None
    }


def _texts(perplexity: Perplexity) -> dict[str, float]:
    """Bits per byte by component, of all of the text first; empty where the corpus has one component."""
    if not perplexity.components:
        return {}
    parts = {name: part.bits_per_byte for name, part in perplexity.components.items()}
    return {"all": perplexity.bits_per_byte} | parts
