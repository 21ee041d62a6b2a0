"""The table of bits per byte: of how much text, and how sure over documents and over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from stlm.evaluation.statistics import Interval, SeedNoise, seed_noise
from stlm.report.documents import (
    FEW_NOTE,
    Difference,
    Documents,
    amount_note,
    comparable,
    compare_seeds,
    documents_of,
    interval_text,
    mean_over_seeds,
)
from stlm.report.names import difference_text, seeds_label
from stlm.report.noise import noise_note
from stlm.report.results import Perplexity, PublishedResult, RunResult
from stlm.report.table import Cell, Section, Table
from stlm.study.runs import Study


@dataclass
class _Row:
    """A variant, or a published model (`variant` None): by seed its bits per byte, and those of each document
    if kept."""

    variant: str | None
    label: str
    measured: Perplexity
    bits: dict[int, float]
    documents: dict[int, Documents | None]

    @property
    def over_documents(self) -> tuple[Interval | None, bool]:
        """The interval over documents of the mean over seeds, and whether there are too few of them."""
        kept = list(self.documents.values())
        if any(own is None or not own.same_text(kept[0]) for own in kept):
            return None, False
        whole = mean_over_seeds(kept)
        return whole.interval, whole.few


def bits_table(
    study: Study, results: Mapping[str, RunResult], published: Mapping[str, PublishedResult] | None = None
) -> Table:
    """A row a variant, the baseline first, and a row a published model.

    Raises UserError where documents.parquet is missing or says something else than evaluation.json.
    """
    variants: dict[str, _Row] = {}
    for result in results.values():
        train = result.train
        own = variants.setdefault(
            train.variant, _Row(train.variant, train.label, result.last.perplexity, {}, {})
        )
        own.bits[train.seed] = result.last.perplexity.bits_per_byte
        own.documents[train.seed] = documents_of(result)
    models = []
    for model in (published or {}).values():
        measured = model.checkpoint.perplexity
        models.append(
            _Row(None, model.label, measured, {0: measured.bits_per_byte}, {0: documents_of(model)})
        )
    rows = [*variants.values(), *models]
    base, noise = rows[0], seed_noise({name: own.bits for name, own in variants.items()})
    cells: list[list[Cell] | Section] = []
    records = []
    for own in rows:
        if models and own is models[0]:
            cells.append(Section("Published models, scored here"))
        compared = None if own is base else compare_seeds(own.documents, base.documents)
        shared = (
            [] if own.variant is None else [own.bits[s] - base.bits[s] for s in own.bits if s in base.bits]
        )
        half = None
        if noise is not None and shared and own is not base:
            half = noise.half_width(shared, (own.variant, base.variant))
        cells.append(_cells(own, base, compared, shared, half))
        records.append(_record(own, base, compared, shared, half))
    return Table(
        name="bits-per-byte",
        title=f"Bits per byte of test text, study {study.name}",
        header=[
            "",
            "documents",
            "bits per byte",
            "interval over\ndocuments",
            f"difference from\n{base.label}",
            "interval over\ndocuments",
            "interval over\nseeds",
        ],
        rows=cells,
        notes=_notes(rows, noise),
        records=records,
    )


def _cells(
    own: _Row, base: _Row, compared: Difference | None, shared: list[float], half: float | None
) -> list[Cell]:
    values = list(own.bits.values())
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    documents = own.measured.documents
    cells = [
        Cell(seeds_label(own.label, len(values))),
        Cell("–" if documents is None else f"{documents:,}"),
        Cell(f"{mean(values):.3f}{spread}"),
        Cell(interval_text(*own.over_documents)),
    ]
    if own is base:
        return [*cells, Cell(""), Cell(""), Cell("")]
    value = _difference(own, base, compared, shared)
    if value is None:
        return [*cells, Cell("other text"), Cell("–"), Cell("–")]
    documents = None if compared is None else compared.interval
    seeds = None if half is None else Interval(value - half, value + half)
    certain = _excludes_zero(documents) and (seeds is None or _excludes_zero(seeds))
    return [
        *cells,
        Cell(difference_text(value), bold=certain),
        Cell(interval_text(documents, few=compared is not None and compared.few, signed=True)),
        Cell(interval_text(seeds, signed=True)),
    ]


def _excludes_zero(interval: Interval | None) -> bool:
    return interval is not None and not interval.low <= 0 <= interval.high


def _difference(own: _Row, base: _Row, compared: Difference | None, shared: list[float]) -> float | None:
    """None where the two are of other text."""
    if compared is not None:
        return compared.value
    if not comparable(own.measured, base.measured):
        return None
    return mean(shared) if shared else mean(own.bits.values()) - mean(base.bits.values())


def _record(
    own: _Row, base: _Row, compared: Difference | None, shared: list[float], half: float | None
) -> dict[str, Any]:
    interval, few = own.over_documents
    record: dict[str, Any] = {"label": own.label, "seeds": len(own.bits)}
    record |= {key: getattr(own.measured, key) for key in ("documents", "documents_total")}
    record |= {key: getattr(own.measured, key) for key in ("bytes", "bytes_total", "text_sha256")}
    record |= {"few_documents": few, "bits_per_byte": round(mean(own.bits.values()), 6)}
    record |= {"sd": round(stdev(own.bits.values()), 6) if len(own.bits) > 1 else None}
    record |= _bounds("", interval)
    if own is base:
        return record
    value = _difference(own, base, compared, shared)
    record["difference"] = None if value is None else round(value, 6)
    record |= _bounds("difference_", None if compared is None else compared.interval)
    return record | {"difference_half_width_seeds": None if half is None else round(half, 6)}


def _bounds(prefix: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = (None, None) if interval is None else (round(bound, 6) for bound in interval)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _notes(rows: list[_Row], noise: SeedNoise | None) -> list[str]:
    kept = [own for row in rows for own in row.documents.values()]
    notes = [amount_note((row.label, row.measured) for row in rows) + " Lower is better."]
    if all(own is None for own in kept):
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
    if any(own is not None and own.few for own in kept):
        notes.append(FEW_NOTE)
    return notes
