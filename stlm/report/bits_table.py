"""Tables of bits per byte: their uncertainty over documents and seeds, and each component of a mix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import mean, stdev
from typing import NamedTuple

from stlm.evaluation.statistics import Interval, SeedNoise, seed_noise
from stlm.report.documents import (
    FEW_NOTE,
    Difference,
    TextScores,
    amount_note,
    comparable,
    compare,
    interval_text,
    mean_documents,
)
from stlm.report.names import bounds_record, difference_text, plural, rounded, seeds_label
from stlm.report.notes import noise_in_words, noise_note
from stlm.report.results import Results
from stlm.report.table import Cell, Section, Table

_bounds = partial(bounds_record, digits=6)


class _Compared(NamedTuple):
    """The difference from the baseline: over documents, and half of its interval over seeds."""

    value: float | None  # None where the two are of different text
    over_documents: Difference | None
    half: float | None

    @property
    def over_seeds(self) -> Interval | None:
        """The interval over seeds."""
        if self.half is None or self.value is None:
            return None
        return Interval(self.value - self.half, self.value + self.half)

    @property
    def certain(self) -> bool:
        """Whether all intervals that there are exclude zero, that over documents among them."""
        documents, seeds = self.over_documents and self.over_documents.interval, self.over_seeds
        intervals = [documents] if seeds is None else [documents, seeds]
        return all(interval is not None and not interval.low <= 0 <= interval.high for interval in intervals)


def bits_table(results: Results) -> Table:
    """A row a variant, the baseline first, and a row a published model.

    Raises UserError where documents.parquet is missing or disagrees with evaluation.json.
    """
    variants = {
        name: TextScores(
            runs[0].train.label,
            {run.train.seed: run.last for run in runs},
            {run.train.seed: run.documents() for run in runs},
        )
        for name, runs in results.variants.items()
    }
    models = {
        name: TextScores(model.label, {None: model.last}, {None: model.documents()})
        for name, model in results.published.items()
    }
    base_name, base = next(iter(variants.items()))
    noise = seed_noise({name: scores.bits for name, scores in variants.items()})

    def row(name: str | None, scores: TextScores) -> Iterator[tuple]:
        compared = None if scores is base else _compare(scores, base, noise, (name, base_name))
        return _columns(scores, compared, base.label)

    rows: list[Section | Iterator[tuple]] = [row(name, scores) for name, scores in variants.items()]
    if models:
        rows += [Section("Published models, scored here"), *(row(*model) for model in models.items())]
    labels = {name: scores.label for name, scores in variants.items()}
    return Table.of_columns(
        "bits-per-byte",
        f"Bits per byte of test text, study {results.study.name}",
        rows,
        _notes([*variants.values(), *models.values()], noise, labels),
    )


def _compare(
    scores: TextScores, base: TextScores, noise: SeedNoise | None, names: tuple[str, str]
) -> _Compared:
    difference, bits, base_bits = scores.compare(base), scores.bits, base.bits
    shared = [bits[seed] - base_bits[seed] for seed in bits if seed in base_bits]
    half = noise.half_width(shared, names) if noise and shared else None
    value = mean(shared) if shared else mean(bits.values()) - mean(base_bits.values())
    if difference is not None:
        value = difference.value
    elif not comparable(scores.text, base.text):
        value = None
    return _Compared(value, difference, half)


def _columns(scores: TextScores, compared: _Compared | None, baseline: str) -> Iterator[tuple]:
    values, text = list(scores.bits.values()), scores.text
    documents = mean_documents(list(scores.documents.values()))
    interval, few = (None, False) if documents is None else (documents.interval, documents.few)
    sd = stdev(values) if len(values) > 1 else None
    keys = ("documents", "documents_total", "bytes", "bytes_total", "text_sha256")
    record = {key: getattr(text, key) for key in keys} | {"few_documents": few}
    yield "", seeds_label(scores.label, len(values)), {"label": scores.label, "seeds": len(values)}
    yield "documents", "–" if text.documents is None else f"{text.documents:,}", record
    spread = "" if sd is None else f" ± {sd:.3f}"
    record = {"bits_per_byte": round(mean(values), 6), "sd": rounded(sd, 6)}
    yield "bits per byte", f"{mean(values):.3f}{spread}", record
    yield "interval over\ndocuments", interval_text(interval, few), _bounds(interval)
    cells, records = ["", "", ""], [{}, {}, {}]
    if compared is not None:
        over = compared.over_documents
        cells, half = ["other text", "–", "–"], rounded(compared.half, 6)
        records = [{"difference": rounded(compared.value, 6)}, _bounds(over and over.interval, "difference_")]
        records.append({"difference_half_width_seeds": half})
        if compared.value is not None:
            cells = [
                Cell(difference_text(compared.value), bold=compared.certain),
                interval_text(*over[1:], signed=True) if over else "–",
                interval_text(compared.over_seeds, signed=True),
            ]
    headers = (f"difference from\n{baseline}", "interval over\ndocuments", "interval over\nseeds")
    yield from zip(headers, cells, records, strict=True)


def _notes(rows: Sequence[TextScores], noise: SeedNoise | None, labels: dict[str, str]) -> list[str | None]:
    over_documents = (
        "Intervals over documents: 95%, whole documents resampled; of differences paired, since both "
        "models read the same documents. They say how far other documents of this corpus would move a "
        "figure, not another seed."
    )
    if all(documents is None for row in rows for documents in row.documents.values()):
        over_documents = (
            "No intervals over documents: evaluated by an earlier version of STLM (`stlm evaluate` again)."
        )
    over_seeds = ["One seed: how far another would move these figures is not known."]
    if noise is not None:
        over_seeds = [
            "±: standard deviation over seeds. Intervals over seeds: 95%, from the noise of the seeds of all "
            f"variants together ({noise_in_words(noise)}).",
            noise_note(noise, labels),
        ]
    return [
        amount_note((row.label, row.text) for row in rows) + " Lower is better.",
        over_documents,
        *over_seeds,
        "Bold: zero is outside of the interval over documents and, where there is one, outside of that over "
        "seeds; not adjusted for the number of differences.",
        FEW_NOTE if any(row.few for row in rows) else None,
    ]


def component_table(results: Results) -> Table | None:
    """A row a run, a column a component, with differences from the baseline; None without a mix."""
    bits: dict[str, dict[str, float]] = {}
    for name, run in results.items():
        parts = {"all": run.perplexity, **run.perplexity.components}
        bits[name] = {key: part.bits_per_byte for key, part in parts.items()} if len(parts) > 1 else {}
    components = list(dict.fromkeys(component for of_run in bits.values() for component in of_run))
    if len(components) < 2:
        return None
    base, base_bits = results.base, bits[results.base.name]
    documents = {name: run.documents() for name, run in results.items()}
    # Runs of another tokenizer or mix may lack a component: they cannot be its best.
    best = {key: min(of_run[key] for of_run in bits.values() if key in of_run) for key in components}
    sizes = {"all": base.perplexity, **base.perplexity.components}

    def columns(run: str) -> Iterator[tuple]:
        record = {component: round(value, 5) for component, value in bits[run].items()}
        yield "", results[run].label, {"run": run, "label": results[run].label, **record}
        for component in components:
            size = sizes[component].documents if component in sizes else None
            header = component.replace("_", " ") + (f"\n{plural(size, 'document')}" if size else "")
            value, record = bits[run].get(component), {}
            if value is None:
                yield header, "–", {}
                continue
            text = f"{value:.3f}"
            if run != base.name and component in base_bits:
                text += f"\n{difference_text(value - base_bits[component])}"
            pair = [one and one.of(component) for one in (documents[run], documents[base.name])]
            difference = None if run == base.name else compare(*pair)
            if difference is not None and difference.interval is not None:
                text += f"\n{interval_text(difference.interval, difference.few, signed=True)}"
                record = bounds_record(difference.interval, f"{component}_difference_", 5)
            yield header, Cell(text, bold_line=0 if value == best[component] else None), record

    return Table.of_columns(
        "components",
        f"Bits per byte on the test text of each component, study {results.study.name}",
        map(columns, results),
        [
            f"Below each: the difference from {base.train.label}, in brackets its 95% "
            "interval over documents, paired, where both kept the scores of their documents. Bold: the "
            "lowest of the column. `all` weighs the components by their test bytes. Another seed may move "
            "these figures by more than some of the differences.",
            amount_note(results.texts),
            FEW_NOTE if any(run is not None and run.few for run in documents.values()) else None,
        ],
    )
