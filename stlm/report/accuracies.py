"""Table 2: perplexity and zero-shot accuracy of our runs next to those of the paper and of the literature."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from stlm.evaluation.statistics import Interval, SeedTest
from stlm.report.comparison import SIGN, Comparisons, Paired, mark, significant
from stlm.report.documents import FEW_NOTE, amount_note, interval_text
from stlm.report.names import benchmark_label, bounds, bounds_record, count, p_record, p_value, percent
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

# Rows of the literature, for which mode and metric are not known.
_NOT_SCORED = ("paper", "literature")


@dataclass(frozen=True)
class Reference:
    """A row from the literature: percents by benchmark, as printed in `source`."""

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
            *(row[key] for key in ("kind", "label", "parameters")),
            {benchmark: float(row[benchmark]) for benchmark in benchmarks},
            row["source"],
        )
        for row in rows
    ]
    return benchmarks, references


def score(result: BenchmarkResult | None, mode: str, metric: str) -> Proportion | None:
    """The accuracy in `mode` by `metric` (acc or acc_norm); None where it was not scored."""
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
    scored = [benchmark for result in results.values() for benchmark in result.last.benchmarks.values()]
    wanted = [("table2", "Table 2", main, "acc", True)]
    if any(score(benchmark, main, "acc_norm") for benchmark in scored):
        wanted.append(("table2-acc-norm", "Table 2, length-normalized", main, "acc_norm", False))
    if main != "paper" and any("paper" in benchmark.modes for benchmark in scored):
        wanted.append(("table2-paper-mode", "Table 2, paper mode", "paper", "acc", True))
    return [
        _Table2(study, results, comparisons, published or {}, mode, metric, references).table(name, title)
        for name, title, mode, metric, references in wanted
    ]


class _Table2:
    """One of the variations of Table 2 while its rows are collected.

    `references`: whether it has the rows of the paper and of the literature.
    """

    def __init__(
        self,
        study: Study,
        results: Mapping[str, RunResult],
        comparisons: Comparisons,
        published: Mapping[str, PublishedResult],
        mode: str,
        metric: str,
        references: bool,
    ) -> None:
        self.study, self.results, self.comparisons, self.published = study, results, comparisons, published
        self.mode, self.metric, self.with_references = mode, metric, references
        paper, self.references = read_references()
        self.scored = [
            b
            for b in _in_order(study, results)
            if any(score(r.last.benchmarks.get(b), mode, metric) for r in results.values())
        ]
        # The main table keeps the paper's columns even where no run has them: they are listed with ours.
        first = paper if references else [b for b in paper if b in self.scored]
        self.benchmarks = first + [b for b in self.scored if b not in first]
        self.rows: list[Sequence[Cell] | Section] = []
        self.records: list[dict[str, Any]] = []

    def table(self, name: str, title: str) -> Table:
        """All rows: runs by variant, published models, references, guessing."""
        self.rows.append(Section(f"This study ({self.study.name})"))
        variants: dict[str, list[RunResult]] = {}
        for result in self.results.values():
            variants.setdefault(result.train.variant, []).append(result)
        for runs in variants.values():
            for result in runs:
                self._add_run(result)
            if len(runs) > 1:
                self._add_mean(runs)
        if self.published:
            self.rows.append(Section("Published models, scored here"))
        for model in self.published.values():
            self._add_published(model)
        if self.with_references:
            for kind, heading in (("paper", "The paper"), ("literature", "Literature")):
                self._add_references(kind, heading)
        self._add_chance()
        header = ["", "parameters", "bits per byte", "character perplexity"]
        return Table(
            name=name,
            title=f"{title}. Zero-shot accuracy (%), {self.mode} mode, {self.metric}; "
            f"study {self.study.name}",
            header=[*header, *map(self._heading, self.benchmarks)],
            rows=self.rows,
            notes=[
                *accuracy_notes(
                    *(self.study, self.results, self.comparisons, self.scored),
                    *(self.mode, self.metric, self.with_references),
                ),
                *self._text_notes(),
                *prefix_notes(self.published),
            ],
            records=self.records,
        )

    def _add(self, kind: str, cell: Cell, size: tuple[Any, str], **more: Any) -> dict[str, Any]:
        """Begin a row with its label and its number of parameters as recorded and as shown; its record."""
        self.rows.append([cell, Cell(size[1])])
        record = {"kind": kind} | ({} if kind in _NOT_SCORED else {"mode": self.mode, "metric": self.metric})
        self.records.append(record | more | {"parameters": size[0]})
        return self.records[-1]

    def _add_run(self, result: RunResult) -> None:
        label, size = run_label(result, self.results), result.train.parameters.total
        named = {"run": result.name, "label": label, "seed": result.train.seed}
        record = self._add("run", Cell(label), (size, count(size)), **named)
        record["step"] = result.last.step
        cells = _perplexities(result.last, record)
        for benchmark in self.benchmarks:
            lines = self._accuracy(result.last, benchmark, record)
            perplexity = result.word_perplexity(benchmark, self.mode)
            if perplexity is not None:
                record[f"{benchmark}_perplexity"] = round(perplexity, 4)
            point = self.comparisons.last(result.name, (benchmark, self.mode, self.metric))
            paired = None if point is None else point.paired
            sign = "" if paired is None else mark(paired)
            if paired is not None:
                lines += _difference(benchmark, paired, sign, paired.adjusted, record)
            cells.append(Cell("\n".join(lines), bold_line=1 if sign == SIGN else None))
        self.rows[-1] += cells

    def _add_mean(self, runs: list[RunResult]) -> None:
        train = runs[0].train
        label, size = f"{train.label}, mean of {len(runs)} seeds", train.parameters.total
        record = self._add("mean", Cell(label, bold=True), (size, count(size)), label=label)
        cells = []
        for figure in ("bits_per_byte", "char_perplexity"):
            values = [getattr(run.last.perplexity, figure) for run in runs]
            record[f"test_{figure}"] = round(mean(values), 4)
            cells.append(Cell(f"{mean(values):.3f}\n± {stdev(values):.3f}"))
        for benchmark in self.benchmarks:
            key = (benchmark, self.mode, self.metric)
            over_seeds = self.comparisons.seeds.get(train.variant, {}).get(key)
            if over_seeds is None:
                cells.append(Cell("–"))
                continue
            lines = [f"{percent(over_seeds.mean)} ± {percent(over_seeds.sd)}"]
            record[f"{benchmark}_percent"] = round(100 * over_seeds.mean, 3)
            record[f"{benchmark}_sd"] = round(100 * over_seeds.sd, 3)
            sign = SIGN if significant(over_seeds.adjusted) else ""
            if over_seeds.test is not None:
                lines += _difference(benchmark, over_seeds.test, sign, over_seeds.adjusted, record)
            cells.append(Cell("\n".join(lines), bold_line=1 if sign else None))
        self.rows[-1] += cells

    def _add_published(self, model: PublishedResult) -> None:
        size = (model.parameters, model.parameters_shown or count(model.parameters))
        record = self._add("published", Cell(model.label), size, label=model.label)
        record["prefix"] = model.prefix
        self.rows[-1] += _perplexities(model.checkpoint, record)
        for benchmark in self.benchmarks:
            self.rows[-1].append(Cell("\n".join(self._accuracy(model.checkpoint, benchmark, record))))

    def _add_references(self, kind: str, heading: str) -> None:
        chosen = [reference for reference in self.references if reference.kind == kind]
        self.rows.append(Section(f"{heading} ({chosen[0].source})"))
        for reference in chosen:
            record = self._add(
                kind,
                Cell(reference.label),
                (reference.parameters, reference.parameters),
                label=reference.label,
            )
            record |= {f"{b}_percent": value for b, value in reference.scores.items() if b in self.benchmarks}
            shown = [f"{reference.scores[b]:g}" if b in reference.scores else "–" for b in self.benchmarks]
            self.rows[-1] += map(Cell, ["–", "–", *shown])

    def _add_chance(self) -> None:
        levels = {b: 100 * level for b, level in self.comparisons.chance.items() if b in self.benchmarks}
        published = next(r.scores for r in self.references if r.kind == "chance")
        levels = {b: levels.get(b, published.get(b)) for b in self.benchmarks}
        self.rows.append(Section("Guessing"))
        shown = ["–" if level is None else f"{level:.1f}".removesuffix(".0") for level in levels.values()]
        self.rows.append([*map(Cell, ["chance", "–", "–", "–", *shown])])
        known = {f"{b}_percent": round(level, 3) for b, level in levels.items() if level is not None}
        self.records.append({"kind": "chance", "label": "chance"} | known)

    def _accuracy(self, checkpoint: CheckpointResult, benchmark: str, record: dict[str, Any]) -> list[str]:
        """An accuracy with its interval, the first line of a cell, put into `record` too; a dash for none."""
        accuracy = score(checkpoint.benchmarks.get(benchmark), self.mode, self.metric)
        if accuracy is None:
            return ["–"]
        record[f"{benchmark}_percent"] = round(100 * accuracy.value, 3)
        record |= bounds_record(accuracy.interval, f"{benchmark}_", 3, 100) | {f"{benchmark}_n": accuracy.n}
        return [f"{percent(accuracy.value)} {bounds(*accuracy.interval)}"]

    def _heading(self, benchmark: str) -> str:
        found = [r.last.benchmarks.get(benchmark) for r in self.results.values()]
        versions = "/".join(dict.fromkeys(str(scored.version) for scored in found if scored is not None))
        label = benchmark_label(benchmark)
        return f"{label}\nv{versions}, n = {items_scored(self.results, benchmark)}" if versions else label

    def _text_notes(self) -> list[str]:
        """How much text bits per byte and character perplexity are measured on."""
        rows = [(run_label(result, self.results), result.last.perplexity) for result in self.results.values()]
        rows += [(model.label, model.checkpoint.perplexity) for model in self.published.values()]
        notes = [amount_note(rows, "Bits per byte and character perplexity")]
        intervals = [text.interval for _, text in rows if text.interval is not None]
        if intervals:
            notes[0] += (
                " Below bits per byte: its 95% interval over documents; models of the same documents differ "
                "more surely than these overlap (table bits-per-byte)."
            )
        return notes + ([FEW_NOTE] if any(interval.few_documents for interval in intervals) else [])


def _in_order(study: Study, results: Mapping[str, RunResult]) -> list[str]:
    """The benchmarks that any run was scored on, in the study's order."""
    scored = {b for r in results.values() for b in r.last.benchmarks}
    return [b for b in study.benchmarks if b in scored] + sorted(scored - set(study.benchmarks))


def _difference(
    benchmark: str, test: Paired | SeedTest, sign: str, adjusted: float | None, record: dict[str, Any]
) -> list[str]:
    """The lines of a cell that compare with the baseline, put into `record` too."""
    record[f"{benchmark}_difference"] = round(100 * test.difference, 3)
    record |= bounds_record(test.interval, f"{benchmark}_difference_", 3, 100)
    record[f"{benchmark}_p"] = p_record(test.p)
    lines = [f"{percent(test.difference, signed=True)}{sign} {bounds(*test.interval, signed=True)}"]
    if adjusted is None:
        return lines
    record[f"{benchmark}_p_holm"] = p_record(adjusted)
    return [*lines, p_value(adjusted)]


def _perplexities(checkpoint: CheckpointResult, record: dict[str, Any]) -> list[Cell]:
    """Bits per byte and character perplexity of the test text, put into `record` too."""
    measured = checkpoint.perplexity
    record["test_bits_per_byte"] = round(measured.bits_per_byte, 4)
    record["test_char_perplexity"] = round(measured.char_perplexity, 4)
    bits, characters = f"{measured.bits_per_byte:.3f}", f"{measured.char_perplexity:.3f}"
    if measured.interval is not None:
        over = Interval(measured.interval.low, measured.interval.high)
        record |= bounds_record(over, "test_bits_per_byte_", 4)
        bits += f"\n{interval_text(over, measured.interval.few_documents)}"
    return [Cell(bits), Cell(characters)]
