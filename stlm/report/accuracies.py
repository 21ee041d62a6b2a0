"""Table 2: perplexity and zero-shot accuracy of our runs beside the paper's rows and the literature's."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from stlm.evaluation.statistics import Interval
from stlm.report.comparison import SIGN, Comparisons, mark, significant
from stlm.report.documents import FEW_NOTE, amount_note, interval_text
from stlm.report.last_word import word_perplexity
from stlm.report.names import benchmark_label, bounds, count, p_value, percent
from stlm.report.notes import accuracy_notes, items_scored, prefix_notes
from stlm.report.results import (
    BenchmarkResult,
    CheckpointResult,
    Proportion,
    PublishedResult,
    RunResult,
    run_label,
)
from stlm.report.table import Cell, Section, Table
from stlm.study.runs import Study


@dataclass(frozen=True)
class Reference:
    """A published row: whole percents by benchmark, as printed in `source`."""

    kind: str
    label: str
    parameters: str
    scores: dict[str, float]
    source: str


def read_references() -> tuple[list[str], list[Reference]]:
    """The benchmarks of the paper's table, in its order, and its rows (literature.csv)."""
    with Path(__file__).with_name("literature.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    benchmarks = [column for column in rows[0] if column not in ("kind", "label", "parameters", "source")]
    references = [
        Reference(
            row["kind"],
            row["label"],
            row["parameters"],
            {benchmark: float(row[benchmark]) for benchmark in benchmarks},
            row["source"],
        )
        for row in rows
    ]
    return benchmarks, references


def score(result: BenchmarkResult | None, mode: str, metric: str) -> Proportion | None:
    """The accuracy asked for, or None where the run has none."""
    if result is None or mode not in result.modes:
        return None
    return getattr(result.modes[mode], metric)


def main_mode(results: Mapping[str, RunResult]) -> str:
    """The mode that plots and metrics quote: harness, or paper where that is the only one scored."""
    modes = {mode for r in results.values() for b in r.last.benchmarks.values() for mode in b.modes}
    return "harness" if "harness" in modes or not modes else "paper"


def accuracy_tables(
    study: Study,
    results: Mapping[str, RunResult],
    comparisons: Comparisons,
    published: Mapping[str, PublishedResult] | None = None,
) -> list[Table]:
    """table2 (acc), and where the runs have them table2-acc-norm and table2-paper-mode.

    The main table is in harness mode, or in paper mode where that is the only one scored.
    """
    main = main_mode(results)
    table = _Table2(study, results, comparisons, published or {})
    tables = [table.build("table2", "Table 2", main, "acc", references=True)]
    normalized = any(score(b, main, "acc_norm") for r in results.values() for b in r.last.benchmarks.values())
    if normalized:
        tables.append(
            table.build("table2-acc-norm", "Table 2, length-normalized", main, "acc_norm", references=False)
        )
    if main != "paper" and any(
        "paper" in b.modes for r in results.values() for b in r.last.benchmarks.values()
    ):
        tables.append(
            table.build("table2-paper-mode", "Table 2, paper mode", "paper", "acc", references=True)
        )
    return tables


def _difference(difference: float, interval: Interval, sign: str) -> str:
    return f"{percent(difference, signed=True)}{sign} {bounds(*interval, signed=True)}"


def _difference_record(
    benchmark: str, difference: float, interval: Interval, p: float, adjusted: float | None
) -> dict[str, object]:
    record: dict[str, object] = {
        f"{benchmark}_difference": round(100 * difference, 3),
        f"{benchmark}_difference_low": round(100 * interval.low, 3),
        f"{benchmark}_difference_high": round(100 * interval.high, 3),
        f"{benchmark}_p": float(f"{p:.4g}"),
    }
    return record if adjusted is None else record | {f"{benchmark}_p_holm": float(f"{adjusted:.4g}")}


class _Table2:
    """What the variations of Table 2 have in common."""

    def __init__(
        self,
        study: Study,
        results: Mapping[str, RunResult],
        comparisons: Comparisons,
        published: Mapping[str, PublishedResult],
    ) -> None:
        self.study, self.results, self.comparisons = study, results, comparisons
        self.published = published
        self.paper_benchmarks, self.references = read_references()

    def build(self, name: str, title: str, mode: str, metric: str, references: bool) -> Table:
        own = [
            b
            for b in self._scored_benchmarks()
            if any(score(r.last.benchmarks.get(b), mode, metric) for r in self.results.values())
        ]
        # The main table keeps the paper's columns even where no run has them: its rows stand beside ours.
        paper = self.paper_benchmarks if references else [b for b in self.paper_benchmarks if b in own]
        benchmarks = paper + [b for b in own if b not in paper]
        rows: list[Sequence[Cell] | Section] = [Section(f"This study ({self.study.name})")]
        records: list[dict[str, object]] = []
        for runs in self._by_variant():
            for result in runs:
                self._add_run(result, benchmarks, mode, metric, rows, records)
            if len(runs) > 1:
                self._add_mean(runs, benchmarks, mode, metric, rows, records)
        if self.published:
            rows.append(Section("Published models, scored here"))
        for model in self.published.values():
            self._add_published(model, benchmarks, mode, metric, rows, records)
        if references:
            for kind, heading in (("paper", "The paper"), ("literature", "Literature")):
                self._add_references(kind, heading, benchmarks, rows, records)
        self._add_chance(benchmarks, rows, records)
        return Table(
            name=name,
            title=f"{title}. Zero-shot accuracy (%), {mode} mode, {metric}; study {self.study.name}",
            header=[
                "",
                "parameters",
                "bits per byte",
                "character perplexity",
                *(self._heading(b) for b in benchmarks),
            ],
            rows=rows,
            notes=[
                *accuracy_notes(self.study, self.results, self.comparisons, own, mode, metric, references),
                *self._text_notes(),
                *prefix_notes(self.published),
            ],
            records=records,
        )

    def _text_notes(self) -> list[str]:
        """How much text bits per byte and character perplexity are of."""
        rows = [(run_label(own, self.results), own.last.perplexity) for own in self.results.values()]
        rows += [(own.label, own.checkpoint.perplexity) for own in self.published.values()]
        notes = [amount_note(rows, "Bits per byte and character perplexity")]
        intervals = [text.interval for _, text in rows if text.interval is not None]
        if intervals:
            notes[0] += (
                " Below bits per byte: its 95% interval over documents; models of the same documents differ "
                "more surely than these overlap (table bits-per-byte)."
            )
        if any(interval.few_documents for interval in intervals):
            notes.append(FEW_NOTE)
        return notes

    def _scored_benchmarks(self) -> list[str]:
        scored = {b for r in self.results.values() for b in r.last.benchmarks}
        return [b for b in self.study.benchmarks if b in scored] + sorted(scored - set(self.study.benchmarks))

    def _by_variant(self) -> list[list[RunResult]]:
        variants: dict[str, list[RunResult]] = {}
        for result in self.results.values():
            variants.setdefault(result.train.variant, []).append(result)
        return list(variants.values())

    def _add_run(self, result: RunResult, benchmarks, mode, metric, rows, records) -> None:
        last = result.last
        label = run_label(result, self.results)
        record: dict[str, object] = {
            "kind": "run",
            "mode": mode,
            "metric": metric,
            "run": result.name,
            "label": label,
            "seed": result.train.seed,
            "parameters": result.train.parameters.total,
            "step": last.step,
        }
        cells = [Cell(label), Cell(count(result.train.parameters.total)), *_perplexities(last, record)]
        for benchmark in benchmarks:
            lines = _accuracy(last, benchmark, mode, metric, record)
            perplexity = word_perplexity(result, benchmark, mode)
            if perplexity is not None:
                record[f"{benchmark}_perplexity"] = round(perplexity, 4)
            point = self.comparisons.last(result.name, (benchmark, mode, metric))
            if point is None or point.paired is None:
                cells.append(Cell(lines[0]))
                continue
            paired, sign = point.paired, mark(point.paired)
            lines.append(_difference(paired.difference, paired.interval, sign))
            if paired.adjusted is not None:
                lines.append(p_value(paired.adjusted))
            record |= _difference_record(
                benchmark, paired.difference, paired.interval, paired.p, paired.adjusted
            )
            cells.append(Cell("\n".join(lines), bold_line=1 if sign == SIGN else None))
        rows.append(cells)
        records.append(record)

    def _add_mean(self, runs: list[RunResult], benchmarks, mode, metric, rows, records) -> None:
        train = runs[0].train
        label = f"{train.label}, mean of {len(runs)} seeds"
        bits = [r.last.perplexity.bits_per_byte for r in runs]
        perplexity = [r.last.perplexity.char_perplexity for r in runs]
        record: dict[str, object] = {
            "kind": "mean",
            "mode": mode,
            "metric": metric,
            "label": label,
            "parameters": train.parameters.total,
            "test_bits_per_byte": round(mean(bits), 4),
            "test_char_perplexity": round(mean(perplexity), 4),
        }
        cells = [
            Cell(label, bold=True),
            Cell(count(train.parameters.total)),
            Cell(f"{mean(bits):.3f}\n± {stdev(bits):.3f}"),
            Cell(f"{mean(perplexity):.3f}\n± {stdev(perplexity):.3f}"),
        ]
        for benchmark in benchmarks:
            own = self.comparisons.seeds.get(train.variant, {}).get((benchmark, mode, metric))
            if own is None:
                cells.append(Cell("–"))
                continue
            lines = [f"{percent(own.mean)} ± {percent(own.sd)}"]
            record |= {
                f"{benchmark}_percent": round(100 * own.mean, 3),
                f"{benchmark}_sd": round(100 * own.sd, 3),
            }
            sign = SIGN if significant(own.adjusted) else ""
            if own.test is not None:
                lines += [_difference(own.test.difference, own.test.interval, sign), p_value(own.adjusted)]
                record |= _difference_record(
                    benchmark, own.test.difference, own.test.interval, own.test.p, own.adjusted
                )
            cells.append(Cell("\n".join(lines), bold_line=1 if sign else None))
        rows.append(cells)
        records.append(record)

    def _add_published(self, model: PublishedResult, benchmarks, mode, metric, rows, records) -> None:
        record: dict[str, object] = {
            "kind": "published",
            "mode": mode,
            "metric": metric,
            "label": model.label,
            "parameters": model.parameters,
            "prefix": model.prefix,
        }
        cells = [
            Cell(model.label),
            Cell(model.parameters_shown or count(model.parameters)),
            *_perplexities(model.checkpoint, record),
        ]
        for benchmark in benchmarks:
            cells.append(Cell("\n".join(_accuracy(model.checkpoint, benchmark, mode, metric, record))))
        rows.append(cells)
        records.append(record)

    def _add_references(self, kind, heading, benchmarks, rows, records) -> None:
        chosen = [reference for reference in self.references if reference.kind == kind]
        rows.append(Section(f"{heading} ({chosen[0].source})"))
        for reference in chosen:
            cells = [Cell(reference.label), Cell(reference.parameters), Cell("–"), Cell("–")]
            cells += [Cell(f"{reference.scores[b]:g}" if b in reference.scores else "–") for b in benchmarks]
            rows.append(cells)
            scores = {f"{b}_percent": value for b, value in reference.scores.items() if b in benchmarks}
            records.append(
                {"kind": kind, "label": reference.label, "parameters": reference.parameters, **scores}
            )

    def _add_chance(self, benchmarks, rows, records) -> None:
        published = next(r.scores for r in self.references if r.kind == "chance")
        levels = {b: 100 * self.comparisons.chance[b] for b in benchmarks if b in self.comparisons.chance}
        levels |= {b: value for b, value in published.items() if b in benchmarks and b not in levels}
        rows.append(Section("Guessing"))
        shown = [f"{levels[b]:.1f}".removesuffix(".0") if b in levels else "–" for b in benchmarks]
        rows.append([Cell("chance"), Cell("–"), Cell("–"), Cell("–"), *map(Cell, shown)])
        records.append(
            {"kind": "chance", "label": "chance"} | {f"{b}_percent": round(v, 3) for b, v in levels.items()}
        )

    def _heading(self, benchmark: str) -> str:
        found = [
            r.last.benchmarks[benchmark] for r in self.results.values() if benchmark in r.last.benchmarks
        ]
        if not found:
            return benchmark_label(benchmark)
        versions = "/".join(dict.fromkeys(str(b.version) for b in found))
        return f"{benchmark_label(benchmark)}\nv{versions}, n = {items_scored(self.results, benchmark)}"


def _perplexities(checkpoint: CheckpointResult, record: dict[str, object]) -> list[Cell]:
    """Bits per byte and character perplexity of the test text, put into `record` too."""
    bits, characters = checkpoint.perplexity.bits_per_byte, checkpoint.perplexity.char_perplexity
    record |= {"test_bits_per_byte": round(bits, 4), "test_char_perplexity": round(characters, 4)}
    interval = checkpoint.perplexity.interval
    if interval is None:
        return [Cell(f"{bits:.3f}"), Cell(f"{characters:.3f}")]
    record |= {
        "test_bits_per_byte_low": round(interval.low, 4),
        "test_bits_per_byte_high": round(interval.high, 4),
    }
    over = interval_text(Interval(interval.low, interval.high), interval.few_documents)
    return [Cell(f"{bits:.3f}\n{over}"), Cell(f"{characters:.3f}")]


def _accuracy(
    checkpoint: CheckpointResult, benchmark: str, mode: str, metric: str, record: dict[str, object]
) -> list[str]:
    """An accuracy with its interval, the first line of a cell, put into `record` too; a dash for none."""
    accuracy = score(checkpoint.benchmarks.get(benchmark), mode, metric)
    if accuracy is None:
        return ["–"]
    record |= {
        f"{benchmark}_percent": round(100 * accuracy.value, 3),
        f"{benchmark}_low": round(100 * accuracy.low, 3),
        f"{benchmark}_high": round(100 * accuracy.high, 3),
        f"{benchmark}_n": accuracy.n,
    }
    return [f"{percent(accuracy.value)} {bounds(accuracy.low, accuracy.high)}"]
