"""Table 2: perplexity and zero-shot accuracy of our runs next to those of the paper and of the literature."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from stlm.report.comparison import FEWEST_SEEDS, SIGN, SIGN_ITEMS, Comparisons, Paired
from stlm.report.documents import FEW_NOTE, amount_note, interval_text
from stlm.report.names import (
    benchmark_label,
    bounds,
    bounds_record,
    count,
    listing,
    p_record,
    p_value,
    percent,
)
from stlm.report.notes import last_word_note
from stlm.report.results import PublishedResult, Results, RunResult, ScoredModel
from stlm.report.schema import BenchmarkResult, Perplexity
from stlm.report.table import Cell, Section, Table

# A cell, and the same for programs.
_Shown = tuple[Cell | str, dict[str, Any]]
_bounds = partial(bounds_record, digits=3, scale=100)
# Notes mention clustered intervals that are this many times as wide as Wilson's.
_MUCH_WIDER = 1.25
_METRICS = {
    "acc": "acc: the option of highest log-probability is the answer",
    "acc_norm": "acc_norm: log-probabilities are divided by the option's length in characters",
}
_MODES = {
    "harness": "harness mode: prompts and scored continuations of the reference evaluation harness",
    "paper": "paper mode: the summed log-probability of the whole string, context and option, not normalized",
}


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
    texts = ("kind", "label", "parameters", "source")
    benchmarks = [column for column in rows[0] if column not in texts]
    references = [
        Reference(**{key: row[key] for key in texts}, scores={b: float(row[b]) for b in benchmarks})
        for row in rows
    ]
    return benchmarks, references


def accuracy_tables(results: Results, comparisons: Comparisons) -> list[Table]:
    """table2 (acc), and where the runs have them table2-acc-norm and table2-paper-mode.

    The main table is in harness mode, or in paper mode where that is the only one scored.
    """
    main = results.mode
    scored = {score[1:] for result in results.values() for score in result.last.scores}
    tables = [_Table2(results, comparisons, main, "acc").table("table2", "Table 2")]
    if (main, "acc_norm") in scored:
        table = _Table2(results, comparisons, main, "acc_norm", references=False)
        tables.append(table.table("table2-acc-norm", "Table 2, length-normalized"))
    if main != "paper" and ("paper", "acc") in scored:
        table = _Table2(results, comparisons, "paper", "acc")
        tables.append(table.table("table2-paper-mode", "Table 2, paper mode"))
    return tables


@dataclass
class _Table2:
    """A variation of Table 2; `references`: with the rows of the paper and of the literature."""

    results: Results
    comparisons: Comparisons
    mode: str
    metric: str
    references: bool = True

    def __post_init__(self) -> None:
        # The main table keeps the paper's columns even where no run has them: they are listed with ours.
        paper, self.literature = read_references()
        ordered = self.results.study.benchmarks
        scores = [score for run in self.results.values() for score in run.last.scores]
        scored = {b for b, mode, metric in scores if (mode, metric) == self.mode_and_metric}
        self.scored = [b for b in ordered if b in scored] + sorted(scored - set(ordered))
        first = paper if self.references else [b for b in paper if b in self.scored]
        self.benchmarks = first + [b for b in self.scored if b not in first]

    @property
    def mode_and_metric(self) -> tuple[str, str]:
        """Mode and metric."""
        return self.mode, self.metric

    def table(self, name: str, title: str) -> Table:
        """All rows: runs by variant, published models, references, guessing."""
        study = self.results.study.name
        title = f"{title}. Zero-shot accuracy (%), {self.mode} mode, {self.metric}; study {study}"
        return Table.of_columns(name, title, list(self._rows()), _notes(self))

    def _rows(self) -> Iterator[Section | Iterator[tuple]]:
        yield Section(f"This study ({self.results.study.name})")
        for runs in self.results.variants.values():
            yield from map(self._run, runs)
            if len(runs) > 1:
                yield self._mean(runs)
        if self.results.published:
            yield Section("Published models, scored here")
            yield from map(self._published, self.results.published.values())
        chance = {name: 100 * level for name, level in self.comparisons.chance.items()}
        for kind, heading in (("paper", "The paper"), ("literature", "Literature"), ("chance", "Guessing")):
            rows = [row for row in self.literature if row.kind == kind]
            if kind == "chance":
                yield Section(heading)
                yield self._reference(rows[0], rows[0].scores | chance)
            elif self.references:
                yield Section(f"{heading} ({rows[0].source})")
                yield from (self._reference(row, row.scores) for row in rows)

    def _row(
        self,
        label: Cell | str,
        named: dict[str, Any],
        size: tuple[str, dict[str, Any]],
        perplexity: tuple[str, str, dict[str, Any]],
        score: Callable[[str], _Shown],
    ) -> Iterator[tuple]:
        """`score` gives the cell of a benchmark, and the same for programs."""
        bits, characters, record = perplexity
        yield "", label, named
        yield "parameters", *size
        yield "bits per byte", bits, record
        yield "character perplexity", characters, {}
        for benchmark in self.benchmarks:
            cell, scores = score(benchmark)
            yield self._heading(benchmark), cell, {f"{benchmark}_{key}": x for key, x in scores.items()}

    def _named(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "mode": self.mode, "metric": self.metric, **more}

    def _run(self, run: RunResult) -> Iterator[tuple]:
        def score(benchmark: str) -> _Shown:
            text, record = self._accuracy(run, benchmark)
            perplexity = run.word_perplexity(benchmark, self.mode)
            if perplexity is not None:
                record["perplexity"] = round(perplexity, 4)
            point = self.comparisons.last(run.name, (benchmark, *self.mode_and_metric))
            return _with_difference(text, record, point and point.paired)

        named = self._named("run", run=run.name, label=run.label, seed=run.train.seed)
        parameters = run.train.parameters.total
        size = count(parameters), {"parameters": parameters, "step": run.last.step}
        return self._row(run.label, named, size, _perplexity(run.perplexity), score)

    def _mean(self, runs: list[RunResult]) -> Iterator[tuple]:
        train, by_score = runs[0].train, self.comparisons.seeds.get(runs[0].train.variant, {})

        def score(benchmark: str) -> _Shown:
            scored = by_score.get((benchmark, *self.mode_and_metric))
            if scored is None:
                return "–", {}
            record = {"percent": round(100 * scored.mean, 3), "sd": round(100 * scored.sd, 3)}
            return _with_difference(f"{percent(scored.mean)} ± {percent(scored.sd)}", record, scored.test)

        texts, record = [], {}
        for figure in ("bits_per_byte", "char_perplexity"):
            values = [getattr(run.perplexity, figure) for run in runs]
            texts.append(f"{mean(values):.3f}\n± {stdev(values):.3f}")
            record[f"test_{figure}"] = round(mean(values), 4)
        label, parameters = f"{train.label}, mean of {len(runs)} seeds", train.parameters.total
        size = count(parameters), {"parameters": parameters}
        named = self._named("mean", label=label)
        return self._row(Cell(label, bold=True), named, size, (*texts, record), score)

    def _published(self, model: PublishedResult) -> Iterator[tuple]:
        record = {"parameters": model.parameters, "prefix": model.prefix}
        size = model.parameters_shown or count(model.parameters), record
        named, score = self._named("published", label=model.label), partial(self._accuracy, model)
        return self._row(model.label, named, size, _perplexity(model.perplexity), score)

    def _reference(self, row: Reference, levels: dict[str, float]) -> Iterator[tuple]:
        def score(benchmark: str) -> _Shown:
            if benchmark not in levels:
                return "–", {}
            level = levels[benchmark]
            # Printed figures as they were printed.
            text = f"{level:.1f}".removesuffix(".0") if row.kind == "chance" else f"{level:g}"
            return text, {"percent": round(level, 3)}

        size = row.parameters or "–", {"parameters": row.parameters or None}
        return self._row(row.label, {"kind": row.kind, "label": row.label}, size, ("–", "–", {}), score)

    def _accuracy(self, model: ScoredModel, benchmark: str) -> _Shown:
        """An accuracy with its interval; a dash for none."""
        accuracy = model.last.accuracy(benchmark, *self.mode_and_metric)
        if accuracy is None:
            return "–", {}
        record = {"percent": round(100 * accuracy.value, 3), **_bounds(accuracy.interval), "n": accuracy.n}
        return f"{percent(accuracy.value)} {bounds(*accuracy.interval)}", record

    def scored_on(self, benchmark: str) -> list[BenchmarkResult]:
        """What each run last scored on the benchmark, of the runs that were."""
        last = [run.last.benchmarks for run in self.results.values()]
        return [benchmarks[benchmark] for benchmarks in last if benchmark in benchmarks]

    def items_scored(self, benchmark: str) -> str:
        """The numbers of items that the runs were scored on, fewest to most."""
        sizes = sorted({scored.items for scored in self.scored_on(benchmark)})
        return "–".join(f"{size:,}" for size in (sizes if len(sizes) < 3 else [sizes[0], sizes[-1]]))

    def _heading(self, benchmark: str) -> str:
        versions = "/".join(dict.fromkeys(str(scored.version) for scored in self.scored_on(benchmark)))
        label = benchmark_label(benchmark)
        return f"{label}\nv{versions}, n = {self.items_scored(benchmark)}" if versions else label


def _notes(table: _Table2) -> list[str | None]:
    """How the figures are to be read, and what they assume."""
    results, mode = table.results, table.mode
    several = len(results.variants) < len(results)
    baseline = results.base.train.label + (" of the same seed" if several else "")
    reading = (
        f"{_MODES.get(mode, f'{mode} mode')}; {_METRICS.get(table.metric, table.metric)}; k options tied "
        "for the best count 1/k. After each accuracy: its 95% Wilson interval."
    )
    if tests := table.comparisons.tests.get(table.mode_and_metric, 0):
        reading += (
            f" Below it: the difference in points from {baseline} on the same items, its 95% bootstrap "
            f"interval, and the exact McNemar p-value, adjusted by Holm's method for the {tests} tests "
            f"of this table. Bold and {SIGN}: p < 0.05 after the adjustment. {SIGN_ITEMS}: so too, but "
            "with an interval that includes zero when whole groups of items (paradigms, subjects) are "
            "resampled: a difference on these groups, not shown for others like them. This is over "
            "items: it does not say how much another seed would change a run."
        )
    mean_rows = (
        "Mean rows: mean ± standard deviation over seeds. Where a variant shares "
        f"{FEWEST_SEEDS} seeds or more with the baseline, below it: the mean difference over those "
        "seeds, its 95% t interval, and the p-value of the paired t-test with seeds as units, "
        "adjusted alike; the variant's single runs then have no test of their own."
    )
    literature = (
        "The paper's and the literature's rows are whole percents as printed in the paper, which "
        "scores whole strings without length normalization: compare them with acc, first in paper "
        f"mode ({'table2-paper-mode' if mode == 'harness' else 'this table'})."
    )
    published = results.published.values()
    prefixes = [f"{model.label} {model.prefix}" for model in published if model.prefix is not None]
    starts = "published models: a text starts with a token, as params/ or else lm_eval has it"
    texts = [*results.texts, *((model.label, model.perplexity) for model in published)]
    amount = amount_note(texts, "Bits per byte and character perplexity")
    if any(text.interval is not None for _, text in texts):
        amount += (
            " Below bits per byte: its 95% interval over documents; models of the same documents differ "
            "more surely than these overlap (table bits-per-byte)."
        )
    return [
        reading,
        mean_rows if several else None,
        _group_note(table),
        "Bits per byte and character perplexity: test split of the run's corpus; they compare runs on "
        "one corpus, whatever their tokenizers.",
        last_word_note(results, mode),
        *_subset_notes(table),
        listing("Not scored alike", table.comparisons.disturbing),
        literature if table.references else None,
        amount,
        FEW_NOTE if any(text.few_documents for _, text in texts) else None,
        f"{starts}: {'; '.join(prefixes)}" if prefixes else None,
    ]


def _group_note(table: _Table2) -> str | None:
    """Benchmarks for which the Wilson interval is much too narrow for other groups of items."""
    wider = []
    for benchmark in table.scored:
        point = table.comparisons.last(table.results.base.name, (benchmark, *table.mode_and_metric))
        if point is None or point.accuracy.clustered is None:
            continue
        clustered, wilson = point.accuracy.clustered.half_width, point.accuracy.interval.half_width
        if clustered > _MUCH_WIDER * wilson:
            wider.append(
                f"{benchmark_label(benchmark)} ±{percent(clustered)} over {point.accuracy.groups} groups "
                f"instead of ±{percent(wilson)}"
            )
    return listing(
        "Wilson's interval is right for these groups of items; for others like them the cluster-robust "
        f"interval (statistics.csv) is much wider, for {table.results.base.train.label}",
        wider,
    )


def _subset_notes(table: _Table2) -> list[str | None]:
    """Notes about limits on items, and items that do not fit the context."""
    limited, truncated = [], []
    for benchmark in table.scored:
        label, scores = benchmark_label(benchmark), table.scored_on(benchmark)
        if any(scored.items < scored.items_total for scored in scores):
            total = max(scored.items_total for scored in scores)
            limited.append(f"{label} {table.items_scored(benchmark)} of {total:,}")
        modes = [scored.modes[table.mode] for scored in scores if table.mode in scored.modes]
        if cut := max((scored.truncated for scored in modes), default=0):
            truncated.append(f"{label} {cut:,}")
    seed = table.results.study.evaluation.limit_seed
    complete = "All items of every benchmark are scored (no limit on those that there are)."
    return [
        listing(f"Limited to a random subset of the items (seed {seed})", limited)
        or (complete if table.scored else None),
        listing(
            "Items with an option longer than the context, cut from the left (most of any run)", truncated
        ),
    ]


def _with_difference(text: str, record: dict[str, Any], test: Paired | None) -> _Shown:
    """A cell and its record with the difference from the baseline, if there is one."""
    if test is None:
        return text, record
    text += f"\n{percent(test.difference, signed=True)}{test.sign} {bounds(*test.interval, signed=True)}"
    record |= {"difference": round(100 * test.difference, 3), **_bounds(test.interval, "difference_")}
    record["p"] = p_record(test.p)
    if test.adjusted is not None:
        text += f"\n{p_value(test.adjusted)}"
        record["p_holm"] = p_record(test.adjusted)
    return Cell(text, bold_line=1 if test.sign == SIGN else None), record


def _perplexity(measured: Perplexity) -> tuple[str, str, dict[str, Any]]:
    """Bits per byte and character perplexity of the test text, and both for programs."""
    record = {f"test_{key}": round(getattr(measured, key), 4) for key in ("bits_per_byte", "char_perplexity")}
    bits = f"{measured.bits_per_byte:.3f}"
    if measured.over_documents is not None:
        record |= bounds_record(measured.over_documents, "test_bits_per_byte_", 4)
        bits += f"\n{interval_text(measured.over_documents, measured.few_documents)}"
    return bits, f"{measured.char_perplexity:.3f}", record
